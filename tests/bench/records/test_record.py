"""Records: what is written is what is read, and nothing else is."""

import dataclasses
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bench.protocol import load_protocol, protocol_sha256
from bench.records.record import (
    Evidence,
    MetricValue,
    ProtocolInfo,
    ResultRecord,
    load_record,
    new_record,
    record_from_json,
    record_to_json,
    seal,
)
from bench.records.selection import Trial, Tuning
from dimo.errors import DimoError
from dimo.util.files import sha256_bytes

RecordMaker = Callable[..., ResultRecord]


EVIDENCE = Evidence(
    images=("samples",),
    images_sha256="aa" * 32,
    labels_sha256="",
    extractor="digits-cnn",
    extractor_sha256="bb" * 32,
    reference="digits-all",
    reference_sha256="cc" * 32,
    copies=0,
    notes=("labels unknown",),
    nonconforming=(),
    contributions_sha256="dd" * 32,
)


def new(template: ResultRecord, **changes: Any) -> ResultRecord:
    given: dict[str, Any] = {
        "protocol": load_protocol("digits"),
        "method": template.method,
        "metrics": template.metrics,
        "speed": template.speed,
        "seed": 1000,
        "command": "dimo bench",
        "seconds": 1.5,
        "evidence": EVIDENCE,
    }
    return new_record(**(given | changes))


JUDGED = dataclasses.replace(
    EVIDENCE,
    detector="scenes-detector",
    detector_sha256="ee" * 32,
    prompts="scenes-held-out",
    prompts_sha256="ff" * 32,
)


def test_a_detector_is_in_a_file_only_where_there_is_one(make_record: RecordMaker) -> None:
    plain = record_to_json(new(make_record()))
    assert "detector" not in plain
    record = new(make_record(), evidence=JUDGED)
    assert record.format == 2
    assert record_from_json(record_to_json(record), source="x") == record


def test_a_detector_in_an_extractors_place_is_moved(make_record: RecordMaker) -> None:
    """Format 1 without an extractor; the file's hash and text stay those of format 1."""
    none = dataclasses.replace(
        JUDGED, extractor="none", extractor_sha256="", reference="none", reference_sha256=""
    )
    record = make_record(evidence=none)
    assert record.format == 1
    text = record_to_json(record)
    evidence = json.loads(text)["evidence"]
    assert (evidence["extractor"], evidence["reference"]) == ("scenes-detector", "scenes-held-out")
    assert evidence["extractor_sha256"] == "ee" * 32
    assert evidence["reference_sha256"] == "ff" * 32
    assert not {"detector", "detector_sha256", "prompts", "prompts_sha256"} & evidence.keys()
    assert record_from_json(text, source="x") == record


def test_a_detector_beside_an_extractor_has_no_name_in_format_1(make_record: RecordMaker) -> None:
    text = record_to_json(make_record(evidence=JUDGED))
    evidence = record_from_json(text, source="x").evidence
    assert evidence == dataclasses.replace(JUDGED, detector=None, prompts=None)


