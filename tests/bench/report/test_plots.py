"""What plots show: fronts by brute force, lines of the frame, sweeps and runs; and their files."""

import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from bench.protocol import Protocol
from bench.records.record import ResultRecord, seal
from bench.records.selection import Trial, Tuning
from bench.report import Report, collect_report
from bench.report.curves import run_panels
from bench.report.html import inline_svg
from bench.report.panels import (
    MOST_LINES,
    Panel,
    pareto_front,
    protocol_panels,
    tuning_panels,
)
from bench.report.plots import page_svg, write_plots
from dimo.errors import DimoError

RecordMaker = Callable[..., ResultRecord]


def panels_of(report: Report) -> dict[str, Panel]:
    return {panel.slug: panel for panel in protocol_panels(report.protocols[0])}


def report_of(records: list[ResultRecord], protocol: Protocol) -> Report:
    return collect_report(records, [], [], protocols=[protocol], folder=Path())


@pytest.mark.parametrize(("higher_x", "higher_y"), [(False, False), (True, False), (True, True)])
def test_the_front_is_what_nothing_beats(higher_x: bool, higher_y: bool) -> None:
    rng = random.Random(0)
    points = [(float(rng.randrange(8)), float(rng.randrange(8))) for _ in range(40)]
    sx, sy = (-1 if higher_x else 1), (-1 if higher_y else 1)

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return sx * a[0] <= sx * b[0] and sy * a[1] <= sy * b[1] and a != b

    expected = {p for p in points if not any(beats(q, p) for q in points)}
    assert pareto_front(points, higher_x=higher_x, higher_y=higher_y) == expected


def test_panels_hold_the_numbers_of_the_table(study: Report) -> None:
    panels, frame = panels_of(study), study.protocols[0].frame
    assert list(panels)[:3] == ["fid-against-nfe", "fid-against-speed", "fid-against-steps"]
    shown = {
        (line.label, point.x, point.y, point.low)
        for line in panels["fid-against-steps"].lines
        for point in line.points
    }
    rows = frame[(frame["section"] != "Reference") & frame["fid"].notna()]
    lows = rows["fid_low"].astype(object).where(rows["fid_low"].notna(), None)
    assert shown == set(zip(rows["method"], rows["num_steps"], rows["fid"], lows, strict=True))
    styles = {line.label: line.style for line in panels["fid-against-nfe"].lines}
    for panel in panels.values():
        assert {line.label: line.style for line in panel.lines}.items() <= styles.items()
    assert "Lowest: 0.212, MaskGIT (16 steps)." in panels["fid-against-nfe"].alt
    assert "Pareto front: " in panels["fid-against-nfe"].alt


def test_speeds_of_two_machines_are_never_in_one_plot(
    make_record: RecordMaker, protocol: Protocol
) -> None:
    first = [make_record(number=i, num_steps=i, device="first") for i in (1, 2)]
    second = make_record("Other", number=9, device="second", metrics={"fid": 0.1})
    panel = panels_of(report_of([*first, second], protocol))["fid-against-speed"]
    assert [line.label for line in panel.lines] == ["MaskGIT"]
    assert panel.note.startswith("On first, batch 64.")
    assert "left out: Other" in panel.note


def test_of_many_methods_the_best_are_drawn(make_record: RecordMaker, protocol: Protocol) -> None:
    many = [make_record(f"M{i}", number=i, metrics={"fid": 100.0 - i}) for i in range(30)]
    panel = panels_of(report_of(many, protocol))["fid-against-steps"]
    assert {line.label for line in panel.lines} == {f"M{i}" for i in range(30 - MOST_LINES, 30)}
    assert "the table has 18 more" in panel.note


def test_metrics_are_traded_for_one_another(study: Report) -> None:
    panels, table = panels_of(study), study.protocols[0].table
    fid, precision = panels["fid-against-inception-score"], panels["precision-against-recall"]
    assert (fid.x_label, fid.y_label) == ("IS (higher is better)", "FID (lower is better)")
    assert precision.title == "Precision against recall"
    teacher = next(line for line in fid.lines if line.label == "MaskGIT")
    assert [(p.note, p.x, p.y) for p in teacher.points] == [
        ("1 step", 6.6, 3.59),
        ("4 steps", 9.2, 0.541),
        ("16 steps", 9.55, 0.212),
    ]
    row = table[(table["method"] == "MaskGIT") & (table["num_steps"] == 16)].iloc[0]
    ends = (row["inception_score_low"], row["inception_score_high"])
    assert (teacher.points[-1].x_low, teacher.points[-1].x_high) == ends
    # 16 steps are the best in both; the student is better in precision, not in recall
    assert [p.on_front for p in teacher.points] == [False, False, True]
    assert fid.alt.endswith("Pareto front: MaskGIT (16 steps).")
    assert precision.alt.endswith("Pareto front: MaskGIT (16 steps), Di[M]O (1 step).")
    directions = {slug: panel.higher_x for slug, panel in panels.items() if panel.has_front}
    assert directions == {
        "fid-against-nfe": False,
        "fid-against-speed": True,
        "fid-against-inception-score": True,
        "precision-against-recall": True,
    }


