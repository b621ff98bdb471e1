"""What is said next to a table of measured rows, in the same words in every format."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.protocol import Protocol, protocol_sha256
from bench.protocol.catalog import METRICS, NONE
from bench.protocol.networks import DETECTORS
from bench.records.record import ResultRecord
from bench.records.seeds import SINGLE_SEED, SOURCE, grouped
from bench.report import table as cells
from bench.report.collect import Excluded, ProtocolReport
from bench.report.text import (
    LONGEST_NOTE,
    Footnotes,
    Line,
    Styled,
    code,
    joined,
    one_line,
    rank_legend,
)

_Row = dict[str, Any]


def table_notes(rows: list[_Row], part: ProtocolReport) -> list[Line]:
    """Notes on all rows of the table: uncertainty, ranks, ceiling, device, code."""
    shown: Line = (*rank_legend(), ", as shown; ")
    if len(rows) < len(part.records):
        shown += ("seeds compete by their mean (", code("dimo compare"), " weighs the ±); ")
    competing = sum(row["section"] != "Reference" for row in rows)
    return [
        uncertainty_note(part.protocol),
        *[(*shown, "Reference rows do not compete.")] * (competing > 1),
        *_ceiling_notes(rows),
        *[("images/s on ", *place, ".") for place in _places(rows)[:1]],
        *_commit_notes(cells.rows(part.frame)),
    ]


def row_notes(
    rows: list[_Row], seeds: Iterable[Sequence[ResultRecord]], protocol: Protocol
) -> tuple[list[Line], list[Line]]:
    """The footnote marks of each row, and the footnotes: N, seeds, tuned settings, another device.

    What all rows but those of the reference share is a note without a mark. `seeds` are the records
    behind each row.
    """
    places, footnotes = _places(rows), Footnotes()
    notes: list[list[Line]] = []
    for row, records in zip(rows, seeds, strict=True):
        of_row, words = [_count_note(row, protocol), _seeds_note(records)], _how_chosen(row)
        tuned = any(record.method.tuning is not None for record in records)
        if tuned or words.startswith(("lowest ", "highest ")):
            of_row.append(("Settings tuned: ", words, "."))
        if (place := _speed_place(row)) and place != places[0]:
            of_row.append(("images/s on ", *place, "."))
        notes.append([note for note in of_row if note])
    compared = [of for of, row in zip(notes, rows, strict=True) if row["section"] != "Reference"]
    common = [note for note in (compared or notes)[0] if all(note in of for of in compared)]
    marks = [footnotes.mark(*(note for note in of if note not in common)) for of in notes]
    return marks, [*footnotes.notes, *common]


def excluded_notes(excluded: Iterable[Excluded]) -> list[Line]:
    """How many results no table shows, and why."""
    groups = grouped(excluded, lambda one: one.kind)
    notes: list[Line] = []
    for kind in ("replaced", "ablation", "other protocol"):
        records = [one.record for one in groups.get(kind, ())]
        if not records:
            continue
        count = f"Not shown: {len(records):,} result{'' if len(records) == 1 else 's'}"
        if kind == "replaced":
            notes.append((f"{count} replaced by a newer one of the same settings.",))
        elif kind == "ablation":
            command = code("dimo report --ablation")
            notes.append((f"{count} of ablations; see them with ", command, "."))
        else:
            infos = Counter(
                (r.protocol.name, r.protocol.version, r.protocol.sha256) for r in records
            )
            listed: list[Line] = [
                (code(name), f", version {version}, ", code(sha256[:12]), f" ({times})")
                for (name, version, sha256), times in sorted(infos.items())
            ]
            notes.append((f"{count} measured under another protocol: ", *joined(listed, "; "), "."))
    return notes


def caption(protocol: Protocol) -> Line:
    """What the protocol fixes, in one sentence: its name and hash, N, networks, reference."""
    params = {key: value for metric in protocol.metrics for key, value in metric.params.items()}
    rules = [_images_rule(protocol), *_network_rules(protocol)]
    if "splits" in params:
        rules.append((f"IS over {params['splits']} splits",))
    if "k" in params:
        rules.append((f"k = {params['k']} nearest neighbours",))
    paper = one_line(protocol.paper, LONGEST_NOTE)
    name: Line = (Styled("Protocol", "strong"), " ", *protocol_name(protocol), ": ")
    return (*name, *joined(rules, "; "), ". Source: ", paper, ".")


def _images_rule(protocol: Protocol) -> Line:
    images, prompts = protocol.images, protocol.prompts
    height, width = images.resolution
    size = f"{height} x {width}" if height else "of any size"
    seed = f", {size}, seed {protocol.seeds.report}"
    each = f"N = {images.num_images:,} images a row, {images.num_images // images.num_classes:,} "
    each += f"for each of {images.num_classes:,} "
    if prompts is None:
        return (f"{each}labels{seed}",)
    return (f"{each}prompts of ", code(prompts.name), seed if height else f", {size}")


def _network_rules(protocol: Protocol) -> Iterator[Line]:
    """The networks that see the images and what the images are compared with."""
    reference, detector, scorer = protocol.reference, protocol.detector, protocol.scorer
    if protocol.extractor.name != NONE:
        yield ("features of ", code(protocol.extractor.name))
    if reference.name != NONE:
        yield ("reference ", code(reference.name), f", {reference.count:,} images")
    if detector is not None:
        right = detector.accuracy.values()
        known = f", right on {sum(right) / len(right):.2%} of known images" if right else ""
        colors = f", colours by {one_line(detector.colors)}" if detector.colors else ""
        what = "answers of " if DETECTORS[detector.name].reader else "objects by "
        yield (what, code(detector.name), known, colors)
    if scorer is not None:
        resized, prefix = scorer.preprocessing, scorer.prefix
        yield (
            "scores of ",
            code(f"{scorer.name} {scorer.version}".strip()),
            *((", ", one_line(scorer.model)) if scorer.model else ()),
            *((", images resized by ", code(resized)) if resized else ()),
            *((", prefix ", code(prefix.strip())) if prefix else ()),
        )


def protocol_name(protocol: Protocol) -> Line:
    """Name, version and the first digits of the hash."""
    digest = protocol_sha256(protocol)[:12]
    return (code(protocol.name), f", version {protocol.version}, ", code(digest))


_OF_PROMPTS = ("detections", "answers", "pairs", "reconstruction")  # not of generated images


def uncertainty_note(protocol: Protocol) -> Line:
    bootstrap = protocol.uncertainty
    kinds = [METRICS[metric.name] for metric in protocol.metrics]
    others = [kind.label for kind in kinds if kind.needs not in _OF_PROMPTS]
    resampled = "generated images" if others else "prompts"
    if others and protocol.detector is not None:
        resampled = f"prompts, for {', '.join(others)} of the generated images"
    return (
        f"± is half of the {bootstrap.level * 100:g}% bootstrap interval "
        f"({bootstrap.n_bootstrap:,} resamples of the {resampled}).",
    )


def _count_note(row: _Row, protocol: Protocol) -> Line:
    """The numbers of images that a row has instead of the protocol's; empty: it has those."""

    def expected(metric: str) -> int:
        tag, prompts = METRICS[metric].tag, protocol.prompts
        if tag and prompts is not None:
            return prompts.tags[tag] * prompts.images_per_prompt
        return protocol.images.num_images

    counts = {metric.name: row[f"{metric.name}_n"] for metric in protocol.metrics}
    known = {name: int(n) for name, n in counts.items() if not cells.is_missing(n)}
    if all(n == expected(name) for name, n in known.items()):
        return ()
    return (f"N = {' and '.join(f'{count:,}' for count in sorted(set(known.values())))}.",)


