"""Training data of `scenes`: trains the tokenizer and encodes the pictures."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dimo import rng
from dimo.data import scenes
from dimo.models.scenes import SceneTokenizer
from dimo.weights.files import state_sha256

_BATCH = 32
_LEARNING_RATE = 2e-3
_CONTINUOUS = 0.25  # fraction of the steps before the codebook is introduced
_REVIVED_UNTIL = 0.8  # fraction of the steps in which unused codebook vectors are moved
_REVIVED_EVERY = 50  # steps
_DECAY = 0.98  # of the moving averages of the codebook
_COMMITMENT = 0.25  # weight of the commitment loss
_OBJECTS = 4.0  # additional loss weight of an object's pixels and their neighbours
_DISTURBED = 0.2  # highest fraction of replaced vectors of a picture; uniform from 0
_GATHERED = 16  # batches of latents for the initial k-means
_LLOYD = 8  # k-means iterations


def fit_tokenizer(
    *, codebook_size: int, steps: int, seed: int, on_step: Callable[[int], None] | None = None
) -> SceneTokenizer:
    """Trains a VQ autoencoder (van den Oord et al., arXiv 1711.00937) on the training split.

    The codebook starts from k-means of the latents and then follows their moving averages.
    `on_step` gets the number of completed steps.
    """
    torch.manual_seed(rng.stream_seed(seed, "tokenizer/weights"))
    seed = rng.stream_seed(seed, "tokenizer/pictures")
    tokenizer = SceneTokenizer(codebook_size).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), weight_decay=1e-4)
    codebook = tokenizer.quantize.embedding.weight.requires_grad_(False)
    first = int(_CONTINUOUS * steps)
    counts, sums = torch.ones(codebook_size), torch.zeros_like(codebook)
    for step in range(steps):
        if step == first:
            codebook.copy_(_means(_latents(tokenizer, seed, steps), codebook_size, seed))
            sums.copy_(codebook)
        images, weight = _pictures(seed, step)
        z = tokenizer.latents(images)  # [B, D, 8, 8]
        vectors, commitment = z, z.new_zeros(())
        if step >= first:
            tokens, nearest = _nearest(z, codebook)
            vectors = _disturbed(z + (nearest - z).detach(), seed, step)
            commitment = F.mse_loss(z, nearest)
            _follow(codebook, counts, sums, z.detach(), tokens)
            if step < _REVIVED_UNTIL * steps and step % _REVIVED_EVERY == 0:
                _revive(codebook, counts, sums, z.detach(), seed, step)
        error = tokenizer.decoder(tokenizer.post_quant_conv(vectors)) - images
        loss = (weight * (error.abs() + error.square())).mean() + _COMMITMENT * commitment
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(step + 1)
    return tokenizer.requires_grad_(False).eval()


class SceneTokens:
    """Captioned pictures as tokens, rendered on demand; a `dimo.zoo.bundled.TrainingData`."""

    def __init__(self, tokenizer: SceneTokenizer) -> None:
        self.tokenizer = tokenizer
        self.sha256 = state_sha256(tokenizer.state_dict())

    def __call__(self, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, 64] and caption indices int64 [B] of images `index`."""
        images, prompt = scenes.batch(seed, index.cpu(), "train")
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            tokens = self.tokenizer.encode(images)
        return tokens.to(index.device), prompt.to(index.device)


def _pictures(seed: int, number: int) -> tuple[Tensor, Tensor]:
    """Batch `number`: float32 [B, 3, 32, 32] in [-1, 1], and loss weights [B, 1, 32, 32], mean 1.

    Without the weights most codebook vectors would represent shades of the background.
    """
    index = torch.arange(number * _BATCH, (number + 1) * _BATCH)
    drawn = scenes.draw(seed, index, "train")
    covered = drawn.coverage.amax(dim=1, keepdim=True)
    weight = 1 + _OBJECTS * F.max_pool2d(covered, 3, stride=1, padding=1)
    return drawn.images / 127.5 - 1, weight / weight.mean()


@torch.no_grad()
def _latents(tokenizer: SceneTokenizer, seed: int, start: int) -> Tensor:
    """Latents [N, D] of the pictures after batch `start`."""
    batches = range(start, start + _GATHERED)
    return torch.cat([_rows(tokenizer.latents(_pictures(seed, i)[0])) for i in batches])


def _means(points: Tensor, count: int, seed: int) -> Tensor:
    """k-means of points [N, D] from random initial points: [count, D]."""
    order = rng.random_ranks(seed, torch.zeros(1, dtype=torch.int64), "k-means", len(points))[0]
    means = points[order[:count]].clone()
    for _ in range(_LLOYD):
        tokens = _distances(points, means).argmin(1)
        sizes = torch.bincount(tokens, minlength=count)
        sums = torch.zeros_like(means).index_add_(0, tokens, points)
        means = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], means)
    return means


def _distances(points: Tensor, vectors: Tensor) -> Tensor:
    """Squared distances without the points' squared norms: [N, V]."""
    return vectors.square().sum(1) - 2 * points @ vectors.T


def _rows(z: Tensor) -> Tensor:
    """[B, D, h, w] -> [B * h * w, D]."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def _nearest(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B * h * w] and their vectors [B, D, h, w]."""
    tokens = _distances(_rows(z.detach()), codebook).argmin(1)
    nearest = codebook[tokens].view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
    return tokens, nearest


def _disturbed(vectors: Tensor, seed: int, step: int) -> Tensor:
    """Replaces random vectors [B, D, h, w] by others of the batch.

    It teaches the decoder to correct a generator's wrong tokens.
    """
    batch, _, height, width = vectors.shape
    seed = rng.stream_seed(seed, "disturbed")
    index = torch.arange(step * batch, (step + 1) * batch)
    rate = _DISTURBED * rng.uniform(seed, index, "rate", ()).float()
    chosen = rng.uniform(seed, index, "place", (height * width,)) < rate[:, None]
    rows = _rows(vectors)
    order = rng.random_ranks(seed, torch.tensor([step]), "other", len(rows))[0]
    other = rows[order].view(batch, height, width, -1).permute(0, 3, 1, 2)
    return torch.where(chosen.view(batch, 1, height, width), other.detach(), vectors)


def _follow(codebook: Tensor, counts: Tensor, sums: Tensor, z: Tensor, tokens: Tensor) -> None:
    """Updates the moving averages of the codebook in place."""
    taken = torch.bincount(tokens, minlength=len(codebook))
    counts.lerp_(taken.to(counts.dtype), 1 - _DECAY)
    sums.lerp_(torch.zeros_like(sums).index_add_(0, tokens, _rows(z)), 1 - _DECAY)
    used = counts > 1e-3
    codebook[used] = sums[used] / counts[used, None]


def _revive(
    codebook: Tensor, counts: Tensor, sums: Tensor, z: Tensor, seed: int, step: int
) -> None:
    """Moves rarely used vectors to random latents, in place."""
    rows = _rows(z)
    unused = (counts < 0.05 * counts.mean()).nonzero()[: len(rows), 0]
    order = rng.random_ranks(seed, torch.tensor([step]), "revived", len(rows))[0]
    codebook[unused] = rows[order[: len(unused)]]
    counts[unused] = counts.mean()
    sums[unused] = codebook[unused] * counts[unused, None]