def test_two_points_are_no_trade_off(make_record: RecordMaker, protocol: Protocol) -> None:
    both = {"fid": 1.0, "inception_score": 9.0}
    rows = [make_record(number=n, num_steps=n, metrics=both) for n in (1, 2, 3)]
    assert "fid-against-inception-score" not in panels_of(report_of(rows[:2], protocol))
    assert "fid-against-inception-score" in panels_of(report_of(rows, protocol))


def test_what_a_sweep_tried_is_a_line_of_guidance_per_temperature(
    make_record: RecordMaker, protocol: Protocol
) -> None:
    tried = [(0.8, 2.0, 2.0, 9.0), (0.8, 1.0, 3.0, 5.0), (1.0, 1.0, 4.0, 4.0), (1.0, 2.0, 3.5, 9.5)]
    trials = tuple(
        Trial({"temperature": t, "guidance_scale": s}, fid, other_scores={"inception_score": score})
        for t, s, fid, score in tried
    )
    record = make_record()
    method = dataclasses.replace(record.method, tuning=Tuning(2000, 500, trials, 0))
    tuned = seal(dataclasses.replace(record, method=method))
    panel = tuning_panels(report_of([tuned], protocol).protocols[0])[-1]
    assert (panel.slug, panel.kind) == ("tuning-fid-against-inception-score", "sweep")
    assert [
        (ln.label, [(p.note, p.x, p.y, p.on_front) for p in ln.points]) for ln in panel.lines
    ] == [
        ("MaskGIT, 4 steps, T=0.8", [("s=1", 5, 3, False), ("s=2, chosen", 9, 2, True)]),
        ("MaskGIT, 4 steps, T=1", [("s=1", 4, 4, False), ("s=2", 9.5, 3.5, True)]),
    ]


def test_a_sweep_is_the_best_of_each_value(make_record: RecordMaker, protocol: Protocol) -> None:
    trials = [((0.8, 1.0), 3.0), ((0.8, 2.0), 2.0), ((1.0, 1.0), 1.5), ((1.0, 2.0), 4.0)]
    swept = tuple(Trial({"temperature": t, "guidance_scale": g}, fid) for (t, g), fid in trials)
    record = make_record()
    method = dataclasses.replace(record.method, tuning=Tuning(2000, 500, swept, 2))
    tuned = seal(dataclasses.replace(record, method=method))
    temperature, guidance = tuning_panels(report_of([tuned], protocol).protocols[0])
    points = [(p.x, p.y, p.on_front) for p in temperature.lines[0].points]
    assert points == [(0.8, 2.0, False), (1.0, 1.5, True)]
    points = [(p.x, p.y, p.on_front) for p in guidance.lines[0].points]
    assert points == [(1.0, 1.5, True), (2.0, 2.0, False)]
    assert guidance.y_label == "FID on seed 2000 (lower is better)"
    assert tuning_panels(report_of([record], protocol).protocols[0]) == ()


def test_a_sweep_by_geneval_is_the_highest_of_each_value(
    make_record: RecordMaker, protocol: Protocol
) -> None:
    scores = {(0.8, 1.0): 0.25, (0.8, 3.0): 0.5, (1.0, 1.0): 0.75, (1.0, 3.0): 0.0}
    swept = tuple(
        Trial({"temperature": t, "guidance_scale": g}, geneval=score)
        for (t, g), score in scores.items()
    )
    record = make_record()
    method = dataclasses.replace(record.method, tuning=Tuning(2000, 480, swept, 2))
    tuned = seal(dataclasses.replace(record, method=method))
    temperature, _ = tuning_panels(report_of([tuned], protocol).protocols[0])
    points = [(p.x, p.y, p.on_front) for p in temperature.lines[0].points]
    assert points == [(0.8, 0.5, False), (1.0, 0.75, True)]
    assert temperature.y_label == "GenEval on seed 2000 (higher is better)"
    assert temperature.slug == "tuning-geneval-temperature"
    assert "Highest: 0.75" in temperature.alt


