"""Training of teachers and of the bundled feature extractors from their data."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor

from dimo import rng
from dimo.engine.distributed import Runtime
from dimo.masking import MASK_SCHEDULES, mask_count, mask_ratio, random_mask
from dimo.methods.base import Optimization, Task, add_mean, check, known
from dimo.models import MaskedModel
from dimo.models.maskgit import SIZES, block_matrices


@dataclass(frozen=True, kw_only=True)
class TrainRecipe(Optimization):
    """Training of a teacher: masked cross-entropy, label dropout, EMA."""

    kind: ClassVar[str] = "train"
    teacher: str = ""  # a row of `dimo.zoo.teachers` with bundled data
    size: str = ""  # in place of a teacher: of a new network on given data; tiny, small, base
    optimizer: str = "adamw"  # or muon for the matrices of the blocks, and AdamW for the rest
    mask_schedule: str = "arccos"  # arccos, cosine, linear, square or mage
    label_smoothing: float = 0.0  # of the cross-entropy
    label_dropout: float = 0.1  # fraction of images without their label
    dropout: float = 0.1  # in the blocks
    tokenizer_steps: int = 0  # to train the tokenizer first, if it is a network

    def __post_init__(self) -> None:
        super().__post_init__()
        either = bool(self.teacher) != bool(self.size)
        check(either, "size", self.size, "either a size, or a teacher with bundled data")
        known("size", self.size, (*SIZES, ""))
        known("optimizer", self.optimizer, ("adamw", "muon"))
        check(self.tokenizer_steps >= 0, "tokenizer_steps", self.tokenizer_steps, ">= 0")
        for key in ("label_smoothing", "label_dropout", "dropout"):
            check(0 <= getattr(self, key) < 1, key, getattr(self, key), "0 <= x < 1")
        known("mask schedule", self.mask_schedule, MASK_SCHEDULES)


@dataclass(frozen=True, kw_only=True)
class ExtractorRecipe(Optimization):
    """Training of a bundled feature extractor."""

    kind: ClassVar[str] = "extractor"
    extractor: str  # digits-cnn, scenes-detector or scenes-clip
    label_smoothing: float = 0.1  # of the cross-entropy; digits-cnn only, as the next two
    pixel_noise: float = 12.0  # deviation in grey levels of 255
    shift_probability: float = 0.3  # probability that an image is moved by a pixel


class TrainingData(Protocol):
    """Tokens and labels of images, functions of (seed, index); `sha256` is that of their source."""

    sha256: str

    def __call__(self, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, L] and labels int64 [B] of images `index` [B], on its device."""


class TeacherTask(Task):
    """Masked cross-entropy with label dropout (MaskGIT, arXiv 2202.04200, Eq. 1).

    `network`, the teacher with fresh weights, is trained in place.

    Raises:
        DimoError: The batch does not split evenly.
    """

    recipe: TrainRecipe

    def __init__(
        self, recipe: TrainRecipe, network: MaskedModel, data: TrainingData, runtime: Runtime
    ) -> None:
        super().__init__(recipe, runtime, data.sha256)
        self.data = data
        self.model = network.to(self.device).train()
        self.ema = self.make_ema(self.model)
        self.networks = {"model": self.model, "ema": self.ema}
        matrices = block_matrices(self.model) if recipe.optimizer == "muon" else ()
        self.updates = {"model": self.make_update(self.model, matrices)}

    def step(self, step: int) -> dict[str, Tensor]:
        update = self.updates["model"]
        values: dict[str, Tensor] = {}
        for batch in self.micro_batches(step, "model"):
            with self.running(batch, update):
                with self.autocast():
                    loss, weight = self._loss(update.model, batch.index)
                update.backward(loss, weight)
            add_mean(values, "loss", loss, weight)
        self.finish(step, "model", values)
        return values

    def _loss(self, model: Any, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the masked tokens of images `index` [b], and their fraction."""
        recipe, seed = self.recipe, self.recipe.seed
        tokens, labels = self.data(seed, index)
        ratio = mask_ratio(recipe.mask_schedule, rng.uniform(seed, index, "mask_ratio", ()))
        ranks = rng.random_ranks(seed, index, "mask", tokens.shape[1])
        mask = random_mask(ranks, mask_count(ratio, tokens.shape[1]))
        drop = rng.uniform(seed, index, "drop", ()) < recipe.label_dropout
        logits = model(tokens.masked_fill(mask, model.mask_token_id), labels, drop=drop)
        visible = logits[..., : model.codebook_size].float()
        targets = tokens.masked_fill(~mask, -100)  # indexing by the mask would wait for the GPU
        loss = F.cross_entropy(
            visible.flatten(0, 1), targets.flatten(), label_smoothing=recipe.label_smoothing
        )
        return loss, mask.float().mean()
