"""Training seeds: which records share a row, their mean, and both spreads in a difference."""

import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.metrics.base import Interval, Score
from bench.protocol import Protocol
from bench.records.compare import combined_interval, compare, pack_contributions
from bench.records.record import Evidence, ResultRecord, load_record, seal
from bench.records.seeds import across_seeds, mean_of_seeds
from bench.records.store import append
from bench.report.runs import difference_table
from dimo.util.files import sha256_bytes

RecordMaker = Callable[..., ResultRecord]
RESULTS = Path(__file__).parents[3] / "results"


@pytest.fixture
def make_student(make_record: RecordMaker) -> Callable[..., ResultRecord]:
    """`make_student(number, training seed, fid)` -> a record of a run of recipe digits-full."""

    def make(number: int, trained: Any, fid: float = 0.5, **changes: Any) -> ResultRecord:
        training = {"method": "dimo", "recipe": "digits-full", "images_seen": 768_000}
        training |= {"seconds": 900.0 + number, "seed": trained}
        settings: dict[str, Any] = {"section": "Distill.", "num_steps": 1, "nfe": 1}
        settings |= {"weights_sha256": f"{number:064x}", "training": training}
        settings |= {"metrics": {"fid": fid}, "number": number}
        return make_record(f"Di[M]O (run{number})", **(settings | changes))

    return make


def numbers(rows: list[list[ResultRecord]]) -> list[list[int]]:
    return [[int(record.run_id[:8], 16) for record in row] for row in rows]


def test_the_mean_and_the_range_of_seeds(make_student: RecordMaker) -> None:
    (row,) = across_seeds([make_student(n, seed, f) for n, seed, f in
                           ((3, 10, 0.9), (1, 0, 0.5), (2, 2, 0.7))])  # fmt: skip
    mean = mean_of_seeds(row)
    value = mean.metrics["fid"]
    assert (value.value, value.low, value.high) == (pytest.approx(0.7), 0.5, 0.9)
    assert mean.method.name == "Di[M]O (digits-full)"
    assert mean.speed == row[0].speed
    assert numbers([row]) == [[1, 2, 3]]  # in the order of seeds: 0, 2, 10
    assert mean_of_seeds(row[:1]) is row[0]


def test_the_order_of_records_changes_nothing(make_student: RecordMaker) -> None:
    records = [make_student(n, n % 3, n / 10, temperature=1.0 + n // 3) for n in range(6)]
    expected = sorted(numbers(across_seeds(records)))
    assert expected == [[0, 1, 2], [3, 4, 5]]
    for turn in range(4):
        random.Random(turn).shuffle(records)
        assert sorted(numbers(across_seeds(records))) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.4},
        {"num_steps": 2},
        {"seed": 1001},
        {"n": 1000},
        {"teacher": "maskgit"},
        {"network_precision": "bfloat16"},
        {"training": {"recipe": "digits", "images_seen": 768_000, "seed": 1}},
        {"training": {"recipe": "digits-full", "images_seen": 32_000, "seed": 1}},
        {"training": {"recipe": "digits-full", "images_seen": 768_000, "seed": 1, "method": "x"}},
        {"training": {"recipe": "digits-full", "images_seen": 768_000, "seed": None}},
        {
            "training": {
                **{"recipe": "digits-full", "images_seen": 768_000, "seed": 1},
                "recipe_sha256": "0123456789ab",
            }
        },
    ],
    ids=str,
)
def test_what_differs_otherwise_is_a_row_of_its_own(
    make_student: RecordMaker, change: dict[str, Any]
) -> None:
    assert numbers(across_seeds([make_student(1, 0), make_student(2, 1, **change)])) == [[1], [2]]


def test_two_networks_of_one_seed_are_not_averaged(make_student: RecordMaker) -> None:
    """Their recipe was changed with `--set`, which a record does not tell."""
    records = [make_student(1, 0), make_student(2, 0), make_student(3, 1)]
    assert numbers(across_seeds(records)) == [[1], [2], [3]]
    again = make_student(4, 0, weights_sha256=records[0].method.weights_sha256)
    assert numbers(across_seeds([records[0], again, records[2]])) == [[4, 3]]


def test_the_shipped_student_is_seed_0_of_its_recipe() -> None:
    names = ("digits-dimo-1-e1488114", "digits-full-seed1-1-9ce8cd47", "scenes-dimo-1-94b86615",
             "scenes-seed1-1-96eac750", "maskgit-1-50ef63fe")  # fmt: skip
    records = [load_record(next(RESULTS.glob(f"*{name}.json"))) for name in names]
    rows = across_seeds(records)
    assert [len(row) for row in rows] == [2, 2, 1]
    assert [mean_of_seeds(row).method.name for row in rows] == [
        "Di[M]O (digits-full)", "Di[M]O (scenes)", "MaskGIT",
    ]  # fmt: skip


# --- differences -----------------------------------------------------------------------------


def half(*values: list[float], resampling: float = 0.0, level: float = 0.95) -> float:
    found = combined_interval(5.0, Interval(-resampling, resampling), values, level)
    assert found.low + found.high == pytest.approx(10.0)
    return (found.high - found.low) / 2


