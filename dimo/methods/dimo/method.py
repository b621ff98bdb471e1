"""Di[M]O (Zhu et al., arXiv 2503.15457): what the toolkit asks of a method."""

from typing import TYPE_CHECKING, Any

from dimo.engine.distributed import Runtime
from dimo.methods.base import Cost, Distillation, Task, TeacherDefaults, config_from
from dimo.methods.dimo.draws import Initialization, Masking
from dimo.methods.dimo.objective import DiMOObjective, Guidance
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.methods.dimo.step import DiMOTask
from dimo.models import MaskedModel

if TYPE_CHECKING:
    from dimo.data.tokens import TokenData


def objective_of(recipe: DiMORecipe, *, label_smoothing: float) -> DiMOObjective:
    """The recipe's objective; without a `label_smoothing` of its own it takes the teacher's.

    The smoothing then cancels where p = q.
    """
    own = recipe.label_smoothing
    return config_from(
        DiMOObjective,
        recipe,
        initialization=config_from(Initialization, recipe),
        masking=config_from(Masking, recipe),
        guidance=config_from(Guidance, recipe),
        label_smoothing=label_smoothing if own is None else own,
    )


class DiMO(Distillation):
    """One-step students, distilled without data."""

    Recipe = DiMORecipe

    def prompts_file(self, recipe: DiMORecipe) -> str | None:
        return recipe.prompts

    def task(
        self,
        recipe: DiMORecipe,
        teacher: MaskedModel,
        student: MaskedModel,
        data: "TokenData | None",
        defaults: TeacherDefaults,
        runtime: Runtime,
    ) -> Task:
        objective = objective_of(recipe, label_smoothing=defaults.label_smoothing)
        return DiMOTask(recipe, teacher, student, objective, runtime)

    def student_settings(self, recipe: DiMORecipe) -> dict[str, Any]:
        return {
            "init_mask_ratio": recipe.sampling_mask_ratio,
            "embedding_noise": recipe.embedding_noise,
            "token_initialization": recipe.token_initialization,
        }

    def cost(self, recipe: DiMORecipe) -> Cost:
        """10 forwards with a guided teacher and one auxiliary step; 8 with shared samples."""
        turns, shared = recipe.auxiliary_steps, recipe.is_shared
        guided = recipe.teacher_guidance_scale != 1
        forwards = {
            "student forward and backward": 3,
            "teacher": 1 + guided,
            "auxiliary evaluation": 1 - shared,
            "student re-sample": turns - shared,
            "auxiliary forward and backward": 3 * turns,
        }
        return Cost(
            {part: count for part, count in forwards.items() if count},
            networks={"auxiliary": True},
            kept=1 + shared,
            teacher_batches=1 + guided,
            freezes_embeddings=True,
        )
