"""A distillation method, registered outside the package: distilled, benched and reported."""

import json
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest

from bench.protocol import protocol_text
from dimo.cli import main
from dimo.methods import METHODS, Method
from dimo.methods.base import (
    ALL_MASKED,
    Cost,
    Distillation,
    DistillationRecipe,
    Task,
    add_mean,
    check,
    frozen_teacher,
    teacher_sha256,
)


@dataclass(frozen=True, kw_only=True)
class ToyRecipe(DistillationRecipe):
    """Matches the teacher's logits at all-masked images."""

    kind: ClassVar[str] = "toy"
    strength: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check(self.strength > 0, "strength", self.strength, "> 0")

    @property
    def method(self):
        return "toy"


class ToyTask(Task):
    def __init__(self, recipe, teacher, student, data, runtime):
        super().__init__(recipe, runtime, teacher_sha256(teacher) + data.sha256)
        self.teacher = frozen_teacher(teacher, recipe.precision, self.device)
        self.student, self.labels = student.to(self.device).train(), data.labels
        self.networks = {"student": self.student, "ema": self.make_ema(self.student)}
        self.updates = {"student": self.make_update(self.student)}

    def step(self, step):
        values, update = {}, self.updates["student"]
        for batch in self.micro_batches(step, "student"):
            labels = self.labels[batch.index % len(self.labels)]
            tokens = labels[:, None].new_full(
                (len(labels), self.student.num_tokens), self.student.mask_token_id
            )
            with self.running(batch, update):
                distance = update.model(tokens, labels) - self.teacher(tokens, labels)
                loss = self.recipe.strength * distance.square().mean()
                update.backward(loss)
            add_mean(values, "loss", loss, 1)
        self.finish(step, "student", values)
        return values


class Toy(Distillation):
    Recipe = ToyRecipe

    def task(self, recipe, teacher, student, data, label_smoothing, runtime):
        return ToyTask(recipe, teacher, student, data, runtime)

    def student_settings(self, recipe):
        return {**ALL_MASKED, "guidance_scale": 1.5}

    def cost(self, recipe):
        return Cost({"teacher": 1, "student forward and backward": 3})


RECIPE = """
kind = "toy"
teacher = "digits"
steps = 3
batch_size = 4
learning_rate = 1e-3
dropout = 0.1
precision = "float32"
"""


@pytest.fixture
def dimo(monkeypatch, capsys, tmp_path):
    """`dimo("distill", ..., code=0)` -> (stdout, stderr), with the toy method registered."""
    monkeypatch.setitem(METHODS, "toy", Method("Toy", Toy))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.toml").write_text(RECIPE)
    text = protocol_text("digits").replace('name = "digits"', 'name = "tiny"')
    text = text.replace("num_images = 5000", "num_images = 200")
    (tmp_path / "tiny.toml").write_text(text.replace("n_bootstrap = 200", "n_bootstrap = 5"))

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["dimo", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert (stop.value.code or 0) == code, err
        return out, err

    return run


def test_a_method_from_outside_is_distilled_benched_and_reported(dimo, tmp_path):
    distill = ("distill", "--method", "toy", "--recipe", "toy.toml")
    cost = json.loads(dimo(*distill, "--dry-run", "--json")[0])
    assert cost["flops"]["parts"] == {"teacher": 1, "student forward and backward": 3}
    assert set(cost["parameters"]) == {"teacher", "student", "ema", "all"}

    out = str(tmp_path / "run")
    dimo(*distill, "--out", out, "--sample-every", "3", "--score-every", "0")
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["loss"] > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["method"], config["recipe"], config["guidance_scale"]) == ("toy", "toy", 1.5)

    bench = ("bench", "--protocol", "tiny.toml", "--no-reference-rows", "--steps", "2", "--json")
    records = json.loads(dimo(*bench, "--student", out)[0])
    (toy,) = (r["method"] for r in records if r["method"]["training"].get("method") == "toy")
    assert toy["name"] == "Toy (run)"
    assert (toy["sampler"], toy["guidance_scale"], toy["num_steps"]) == ("confidence", 1.5, 2)
    assert "Toy (run)" in dimo("report", "--protocol", "tiny.toml")[0]


def test_its_recipe_is_checked_and_its_name_is_known(dimo):
    run = ("distill", "--recipe", "toy.toml", "--out", "run")
    assert "strength = 0.0 is out of range" in dimo(*run, "--set", "strength=0", code=2)[1]
    assert "is one of method 'toy', not 'sdtt'" in dimo(*run, "--method", "sdtt", code=2)[1]
    assert "unknown method 'toi'; allowed:" in dimo(*run, "--method", "toi", code=2)[1]
