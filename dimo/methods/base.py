"""What all runs share: recipe keys, the training task, and the interface of a method.

Each step is a function of (state, seed, step): row b of step s draws its random numbers as image
s * B + b, whichever rank and micro-batch it is in. Only dropout, whose numbers belong to a whole
forward, is seeded from (seed, purpose, first image of the micro-batch): it repeats exactly for the
same number of ranks and micro-batches only.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from dimo import rng
from dimo.engine.distributed import Runtime
from dimo.engine.optim import Update, update_ema
from dimo.errors import DimoError, unknown_name
from dimo.models import MaskedModel
from dimo.models.cpu import PRECISIONS, prepare_for_inference
from dimo.models.layers import recompute_activations
from dimo.weights.files import check_finite, state_sha256

if TYPE_CHECKING:
    from dimo.data.tokens import TokenData

_Config = TypeVar("_Config")
_LEARNING_RATE_SCHEDULES = ("constant", "cosine", "linear")
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# x_init of a student that starts from masked tokens: fields of `dimo.zoo.students.StudentConfig`.
ALL_MASKED: dict[str, Any] = {
    "init_mask_ratio": 1.0,
    "embedding_noise": 0.0,
    "token_initialization": "masked",
}


def check(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise DimoError(f"recipe key {key} = {value!r} is out of range; allowed: {allowed}")


def known(kind: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise unknown_name(kind, value, allowed)


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Recipe keys of every run."""

    kind: ClassVar[str]
    # whether a resumed run may take more steps; not where they divide into phases
    steps_may_grow: ClassVar[bool] = True
    seed: int = 0  # of every random number of the run
    steps: int  # updates of the trained network
    batch_size: int = 256  # images per step, over all ranks and micro-batches
    accumulate: int = 1  # micro-batches per rank and step
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    learning_rate: float  # the highest, after the warm-up
    lr_schedule: str = "constant"  # or half a cosine or a line to lr_final: cosine, linear
    lr_final: float = 0.0  # the last learning rate, as a fraction of the highest
    lr_warmup_steps: int = 100  # steps of a linear rise from 0
    weight_decay: float = 0.0  # of AdamW
    adam_betas: tuple[float, float] = (0.9, 0.999)  # decay of AdamW's two moments
    adam_eps: float = 1e-8  # AdamW's epsilon
    grad_clip: float = 1.0  # largest norm of the gradient of a network
    max_skipped: int = 20  # stop after this many consecutive non-finite updates
    ema_decay: float = 0.999  # of the averaged weights, which are what is kept
    ema_on_cpu: bool = False  # costs one transfer of the weights per step
    precision: str = "bfloat16"  # or float16, float32; weights are float32 in any case
    checkpoint_every: int = 500  # steps between checkpoints
    keep_every: int = 0  # keep checkpoints at multiples of this beside the two newest

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulate", "max_skipped", "checkpoint_every"):
            check(getattr(self, key) >= 1, key, getattr(self, key), ">= 1")
        for key in ("lr_warmup_steps", "keep_every"):
            check(getattr(self, key) >= 0, key, getattr(self, key), ">= 0")
        check(0 < self.learning_rate < 1, "learning_rate", self.learning_rate, "0 < x < 1")
        check(self.adam_eps > 0, "adam_eps", self.adam_eps, "> 0")
        check(self.grad_clip > 0, "grad_clip", self.grad_clip, "> 0")
        check(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "0 <= x < 1")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, ">= 0")
        check(all(0 <= b < 1 for b in self.adam_betas), "adam_betas", self.adam_betas, "0 <= x < 1")
        known("lr_schedule", self.lr_schedule, _LEARNING_RATE_SCHEDULES)
        check(0 <= self.lr_final <= 1, "lr_final", self.lr_final, "0 <= x <= 1")
        known("precision", self.precision, ("float32", *_AUTOCAST))

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of one step, without saved state."""
        return self.learning_rate * self.learning_rate_factor(step)

    def learning_rate_factor(self, step: int) -> float:
        """A linear warm-up to 1, then the schedule: constant, half a cosine or a line."""
        if step < self.lr_warmup_steps:
            return (step + 1) / self.lr_warmup_steps
        left = 1 - (step - self.lr_warmup_steps) / max(1, self.steps - self.lr_warmup_steps)
        if self.lr_schedule == "cosine":
            left = 0.5 * (1 - math.cos(math.pi * left))
        return 1.0 if self.lr_schedule == "constant" else self.lr_final + (1 - self.lr_final) * left


@dataclass(frozen=True, kw_only=True)
class DistillationRecipe(Optimization):
    """Recipe keys of every distillation method."""

    teacher: str  # a row of `dimo.zoo.teachers`
    init_from: str | None = None  # a student, e.g. a run folder, to start from, not the teacher
    dropout: float = 0.0  # of the networks in training; the teacher has none
    temperature: float = 1.0  # divides the student's logits when it is sampled
    temperature_selected_by: str = "default"  # how that temperature was chosen

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.dropout < 1, "dropout", self.dropout, "0 <= x < 1")
        check(self.temperature > 0, "temperature", self.temperature, "> 0")

    @property
    def method(self) -> str:
        """A key of `dimo.methods.METHODS`."""
        raise NotImplementedError


def config_from(config: type[_Config], recipe: Optimization, **others: Any) -> _Config:
    """A dataclass whose fields are keys of the recipe, but for those given as `others`."""
    fields = {f.name for f in dataclasses.fields(config)} - others.keys()  # type: ignore[arg-type]
    return config(**{name: getattr(recipe, name) for name in fields}, **others)


@dataclass(frozen=True)
class Cost:
    """What a method computes and keeps, for `dimo distill --dry-run`.

    Attributes:
        forwards: Forward passes per image and step, by part; a backward pass counts two.
        networks: Whether each network beside teacher, student and EMA is trained.
    """

    forwards: Mapping[str, int]
    networks: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    rows: int = 1  # per image, which pass the student at once (latents of a mixture)
    kept: int = 1  # networks whose activations are held at the same time
    teacher_batches: int = 1  # 2 if the teacher is guided
    freezes_embeddings: bool = False  # and the output bias
    takes_latent: bool = False


@dataclass(frozen=True)
class TeacherDefaults:
    """How a teacher was trained and is sampled.

    Attributes:
        sampler: A key of `dimo.samplers.SAMPLERS`; `settings` are keyword arguments of it.
    """

    label_smoothing: float = 0.0
    sampler: str = "confidence"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Distillation:
    """The interface of a distillation method; `dimo.methods.Method.source` names a subclass."""

    Recipe: ClassVar[type[DistillationRecipe]]  # a frozen dataclass; its `kind` is in TOML files

    def network(self, teacher: type[Any]) -> type[Any] | None:
        """The class of the student, built as the teacher's; None for unsupported teachers."""
        return teacher

    def prompts_file(self, recipe: Any) -> str | None:
        """The file of prompts that the recipe names for a text-conditioned teacher."""
        return None

    def task(
        self,
        recipe: Any,
        teacher: MaskedModel,
        student: Any,
        data: "TokenData | None",
        defaults: "TeacherDefaults",
        runtime: Runtime,
    ) -> "Task":
        """The training task of a `Recipe`.

        The teacher, in eval mode, is left unchanged. The student, of class `network(...)`, has its
        weights, fresh ones in modules the teacher lacks, or those of the student that the run
        starts from, and is trained in place. `data` is None for a method that needs none.
        """
        raise NotImplementedError

    def student_settings(self, recipe: Any) -> dict[str, Any]:
        """How the student is sampled: fields of `dimo.zoo.students.StudentConfig`."""
        return ALL_MASKED

    def cost(self, recipe: Any) -> Cost:
        raise NotImplementedError


