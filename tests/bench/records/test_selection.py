"""What settings are chosen by: the metric of each protocol, its direction, ties."""

import dataclasses

import pytest

from bench.protocol import load_protocol
from bench.protocol.catalog import METRICS
from bench.records.selection import CRITERIA, Criterion, Trial, criterion_of


@pytest.mark.parametrize(
    ("protocol", "metric", "words"),
    [
        ("digits", "fid", "lowest FID"),
        ("imagenet256-adm", "fid", "lowest FID"),
        ("imagenet256-dgm", "fd_dinov2", "lowest FD-DINOv2"),
        ("scenes-geneval", "geneval", "highest GenEval"),
        ("geneval-hf", "geneval", "highest GenEval"),
    ],
)
def test_a_protocol_has_its_criterion(protocol: str, metric: str, words: str) -> None:
    found = criterion_of(load_protocol(protocol))
    assert found == Criterion(metric)
    assert found.words == words


def test_a_detector_decides_before_features() -> None:
    fid = load_protocol("digits").metrics[0]
    scenes = load_protocol("scenes-geneval")
    both = dataclasses.replace(scenes, metrics=(fid, *scenes.metrics))
    assert criterion_of(both) == Criterion("geneval")


def test_a_supplementary_metric_decides_nothing() -> None:
    digits = load_protocol("digits")
    fid = dataclasses.replace(digits.metrics[0], supplementary=True)
    assert criterion_of(dataclasses.replace(digits, metrics=(fid, *digits.metrics[1:]))) is None


@pytest.mark.parametrize("protocol", ["imagenet256-cmmd", "hpsv2-v2.1"])
def test_other_protocols_have_none(protocol: str) -> None:
    assert criterion_of(load_protocol(protocol)) is None


def test_the_best_is_the_first_of_the_metric_s_direction() -> None:
    values = [0.5, 0.25, 0.75, 0.25, 0.75]
    assert Criterion("fid").best(values) == 1
    assert Criterion("fd_dinov2").best(values) == 1
    assert Criterion("geneval").best(values) == 2


def test_every_criterion_is_a_metric_that_a_trial_can_have() -> None:
    fields = {field.name for field in dataclasses.fields(Trial)} - {"settings", "other_scores"}
    assert fields == set(CRITERIA) <= set(METRICS)
