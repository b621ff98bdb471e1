"""Ablations: grouping, means over seeds in closed form, and what is kept apart."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from bench.records.record import ResultRecord
from bench.report import Report, report_csv, report_json, report_latex, report_markdown
from bench.report.measured import ablations
from bench.report.table import varied_keys

RecordMaker = Callable[..., ResultRecord]


@pytest.fixture
def make_student(make_record: RecordMaker) -> Callable[..., ResultRecord]:
    numbers = iter(range(1, 1000))

    def make(fid: float, seed: Any, varied: Any, **changes: Any) -> ResultRecord:
        training = {"method": "dimo", "recipe": "digits-full", "seed": seed, "ablation": varied}
        training |= {"images_seen": 768_000, "seconds": 900.0 + 10 * seed}
        number = next(numbers)
        settings: dict[str, Any] = {"section": "Distill.", "metrics": {"fid": fid}, "num_steps": 1}
        settings |= {"number": number, "weights_sha256": f"{number:064x}", "training": training}
        return make_record("Di[M]O", **(settings | changes))

    return make


def test_means_and_half_ranges_over_seeds(make_student: Callable[..., ResultRecord]) -> None:
    records = [
        make_student(0.5, 0, {"beta": 0.5, "init_mask_ratio": 0.6}),
        make_student(0.7, 1, {"beta": 0.5, "init_mask_ratio": 0.6}),
        make_student(0.9, 2, {"init_mask_ratio": 0.6, "beta": 0.5}),
        make_student(0.4, 0, {"beta": -0.2, "init_mask_ratio": 0.6}),
        make_student(0.3, 1, {"beta": -0.2, "init_mask_ratio": 0.6}),
        make_student(0.8, 0, {"beta": 10, "init_mask_ratio": 0.6}),
    ]
    (table,) = ablations(records, ["fid", "recall"])
    assert table.subject == ("digits", "dimo", "digits-full")
    assert table.keys == ("beta", "init_mask_ratio")
    assert table.settings == ()
    frame = table.frame
    assert list(frame["recipe.beta"]) == [-0.2, 0.5, 10]
    assert list(frame["seeds"]) == [2, 3, 1]
    assert frame["fid"].tolist() == pytest.approx([0.35, 0.7, 0.8])
    assert frame["fid_half"].tolist() == [pytest.approx(0.05), pytest.approx(0.2), None]
    assert frame["fid_values"].tolist() == [[0.4, 0.3], [0.5, 0.7, 0.9], [0.8]]
    assert frame["seconds"].tolist() == [905, 910, 900]
    assert frame["images_seen"].tolist() == [768_000] * 3
    assert frame["steps"].tolist() == frame["recall"].tolist() == [None] * 3


def test_what_differs_otherwise_is_never_averaged(
    make_student: Callable[..., ResultRecord],
) -> None:
    records = [
        make_student(0.5, 0, {"beta": 0.5}),
        make_student(0.6, 1, {"beta": 0.5}, temperature=0.4),
        make_student(0.7, 0, {"embedding_noise": 0.1}),
        make_student(0.8, 0, {"beta": 0.5}, teacher="maskgit"),
    ]
    tables = ablations(records, ["fid"])
    found = [(t.subject[0], t.keys, t.settings, t.frame["fid"].tolist()) for t in tables]
    assert found == [
        ("digits", ("beta",), ("temperature",), [0.6, 0.5]),
        ("digits", ("embedding_noise",), (), [0.7]),
        ("maskgit", ("beta",), (), [0.8]),
    ]


def test_a_newer_result_of_one_training_seed_replaces_the_older(
    make_student: Callable[..., ResultRecord],
) -> None:
    records = [make_student(fid, 0, {"beta": 0.5}) for fid in (0.5, 0.7)]
    (table,) = ablations(records[::-1], ["fid"])
    assert table.frame["fid_values"].tolist() == [[0.7]]


@pytest.mark.parametrize("varied", [{}, None, [1]])
def test_what_is_no_table_of_keys_is_no_ablation(make_record: RecordMaker, varied: Any) -> None:
    assert not varied_keys(make_record(training={"ablation": varied}))
    assert not varied_keys(make_record())


def test_ablations_are_in_their_own_table_only(
    make_student: Callable[..., ResultRecord],
    make_record: RecordMaker,
    collected: Callable[..., Report],
) -> None:
    records = [
        make_student(0.5, 0, {"beta": 0.5}, metrics={"fid": 0.5, "recall": 0.8}),
        make_student(0.7, 1, {"beta": 0.5}, metrics={"fid": 0.7, "recall": 0.9}),
        make_student(0.44, 0, {"beta": 0.2}, metrics={"fid": 0.44, "recall": 0.7}),
        make_record("MaskGIT", number=1001),
    ]
    main = collected(records)
    markdown = report_markdown(main)
    assert [record.method.name for record in main.protocols[0].records] == ["MaskGIT"]
    assert "Not shown: 3 results of ablations; see them with `dimo report --ablation`" in markdown
    assert "Di[M]O" not in markdown.split("**Protocol**")[0]

    ablation = collected(records, ablation=True)
    markdown = report_markdown(ablation)
    assert "MaskGIT" not in markdown
    assert "### Ablation: digits, dimo, digits-full" in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("| 0.")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert cells[0][:2] == ["0.2", "**0.440**"]
    assert cells[1][:2] == ["0.5", "<ins>0.600</ins>±.100"]
    assert cells[1][4] == "**0.850**±.050"
    assert cells[1][-3:] == ["2", "768,000", "905"]
    assert r"\textbf{0.440}" in report_latex(ablation)
    assert report_csv(ablation).splitlines()[0].split(",")[4:7] == ["recipe.beta", "seeds", "steps"]
    (table,) = json.loads(report_json(main))["protocols"][0]["ablations"]
    assert math.isclose(table["rows"][1]["fid"], 0.6)


def test_without_ablations_it_says_how_to_make_one(
    make_record: RecordMaker, collected: Callable[..., Report]
) -> None:
    report = report_markdown(collected([make_record()], ablation=True))
    assert "`dimo distill --ablation KEY`" in report


def test_varied_keys_may_have_any_name(
    make_student: Callable[..., ResultRecord], collected: Callable[..., Report]
) -> None:
    varied = {"steps": 100, "seeds": 3, "fid": "x", "temperature": 0.5}
    report = collected([make_student(0.5, 0, varied)], ablation=True)
    (table,) = json.loads(report_json(report))["protocols"][0]["ablations"]
    assert {key: table["rows"][0][f"recipe.{key}"] for key in varied} == varied
    assert table["rows"][0]["fid"] == 0.5
