"""Signals of a run's health: from counts, from shipped students, and what is said of a collapse."""

import math

import pytest
import torch

from dimo.config import load_distillation
from dimo.engine.distributed import Ranks, Runtime
from dimo.methods.dimo import health
from dimo.methods.dimo.health import Health, signals
from dimo.methods.dimo.method import objective_of
from dimo.util.terminal import ignore
from dimo.zoo.loading import load_student, load_teacher

CPU = torch.device("cpu")
RECIPE = load_distillation("digits", ["steps=1000", "batch_size=100"])


class Apart(Ranks):
    """Ranks that are not connected."""

    def sum_(self, values):
        return values


def health_of(ranks=None, recipe=RECIPE, warn=ignore):
    teacher = load_teacher("digits", device=CPU).model
    objective = objective_of(recipe, label_smoothing=0.0)
    return Health(recipe, objective, teacher, Runtime(CPU, ranks or Ranks(), warn=warn))


def means_of(sums):
    return {key: float(value[0] / value[1]) for key, value in sums.items()}


def test_the_signals_count_tokens_by_position():
    teacher = torch.tensor([[0, 0], [0, 1], [1, 2], [2, 3]])  # 4 images of 2 tokens
    student = torch.tensor([[0, 3], [0, 3], [0, 3], [1, 3]])
    found = {key: float(value) for key, value in signals(student, teacher).items()}
    entropy = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    assert found == pytest.approx(
        {
            "marginal_entropy": (entropy + 0) / 2,
            "teacher_marginal_entropy": (1.5 * math.log(2) + math.log(4)) / 2,
            "token_coverage": (3 + 1) / 8,
            "teacher_token_coverage": 2 / 8,
        }
    )
    assert signals(teacher, student)["token_coverage"] == (4 + 4) / 8  # the other way round


def test_the_ranks_share_the_conditions():
    student = load_student("digits-dimo", device=CPU).model
    alone = health_of().look(student, 99)
    parts = [health_of(Apart(rank, 2)).look(student, 99) for rank in (0, 1)]
    assert alone["token_coverage"][1] == 10  # conditions
    for key, value in alone.items():
        torch.testing.assert_close(parts[0][key] + parts[1][key], value)


def test_a_short_run_looks_at_few_conditions_and_every_run_at_its_end():
    short = health_of(recipe=load_distillation("digits", ["steps=60", "batch_size=8"]))
    assert [step for step in range(60) if short.look(short.teacher, step)] == [49, 59]
    assert short.look(short.teacher, 59)["token_coverage"][1] == 1


def test_looking_leaves_the_student_as_it_was():
    watch, student = health_of(), load_student("digits-dimo", device=CPU).model.train()
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    first = watch.look(student, 99)
    assert student.training
    assert torch.rand(3).equal(wanted)
    assert all(value.equal(first[key]) for key, value in watch.look(student, 99).items())


def test_the_shipped_student_is_healthy_and_one_of_a_single_token_is_not():
    told = []
    watch, student = health_of(warn=told.append), load_student("digits-dimo", device=CPU).model
    healthy = means_of(watch.look(student, 99))
    assert healthy["token_coverage"] > 0.9 * healthy["teacher_token_coverage"]
    assert abs(healthy["marginal_entropy"] - healthy["teacher_marginal_entropy"]) < 0.3
    assert told == []
    with torch.no_grad():
        student.bias[..., 7] = 100
    for step in (199, 299):
        assert means_of(watch.look(student, step))["marginal_entropy"] < 0.01
    assert len(told) == 1
    assert told[0].startswith("step 200: the student has collapsed: x_init decides its tokens")


def test_distill_says_that_a_run_collapses(dimo, monkeypatch):
    monkeypatch.setattr(health, "_LEAST_ENTROPY", math.inf)
    monkeypatch.setattr(health, "_LEAST_COVERAGE", math.inf)
    settings = ("steps=2", "batch_size=2", "precision=float32")
    options = [part for setting in settings for part in ("--set", setting)]
    quiet = ("--score-every", 0, "--sample-every", 0)
    _, err = dimo("distill", "--teacher", "digits", "--out", "run", *options, *quiet)
    assert err.count("step 2: the student has collapsed") == 1