def _seeds_note(records: Sequence[ResultRecord]) -> Line:
    """How many training runs a row rests on; empty: no student's, or nothing is known of it."""
    if len(records) > 1:
        spread = "± half of their range, resampling not included; images/s of the first"
        return (f"Mean of {len(records)} training seeds {spread}.",)
    if not records[0].method.training:
        return ()
    return (f"{SINGLE_SEED} ({SOURCE}).",)


def _ceiling_notes(rows: list[_Row]) -> list[Line]:
    ceilings = sorted(
        f"{row['coverage_ceiling']:.3f}"
        for row in rows
        if row["section"] != "Reference" and not cells.is_missing(row["coverage_ceiling"])
    )
    if not ceilings:
        return []
    shown = " to ".join(dict.fromkeys((ceilings[0], ceilings[-1])))
    note = f"Coverage has a ceiling of {shown}: what as many images drawn from the reference's "
    return [(f"{note}own distribution are expected to reach.",)]


def _how_chosen(row: _Row) -> str:
    """How the settings of a row were chosen, without a full stop; empty: there are none."""
    if row["section"] == "Reference":
        return ""
    return one_line(row["selected_by"].strip().rstrip("."), LONGEST_NOTE)


def _speed_place(row: _Row) -> Line:
    """What images/s were measured on; empty: they were not."""
    if cells.is_missing(row["images_per_second"]):
        return ()
    batch = cells.integer(row["batch_size"])
    return (one_line(row["device"], LONGEST_NOTE), *[f", batch {batch}"] * (batch != cells.MISSING))


