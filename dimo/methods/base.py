"""What every training has that the loop can drive: how a batch is split, precision, updates, state.

Each step is a function of (state, seed, step): row b of step s draws its random numbers as image
s * B + b, whatever rank has it and whatever part of the step it is in. Dropout alone, whose numbers
belong to a whole forward, is seeded from (seed, purpose, first image of the part): the same again
on as many ranks and parts, others on another number.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dimo import rng
from dimo.config import DistillationRecipe, TrainRecipe
from dimo.data.tokens import TokenData
from dimo.engine.distributed import Ranks
from dimo.engine.optim import Update, update_ema
from dimo.errors import DimoError
from dimo.models.cpu import PRECISIONS, prepare_for_inference
from dimo.models.layers import recompute_activations
from dimo.weights.files import state_sha256
from dimo.zoo.teachers import Network

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Task:
    """Common parts: how a batch is split, precision, updates, state.

    Attributes:
        recipe: What to do.
        inputs: Hash of the weights or the data that the training begins with.
        ranks: Who shares each batch.
        networks: By name, as they are saved; never wrapped.
    """

    def __init__(
        self, recipe: DistillationRecipe | TrainRecipe, device: torch.device, ranks: Ranks
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

    def _update_of(self, network: nn.Module, matrices: Sequence[Tensor] = ()) -> Update:
        recipe = self.recipe
        if recipe.gradient_checkpointing:
            recompute_activations(network)
        return Update(
            network,
            device=self.device,
            ranks=self.ranks,
            grad_clip=recipe.grad_clip,
            scaled=recipe.precision == "float16",
            weight_decay=recipe.weight_decay,
            matrices=matrices,
            betas=recipe.adam_betas,
            eps=recipe.adam_eps,
        )

    def _average_of(self, network: Network) -> Network:
        ema = copy.deepcopy(network).requires_grad_(False).eval()
        return ema.cpu() if self.recipe.ema_on_cpu else ema

    def _autocast(self) -> torch.autocast:
        dtype = _AUTOCAST.get(self.recipe.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _parts(self, step: int, purpose: str, *updates: Update) -> Iterator[Tensor]:
        """The image indices [b] of each part of this rank's share; run a part where it is given.

        `updates` are those of the networks that a part gives gradients to.
        """
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


def add_mean(values: dict[str, Tensor], key: str, mean: Tensor, weight: Tensor | float) -> None:
    """Adds one part's mean to the sums that a step returns."""
    entry = torch.stack([mean.detach().double() * weight, torch.ones_like(mean).double() * weight])
    values[key] = values[key] + entry if key in values else entry


class StudentTask(Task):
    """A distillation: a frozen teacher, a student in training and its average.

    Args:
        recipe: What to do.
        teacher: Frozen; it is made ready for inference, in place.
        student: A network that starts with the teacher's weights; trained in place.
        device: Where to train.
        ranks: Who shares each batch.

    Raises:
        DimoError: The batch does not split into equal parts, or the teacher's weights are not
            finite.
    """

    recipe: DistillationRecipe

    def __init__(
        self,
        recipe: DistillationRecipe,
        teacher: Network,
        student: Network,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        super().__init__(recipe, device, ranks)
        _check_finite(teacher)
        self.inputs = state_sha256(teacher.state_dict())
        self.teacher = teacher.to(device).requires_grad_(False).eval()
        if recipe.precision in PRECISIONS:
            prepare_for_inference(self.teacher, recipe.precision)
        self.student = student.to(device).train()


class DataTask(StudentTask):
    """A distillation with data: one network in training.

    Args:
        recipe: What to do.
        teacher: Frozen; it is made ready for inference, in place.
        student: A network that starts with the teacher's weights; trained in place.
        data: Encoded images.
        device: Where to train.
        ranks: Who shares each batch.

    Raises:
        DimoError: As `StudentTask`.
    """

    def __init__(
        self,
        recipe: DistillationRecipe,
        teacher: Network,
        student: Network,
        data: TokenData,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        super().__init__(recipe, teacher, student, device, ranks)
        self.inputs += data.sha256
        self.tokens, self.labels = data.tokens.to(device), data.labels.to(device)
        self.ema = self._average_of(self.student)
        self.networks = {"student": self.student, "ema": self.ema}

    def _finish(self, step: int, values: dict[str, Tensor]) -> None:
        """The update of the student and of its average, after the gradients of all parts."""
        recipe = self.recipe
        norm, good = self.updates["student"].step(recipe.learning_rate_at(step))
        update_ema(self.ema, self.student, decay=recipe.ema_decay, step=step, good=good)
        add_mean(values, "grad_norm", norm, 1)


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
