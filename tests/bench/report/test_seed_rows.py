"""Rows that differ in the training seed only: one row in the tables, every record in the data."""

import csv
import json
from collections.abc import Callable
from typing import Any

from bench.records.record import ResultRecord
from bench.report import Report, report_csv, report_json, report_markdown
from bench.report.html import render_page

RecordMaker = Callable[..., ResultRecord]


def records(make_record: RecordMaker) -> list[ResultRecord]:
    """A teacher, two seeds of one recipe at two step counts, and one seed of another."""

    def student(name: str, seed: int, fid: float, number: int, **changes: Any) -> ResultRecord:
        training = {"recipe": changes.pop("recipe", "mine"), "images_seen": 1, "seed": seed}
        settings: dict[str, Any] = {"section": "Distill.", "training": training, "number": number}
        settings |= {"weights_sha256": f"{seed}{training['recipe'][0]}" * 32, "selected_by": "set"}
        return make_record(
            name, metrics={"fid": (fid, fid - 0.3, fid + 0.3)}, **settings, **changes
        )

    return [
        make_record("MaskGIT", metrics={"fid": (0.5, 0.4, 0.6)}, selected_by="default"),
        student("SDTT (one)", 0, 0.4, 2),
        student("SDTT (two)", 1, 0.5, 3),
        student("SDTT (one)", 0, 0.8, 4, num_steps=1),
        student("SDTT (two)", 1, 0.9, 5, num_steps=1),
        student("SDTT (alone)", 0, 0.44, 6, recipe="other"),
    ]


def test_tables_have_one_row_and_say_what_it_is(
    make_record: RecordMaker, collected: Callable[..., Report]
) -> None:
    chosen = records(make_record)
    table = report_markdown(collected(chosen))
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    shown = [(row[0], row[1], row[3]) for row in rows if len(row) > 3 and row[1].isdigit()]
    assert shown == [
        ("MaskGIT", "4", "0.500±.100"),
        ("SDTT (alone)<sup>1</sup>", "4", "**0.440**±.300"),
        ("SDTT (mine)<sup>2</sup>", "4", "<ins>0.450</ins>±.050"),  # its best seed has 0.4
        ("", "1", "0.850±.050"),
    ]
    assert table.count("A single training seed") == 1
    assert "- <sup>2</sup> Mean of 2 training seeds ± half of their range" in table
    assert "seeds compete by their mean" in table
    assert report_markdown(collected(chosen[::-1])) == table


def test_without_several_seeds_the_legend_says_nothing_of_them(
    make_record: RecordMaker, collected: Callable[..., Report]
) -> None:
    teacher, one, *_ = records(make_record)
    table = report_markdown(collected([teacher, one]))
    assert "seeds compete" not in table
    assert "A single training seed" in table
    assert "training seed" not in report_markdown(collected([teacher]))


def test_every_record_stays_in_the_data(
    make_record: RecordMaker, collected: Callable[..., Report]
) -> None:
    chosen = records(make_record)
    report = collected(chosen)
    lines = list(csv.DictReader(report_csv(report).splitlines()))
    assert sorted(line["run_id"] for line in lines) == sorted(one.run_id for one in chosen)
    assert [line["training_seed"] for line in lines] == ["", "0", "0", "0", "1", "1"]
    (part,) = json.loads(report_json(report))["protocols"]
    assert len(part["rows"]) == len(part["records"]) == 6
    assert [mean["method"] for mean in part["means"]] == ["SDTT (mine)", "SDTT (mine)"]
    assert part["means"][0]["run_ids"] == [chosen[1].run_id, chosen[2].run_id]
    assert [part["means"][0][f"fid{end}"] for end in ("_low", "_high")] == [0.4, 0.5]


def test_the_page_folds_every_seed_under_its_row(
    make_record: RecordMaker, collected: Callable[..., Report]
) -> None:
    page = render_page(collected(records(make_record)))
    row = page.split("SDTT (mine)<sup>2</sup>")[1].split("</tbody>")[0]
    assert row.count("<dl>") == 2
    assert "name SDTT (one)" in row
    assert "name SDTT (two)" in row
    assert "training.seed 1" in row
