"""The two trainings the loop can drive: a teacher from data, and a Di[M]O distillation.

Each step is a function of (state, seed, step): row b of step s draws its random numbers as image
s * B + b, whatever rank has it and whatever part of the step it is in. Dropout alone, whose numbers
belong to a whole forward, is seeded from (seed, purpose, first image of the part): the same again
on as many ranks and parts, others on another number.
"""

__all__ = ["DistillTask", "TeacherTask"]

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dimo import rng
from dimo.config import DistillRecipe, TrainRecipe
from dimo.ema import update_ema
from dimo.errors import DimoError
from dimo.launch import ALONE, Ranks
from dimo.masking import mask_count, mask_ratio, random_mask
from dimo.models.layers import recompute_activations
from dimo.models.precision import PRECISIONS, in_precision
from dimo.objective import AuxiliaryLoss, Draws, StudentLoss, objective_of
from dimo.teachers import Network
from dimo.update import Update
from dimo.weights import state_sha256

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class _Task:
    """Common parts: how a batch is split, precision, updates, state.

    Attributes:
        recipe: What to do.
        inputs: Hash of the weights or the data that the training begins with.
        ranks: Who shares each batch.
        networks: By name, as they are saved; never wrapped.
    """

    def __init__(
        self, recipe: DistillRecipe | TrainRecipe, device: torch.device, ranks: Ranks
    ) -> None:
        parts = ranks.count * recipe.accumulate
        if recipe.batch_size % parts:
            raise DimoError(
                f"batch_size {recipe.batch_size} does not split into {ranks.count} ranks x "
                f"accumulate {recipe.accumulate} = {parts} equal parts; change one of them"
            )
        self.recipe, self.device, self.ranks, self.inputs = recipe, device, ranks, ""
        self.networks: dict[str, Network] = {}
        self.updates: dict[str, Update] = {}

    def counts(self) -> Tensor:
        """Updates skipped so far, and the most in a row of one network: int64 [2]."""
        counts = torch.stack([update.counts for update in self.updates.values()])
        return torch.stack([counts[:, 0].sum(), counts[:, 1].max()])

    def _update_of(self, network: Network) -> Update:
        recipe = self.recipe
        if recipe.gradient_checkpointing:
            recompute_activations(network)
        return Update(
            network,
            device=self.device,
            ranks=self.ranks,
            grad_clip=recipe.grad_clip,
            scaled=recipe.precision == "float16",
            betas=recipe.adam_betas,
            eps=recipe.adam_eps,
            weight_decay=recipe.weight_decay,
        )

    def _average_of(self, network: Network) -> Network:
        ema = copy.deepcopy(network).requires_grad_(False).eval()
        return ema.cpu() if self.recipe.ema_on_cpu else ema

    def _autocast(self) -> torch.autocast:
        dtype = _AUTOCAST.get(self.recipe.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _parts(self, step: int, purpose: str, *updates: Update) -> Iterator[Tensor]:
        """The image indices [b] of each part of this rank's share; run a part where it is given."""
        size, parts = self.recipe.batch_size, self.recipe.accumulate
        share = self.ranks.share(size)
        first, rows = step * size + share.start, len(share) // parts
        for part in range(parts):
            low = first + part * rows
            torch.manual_seed(rng.stream_seed(self.recipe.seed, f"{purpose}/dropout/{low}"))
            with ExitStack() as stack:
                for update in updates:
                    stack.enter_context(update.part(is_last=part == parts - 1))
                yield torch.arange(low, low + rows, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "networks": {k: v.state_dict() for k, v in self.networks.items()},
            "updates": {k: v.state_dict() for k, v in self.updates.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, update in self.updates.items():
            update.load_state_dict(state["updates"][name])


def _summed(values: dict[str, Tensor], key: str, mean: Tensor, weight: Tensor | float) -> None:
    """Adds one part's mean to the sums of `Task.step`."""
    entry = torch.stack([mean.detach().double() * weight, torch.ones_like(mean).double() * weight])
    values[key] = values[key] + entry if key in values else entry


class TeacherTask(_Task):
    """Masked cross-entropy with label dropout (MaskGIT, arXiv 2202.04200, Eq. 1).

    Args:
        recipe: What to do.
        network: The teacher to be, fresh; it is trained in place.
        tokens: [N, L] int64, the encoded data.
        labels: [N] int64.
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
        tokens: Tensor,
        labels: Tensor,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(recipe, device, ranks)
        self.inputs = state_sha256({"tokens": tokens, "labels": labels})
        self.model = network.to(device).train()
        self.ema = self._average_of(self.model)
        self.tokens, self.labels = tokens.to(device), labels.to(device)
        self.networks = {"model": self.model, "ema": self.ema}
        self.updates = {"model": self._update_of(self.model)}

    def step(self, step: int) -> dict[str, Tensor]:
        recipe, update = self.recipe, self.updates["model"]
        values: dict[str, Tensor] = {}
        for index in self._parts(step, "model", update):
            with self._autocast():
                loss, weight = self._loss(update.model, index)
            update.backward(loss, weight)
            _summed(values, "loss", loss, weight)
        norm, good = update.step(recipe.learning_rate_at(step))
        update_ema(self.ema, self.model, decay=recipe.ema_decay, step=step, good=good)
        _summed(values, "grad_norm", norm, 1)
        return values

    def _loss(self, model: Any, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the masked tokens of images `index` [b], and their share."""
        recipe, seed = self.recipe, self.recipe.seed
        rows = rng.integers(seed, index, "row", (), len(self.tokens))
        tokens, labels = self.tokens[rows], self.labels[rows]
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


class DistillTask(_Task):
    """Di[M]O: student and auxiliary model start as copies of the teacher and take turns.

    Args:
        recipe: What to do.
        teacher: Frozen; it is made ready for inference, in place.
        student: A network with the teacher's weights (its own dropout rate); trained in place.
        label_smoothing: That of the teacher's own training.
        device: Where to train.
        ranks: Who shares each batch.

    Raises:
        DimoError: The batch does not split into equal parts, or the teacher's weights are not
            finite.
    """

    recipe: DistillRecipe

    def __init__(
        self,
        recipe: DistillRecipe,
        teacher: Network,
        student: Network,
        label_smoothing: float,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(recipe, device, ranks)
        _check_finite(teacher)
        self.inputs = state_sha256(teacher.state_dict())
        self.teacher = teacher.to(device).requires_grad_(False).eval()
        if recipe.precision in PRECISIONS:
            in_precision(self.teacher, recipe.precision)  # casts and packs its weights once
        self.student = student.to(device).train()
        for parameter in self.student.embedding_parameters():
            parameter.requires_grad_(False)
        self.auxiliary = copy.deepcopy(self.student)
        self.ema = self._average_of(self.student)
        self.networks = {"student": self.student, "auxiliary": self.auxiliary, "ema": self.ema}
        self.updates = {
            "student": self._update_of(self.student),
            "auxiliary": self._update_of(self.auxiliary),
        }
        self.objective = objective_of(recipe, label_smoothing=label_smoothing)

    def step(self, step: int) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        is_shared = self.recipe.auxiliary_sample == "shared"
        if is_shared:
            self._update_both(step, values)
        else:
            self._update_student(step, values)
        for turn in range(int(is_shared), self.recipe.auxiliary_steps):
            self._update_auxiliary(step, turn, values)
        return values

    def _update_student(self, step: int, values: dict[str, Tensor]) -> None:
        update = self.updates["student"]
        for index in self._parts(step, "student", update):
            with self._autocast():
                draws, logits, tokens = self._generate(step, index, "student", update.model)
                student = self.objective.student_loss(
                    logits,
                    tokens,
                    draws.mask,
                    draws.labels,
                    teacher=self.teacher,
                    auxiliary=self.auxiliary,
                    mask_ratio=draws.mask_ratio,
                )
            self._add_student(student, draws.mask, values)
        self._step_student(step, values)

    def _update_auxiliary(self, step: int, turn: int, values: dict[str, Tensor]) -> None:
        update, purpose = self.updates["auxiliary"], f"auxiliary/{turn}"
        for index in self._parts(step, purpose, update):
            with self._autocast():
                with torch.no_grad():
                    draws, logits, tokens = self._generate(step, index, purpose, self.student)
                auxiliary = self.objective.auxiliary_loss(
                    update.model, tokens, draws.mask, draws.labels, student_logits=logits
                )
            self._add_auxiliary(auxiliary, draws.mask, values)
        self._step_auxiliary(step)

    def _update_both(self, step: int, values: dict[str, Tensor]) -> None:
        """Both from one sample of the student."""
        student, auxiliary = self.updates["student"], self.updates["auxiliary"]
        for index in self._parts(step, "student", student, auxiliary):
            with self._autocast():
                draws, logits, tokens = self._generate(step, index, "student", student.model)
                losses = self.objective.both_losses(
                    logits,
                    tokens,
                    draws.mask,
                    draws.labels,
                    teacher=self.teacher,
                    auxiliary=auxiliary.model,
                    mask_ratio=draws.mask_ratio,
                )
            self._add_student(losses[0], draws.mask, values)
            self._add_auxiliary(losses[1], draws.mask, values)
        self._step_student(step, values)
        self._step_auxiliary(step)

    def _generate(
        self, step: int, index: Tensor, purpose: str, model: Any
    ) -> tuple[Draws, Tensor, Tensor]:
        draws = self.objective.draw(self.student, self.recipe.seed, index, purpose, step=step)
        return draws, *self.objective.generate(model, draws)

    def _add_student(self, found: StudentLoss, mask: Tensor, values: dict[str, Tensor]) -> None:
        self.updates["student"].backward(found.loss)
        masked = mask.sum()
        _summed(values, "gradient", found.logit_gradient.abs().sum() / masked, masked)

    def _add_auxiliary(self, found: AuxiliaryLoss, mask: Tensor, values: dict[str, Tensor]) -> None:
        weight = mask.float().mean()  # its loss is a mean over masked tokens
        self.updates["auxiliary"].backward(found.loss, weight)
        _summed(values, "auxiliary_loss", found.loss, weight)

    def _step_student(self, step: int, values: dict[str, Tensor]) -> None:
        recipe = self.recipe
        norm, good = self.updates["student"].step(recipe.learning_rate_at(step))
        update_ema(self.ema, self.student, decay=recipe.ema_decay, step=step, good=good)
        _summed(values, "grad_norm", norm, 1)

    def _step_auxiliary(self, step: int) -> None:
        recipe = self.recipe
        rate = recipe.auxiliary_learning_rate * recipe.learning_rate_factor(step)
        self.updates["auxiliary"].step(rate)


def _check_finite(teacher: Network) -> None:
    """
    Raises:
        DimoError: Weights of the teacher are NaN or infinite.
    """
    bad = [k for k, v in teacher.state_dict().items() if not bool(v.isfinite().all())]
    if bad:
        raise DimoError(
            f"the teacher's weights hold values that are not finite, in {', '.join(bad[:3])}; "
            "fetch or convert them again"
        )
