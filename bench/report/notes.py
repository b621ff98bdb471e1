"""What is said next to a table of measured rows, in the same words in every format."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from bench.protocol import Protocol, protocol_sha256
from bench.protocol.catalog import METRICS, NONE
from bench.report import table as cells
from bench.report.collect import Excluded
from bench.report.text import (
    LONGEST_NAME,
    LONGEST_NOTE,
    Line,
    Styled,
    code,
    joined,
    one_line,
    rank_legend,
)

_Row = dict[str, Any]


def table_notes(rows: list[_Row], protocol: Protocol) -> list[Line]:
    """Notes on rows of `results_frame`: uncertainty, ranks, N, ceiling, settings, cost, code."""
    return [
        _uncertainty_note(protocol),
        (*rank_legend(), ", as shown; Reference rows do not compete."),
        *_count_notes(rows, protocol),
        *_ceiling_notes(rows),
        *_selection_notes(rows),
        *_training_notes(rows),
        *_speed_notes(rows),
        *_revision_notes(rows),
    ]


def excluded_notes(excluded: Iterable[Excluded]) -> list[Line]:
    """How many results the table does not show, and why."""
    groups = cells.grouped(excluded, lambda one: one.kind)
    notes: list[Line] = []
    for kind in ("replaced", "ablation", "nonconforming", "other protocol"):
        records = [one.record for one in groups.get(kind, ())]
        if not records:
            continue
        count = f"Not shown: {len(records):,} result{'' if len(records) == 1 else 's'}"
        if kind == "replaced":
            notes.append((f"{count} replaced by a newer one of the same settings.",))
        elif kind == "ablation":
            command = code("dimo report --ablation")
            notes.append((f"{count} of ablations; see them with ", command))
        elif kind == "nonconforming":
            names = ", ".join(map(one_line, dict.fromkeys(r.method.name for r in records)))
            reason = f"{count} of image sets that do not conform to the protocol: "
            notes.append((reason, names, "."))
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
        colors = f", colours by {one_line(detector.colors)}"
        yield ("objects by ", code(detector.name), known, colors)
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


def who(rows: list[_Row]) -> Line:
    """`MaskGIT (16, 8 steps), Di[M]O (1 step)`."""
    lines: list[Line] = []
    for name, group in cells.grouped(rows, lambda row: row["method"]).items():
        steps = [row["num_steps"] for row in group if not cells.is_missing(row["num_steps"])]
        counted = [f" ({_counted([*map(cells.integer, steps)])})"] if steps else []
        lines.append((one_line(name, LONGEST_NAME), *counted))
    return joined(lines)


def _counted(numbers: list[str]) -> str:
    """Numbers of steps in words; only the first of very many."""
    if numbers == ["1"]:
        return "1 step"
    if len(numbers) > 24:
        return f"{', '.join(numbers[:20])} and {len(numbers) - 20:,} other numbers of steps"
    return f"{', '.join(numbers)} steps"


def _uncertainty_note(protocol: Protocol) -> Line:
    bootstrap = protocol.uncertainty
    kinds = [METRICS[metric.name] for metric in protocol.metrics]
    others = [kind.label for kind in kinds if kind.needs not in ("detections", "pairs")]
    resampled = "generated images" if others else "prompts"
    if others and protocol.detector is not None:
        resampled = f"prompts, for {', '.join(others)} of the generated images"
    return (
        f"± is half of the {bootstrap.level * 100:g}% bootstrap interval "
        f"({bootstrap.n_bootstrap:,} resamples of the {resampled}).",
    )


def _count_notes(rows: list[_Row], protocol: Protocol) -> list[Line]:
    def expected(metric: str) -> int:
        tag, prompts = METRICS[metric].tag, protocol.prompts
        if tag and prompts is not None:
            return prompts.tags[tag] * prompts.images_per_prompt
        return protocol.images.num_images

    groups: dict[str, list[_Row]] = {}
    for row in rows:
        counts = {metric.name: row[f"{metric.name}_n"] for metric in protocol.metrics}
        known = {name: int(n) for name, n in counts.items() if not cells.is_missing(n)}
        if any(n != expected(name) for name, n in known.items()):
            shown = " and ".join(f"{count:,}" for count in sorted(set(known.values())))
            groups.setdefault(shown, []).append(row)
    return [(f"N = {shown} for ", *who(group), ".") for shown, group in groups.items()]


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


def _selection_notes(rows: list[_Row]) -> list[Line]:
    chosen = [row for row in rows if row["section"] != "Reference" and row["selected_by"].strip()]
    groups = cells.grouped(
        chosen, lambda row: one_line(row["selected_by"].strip().rstrip("."), LONGEST_NOTE)
    )
    return [
        ("How the settings of ", *who(group), " were chosen: ", words, ".")
        for words, group in groups.items()
    ]


def _speed_notes(rows: list[_Row]) -> list[Line]:
    def place(row: _Row) -> Line:
        batch = cells.integer(row["batch_size"])
        device = one_line(row["device"], LONGEST_NOTE)
        return (device, *[f", batch {batch}"] * (batch != cells.MISSING))

    timed = [row for row in rows if not cells.is_missing(row["images_per_second"])]
    return _by_group("images/s", "on", cells.grouped(timed, place))


def _revision_notes(rows: list[_Row]) -> list[Line]:
    def state(row: _Row) -> Line:
        if cells.is_missing(row["commit"]):
            return ("an unknown commit",)
        changed = not cells.is_missing(row["dirty"]) and bool(row["dirty"])
        return ("commit ", code(row["commit"][:12]), *[" with changes"] * changed)

    return _by_group("Code", "at", cells.grouped(rows, state))


def _training_notes(rows: list[_Row]) -> list[Line]:
    distilled = [row for row in rows if row["section"] == "Distill."]
    groups = cells.grouped(distilled, lambda row: cells.training_cost(row["training"]))
    return [("Training of ", *who(group), f": {cost}.") for cost, group in groups.items() if cost]


def _by_group(what: str, preposition: str, groups: dict[Line, list[_Row]]) -> list[Line]:
    """A note per group, which names its rows if there are several groups."""
    if len(groups) == 1:
        return [(f"{what} {preposition} ", *shared, ".") for shared in groups]
    return [
        (f"{what} of ", *who(rows), f" {preposition} ", *shared, ".")
        for shared, rows in groups.items()
    ]
