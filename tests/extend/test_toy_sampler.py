"""A sampler with a knob, registered outside the package: benched, recorded and reported."""

import json
import sys

import pytest
import torch

from bench.protocol import protocol_text
from dimo.cli import main
from dimo.errors import DimoError
from dimo.samplers import SAMPLERS, Knob, Sampler, all_knobs
from dimo.samplers.base import Predictor, Samples, draw_tokens


def sample_left_to_right(
    model, condition, noise, *, num_steps, temperature=1.0, sharpness=1.0, callback=None
):
    """Reveals the grid in `num_steps` slices; `sharpness` multiplies log-probabilities."""
    predict = Predictor(model, condition, noise)
    tokens = predict.all_masked()
    slices = torch.arange(model.num_tokens).tensor_split(num_steps)
    for step, positions in enumerate(slices):
        where = positions.expand(len(condition), -1)
        log_p = predict(tokens, step, temperature=temperature)[:, positions]
        drawn = draw_tokens(sharpness * log_p, noise, f"sample/tokens/{step}", where)
        tokens = tokens.scatter(1, where, drawn)
        if callback is not None:
            callback(step, tokens)
    return Samples(tokens=tokens, nfe=predict.nfe, token_counts=[len(part) for part in slices])


SHARPNESS = Knob(
    name="sharpness",
    label="sharpness",
    heading="Sharpness",
    default=1.0,
    rule="above 0; 1 is as trained",
    is_allowed=lambda value: value > 0,
)


@pytest.fixture
def dimo(monkeypatch, capsys, tmp_path):
    """`dimo("bench", ..., code=0)` -> (stdout, stderr), with the toy sampler registered."""
    knobs = (all_knobs()["temperature"], SHARPNESS)
    toy = Sampler("Left to right", sample_left_to_right, knobs)
    monkeypatch.setitem(SAMPLERS, "left_to_right", toy)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["dimo", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert (stop.value.code or 0) == code, err
        return out, err

    text = protocol_text("digits").replace('name = "digits"', 'name = "tiny"')
    text = text.replace("num_images = 5000", "num_images = 200")
    (tmp_path / "tiny.toml").write_text(text.replace("n_bootstrap = 200", "n_bootstrap = 5"))
    return run


def test_a_sampler_from_outside_is_benched_and_reported(dimo):
    bench = ("bench", "--protocol", "tiny.toml", "--no-reference-rows", "--steps", "2")
    samplers = ("--samplers", "left_to_right,random", "--json")
    records = json.loads(dimo(*bench, *samplers, "--set-sampler", "sharpness=1.5")[0])
    toy, random = (record["method"] for record in records)
    assert (toy["name"], toy["section"]) == ("Left to right", "Sampler")
    assert toy["settings"] == {"sharpness": 1.5}
    assert toy["token_counts"] == [8, 8]
    assert "sharpness given on the command line" in toy["selected_by"]
    assert "settings" not in random  # no such knob: its file is as it always was
    dimo(*bench, "--sampler", "left_to_right", "--json")  # a second row, at the default

    report, _ = dimo("report", "-f", "markdown", "--settings", "--protocol", "tiny.toml")
    assert "Left to right (sharpness 1.5)" in report
    assert "| (sharpness 1)" in report  # below the name
    header, _, *rows = report[report.index("### Settings") :].splitlines()[2:6]
    column = [cell.strip() for cell in header.split("|")].index("Sharpness")
    shown = {row.split("|")[1].strip(): row.split("|")[column].strip() for row in rows}
    assert shown["Left to right (sharpness 1.5)"] == "1.5"

    out, _ = dimo("verify", records[0]["run_id"], "--protocol", "tiny.toml", "--json")
    assert json.loads(out)["same_images"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set-sampler", "sharpnes=2"), "did you mean 'sharpness'"),
        (("--set-sampler", "sharpness=big"), "give a number"),
        (("--sampler", "left_to_right", "--set-sampler", "sharpness=0"), "must be above 0"),
        (("--set-sampler", "sharpness=2"), "it applies to left_to_right"),
        (("--sampler", "left_to_right", "--schedule", "cosine"), "has no effect"),
    ],
)
def test_its_knob_is_checked_once(dimo, arguments, words):
    _, err = dimo("bench", "--steps", "2", *arguments, code=2)
    assert words in err
    assert err.count("\n") == 1


def test_a_knob_tells_what_it_takes():
    flag = Knob("flag", "flag", "Flag", False, kind=bool)
    assert flag.parse("true") is True
    with pytest.raises(DimoError, match="--set-sampler flag=maybe is not allowed; give true or"):
        flag.parse("maybe")
