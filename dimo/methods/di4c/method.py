"""di4c and di4c-d (Hayakawa et al., arXiv 2410.08709): a mixture student that learns from data."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dimo.methods.base import Cost, add_mean, check, config_from
from dimo.methods.di4c.network import Di4CStudent
from dimo.methods.di4c.objective import Di4CObjective, LatentMixture
from dimo.methods.masked_data import DataDistillation, DataRecipe, DataTask
from dimo.models.maskgit import MaskGIT


@dataclass(frozen=True, kw_only=True)
class Di4CRecipe(DataRecipe):
    """One di4c distillation; names as in `dimo.methods.di4c.objective`.

    Attributes:
        num_latents: N, latents per image and step.
        latent_chunk: Latents that pass the student at once, with recomputation in the backward
            pass; 0: all, without. Changes memory and speed, and the result only through dropout.
        step_size: delta, length of the teacher's step; the last delta is distilled directly.
        alpha: Largest weight of the data's correlation term: 0 is di4c, above 0 is di4c-d.
        control_variate: Use the control variate in sampled terms.
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
        return "di4c-d" if self.alpha > 0 else "di4c"


class Di4CTask(DataTask):
    """The student learns from the teacher's steps, from its own samples and from data."""

    def __init__(self, recipe: Di4CRecipe, *inputs: Any) -> None:
        super().__init__(recipe, *inputs)
        self.updates = {
            "student": self.make_update(LatentMixture(self.student, recipe.latent_chunk))
        }
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

    Recipe, task_class = Di4CRecipe, Di4CTask

    def network(self, teacher: type[Any]) -> type[Any] | None:
        return Di4CStudent if teacher is MaskGIT else None

    def student_settings(self, recipe: Any) -> dict[str, Any]:
        settings = super().student_settings(recipe)
        return {**settings, "teacher_unconditional": recipe.teacher_unconditional}

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