@dataclass(frozen=True)
class MicroBatch:
    """Images of one forward and backward pass."""

    index: Tensor  # [b] numbers of the images, which select their random streams
    dropout_seed: int  # of the global generator
    is_last: bool  # the optimizer steps after it: only then do ranks exchange gradients


class Task:
    """What `dimo.engine.loop.fit` drives; a subclass adds `step`.

    `inputs` is a hash of the weights and data it starts from. `networks` are saved in checkpoints,
    never wrapped; `updates` has one for each network in training, by the same names.
    """

    def __init__(self, recipe: Any, runtime: Runtime, inputs: str) -> None:
        parts = runtime.ranks.count * recipe.accumulate
        if recipe.batch_size % parts:
            raise DimoError(
                f"batch_size {recipe.batch_size} does not split into {runtime.ranks.count} ranks x "
                f"accumulate {recipe.accumulate} = {parts} equal parts; change one of them"
            )
        self.recipe, self.inputs = recipe, inputs
        self.device, self.ranks = runtime.device, runtime.ranks
        self.networks: dict[str, MaskedModel] = {}
        self.updates: dict[str, Update] = {}

    def step(self, step: int) -> dict[str, Tensor]:
        """Updates the networks; returns means for the log as (sum, weight), float64 [2]."""
        raise NotImplementedError

    def counts(self) -> Tensor:
        """Updates skipped so far, and the most in a row of one network: int64 [2]."""
        counts = torch.stack([update.counts for update in self.updates.values()])
        return torch.stack([counts[:, 0].sum(), counts[:, 1].max()])

    def make_update(self, network: nn.Module, matrices: Sequence[Tensor] = ()) -> Update:
        """The optimizer of a network: Muon for `matrices`, AdamW for its other parameters."""
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

    def make_ema(self, network: MaskedModel) -> MaskedModel:
        ema = copy.deepcopy(network).requires_grad_(False).eval()
        return ema.cpu() if self.recipe.ema_on_cpu else ema

    def autocast(self) -> torch.autocast:
        dtype = _AUTOCAST.get(self.recipe.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def micro_batches(self, step: int, purpose: str) -> list[MicroBatch]:
        """This rank's part of a step; `purpose` names what the images are drawn for."""
        size, count = self.recipe.batch_size, self.recipe.accumulate
        own = self.ranks.split(size)
        rows, first = len(own) // count, step * size + own.start
        starts = range(first, first + rows * count, rows)
        return [
            MicroBatch(
                torch.arange(start, start + rows, device=self.device),
                rng.stream_seed(self.recipe.seed, f"{purpose}/dropout/{start}"),
                is_last=number == count - 1,
            )
            for number, start in enumerate(starts)
        ]

    @contextmanager
    def running(self, batch: MicroBatch, *updates: Update) -> Iterator[None]:
        """Around forward and backward of a micro-batch that adds to the gradients of `updates`."""
        torch.manual_seed(batch.dropout_seed)
        with ExitStack() as stack:
            for update in updates:
                stack.enter_context(update.part(is_last=batch.is_last))
            yield

    def finish(
        self, step: int, name: str, values: dict[str, Tensor], ema: str | None = "ema"
    ) -> None:
        """Steps the optimizer of a network, then its EMA."""
        norm, is_finite = self.updates[name].step(self.recipe.learning_rate_at(step))
        if ema is not None:
            average, decay = self.networks[ema], self.recipe.ema_decay
            update_ema(average, self.networks[name], decay=decay, step=step, is_finite=is_finite)
        add_mean(values, "grad_norm", norm, 1)

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
    """Adds the mean of a micro-batch to the weighted sums that a step returns."""
    entry = torch.stack([mean.detach().double() * weight, torch.ones_like(mean).double() * weight])
    values[key] = values[key] + entry if key in values else entry


def frozen_teacher(teacher: MaskedModel, precision: str, device: torch.device) -> MaskedModel:
    """A copy of the teacher in eval mode, ready for inference in that precision."""
    copied = copy.deepcopy(teacher).to(device).requires_grad_(False).eval()
    return prepare_for_inference(copied, precision) if precision in PRECISIONS else copied


def teacher_sha256(teacher: MaskedModel) -> str:
    """Hash of the teacher's weights, which must be finite."""
    state = teacher.state_dict()
    check_finite(state, "of the teacher")
    return state_sha256(state)