def edited(record: ResultRecord, edit: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(record_to_json(record))
    edit(data)
    return json.dumps(data)


def test_a_record_survives_its_file(make_record: RecordMaker, tmp_path: Path) -> None:
    record = make_record(
        "Di[M]O | \u2603\n",
        section="Distill.",
        training={"seconds": 1.5, "recipe": "digits", "curve": [1, 2.5, None], "more": {"a": True}},
        metrics={"fid": (0.1 + 0.2, 1e-17, 1e17), "coverage": 0.9},
    )
    path = tmp_path / "record.json"
    path.write_text(record_to_json(record), encoding="utf-8")
    assert load_record(path) == record
    assert record_to_json(load_record(path)) == path.read_text(encoding="utf-8")


def test_the_hash_of_known_content_is_known(make_record: RecordMaker) -> None:
    # The hash is over JSON with sorted keys and no spaces, so that other tools can check it.
    data = json.loads(record_to_json(make_record(protocol=ProtocolInfo("p", 1, "0"))))
    found = data.pop("content_sha256")
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    assert found == sha256_bytes(text.encode())
    assert found == "241a59af0c2bd7f7d112df9ab191122b6edabb259d5eda185bc1b43b4fd93594"


def test_keys_that_came_later_are_written_only_where_they_say_something(
    make_record: RecordMaker,
) -> None:
    later = {"final_temperature", "theta", "random_start", "top_k", "top_p", "network_precision"}
    later |= {"student", "tuning"}
    plain = record_to_json(make_record())
    assert not later & json.loads(plain)["method"].keys()
    record = make_record(theta=0.5, random_start=True, top_k=7)
    text = record_to_json(record)
    assert json.loads(text)["method"].keys() & later == {"theta", "random_start", "top_k"}
    assert record_from_json(text, source="x") == record


def tuning(*fids: float, chosen: int) -> Tuning:
    trials = tuple(Trial({"temperature": float(i + 1)}, fid) for i, fid in enumerate(fids))
    return Tuning(seed=2000, num_images=1000, trials=trials, chosen=chosen)


def test_a_sweep_survives_its_file(make_record: RecordMaker) -> None:
    record = make_record(tuning=tuning(3.0, 1.5, chosen=1))
    text = record_to_json(record)
    assert json.loads(text)["method"]["tuning"] == {
        "seed": 2000,
        "num_images": 1000,
        "trials": [
            {"settings": {"temperature": 1.0}, "fid": 3.0},
            {"settings": {"temperature": 2.0}, "fid": 1.5},
        ],
        "chosen": 1,
    }
    assert record_from_json(text, source="x") == record


def test_a_sweep_names_what_it_chose_by(make_record: RecordMaker) -> None:
    trials = tuple(Trial({"temperature": t}, geneval=score) for t, score in ((1, 0.0), (2, 0.5)))
    record = make_record(tuning=Tuning(2000, 480, trials, 1))
    text = record_to_json(record)
    assert json.loads(text)["method"]["tuning"]["trials"] == [
        {"settings": {"temperature": 1.0}, "geneval": 0.0},
        {"settings": {"temperature": 2.0}, "geneval": 0.5},
    ]
    assert record_from_json(text, source="x") == record
    sweep = record.method.tuning
    assert sweep is not None
    assert (sweep.criterion.words, sweep.values) == ("highest GenEval", (0.0, 0.5))


def test_a_sweep_keeps_the_scores_that_decide_nothing(make_record: RecordMaker) -> None:
    trials = (Trial({"theta": 0.5}, 1.0, other_scores={"recall": 0.8}), Trial({"theta": 0.7}, 2.0))
    record = make_record(tuning=Tuning(2000, 480, trials, 0))
    text = record_to_json(record)
    assert json.loads(text)["method"]["tuning"]["trials"] == [
        {"settings": {"theta": 0.5}, "fid": 1.0, "other_scores": {"recall": 0.8}},
        {"settings": {"theta": 0.7}, "fid": 2.0},
    ]
    assert record_from_json(text, source="x") == record
    assert [trial.metrics for trial in trials] == [{"recall": 0.8, "fid": 1.0}, {"fid": 2.0}]


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (tuning(3.0, 1.5, chosen=0), "'method.tuning.chosen' must be 1"),
        (tuning(1.5, 1.5, chosen=1), "must be 0, the first of lowest FID, not 1"),
        (tuning(chosen=0), "'method.tuning.trials' must not be empty"),
        (
            Tuning(1, 2, (Trial({"theta": 0.5}, 1.0), Trial({"temperature": 1.0}, 2.0)), 0),
            "must all have the same settings",
        ),
        (
            Tuning(1, 2, (Trial({"theta": 0.5}, 1.0), Trial({"theta": 0.7}, geneval=1.0)), 0),
            "must each have one of geneval, fid, fd_dinov2, all the same one",
        ),
        (Tuning(1, 2, (Trial({"theta": 0.5}),), 0), "all the same one"),
        (
            Tuning(1, 2, tuple(Trial({"theta": t}, geneval=t) for t in (0.5, 0.7)), 0),
            "must be 1, the first of highest GenEval, not 0",
        ),
        (Tuning(1, 2, (Trial({"theta": 0.5}, fid=1.0, geneval=1.0),), 0), "all the same one"),
    ],
)
def test_a_sweep_that_contradicts_itself(
    make_record: RecordMaker, sweep: Tuning, words: str
) -> None:
    with pytest.raises(DimoError, match=words):
        make_record(tuning=sweep)


def test_the_results_of_this_repository_are_whole() -> None:
    paths = sorted((Path(__file__).parents[3] / "results").glob("*.json"))
    assert paths
    for path in paths:
        assert record_to_json(load_record(path)) == path.read_text(encoding="utf-8")


