"""`dimo demo` from beginning to end, with a run of three steps."""

import re

import pytest

from dimo.cli import app
from dimo.config import load_distillation, to_toml


@pytest.mark.slow
def test_the_demo_ends_with_the_paper_table_and_runs_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "quick.toml"
    recipe.write_text(to_toml(load_distillation("digits", ["steps=3", "checkpoint_every=3"])))

    def demo():
        app(["demo", "--recipe", str(recipe), "--device", "cpu"], standalone_mode=False)
        return capsys.readouterr().out

    first = demo()
    out = tmp_path / "runs/demo"
    looks, own = first.index("shipped.png"), first.index("(demo)")
    assert looks < first.index("(digits-dimo)") < own  # what is shipped comes before the training
    ratios = re.findall(r"= ([\d.]+) : 1", first)
    assert len(ratios) == 2
    assert float(ratios[0]) > 5  # one step is faster than sixteen
    for name in ("samples.png", "report.html", "student/student.safetensors"):
        assert (out / name).is_file()
    records = sorted((out / "results").glob("*.json"))
    assert len(records) == 9  # real data, tokenizer, five of the teacher, two students
    second = demo()
    assert second.split("(demo)")[-1] == first.split("(demo)")[-1]
    assert sorted((out / "results").glob("*.json")) == records  # nothing is measured twice