def test_a_curve_says_what_it_scores(tmp_path: Path) -> None:
    scores = ("geneval", 0.0), ("fid", 3.5)
    for name, score in scores:
        (tmp_path / name).mkdir()
        line = {"step": 0, name: score, "images": 20, "seed": 7, "seconds": 1.0}
        (tmp_path / name / "curve.jsonl").write_text(json.dumps(line) + "\n")
    fid, geneval = run_panels(tmp_path)
    assert (fid.title, fid.y_label) == ("FID on the selection seed", "FID (lower is better)")
    assert geneval.y_label == "GenEval (higher is better)"
    assert (fid.higher_is_better, geneval.higher_is_better) == (False, True)
    assert geneval.lines[0].points[0].y == 0  # nothing right yet is a score too


def test_runs_are_read_and_nothing_else(tmp_path: Path) -> None:
    for name, scale in (("b", 2.0), ("a", 1.0)):
        (tmp_path / name).mkdir()
        lines = [{"step": s, "student_loss": scale / s, "skipped": 0} for s in range(1, 1001)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    line = {"step": 10, "fid": 3.5, "images": 20, "seed": 7, "seconds": 1.0}
    (tmp_path / "a" / "curve.jsonl").write_text(json.dumps(line) + "\n")
    curve, loss = run_panels(tmp_path)
    assert [(ln.label, [(p.x, p.y) for p in ln.points]) for ln in curve.lines] == [
        ("a", [(10.0, 3.5)])
    ]
    assert [line.label for line in loss.lines] == ["a", "b"]
    assert len(loss.lines[0].points) <= 400
    assert loss.lines[1].points[-1] == dataclasses.replace(loss.lines[1].points[-1], x=1000, y=2e-3)
    assert run_panels(tmp_path / "b")[0].lines[0].label == "b"
    (tmp_path / "a" / "curve.jsonl").write_text('{"fid": 1}\n')
    with pytest.raises(DimoError, match=r"curve\.jsonl is damaged"):
        run_panels(tmp_path)
    with pytest.raises(DimoError, match="contains no run"):
        run_panels(tmp_path / "nothing")


def test_files_are_the_same_bytes_each_time(
    make_record: RecordMaker, protocol: Protocol, tmp_path: Path
) -> None:
    report = report_of([make_record(), make_record(number=2, num_steps=8, nfe=16)], protocol)
    first, second = (write_plots(report, tmp_path / name) for name in ("one", "two"))
    assert [path.name for path in first] == [
        f"handwriting-fid-against-{what}.{kind}"
        for what in ("nfe", "speed", "steps")
        for kind in ("svg", "png")
    ]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    drawn = ET.fromstring(first[0].read_bytes())
    words = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"MaskGIT", "FID against network forwards", "8", "16"} <= set(words)
    assert b"<dc:date>" not in first[0].read_bytes()


def test_a_picture_of_the_page_has_its_colours_and_ids_of_its_own(study: Report) -> None:
    panel = panels_of(study)["fid-against-nfe"]
    svg = inline_svg(page_svg(panel), prefix="x", label='a "label" <b>')
    root = ET.fromstring(svg)
    assert root.get("aria-label") == 'a "label" <b>'
    assert "<style" not in svg
    assert not re.search("#[0-9a-f]{6}", svg)
    used = set(re.findall(r"var\((--\w+)\)", svg))
    assert {"--ink", "--faint", "--muted", "--c0"} <= used
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert ids
    assert all(name.startswith("x-") for name in ids)
    assert all(
        use.get("href", "")[1:] in ids for use in root.iter("{http://www.w3.org/2000/svg}use")
    )


def test_hostile_names_are_drawn_as_they_are(
    make_record: RecordMaker, protocol: Protocol, tmp_path: Path
) -> None:
    nasty = [
        "<script>a()</script>",
        "$x^2$ \\frac",
        "\u202e\x00 a\nb",
        "\u96ea" * 999,
        "../../x",
    ]
    records = [make_record(text, number=i, device=text) for i, text in enumerate(nasty)]
    written = write_plots(report_of(records, protocol), tmp_path / "plots")
    assert len(written) == 6
    assert sorted(tmp_path.rglob("*.*")) == sorted(written)
    for path in written[::2]:
        found = list(ET.parse(path).iter())
        tags = {element.tag.rpartition("}")[2] for element in found}
        assert not tags & {"script", "image", "foreignObject", "a"}
        if "speed" not in path.name:  # each was timed on a machine of its own
            assert {"<script>a()</script>", "$x^2$ \\frac"} <= {e.text for e in found}
