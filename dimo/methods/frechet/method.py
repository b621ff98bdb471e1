"""Di[M]O-FD: Di[M]O with a Fréchet distance on the hidden states of the frozen teacher.

Di[M]O compares teacher and student token by token, given the rest of the image; what no token shows
is how images differ from one another. The second term does: the states that the student's tokens
lead to in the teacher should have the mean and covariance of those that the teacher's own samples,
drawn in many steps, lead to (FD-loss, arXiv 2604.28190, without images from outside). Tokens are
straight-through: hard ones forward, their Gumbel-softmax backward.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dimo import rng
from dimo.engine.distributed import Runtime
from dimo.methods.base import Cost, Task, TeacherDefaults, add_mean, check
from dimo.methods.dimo.divergence import tempered
from dimo.methods.dimo.draws import Draws
from dimo.methods.dimo.method import DiMO, objective_of
from dimo.methods.dimo.objective import StudentLoss
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.methods.dimo.step import DiMOTask
from dimo.methods.frechet.moments import RunningFrechet
from dimo.models import MaskedModel
from dimo.samplers import get_sampler
from dimo.util.terminal import stop_if_asked

if TYPE_CHECKING:
    from dimo.data.tokens import TokenData

_BATCH = 250  # images of the reference at a time
_MEMORY = 0.98  # of the running norms of both gradients, per step


@dataclass(frozen=True, kw_only=True)
class FrechetRecipe(DiMORecipe):
    """One distillation by Di[M]O-FD; its other keys are those of Di[M]O.

    Attributes:
        frechet_weight: Norm of the term's gradient in the logits, as a fraction of Di[M]O's.
        frechet_blocks: Blocks of the teacher whose states are compared, spread evenly and with the
            last; features have twice the width of the network for each.
        frechet_window: Images that the student's running moments remember.
        reference_images: Samples of the teacher for the moments that they should have.
        reference_steps: Sampling steps of these, by the teacher's own sampler and settings.
    """

    kind: ClassVar[str] = "dimo-fd"
    frechet_weight: float = 0.5
    frechet_blocks: int = 3
    frechet_window: int = 20_000
    reference_images: int = 20_000
    reference_steps: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.frechet_weight > 0, "frechet_weight", self.frechet_weight, "> 0")
        for key in ("frechet_blocks", "frechet_window", "reference_steps"):
            check(getattr(self, key) >= 1, key, getattr(self, key), ">= 1")
        check(self.reference_images >= 2, "reference_images", self.reference_images, ">= 2")

    @property
    def method(self) -> str:
        return "dimo-fd"


class FrechetTask(DiMOTask):
    """A Di[M]O step whose gradient in the logits has a second part."""

    recipe: FrechetRecipe

    def __init__(self, *inputs: Any, defaults: TeacherDefaults) -> None:
        super().__init__(*inputs)
        teacher = inputs[1]
        self.progress = inputs[-1].progress
        count, depth = self.recipe.frechet_blocks, teacher.depth
        check(count <= depth, "frechet_blocks", count, f"at most the teacher's {depth}")
        self.blocks = [depth * number // count for number in range(1, count + 1)]
        self.defaults = defaults
        # `teacher` of the base class may have weights that no gradient passes
        self.network = copy.deepcopy(teacher).to(self.device).requires_grad_(False).eval()
        moments = RunningFrechet(2 * teacher.hidden_dim * count, self.recipe.frechet_window)
        self.moments = moments.to(self.device)
        self.norms = torch.zeros(2, dtype=torch.float64, device=self.device)  # running, of both
        self._features: list[Tensor] = []
        self._squares = torch.zeros_like(self.norms)

    def step(self, step: int) -> dict[str, Tensor]:
        if not self.moments.has_reference:
            self.moments.set_reference(self._reference(), self.ranks)
        values = super().step(step)
        self.moments.update(self._features, self.ranks)
        if self.ranks.sum_(self._squares).all():
            self.norms.lerp_(self._squares, 1 - _MEMORY)
        self._features, self._squares = [], torch.zeros_like(self.norms)
        if self.moments.is_ready:
            one = torch.ones((), dtype=torch.float64, device=self.device)
            add_mean(values, "hidden_fd", self.moments.distance, one / self.ranks.count)
        return values

    def further_loss(
        self, draws: Draws, logits: Tensor, tokens: Tensor, student: StudentLoss
    ) -> Tensor | None:
        """As in the base class; the surrogate <z, g> of the term's gradient g in the logits z."""
        z = logits.detach().requires_grad_()
        soft = (tempered(z, self.recipe.student_temperature) + draws.gumbel).softmax(-1)
        table = self.network.token_embeddings
        expected = soft.to(table.dtype) @ table[: z.shape[-1]]
        hard = table[tokens]
        features = self._states(hard + expected - expected.detach(), draws.labels)
        self._features.append(features.detach())
        (gradient,) = torch.autograd.grad(features, z, self.moments.gradient(features))
        self._squares[0] += student.logit_gradient.double().square().sum()
        self._squares[1] += gradient.double().square().sum()
        if not self.norms.all():
            return None
        scale = self.recipe.frechet_weight * (self.norms[0] / self.norms[1]).sqrt()
        count = len(tokens) if self.objective.loss_reduction == "sum" else logits.numel()
        product = (logits * gradient * scale.to(logits.dtype)).sum() / count
        return product - product.detach()

    def _states(self, embedded: Tensor, labels: Tensor) -> Tensor:
        """Means over the places, and over the condition's tokens, after each block: [B, D]."""
        states, places = self.network.block_states(embedded, labels, self.blocks), embedded.shape[1]
        parts = (part for h in states for part in (h[:, :places], h[:, places:]))
        return torch.cat([part.mean(1) for part in parts], 1)

    @torch.no_grad()
    def _reference(self) -> Iterator[Tensor]:
        """Features [B, D] of this rank's share of the teacher's samples."""
        recipe, own = self.recipe, self.ranks.split(self.recipe.reference_images)
        sampler = get_sampler(self.defaults.sampler)
        seed = rng.stream_seed(recipe.seed, "reference")
        settings = {**self.defaults.settings, "num_steps": recipe.reference_steps}
        for start in range(own.start, own.stop, _BATCH):
            stop_if_asked("no step is done; run the same command again")
            index = torch.arange(start, min(start + _BATCH, own.stop), device=self.device)
            labels = index * self.network.num_classes // recipe.reference_images  # all of them
            noise = rng.ImageNoise(seed, index)
            with self.autocast():
                tokens = sampler(self.teacher, labels, noise, **settings).tokens
                yield self._states(self.network.token_embeddings[tokens], labels)
            self.progress(
                "samples of the teacher", int(index[-1]) + 1 - own.start, len(own), "images"
            )

    def state_dict(self) -> dict[str, Any]:
        own = {**self.moments.state_dict(), "norms": self.norms}
        return {**super().state_dict(), "frechet": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        own: Mapping[str, Tensor] = state["frechet"]
        self.norms.copy_(own["norms"])
        self.moments.load_state_dict({k: v for k, v in own.items() if k != "norms"})


class DiMOFD(DiMO):
    """One-step students of teachers that show their hidden states, distilled without data."""

    Recipe = FrechetRecipe

    def network(self, teacher: type[Any]) -> type[Any] | None:
        return teacher if teacher.gives_states else None

    def task(
        self,
        recipe: Any,
        teacher: MaskedModel,
        student: MaskedModel,
        data: "TokenData | None",
        defaults: TeacherDefaults,
        runtime: Runtime,
    ) -> Task:
        objective = objective_of(recipe, label_smoothing=defaults.label_smoothing)
        inputs = (recipe, teacher, student, objective, runtime)
        return FrechetTask(*inputs, defaults=defaults)

    def cost(self, recipe: Any) -> Cost:
        """Di[M]O's, and a copy of the teacher forward and backward, for its input alone."""
        cost, part = super().cost(recipe), "states"
        return dataclasses.replace(
            cost,
            forwards={**cost.forwards, f"{part}, forward and backward": 2},
            networks={**cost.networks, part: False},
            kept=2,  # the student's, and the copy's or the auxiliary model's
        )