def test_new_record_fills_in_where_and_when(make_record: RecordMaker) -> None:
    before = datetime.now(UTC)
    first, second = new(make_record()), new(make_record())
    assert first.run_id != second.run_id
    assert re.fullmatch("[0-9a-f]{32}", first.run_id)
    assert before <= datetime.fromisoformat(first.created) <= datetime.now(UTC)
    assert first.created.endswith("Z")
    assert first.created <= second.created
    protocol = load_protocol("digits")
    assert first.protocol.sha256 == protocol_sha256(protocol)
    assert (first.protocol.name, first.protocol.version) == ("digits", protocol.version)
    assert {"python", "numpy", "torch"} <= first.packages.keys()
    assert record_from_json(record_to_json(first), source="x") == first


def test_lists_become_tuples(make_record: RecordMaker) -> None:
    template = make_record()
    method = dataclasses.replace(template.method, token_counts=[1, 15])  # type: ignore[arg-type]
    assert new(template, method=method).method.token_counts == (1, 15)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (MetricValue(float("nan"), None, None, 9, {}), "'metrics.fid.value' must be a finite numb"),
        (MetricValue("1", None, None, 9, {}), "'metrics.fid.value' must be a finite number"),  # type: ignore[arg-type]
        (MetricValue(1.0, 0.5, None, 9, {}), "'metrics.fid' must have both 'low' and 'high'"),
        (MetricValue(1.0, 2.0, 1.0, 9, {}), "'metrics.fid': 'low' must not be above 'high'"),
        (MetricValue(1.0, None, None, 9.5, {}), "'metrics.fid.n' must be an integer"),  # type: ignore[arg-type]
    ],
)
def test_nothing_ill_typed_is_made(
    make_record: RecordMaker, metric: MetricValue, said: str
) -> None:
    with pytest.raises(DimoError, match=re.escape(said)):
        new(make_record(), metrics={"fid": metric})


@pytest.mark.parametrize("value", [object(), {1: 2}, float("nan"), [b"x"]])
def test_training_facts_are_json(make_record: RecordMaker, value: object) -> None:
    template = make_record()
    method = dataclasses.replace(template.method, training={"fact": value})
    with pytest.raises(DimoError, match=r"'method\.training\.fact"):
        new(template, method=method)


def test_a_record_changed_in_memory_is_not_written(make_record: RecordMaker) -> None:
    changed = dataclasses.replace(make_record(), seed=7)
    with pytest.raises(DimoError, match="'content_sha256' does not match"):
        record_to_json(changed)
    assert record_from_json(record_to_json(seal(changed)), source="x").seed == 7


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d["metrics"]["fid"].update(value=0.01), "'content_sha256' does not match"),
        (lambda d: d["method"].update(nmae=1), "unknown key 'method.nmae'; did you mean 'name'?"),
        (lambda d: d.update(extra=1), "unknown key 'extra'"),
        (lambda d: d["speed"].pop("device"), "missing key 'speed.device'"),
        (lambda d: d.pop("seed"), "missing key 'seed'"),
        (lambda d: d.update(seed="7"), "'seed' must be an integer, not '7'"),
        (lambda d: d.update(seed=True), "'seed' must be an integer, not True"),
        (lambda d: d["method"].update(section="Best"), "must be one of 'Reference', 'Teacher', "),
        (lambda d: d["method"].update(token_counts=[1, "2"]), "'method.token_counts[1]' must be"),
        (lambda d: d["metrics"].update(fid=3), "'metrics.fid' must be a table of named values"),
        (lambda d: d["metrics"]["fid"].update(value=10**400), "must be a finite number"),
        (lambda d: d.update(run_id="../../x"), "'run_id' must be 32 hex digits"),
        (lambda d: d.update(created="yesterday"), "'created' must be like '2026-"),
        (lambda d: d["method"].update(name=" "), "'method.name' must not be empty"),
        (lambda d: d.update(format=3), "'format' is 3, and this dimo reads 1 to 2; update dimo"),
    ],
)
def test_an_edited_file_is_refused_in_one_line(
    make_record: RecordMaker, edit: Callable[[dict[str, Any]], object], said: str
) -> None:
    with pytest.raises(DimoError) as caught:
        record_from_json(edited(make_record(), edit), source="results/a.json")
    message = str(caught.value)
    assert message.startswith("results/a.json: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "the content must be a table of named values, not []"),
        ('{"format": 1, "format": 1}', "key 'format' is written twice"),
    ],
)
def test_a_foreign_file_is_refused(text: str, said: str) -> None:
    with pytest.raises(DimoError, match=re.escape(said)):
        record_from_json(text, source="a.json")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DimoError, match="cannot be read: No such file"):
        load_record(tmp_path / "nowhere.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DimoError, match="not a text file"):
        load_record(tmp_path / "bytes.json")
