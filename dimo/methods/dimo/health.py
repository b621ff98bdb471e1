"""Whether a student still draws the tokens that its teacher would: signals in the log of a run."""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dimo import rng
from dimo.engine.distributed import Runtime
from dimo.engine.tracking import is_due, undisturbed, watch_interval
from dimo.methods.base import add_mean
from dimo.methods.dimo.divergence import certainty
from dimo.methods.dimo.objective import DiMOObjective
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.models import MaskedModel
from dimo.samplers.ordered import sample_random

_CONDITIONS, _IMAGES, _TEACHER_STEPS = 10, 32, 8
_TRAINED = 10_000  # images of a run per condition: both sets then cost less than 1% of it
_SIGNALS = (
    *("token_entropy", "marginal_entropy", "teacher_marginal_entropy"),
    *("token_coverage", "teacher_token_coverage"),
)
# At temperatures 0.5 and 1 a healthy student (digits) left 0.5 to 1.0 nats open and had 98% to 100%
# of its teacher's coverage, a collapsed one (scenes) 0.1 to 0.2 nats and 46% to 60%.
_LEAST_ENTROPY, _LEAST_COVERAGE = 0.4, 0.7


class Health:
    """Compares the tokens that student and teacher draw, about ten times a run.

    Both draw 32 images of each of up to 10 conditions, spread over all and shared by the ranks; the
    teacher once, in up to 8 random-order steps with the recipe's guidance and temperature: the law
    that the student should have. Signals are means over conditions and positions:

    - `marginal_entropy`, `teacher_marginal_entropy`: entropy in nats of the tokens that occur. So
      few images make it too low, and equally so for both.
    - `token_coverage`: fraction of the teacher's tokens that the student draws at the same position
      under the same condition. `teacher_token_coverage`, what another set of the teacher would
      reach, is the fraction of its tokens that it draws there at least twice (Good-Turing).
    """

    def __init__(
        self, recipe: DiMORecipe, objective: DiMOObjective, teacher: MaskedModel, runtime: Runtime
    ) -> None:
        self.recipe, self.objective, self.teacher = recipe, objective, teacher
        self.runtime, self.is_told = runtime, False
        self.interval = watch_interval(None, recipe.steps, "")
        self.of_teacher: list[Tensor] = []

    @torch.no_grad()
    def look(self, student: MaskedModel, step: int) -> dict[str, Tensor]:
        """The signals, as `dimo.methods.base.Task.step` returns them; none unless a look is due."""
        if not is_due(step + 1, self.interval, self.recipe.steps):
            return {}
        self.of_teacher = self.of_teacher or self._draw(self._teacher_tokens)
        nothing = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
        values = {name: nothing.clone() for name in _SIGNALS}  # also on a rank without conditions

        def student_tokens(index: Tensor, labels: Tensor) -> Tensor:
            draws = self.objective.draw(student, self.recipe.seed, index, "health", step=step)
            draws = dataclasses.replace(draws, labels=labels)
            logits, tokens = self.objective.generate(student, draws)
            entropy = certainty(logits, self.recipe.student_temperature)["token_entropy"]
            add_mean(values, "token_entropy", entropy, len(index))
            return tokens

        with undisturbed(student):
            of_student = self._draw(student_tokens)
        for own, teacher in zip(of_student, self.of_teacher, strict=True):
            for key, value in signals(own, teacher).items():
                add_mean(values, key, value, 1)
        self._warn(values, step)
        del values["token_entropy"]  # the log has that of the batches
        return values

    def _warn(self, values: Mapping[str, Tensor], step: int) -> None:
        """Says once, on the first rank, that the student has collapsed."""
        total, weight = self.runtime.ranks.sum_(torch.stack(list(values.values()))).T.tolist()
        means = {key: a / b for key, a, b in zip(values, total, weight, strict=True)}
        text = collapse(means)
        if text is not None and self.runtime.ranks.is_first and not self.is_told:
            self.is_told = True
            self.runtime.warn(f"step {step + 1:,}: {text}")

    def _draw(self, tokens_of: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Tokens [32, L] of each of this rank's conditions.

        `tokens_of` returns tokens [b, L] for the numbers of images and their labels, [b] each, no
        more at a time than in training.
        """
        recipe, known, drawn = self.recipe, self.teacher.num_classes, []
        affordable = max(1, recipe.steps * recipe.batch_size // _TRAINED)
        conditions, ranks = min(_CONDITIONS, known, affordable), self.runtime.ranks
        rows = recipe.batch_size // (ranks.count * recipe.accumulate)
        for number in ranks.split(conditions):
            index = torch.arange(
                number * _IMAGES, (number + 1) * _IMAGES, device=self.runtime.device
            )
            labels = torch.full_like(index, (2 * number + 1) * known // (2 * conditions))
            parts = zip(torch.split(index, rows), torch.split(labels, rows), strict=True)
            drawn.append(torch.cat([tokens_of(*part) for part in parts]))
        return drawn

    def _teacher_tokens(self, index: Tensor, labels: Tensor) -> Tensor:
        recipe, seed = self.recipe, rng.stream_seed(self.recipe.seed, "health")
        return sample_random(
            self.teacher,
            labels,
            rng.ImageNoise(seed, index),
            num_steps=min(_TEACHER_STEPS, self.teacher.num_tokens),
            guidance_scale=recipe.teacher_guidance_scale,
            guidance_rule=recipe.teacher_guidance,
            temperature=recipe.teacher_temperature,
            final_temperature=recipe.teacher_final_temperature,
        ).tokens


def collapse(scalars: Mapping[str, float]) -> str | None:
    """What the means of `token_entropy` and of the signals say of a collapse; None: nothing."""
    entropy, covered = scalars["token_entropy"], scalars["token_coverage"]
    possible = scalars["teacher_token_coverage"]
    if entropy >= _LEAST_ENTROPY or covered >= _LEAST_COVERAGE * possible:
        return None
    return (
        f"the student has collapsed: x_init decides its tokens (token_entropy {entropy:.2f} nats), "
        f"and they cover {covered:.0%} of the teacher's, where a second set of the teacher's would "
        f"cover {possible:.0%}; lower learning_rate, raise auxiliary_steps or set "
        "fully_masked = 0.2, and start again"
    )


def signals(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """The signals of one condition, from tokens [N, L] each; see `Health`."""
    of_student, of_teacher = _occurrences(student, student), _occurrences(teacher, teacher)
    covered = _occurrences(teacher, student) > 0
    return {
        "marginal_entropy": -(of_student / len(student)).log().mean(),
        "teacher_marginal_entropy": -(of_teacher / len(teacher)).log().mean(),
        "token_coverage": covered.double().mean(),
        "teacher_token_coverage": (of_teacher > 1).double().mean(),
    }


def _occurrences(tokens: Tensor, others: Tensor) -> Tensor:
    """How often each token [N, L] occurs at its position among others [M, L]: int64 [N, L]."""
    return (tokens[:, None] == others).sum(1)