def test_the_combined_interval_in_closed_form() -> None:
    """Student's quantile is tan(pi (p - 1/2)) for 1 degree of freedom, for 2 also elementary."""
    assert half([1.0], [2.0], resampling=0.3) == pytest.approx(0.3)
    assert half([3.0, 3.0], [], resampling=0.3) == pytest.approx(0.3)
    one = math.tan(math.pi * 0.475)
    assert half([1.0, 1.5], [2.0]) == pytest.approx(0.25 * one)  # s^2 / k is 0.5^2 / 4
    two = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    assert half([1.0, 1.5], [2.0, 2.5]) == pytest.approx(math.sqrt(0.125) * two)
    z = 1.959963984540054  # v = 2 (0.25)^2, of which half is known: 4 degrees of freedom
    four = 2.7764451051977987
    assert half([1.0, 1.5], resampling=0.25 * z) == pytest.approx(math.sqrt(0.125) * four)


def test_more_spread_is_a_wider_interval_and_sides_are_alike() -> None:
    narrow = half([1.0, 1.1], [2.0, 2.1], resampling=0.1)
    assert half([1.0, 1.3], [2.0, 2.1], resampling=0.1) > narrow > 0.1
    assert half([2.0, 2.1], [1.1, 1.0], resampling=0.1) == pytest.approx(narrow)


@pytest.fixture
def stored(
    make_student: RecordMaker, make_record: RecordMaker, tmp_path: Path
) -> dict[str, ResultRecord]:
    """A teacher, two seeds of one recipe, two of another and one of a third, in a folder."""

    def store(record: ResultRecord) -> ResultRecord:
        shift = int(record.run_id[:8], 16)
        draws = np.random.RandomState(shift).randn(400) + record.metrics["fid"].value
        data = pack_contributions({"fid": Score(0.0, draws)})
        evidence = Evidence((), "a" * 64, "b" * 64, "digits-cnn", "c" * 64, "digits-all", "d" * 64,
                            0, (), (), sha256_bytes(data))  # fmt: skip
        kept = seal(dataclasses.replace(record, evidence=evidence, format=2))
        append(kept, tmp_path, data)
        return kept

    def trained(number: int, seed: int, fid: float, recipe: str) -> ResultRecord:
        training = {"recipe": recipe, "images_seen": 1, "seed": seed}
        return make_student(number, seed, fid, training=training)

    return {
        "teacher": store(make_record("MaskGIT", metrics={"fid": 2.0}, number=9)),
        "a0": store(trained(1, 0, 1.0, "a")),
        "a1": store(trained(2, 1, 1.2, "a")),
        "b0": store(trained(3, 0, 3.0, "b")),
        "b1": store(trained(4, 1, 3.4, "b")),
        "c0": store(trained(5, 0, 4.0, "c")),
    }


@pytest.fixture
def difference(
    stored: dict[str, ResultRecord], tmp_path: Path, protocol: Protocol
) -> Callable[[str, str], Any]:
    file = Path(__file__).parents[1] / "report" / "handwriting.toml"

    def of(first: str, second: str) -> Any:
        (found,) = compare(stored[first], stored[second], protocol=file, results=tmp_path)
        table = difference_table(stored[first], stored[second], [found], level=0.95)
        return found, table

    return of


def test_several_seeds_of_both_sides_are_compared_by_their_means(
    difference: Callable[[str, str], Any],
) -> None:
    found, table = difference("a0", "b0")
    assert (found.first, found.second) == (pytest.approx(1.1), pytest.approx(3.2))
    assert (found.first_seeds, found.second_seeds, found.retraining) == ((0, 1), (0, 1), True)
    assert "| Di[M]O (a) | Di[M]O (b) |" in table
    assert "Means of 2 training seeds and 2 training seeds; the interval covers" in table
    assert found.better == "first"
    assert found == difference("a1", "b1")[0]  # whichever seed is named
    swapped, _ = difference("b0", "a0")
    assert (swapped.low, swapped.high) == (pytest.approx(-found.high), pytest.approx(-found.low))
    assert swapped.better == "second"


def test_a_teacher_is_taken_as_it_is(difference: Callable[[str, str], Any]) -> None:
    found, table = difference("a0", "teacher")
    assert (found.first_seeds, found.second_seeds, found.retraining) == ((0, 1), (), True)
    assert "Means of 2 training seeds and one fixed network" in table


@pytest.mark.parametrize("pair", [("a0", "c0"), ("c0", "teacher"), ("a0", "a1")], ids="-".join)
def test_a_single_seed_is_said_to_be_one(
    difference: Callable[[str, str], Any], stored: dict[str, ResultRecord], pair: tuple[str, str]
) -> None:
    """Also two seeds of one recipe, whose means would be equal."""
    found, table = difference(*pair)
    assert found.first == stored[pair[0]].metrics["fid"].value
    assert len(found.first_seeds) == 1
    assert not found.retraining
    assert found.high - found.low < 0.35  # of resampling 400 differences alone: about 4 * 0.07
    assert table.count("A single training seed") == 1
    assert "arXiv:2606.20536" in table


def test_without_any_student_nothing_is_said_of_seeds(
    difference: Callable[[str, str], Any],
) -> None:
    found, table = difference("teacher", "teacher")
    assert found.low == found.high == 0
    assert "training seed" not in table