def _places(rows: list[_Row]) -> list[Line]:
    """What images/s were measured on, the place of most rows first."""
    places = Counter(filter(None, map(_speed_place, rows)))
    return [place for place, _ in places.most_common()]


def _commit(row: _Row) -> str:
    """The code that measured a row: `0123456789ab with changes`."""
    if cells.is_missing(row["commit"]):
        return "unknown"
    changed = not cells.is_missing(row["dirty"]) and bool(row["dirty"])
    return one_line(row["commit"][:12]) + " with changes" * changed


def _commit_notes(rows: list[_Row]) -> list[Line]:
    commits = {_commit(row) for row in rows}
    return [("Every row at commit ", *commits, ".")] if len(commits) == 1 else []


def noted_columns(rows: list[_Row], footnotes: Footnotes) -> dict[str, list[Line]]:
    """Columns by heading: what is too long for a cell is a footnote, shared by equal rows."""
    columns: dict[str, list[Line]] = {}
    commits = [_commit(row) for row in rows]
    if len({*commits}) > 1:
        columns["Commit"] = [(words,) for words in commits]
    facts: dict[str, list[Line]] = {
        "Chosen": [_sentence("Settings chosen: ", _how_chosen(row)) for row in rows],
        "Training": [_sentence("Training: ", _training(row["training"] or {})) for row in rows],
    }
    if len({place for row in rows if (place := _speed_place(row))}) > 1:
        places = map(_speed_place, rows)
        facts["Device"] = [("images/s on ", *place, ".") if place else () for place in places]
    for heading, notes in facts.items():
        if any(notes):
            columns[heading] = [
                footnotes.mark(note) if note else (cells.MISSING,) for note in notes
            ]
    return columns


def _sentence(begin: str, words: str) -> Line:
    return (begin, one_line(words, LONGEST_NOTE), ".") if words else ()


def _training(facts: _Row) -> str:
    """`recipe digits, seconds 372.1, images_seen 76,800`: numbers, texts and what is unknown."""
    shown = []
    for name, value in facts.items():
        if cells.is_number(value):
            shown.append(f"{name} {value:,.6g}" if abs(value) < 1e6 else f"{name} {value:,.0f}")
        elif value is None or isinstance(value, str):
            shown.append(f"{name} {'unknown' if value is None else value}")
    return ", ".join(shown)
