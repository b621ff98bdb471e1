"""The two trainings the loop can drive: a teacher from data, and a Di[M]O distillation.

Each step is a function of (state, seed, step): row b of step s draws its random numbers as image
s * B + b, and dropout's generator is seeded from (seed, step).
"""

__all__ = ["DistillTask", "TeacherTask"]

import copy
import dataclasses
import hashlib
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from dimo import rng
from dimo.config import DistillRecipe, TrainRecipe
from dimo.ema import update_ema
from dimo.masking import mask_count, mask_ratio, random_mask
from dimo.objective import objective_of
from dimo.teachers import Network
from dimo.weights import state_sha256


class _Task:
    """Common parts: identity, device, precision, optimizers."""

    def __init__(self, recipe: DistillRecipe | TrainRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.steps, self.checkpoint_every = recipe.steps, recipe.checkpoint_every
        self.networks: dict[str, Network] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.identity = ""

    def _identify(self, *inputs: str) -> None:
        content = json.dumps([dataclasses.asdict(self.recipe), self.recipe.kind, *inputs])
        self.identity = hashlib.sha256(content.encode()).hexdigest()

    def _optimizer(self, network: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        recipe = self.recipe
        return torch.optim.AdamW(
            [p for p in network.parameters() if p.requires_grad],
            lr=learning_rate,
            betas=recipe.adam_betas,
            eps=recipe.adam_eps,
            weight_decay=recipe.weight_decay,
            foreach=True,
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"
        )

    def _index(self, step: int) -> Tensor:
        size = self.recipe.batch_size
        return torch.arange(step * size, (step + 1) * size, device=self.device)

    def _begin(self, step: int) -> None:
        torch.manual_seed(rng.stream_seed(self.recipe.seed, f"dropout/{step}"))

    def _update(self, name: str, loss: Tensor, learning_rate: float) -> Tensor:
        """Backward, clip, step; returns the gradient norm before clipping."""
        optimizer = self.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = clip_grad_norm_(parameters, self.recipe.grad_clip, foreach=True)
        optimizer.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {
            "networks": {k: v.state_dict() for k, v in self.networks.items()},
            "optimizers": {k: v.state_dict() for k, v in self.optimizers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


class TeacherTask(_Task):
    """Masked cross-entropy with label dropout (MaskGIT, arXiv 2202.04200, Eq. 1).

    Args:
        recipe: What to do.
        network: The teacher to be, fresh; it is trained in place.
        tokens: [N, L] int64, the encoded data.
        labels: [N] int64.
        device: Where to train.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        network: Network,
        tokens: Tensor,
        labels: Tensor,
        device: torch.device,
    ) -> None:
        super().__init__(recipe, device)
        self.model = network.to(device).train()
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.tokens, self.labels = tokens.to(device), labels.to(device)
        self.networks = {"model": self.model, "ema": self.ema}
        self.optimizers = {"model": self._optimizer(self.model, recipe.learning_rate)}
        self._identify(state_sha256({"tokens": tokens, "labels": labels}))

    def step(self, step: int) -> dict[str, Tensor]:
        recipe: TrainRecipe = self.recipe  # type: ignore[assignment]
        self._begin(step)
        seed, index = recipe.seed, self._index(step)
        rows = rng.integers(seed, index, "row", (), len(self.tokens))
        tokens, labels = self.tokens[rows], self.labels[rows]
        ratio = mask_ratio(recipe.mask_schedule, rng.uniform(seed, index, "mask_ratio", ()))
        ranks = rng.random_ranks(seed, index, "mask", tokens.shape[1])
        mask = random_mask(ranks, mask_count(ratio, tokens.shape[1]))
        drop = rng.uniform(seed, index, "drop", ()) < recipe.label_dropout
        with self._autocast():
            logits = self.model(
                tokens.masked_fill(mask, self.model.mask_token_id), labels, drop=drop
            )
        visible = logits[..., : self.model.codebook_size].float()
        loss = F.cross_entropy(visible[mask], tokens[mask], label_smoothing=recipe.label_smoothing)
        norm = self._update("model", loss, recipe.learning_rate_at(step))
        update_ema(self.ema, self.model, decay=recipe.ema_decay, step=step)
        return {"loss": loss.detach(), "grad_norm": norm}


class DistillTask(_Task):
    """Di[M]O: student and auxiliary model start as copies of the teacher and take turns.

    Args:
        recipe: What to do.
        teacher: Frozen; kept in eval mode.
        student: A network with the teacher's weights (its own dropout rate); trained in place.
        label_smoothing: That of the teacher's own training.
        device: Where to train.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        teacher: Network,
        student: Network,
        label_smoothing: float,
        device: torch.device,
    ) -> None:
        super().__init__(recipe, device)
        self.teacher = teacher.to(device).requires_grad_(False).eval()
        self.student = student.to(device).train()
        for parameter in self.student.embedding_parameters():
            parameter.requires_grad_(False)
        self.auxiliary = copy.deepcopy(self.student)
        self.ema = copy.deepcopy(self.student).eval()
        self.networks = {"student": self.student, "auxiliary": self.auxiliary, "ema": self.ema}
        self.optimizers = {
            "student": self._optimizer(self.student, recipe.learning_rate),
            "auxiliary": self._optimizer(self.auxiliary, recipe.auxiliary_learning_rate),
        }
        self.objective = objective_of(recipe, label_smoothing=label_smoothing)
        self._identify(state_sha256(teacher.state_dict()))

    def step(self, step: int) -> dict[str, Tensor]:
        recipe: DistillRecipe = self.recipe  # type: ignore[assignment]
        self._begin(step)
        objective, seed, index = self.objective, recipe.seed, self._index(step)
        factor = recipe.learning_rate_factor(step)

        draws = objective.draw(self.student, seed, index, "student", step=step)
        with self._autocast():
            logits, tokens = objective.generate(self.student, draws)
            student = objective.student_loss(
                logits,
                tokens,
                draws.mask,
                draws.labels,
                teacher=self.teacher,
                auxiliary=self.auxiliary,
                mask_ratio=draws.mask_ratio,
            )
        norm = self._update("student", student.loss, recipe.learning_rate * factor)
        update_ema(self.ema, self.student, decay=recipe.ema_decay, step=step)

        for turn in range(recipe.auxiliary_steps):
            draws = objective.draw(self.student, seed, index, f"auxiliary/{turn}", step=step)
            with self._autocast():
                with torch.no_grad():
                    logits, tokens = objective.generate(self.student, draws)
                auxiliary = objective.auxiliary_loss(
                    self.auxiliary, tokens, draws.mask, draws.labels, student_logits=logits
                )
            rate = recipe.auxiliary_learning_rate * factor
            self._update("auxiliary", auxiliary.loss, rate)
        return {
            "gradient": student.logit_gradient.abs().sum(-1).sum() / draws.mask.sum(),
            "auxiliary_loss": auxiliary.loss.detach(),
            "grad_norm": norm,
        }
