"""Trackers, the curve and the moments to look; that nothing of a network or generator changes."""

import json
import random
import struct
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from bench.images.codec import save_grid
from dimo.engine.tracking import (
    Trackers,
    check_wandb,
    is_due,
    open_tensorboard,
    open_wandb,
    put_on_curve,
    read_curve,
    undisturbed,
    watch_interval,
)
from dimo.errors import DimoError


def read_events(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.mark.parametrize(
    ("steps", "interval"), [(1, 50), (500, 50), (501, 100), (800, 100), (3000, 300), (30000, 3000)]
)
def test_a_run_is_looked_at_about_ten_times(steps, interval):
    assert watch_interval(None, steps, "--sample-every") == interval
    assert interval % 50 == 0


def test_a_given_interval_counts_and_a_negative_one_is_refused():
    assert watch_interval(7, 100, "--sample-every") == 7
    assert watch_interval(0, 100, "--sample-every") == 0
    with pytest.raises(DimoError, match="--sample-every -1 is negative"):
        watch_interval(-1, 100, "--sample-every")


def test_the_first_and_the_last_step_are_due():
    assert [step for step in range(11) if is_due(step, 4, 10)] == [0, 4, 8, 10]
    assert not any(is_due(step, 0, 10) for step in range(11))


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    save_grid(
        tmp_path / "x.png", [("a", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))], columns=["b"]
    )
    trackers = Trackers([lambda done: open_tensorboard(tmp_path / "tb", done)])
    assert not (tmp_path / "tb").exists()  # the run folder must be empty until it starts
    trackers.watch(0, {}, None)
    trackers.watch(50, {"loss": 0.5}, None)
    trackers.scalars(50, {"eval/fid": 2.0})
    trackers.picture(50, "samples", tmp_path / "x.png")
    trackers.close()
    events = read_events(tmp_path / "tb")
    (loss,), (fid,) = events.Scalars("train/loss"), events.Scalars("eval/fid")
    assert (loss.step, loss.value, fid.step, fid.value) == (50, 0.5, 50, 2.0)
    (image,) = events.Images("samples")
    data = (tmp_path / "x.png").read_bytes()
    assert image.encoded_image_string == data
    assert (image.width, image.height) == struct.unpack(">II", data[16:24])


def test_what_was_logged_after_the_checkpoint_is_hidden(tmp_path):
    for done, steps in ((0, (50, 100, 150)), (100, (150, 200))):
        trackers = Trackers([lambda done: open_tensorboard(tmp_path, done)])
        trackers.watch(done, {}, None)
        for step in steps:
            trackers.watch(step, {"loss": done + step}, None)
        trackers.close()
    found = [(event.step, event.value) for event in read_events(tmp_path).Scalars("train/loss")]
    assert found == [(50, 50), (100, 100), (150, 250), (200, 300)]


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DimoError, match=r"cannot write .*choose another --out"):
        open_tensorboard(tmp_path / "file" / "tb", 0)


def test_without_wandb_its_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DimoError, match="install it with: pip install wandb"):
        check_wandb()
    with pytest.raises(DimoError, match="pip install wandb"):
        open_wandb("mine", tmp_path, {}, 0)
    assert not list(tmp_path.iterdir())


def test_modes_and_generators_are_as_before():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    network[2].eval()
    modes = [part.training for part in network.modules()]
    state, python = torch.get_rng_state(), random.getstate()

    def disturb():
        with undisturbed(network):
            assert not any(part.training for part in network.modules())
            torch.rand(5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        disturb()
    assert [part.training for part in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


def test_a_step_has_one_line_on_the_curve(tmp_path):
    path = tmp_path / "curve.jsonl"
    assert read_curve(path) == {}
    for step, fid in ((0, 9.0), (20, 5.0), (10, 7.0), (20, 4.0)):
        put_on_curve(path, {"step": step, "fid": fid})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["fid"]) for line in lines] == [(0, 9.0), (10, 7.0), (20, 4.0)]


@pytest.mark.parametrize("text", ["{", "[1]", '{"fid": 1}', "7"])
def test_a_damaged_curve_is_named(tmp_path, text):
    (tmp_path / "curve.jsonl").write_text(text + "\n")
    with pytest.raises(DimoError, match=r"curve\.jsonl is damaged"):
        read_curve(tmp_path / "curve.jsonl")
