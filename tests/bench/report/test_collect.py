"""Which record goes in which table, and what is said of the others."""

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

from bench.protocol import Metric, Protocol, protocol_sha256
from bench.protocol.catalog import ANY
from bench.records.record import Evidence, MetricValue, ProtocolInfo, ResultRecord, seal
from bench.report import (
    Report,
    collect_report,
    difference_table,
    report_csv,
    report_markdown,
    report_plain,
    with_records,
)
from bench.report.html import render_page
from dimo.cli.report import measured_table

RecordMaker = Callable[..., ResultRecord]
FORMATS = {"text": report_plain, "markdown": report_markdown, "csv": report_csv}
EVIDENCE = Evidence((), "a" * 64, "", "digits-cnn", "b" * 64, "digits-all", "c" * 64, 0, (), (), "")


def under(protocol: Protocol) -> ProtocolInfo:
    return ProtocolInfo(protocol.name, protocol.version, protocol_sha256(protocol))


def test_rows_and_records_are_in_the_same_order(study: Report) -> None:
    (part,) = study.protocols
    assert [record.run_id for record in part.records] == part.frame["run_id"].tolist()
    assert [record.method.name for record in part.records] == part.frame["method"].tolist()


def test_each_protocol_has_its_own_table(make_record: RecordMaker, protocol: Protocol) -> None:
    second = dataclasses.replace(protocol, name="second", title="Second")
    newer = dataclasses.replace(protocol, name="second", version=2)
    records = [
        make_record("A"),
        make_record("B", number=2, protocol=under(second)),
        make_record("C", number=3, protocol=under(newer)),
        make_record("D", number=4, protocol=ProtocolInfo("gone", 1, "ef" * 32)),
    ]
    known = [protocol, second, dataclasses.replace(protocol, name="third")]
    chosen = with_records(known, records)
    assert chosen == [protocol, second]
    report = collect_report(records, [], [], protocols=chosen, folder=Path())
    assert report.title == "Results"
    first, other = report.protocols
    assert [record.method.name for record in first.records] == ["A"]
    assert [record.method.name for record in other.records] == ["B"]
    assert first.excluded == ()
    assert [one.record.method.name for one in other.excluded] == ["C", "D"]
    assert "measured under second, version 2, " in other.excluded[0].reason
    markdown = report_markdown(report)
    assert markdown.index("## Handwritten digits") < markdown.index("| A ")
    assert markdown.index("| A ") < markdown.index("## Second") < markdown.index("| B ")


def test_an_open_protocol_has_a_table_for_each_reference(
    make_record: RecordMaker, protocol: Protocol
) -> None:
    reference = dataclasses.replace(protocol.reference, sha256=ANY)
    protocol = dataclasses.replace(protocol, reference=reference)
    other = dataclasses.replace(EVIDENCE, reference_sha256="d" * 64)
    refused = dataclasses.replace(EVIDENCE, nonconforming=("one image short",))
    records = [
        make_record("A", protocol=under(protocol), evidence=EVIDENCE),
        make_record("B", number=2, protocol=under(protocol), evidence=other),
        make_record("C", number=3, protocol=under(protocol), evidence=refused),
    ]
    report = collect_report(records, [], [], protocols=[protocol], folder=Path())
    assert [part.measured_with for part in report.protocols] == [("c" * 64,), ("d" * 64,)]
    assert [len(part.records) for part in report.protocols] == [1, 1]
    assert [one.reason for one in report.protocols[-1].excluded] == ["one image short"]
    markdown = report_markdown(report)
    assert markdown.count("## Handwritten digits\n") == 1
    assert markdown.index("### Measured with `cccccccccccc`") < markdown.index("| A ")
    main, _, apart = markdown.partition("### Off-protocol (not comparable), N = 5,000\n")
    assert "| C " not in main
    assert "| C " in apart
    assert "- Off-protocol: one image short.\n" in apart


def test_off_protocol_rows_of_one_cause_and_n_share_a_table_without_ranks(
    make_record: RecordMaker, collected: Callable[..., Report]
) -> None:
    def quick(name: str, number: int, n: int) -> ResultRecord:
        found = dataclasses.replace(EVIDENCE, nonconforming=(f"{n:,} images; allowed: 5,000",))
        return make_record(name, number=number, n=n, evidence=found)

    looks = [quick("A", 1, 1000), quick("B", 2, 1000), quick("C", 3, 500), quick("A", 4, 1000)]
    only = report_markdown(collected(looks))
    assert render_page(collected(looks)).count("Off-protocol (not comparable), N = ") >= 2
    assert "N = 500\n-------" in measured_table(looks, collected([]).protocols[0].protocol)
    ranked = [make_record(name, number=number) for name, number in (("D", 5), ("E", 6))]
    shown = report_markdown(collected([*ranked, *looks]))
    assert "No results under protocol" not in only
    for report in (only, shown):
        _, first, second = report.split("### Off-protocol (not comparable), N = ")
        assert first.startswith("1,000\n")
        assert [line[2] for line in first.splitlines() if "0.500" in line] == ["A", "B"]
        assert second.startswith("500\n")
        assert [line[2] for line in second.splitlines() if "0.500" in line] == ["C"]
        assert "**0.5" not in first + second
        assert "- Off-protocol: 500 images; allowed: 5,000.\n" in second
    assert "**0.500**" in shown.partition("### Off-protocol")[0]
    assert "Not shown" not in shown


