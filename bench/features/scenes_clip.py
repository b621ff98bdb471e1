"""A small CLIP for `scenes`: features of the protocol `scenes-geneval`, and its CLIP score.

Two towers trained contrastively (Radford et al., arXiv:2103.00020). Each image is compared with the
captions of the others in its batch and, as these seldom differ in one word only, with its own
caption with one thing wrong (NegCLIP; Yuksekgonul et al., arXiv:2210.01936).
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.features.extraction import embed
from bench.features.small import SceneNetwork, TrainingStep, fit_network
from dimo.data.scenes import SIDE, batch
from dimo.data.scenes.prompts import BACKGROUNDS, COLORS, NUMBERS, SHAPES, SIZES, plural, prompts
from dimo.errors import DimoError
from dimo.models.scenes import SceneWords
from dimo.rng import uniform
from dimo.weights.catalog import ASSETS
from dimo.weights.files import load_state_dict

_CELLS = 8  # along each side of the last maps
_CHANNELS = 96  # of the last maps
_PAIRS = 128  # features of a pair of words
_WAVES = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))  # half periods along y and x
_HIGHEST_SCALE = 100.0  # of logits, as CLIP's
_OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above"}
_GROUPS = (  # words of which one stands for another in a wrong caption
    ("color", COLORS),
    ("number", tuple(NUMBERS.values())),
    ("shape", SHAPES),
    ("shape", tuple(plural(shape) for shape in SHAPES)),
    ("size", SIZES),
    ("background", BACKGROUNDS),
)


def _waves() -> Tensor:
    """Initial weights of the sums over places: float32 [6, 8, 8], low frequencies of a cosine."""
    places = (torch.arange(_CELLS) + 0.5) * math.pi / _CELLS
    waves = [torch.outer((y * places).cos(), (x * places).cos()) for y, x in _WAVES]
    return torch.stack(waves) / _CELLS


class SceneCLIP(nn.Module):
    """uint8 images [B, 3, 32, 32] -> `features` float32 [B, 64]; images and texts -> embeddings.

    The image tower processes each cell of its last maps on its own and sums over the cells with
    several learned weights, so that it knows what is where; the text tower sums over pairs of
    neighbouring words: "red circle", "circle above".
    """

    feature_dim = 64

    def __init__(self) -> None:
        super().__init__()
        same = SceneNetwork()
        self.fine, self.coarse = same.fine, same.coarse
        first, second = nn.Conv2d(48 + 64, _CHANNELS, 1), nn.Conv2d(_CHANNELS, _CHANNELS, 1)
        self.cells = nn.Sequential(first, nn.GELU(), second, nn.GELU())
        self.views = nn.Parameter(_waves())
        self.norm = nn.LayerNorm(len(_WAVES) * _CHANNELS)
        self.seen = nn.Linear(len(_WAVES) * _CHANNELS, self.feature_dim)
        self.bent = nn.Linear(self.feature_dim, self.feature_dim)
        self.pairs = nn.Conv1d(SceneWords.width, _PAIRS, 2)
        self.project_text = nn.Sequential(nn.LayerNorm(_PAIRS), nn.Linear(_PAIRS, self.feature_dim))
        # a pair is two of many words: PyTorch's weights are too small for GELU to bind them
        nn.init.normal_(self.pairs.weight)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.fine(images.float() / 127.5 - 1)  # [B, 48, 16, 16]
        both = torch.cat([F.avg_pool2d(fine, 2), self.coarse(fine)], dim=1)
        maps = self.cells(both)  # [B, C, 8, 8]
        views = torch.einsum("bcyx,vyx->bvc", maps, self.views)
        seen = self.seen(self.norm(views.flatten(1)))
        return {"features": seen + self.bent(F.gelu(seen))}

    def embed_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, 32, 32] -> float32 [B, 64] of length one."""
        return F.normalize(self(images)["features"], dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> float32 [B, 64] of length one.

        Raises: DimoError: A word that is none of the data set's, or too many of them.
        """
        words = SceneWords()(texts).states.to(self.log_scale.device)  # [B, 8, W], one-hot
        pairs = F.gelu(self.pairs(words.mT)).sum(dim=2)  # [B, _PAIRS]
        return F.normalize(self.project_text(pairs), dim=1)

    @torch.inference_mode()
    def images(self, images: Iterable[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Images uint8 [32, 32, 3] -> embeddings of length one, float32 [N, 64].

        Raises: DimoError: An image of another size.
        """
        return embed(images, lambda part: self.embed_images(self._batch(part)))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Texts -> embeddings of length one, float32 [N, 64]; errors as `embed_texts`."""
        return embed(texts, self.embed_texts)

    def _batch(self, pixels: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        for height, width, _ in (image.shape for image in pixels):
            if (height, width) != (SIDE, SIDE):
                raise DimoError(
                    f"the CLIP of scenes takes images of {SIDE} x {SIDE}, not {height} x {width}; "
                    "give the pictures as they were made"
                )
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(self.log_scale.device)


def load_scene_clip(weights: Path, resize: str = "") -> SceneCLIP:
    """Both towers with the weights of a file; images are never resized.

    Raises: DimoError: Unreadable file, or weights of another network.
    """
    network = SceneCLIP()
    load_state_dict(network, weights)
    return network.eval()


def wrong_captions(text: str) -> dict[str, list[str]]:
    """A caption with one thing wrong, by kind of fault; no image of `text` shows any of them."""
    words = text.split()
    faults: dict[str, list[str]] = {}

    def put(kind: str, *changes: tuple[int, str]) -> None:
        other = [*words]
        for place, word in changes:
            other[place] = word
        faults.setdefault(kind, []).append(_with_articles(" ".join(other)))

    colored = [place for place, word in enumerate(words) if word in COLORS]
    if len(colored) == 2:
        first, second = colored
        put("colors swapped", (first, words[second]), (second, words[first]))
    for place, word in enumerate(words):
        if word in _OPPOSITES:
            put("relation", (place, _OPPOSITES[word]))
        for kind, group in _GROUPS:
            for other in group if word in group else ():
                if other not in words:
                    put(kind, (place, other))
    return faults


def contrastive_loss(
    clip: SceneCLIP, images: Tensor, captions: Sequence[str], wrong: Sequence[Sequence[str]]
) -> Tensor:
    """Cross-entropy of captions given images, of images given captions, and of own captions.

    Every caption that reads as an image's own is right for it, wherever in the batch it stands.

    Args:
        images: uint8 [B, 3, 32, 32].
        captions: B texts, row i of image i.
        wrong: B lists of wrong captions of image i; they compete for every image, and once
            more with image i's own caption only, which most of them are close to.
    """
    texts = [*captions, *(other for others in wrong for other in others)]  # B + W
    count = len(captions)
    picture = [*range(count), *(row for row, others in enumerate(wrong) for _ in others)]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    number = torch.tensor([numbers[text] for text in texts])
    right = (number[:count, None] == number).float()  # [B, B + W]
    logits = clip.embed_images(images) @ clip.embed_texts(texts).T
    logits = logits * clip.log_scale.exp().clamp(max=_HIGHEST_SCALE)
    of_texts = F.cross_entropy(logits, right / right.sum(dim=1, keepdim=True))
    among = right[:, :count]
    of_images = F.cross_entropy(logits[:, :count].T, among / among.sum(dim=1, keepdim=True))
    foreign = torch.arange(count)[:, None] != torch.tensor(picture)
    of_own = F.cross_entropy(logits.masked_fill(foreign, -math.inf), torch.arange(count))
    return (of_texts + of_images) / 2 + of_own


def train_scene_clip(
    *,
    steps: int,
    batch_size: int,
    learning_rate: Callable[[int], float],
    weight_decay: float,
    seed: int,
    on_step: TrainingStep | None = None,
) -> SceneCLIP:
    """Trains on images of the training prompts, each with wrong captions of every kind too.

    The convolutions start from those of the shipped detector, which know the shapes. No caption of
    a held-out prompt is seen, not even as a wrong one. Arguments as of `train_digits_cnn`.
    """
    torch.manual_seed(seed)
    clip = SceneCLIP().train()
    detector = SceneNetwork()
    load_state_dict(detector, ASSETS / "scenes-detector.safetensors")
    clip.fine.load_state_dict(detector.fine.state_dict())
    clip.coarse.load_state_dict(detector.coarse.state_dict())
    texts = [prompt.text for prompt in prompts("train")]

    def loss_at(step: int) -> Tensor:
        index = torch.arange(step * batch_size, (step + 1) * batch_size)
        images, numbers = batch(seed, index, "train", free=True)
        captions = [texts[number] for number in numbers.tolist()]
        u = uniform(seed, index, "scenes-clip/wrong", ()).tolist()
        wrong = [_drawn(text, v) for text, v in zip(captions, u, strict=True)]
        return contrastive_loss(clip, images, captions, wrong)

    fit_network(
        clip,
        loss_at,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        on_step=on_step,
    )
    return clip.eval()


def _drawn(text: str, u: float) -> list[str]:
    """One wrong caption of each kind, none of which is that of a held-out prompt."""
    held_out = _held_out_texts()
    kinds = (
        [other for other in others if other not in held_out]
        for others in wrong_captions(text).values()
    )
    return [others[int(u * len(others))] for others in kinds if others]


@functools.cache
def _held_out_texts() -> frozenset[str]:
    return frozenset(prompt.text for prompt in prompts("held-out"))


def _with_articles(text: str) -> str:
    """The text with "a" and "an" corrected."""
    return re.sub(r"\ban?\b(?= (\w))", lambda m: "an" if m[1] in "aeiou" else "a", text)
