"""Training of an embedded teacher from its data."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dimo import rng
from dimo.config import TrainRecipe
from dimo.engine.distributed import ALONE, Ranks
from dimo.engine.optim import update_ema
from dimo.masking import mask_count, mask_ratio, random_mask
from dimo.methods.base import Task, add_mean
from dimo.models.maskgit import block_matrices
from dimo.zoo.bundled import TrainingData
from dimo.zoo.teachers import Network


class TeacherTask(Task):
    """Masked cross-entropy with label dropout (MaskGIT, arXiv 2202.04200, Eq. 1).

    Args:
        recipe: What to do.
        network: The teacher to be, fresh; it is trained in place.
        data: What it learns from.
        device: Where to train.
        ranks: Who shares each batch.

    Raises:
        DimoError: The batch does not split into equal parts.
    """

    recipe: TrainRecipe

    def __init__(
        self,
        recipe: TrainRecipe,
        network: Network,
        data: TrainingData,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(recipe, device, ranks)
        self.inputs, self.data = data.sha256, data
        self.model = network.to(device).train()
        self.ema = self._average_of(self.model)
        self.networks = {"model": self.model, "ema": self.ema}
        matrices = block_matrices(self.model) if recipe.optimizer == "muon" else ()
        self.updates = {"model": self._update_of(self.model, matrices)}

    def step(self, step: int) -> dict[str, Tensor]:
        recipe, update = self.recipe, self.updates["model"]
        values: dict[str, Tensor] = {}
        for index in self._parts(step, "model", update):
            with self._autocast():
                loss, weight = self._loss(update.model, index)
            update.backward(loss, weight)
            add_mean(values, "loss", loss, weight)
        norm, good = update.step(recipe.learning_rate_at(step))
        update_ema(self.ema, self.model, decay=recipe.ema_decay, step=step, good=good)
        add_mean(values, "grad_norm", norm, 1)
        return values

    def _loss(self, model: Any, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the masked tokens of images `index` [b], and their share."""
        recipe, seed = self.recipe, self.recipe.seed
        tokens, labels = self.data(seed, index)
        ratio = mask_ratio(recipe.mask_schedule, rng.uniform(seed, index, "mask_ratio", ()))
        ranks = rng.random_ranks(seed, index, "mask", tokens.shape[1])
        mask = random_mask(ranks, mask_count(ratio, tokens.shape[1]))
        drop = rng.uniform(seed, index, "drop", ()) < recipe.label_dropout
        logits = model(tokens.masked_fill(mask, model.mask_token_id), labels, drop=drop)
        visible = logits[..., : model.codebook_size].float()
        wanted = tokens.masked_fill(~mask, -100)  # not indexed by the mask, which waits for a GPU
        loss = F.cross_entropy(
            visible.flatten(0, 1), wanted.flatten(), label_smoothing=recipe.label_smoothing
        )
        return loss, mask.float().mean()