def test_image_sets_of_one_name_are_rows_of_their_own(
    make_record: RecordMaker, collected: Callable[..., Report]
) -> None:
    def of(number: int, path: str, digest: str) -> ResultRecord:
        found = dataclasses.replace(EVIDENCE, images=(path,), images_sha256=digest * 64)
        return make_record("samples", number=number, section="Image sets", evidence=found)

    first, second = of(1, "/x/modelA/run/samples", "a"), of(2, "/x/modelB/run/samples", "b")
    moved = of(3, "/elsewhere/samples", "b")  # the same images: a newer record of one row
    report = collected([first, second, moved])
    assert report.protocols[0].records == (first, moved)
    assert [one.record for one in report.protocols[0].excluded] == [second]
    markdown = report_markdown(collected([first, second]))
    assert "| samples (modelA) " in markdown
    assert "| samples (modelB) " in markdown
    again = of(4, "/x/modelA/run/samples", "c")  # made again in the same folder
    assert "| samples (images cccccccc) " in report_markdown(collected([first, again]))
    assert "| modelA | modelB |" in difference_table(first, second, [], level=0.95)


def test_the_time_is_utc(protocol: Protocol) -> None:
    now = datetime(2026, 1, 2, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    report = collect_report([], [], [], protocols=[protocol], folder=Path(), now=now)
    assert report.generated == "2026-01-01 23:30 UTC"
    assert datetime.strptime(report.generated, "%Y-%m-%d %H:%M %Z").astimezone(UTC)


MIND = Metric("mind", False, {"projections": 1000, "seed": 2020}, supplementary=True)


def with_mind(record: ResultRecord, value: float, projections: float = 1000) -> ResultRecord:
    extra = {"projections": projections, "seed": 2020.0}
    found = MetricValue(value, value * 0.9, value * 1.1, record.num_images, extra)
    return seal(dataclasses.replace(record, metrics=record.metrics | {"mind": found}))


def test_a_supplementary_metric_has_a_column_where_a_record_has_it(
    make_record: RecordMaker, protocol: Protocol
) -> None:
    more = dataclasses.replace(protocol, metrics=(*protocol.metrics, MIND))
    old, other = make_record(num_steps=4), make_record(number=2, num_steps=8)
    varied = {"recipe": "digits", "seed": 0, "ablation": {"beta": 0.5}}
    ablated = make_record("Di[M]O", number=3, section="Distill.", training=varied)
    short = dataclasses.replace(EVIDENCE, nonconforming=("one image short",))
    refused = make_record(number=4, num_steps=2, evidence=short)

    def shown(records: list[ResultRecord], ablation: bool = False) -> dict[str, str]:
        options = {"folder": Path(), "ablation": ablation, "now": datetime(2026, 1, 2, tzinfo=UTC)}
        return {
            name: render(collect_report(records, protocols=[more], **options))
            for name, render in FORMATS.items()
        }

    records = [old, other, ablated, refused]
    for ablation in (False, True):
        without = shown(records, ablation)
        before = collect_report(records, protocols=[protocol], folder=Path(), ablation=ablation)
        for name, render in FORMATS.items():
            assert without[name] == render(before), name
    measured = [old, with_mind(other, 1.25), ablated, refused]
    tables = shown(measured)["markdown"].split("Off-protocol (not")
    assert [("MIND (↓)" in table) for table in tables] == [True, False]
    assert "1.25" in tables[0]
    assert ", mind, mind_low, mind_high, mind_n".replace(" ", "") in shown(measured)["csv"]
    assert "MIND" not in shown(measured, ablation=True)["markdown"]
    tables = shown([old, other, with_mind(ablated, 1.25), with_mind(refused, 1.5)])
    tables = tables["markdown"].split("Off-protocol (not")
    assert [("MIND (↓)" in table) for table in tables] == [False, True]
    assert "MIND (↓)" in shown([old, with_mind(ablated, 1.25)], ablation=True)["markdown"]


def test_supplementary_values_of_other_parameters_are_not_shown(
    make_record: RecordMaker, protocol: Protocol
) -> None:
    more = dataclasses.replace(protocol, metrics=(*protocol.metrics, MIND))
    records = [make_record(num_steps=4), make_record(number=2, num_steps=8)]
    for projections, is_shown in ((1000, True), (500, False)):
        found = [with_mind(records[0], 1.5), with_mind(records[1], 1.25, projections)]
        text = report_markdown(collect_report(found, protocols=[more], folder=Path()))
        assert ("MIND" in text) == is_shown


def test_plain_text_leaves_out_speeds_and_then_supplementary_metrics(
    make_record: RecordMaker, protocol: Protocol
) -> None:
    names = [metric.name for metric in protocol.metrics]
    kid = Metric("kid", False, {}, supplementary=True)
    record = make_record("Di[M]O (a-student)", metrics=dict.fromkeys(names, (0.5, 0.4, 0.6)))
    values = {"kid": MetricValue(0.5, 0.4, 0.6, 5000, {}), **record.metrics}

    def heading(count: int) -> list[str]:
        """With `count` metrics more before the supplementary one."""
        extra = tuple(
            Metric(name, True, {})
            for name in ("hps_anime", "hps_photo", "hps", "clip_score")[:count]
        )
        more = dataclasses.replace(protocol, metrics=(*protocol.metrics, *extra, kid))
        measured = values | {metric.name: values["fid"] for metric in extra}
        one = seal(dataclasses.replace(record, metrics=measured, protocol=under(more)))
        lines = report_plain(collect_report([one], protocols=[more], folder=Path())).splitlines()
        assert max(map(len, lines)) <= 100
        return " ".join(lines[2:6]).split()

    found = [
        (any("KID" in w for w in words), any("/s" in w for w in words))
        for words in map(heading, range(5))
    ]
    assert found[0] == (True, True)
    assert (True, False) in found
