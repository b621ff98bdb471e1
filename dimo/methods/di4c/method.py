"""di4c and di4c-d (Hayakawa et al., arXiv 2410.08709): a mixture student that learns from data."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from dimo.engine.distributed import Runtime
from dimo.methods.base import (
    Cost,
    Task,
    add_mean,
    check,
    config_from,
    frozen_teacher,
    teacher_sha256,
)
from dimo.methods.di4c.network import Di4CStudent
from dimo.methods.di4c.objective import Di4CObjective, LatentMixture
from dimo.methods.masked_data import DataDistillation, DataRecipe, required
from dimo.models import MaskedModel
from dimo.models.maskgit import MaskGIT

if TYPE_CHECKING:
    from dimo.data.tokens import TokenData


@dataclass(frozen=True, kw_only=True)
class Di4CRecipe(DataRecipe):
    """One di4c distillation; names as in `dimo.methods.di4c.objective`.

    Attributes:
        num_latents: N, latents per image and step; `batch_size` counts images.
        latent_chunk: Latents that pass the student at once, with recomputation in the backward
            pass; 0: all, without. Changes memory and speed, and the result only through dropout.
        step_size: delta, length of the teacher's step; the last delta is distilled directly.
        alpha: Largest weight of the data's correlation term: 0 is di4c, above 0 is di4c-d.
        control_variate: Subtract the product of the marginals in sampled terms, and add its exact
            mean.
        teacher_unconditional: Guided sampling takes its unconditional branch from the teacher.
    """

    kind: ClassVar[str] = "di4c"
    num_latents: int = 32
    latent_chunk: int = 0
    step_size: float = 0.05
    alpha: float = 0.1
    control_variate: bool = True
    teacher_unconditional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_latents >= 1, "num_latents", self.num_latents, ">= 1")
        chunk = self.latent_chunk
        check(0 <= chunk <= self.num_latents, "latent_chunk", chunk, "0 to num_latents")
        check(0 < self.step_size < 1, "step_size", self.step_size, "0 < x < 1")
        check(self.alpha >= 0, "alpha", self.alpha, ">= 0")

    @property
    def method(self) -> str:
        """A key of `dimo.methods.METHODS`."""
        return "di4c-d" if self.alpha > 0 else "di4c"


class Di4CTask(Task):
    """The student learns from the teacher's steps, from its own samples and from data.

    Arguments and errors as for `dimo.methods.dimo.step.DiMOTask`. The latent projection is fresh;
    everything is trained.
    """

    recipe: Di4CRecipe

    def __init__(
        self,
        recipe: Di4CRecipe,
        teacher: MaskedModel,
        student: Di4CStudent,
        data: "TokenData",
        runtime: Runtime,
    ) -> None:
        super().__init__(recipe, runtime, teacher_sha256(teacher) + data.sha256)
        self.teacher = frozen_teacher(teacher, recipe.precision, self.device)
        self.student = student.to(self.device).train()
        self.tokens, self.labels = data.tokens.to(self.device), data.labels.to(self.device)
        self.ema = self.make_ema(self.student)
        self.networks = {"student": self.student, "ema": self.ema}
        mixture = LatentMixture(student, recipe.latent_chunk)
        self.updates = {"student": self.make_update(mixture)}
        self.objective = config_from(Di4CObjective, recipe)

    def step(self, step: int) -> dict[str, Tensor]:
        objective, update = self.objective, self.updates["student"]
        values: dict[str, Tensor] = {}
        for batch in self.micro_batches(step, "student"):
            with self.running(batch, update):
                draws = objective.draw(self.tokens, self.labels, self.recipe.seed, batch.index)
                with self.autocast():
                    self.student.eval()
                    target = objective.target(draws, teacher=self.teacher, student=self.student)
                    self.student.train()
                    losses = objective.losses(update.model, draws, target)
                update.backward(losses.total)
            for name, value in vars(losses).items():
                add_mean(values, name, value.mean(), 1)
        self.finish(step, "student", values)
        return values


class Di4C(DataDistillation):
    """Mixture students of MaskGIT teachers."""

    Recipe = Di4CRecipe

    def network(self, teacher: type[Any]) -> type[Any] | None:
        return Di4CStudent if teacher is MaskGIT else None

    def task(
        self,
        recipe: Di4CRecipe,
        teacher: MaskedModel,
        student: Di4CStudent,
        data: "TokenData | None",
        label_smoothing: float,
        runtime: Runtime,
    ) -> Task:
        return Di4CTask(recipe, teacher, student, required(data), runtime)

    def student_settings(self, recipe: Any) -> dict[str, Any]:
        unconditional = recipe.teacher_unconditional
        return {**super().student_settings(recipe), "teacher_unconditional": unconditional}

    def cost(self, recipe: Di4CRecipe) -> Cost:
        latents, chunk = recipe.num_latents, recipe.latent_chunk
        recomputed = 0 < chunk < latents
        return Cost(
            {
                "teacher": 1,
                "student after the teacher's step": latents,
                "student forward and backward": (3 + recomputed) * latents,
            },
            rows=chunk or latents,
            takes_latent=True,
        )
