"""What must be said below a table of measured rows, in the same words in every format.

Measured rows as blocks: the table, its caption and notes, and the settings of each row.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from bench.protocol import Protocol, protocol_sha256
from bench.protocol.catalog import METRICS, NONE
from bench.report import table as cells
from bench.report.document import Excluded, ProtocolReport
from bench.report.table import best_and_second, decimals_of
from bench.report.text import (
    LONGEST_NAME,
    LONGEST_NOTE,
    Block,
    Bullets,
    Code,
    Heading,
    Line,
    Mark,
    Paragraph,
    Strong,
    Table,
    Words,
    joined,
)

_Row = dict[str, Any]
_Groups = dict[Line, list[_Row]]


def table_notes(rows: list[_Row], protocol: Protocol) -> list[Line]:
    """Uncertainty, ranks, N, ceiling, choice of settings, training, speed and code of the rows.

    Args:
        rows: Of `bench.report.table.results_frame`, as dicts.
        protocol: What they were measured under.
    """
    names = [metric.name for metric in protocol.metrics]
    return [
        _uncertainty_note(protocol),
        (*rank_legend(), ", as shown; Reference rows do not compete."),
        *_count_notes(rows, names, protocol),
        *_ceiling_notes(rows),
        *_selection_notes(rows),
        *_training_notes(rows),
        *_speed_notes(rows),
        *_revision_notes(rows),
    ]


def excluded_notes(excluded: Iterable[Excluded]) -> list[Line]:
    """How many results the table does not show, and why."""
    found = {
        kind: [one.record for one in excluded if one.kind == kind]
        for kind in ("replaced", "ablation", "nonconforming", "other protocol")
    }
    notes: list[Line] = []
    if records := found["replaced"]:
        words = "replaced by a newer one of the same settings."
        notes.append((f"Not shown: {_results(len(records))} {words}",))
    if records := found["ablation"]:
        command = Code("dimo report --ablation")
        notes.append((f"Not shown: {_results(len(records))} of ablations; see them with ", command))
    if records := found["nonconforming"]:
        what = f"{_results(len(records))} of image sets that do not conform to the protocol"
        named: list[Line] = [
            (Words(name),) for name in dict.fromkeys(record.method.name for record in records)
        ]
        notes.append((f"Not shown: {what}: ", *joined(named), "."))
    if records := found["other protocol"]:
        counts = Counter((r.protocol.name, r.protocol.version, r.protocol.sha256) for r in records)
        listed: list[Line] = [
            (Code(name), f", version {version}, ", Code(sha256[:12]), f" ({count})")
            for (name, version, sha256), count in sorted(counts.items())
        ]
        what = f"{_results(len(records))} measured under another protocol"
        notes.append((f"Not shown: {what}: ", *joined(listed, "; "), "."))
    return notes


def caption(protocol: Protocol) -> Line:
    """What the protocol fixes, in one sentence: its name and hash, N, networks, reference."""
    params = {key: value for metric in protocol.metrics for key, value in metric.params.items()}
    rules = [_images_rule(protocol), *_network_rules(protocol)]
    if "splits" in params:
        rules.append((f"IS over {params['splits']} splits",))
    if "k" in params:
        rules.append((f"k = {params['k']} nearest neighbours",))
    paper = Words(protocol.paper, LONGEST_NOTE)
    name = protocol_name(protocol)
    return (Strong("Protocol"), " ", *name, ": ", *joined(rules, "; "), ". Source: ", paper, ".")


def _images_rule(protocol: Protocol) -> Line:
    images, prompts = protocol.images, protocol.prompts
    height, width = images.resolution
    size = f"{height} x {width}" if height else "of any size"
    seed = f", {size}, seed {protocol.seeds.report}"
    each = f"N = {images.num_images:,} images a row, {images.num_images // images.num_classes:,} "
    each += f"for each of {images.num_classes:,} "
    if prompts is None:
        return (f"{each}labels{seed}",)
    return (f"{each}prompts of ", Code(prompts.name), seed if height else f", {size}")


def _network_rules(protocol: Protocol) -> Iterator[Line]:
    """What the images are seen by and compared with; what a protocol has not is not named."""
    reference, detector, scorer = protocol.reference, protocol.detector, protocol.scorer
    if protocol.extractor.name != NONE:
        yield ("features of ", Code(protocol.extractor.name))
    if reference.name != NONE:
        yield ("reference ", Code(reference.name), f", {reference.count:,} images")
    if detector is not None:
        right = detector.accuracy.values()
        known = f", right on {sum(right) / len(right):.2%} of known images" if right else ""
        yield ("objects by ", Code(detector.name), known, ", colours by ", Words(detector.colors))
    if scorer is not None:
        version = f" {scorer.version}" if scorer.version else ""
        resized = scorer.preprocessing
        prefix: Line = (", prefix ", Code(scorer.prefix.strip())) if scorer.prefix else ()
        yield (
            "scores of ",
            Code(f"{scorer.name}{version}"),
            *((", ", Words(scorer.model)) if scorer.model else ()),
            *((", images resized by ", Code(resized)) if resized else ()),
            *prefix,
        )


def protocol_name(protocol: Protocol) -> Line:
    """Name, version and the first digits of the hash."""
    digest = protocol_sha256(protocol)[:12]
    return (Code(protocol.name), f", version {protocol.version}, ", Code(digest))


def rank_legend() -> Line:
    """What bold and underlined mean."""
    return ("Best in ", Mark("bold", 1), ", second ", Mark("underlined", 2))


def who(rows: list[_Row]) -> Line:
    """`MaskGIT (16, 8 steps), Di[M]O (1 step)`."""
    steps: dict[str, list[str]] = {}
    for row in rows:
        listed = steps.setdefault(row["method"], [])
        listed += [] if cells.is_missing(row["num_steps"]) else [cells.integer(row["num_steps"])]
    return joined(
        (Words(name, LONGEST_NAME), *[f" ({_counted(numbers)})"] * bool(numbers))
        for name, numbers in steps.items()
    )


def _counted(numbers: list[str]) -> str:
    """Steps in words; of very many the first ones."""
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


def _count_notes(rows: list[_Row], metrics: list[str], protocol: Protocol) -> list[Line]:
    groups: _Groups = {}
    for row in rows:
        found = {name: row[f"{name}_n"] for name in metrics}
        found = {name: int(n) for name, n in found.items() if not cells.is_missing(n)}
        counts = set(found.values())
        if any(n != _count_of(name, protocol) for name, n in found.items()):
            shown = " and ".join(f"{count:,}" for count in sorted(counts))
            groups.setdefault((shown,), []).append(row)
    return [("N = ", *shown, " for ", *who(group), ".") for shown, group in groups.items()]


def _count_of(metric: str, protocol: Protocol) -> int:
    """How many images a metric of a row stands on."""
    tag, prompts = METRICS[metric].tag, protocol.prompts
    if tag and prompts is not None:
        return prompts.tags[tag] * prompts.images_per_prompt
    return protocol.images.num_images


def _ceiling_notes(rows: list[_Row]) -> list[Line]:
    ceilings = sorted(
        f"{row['coverage_ceiling']:.3f}"
        for row in rows
        if row["section"] != "Reference" and not cells.is_missing(row["coverage_ceiling"])
    )
    if not ceilings:
        return []
    shown = " to ".join(dict.fromkeys((ceilings[0], ceilings[-1])))
    return [
        (
            f"Coverage has a ceiling of {shown}: what as many images drawn from the reference's "
            "own distribution are expected to reach.",
        )
    ]


def _selection_notes(rows: list[_Row]) -> list[Line]:
    chosen = [row for row in rows if row["section"] != "Reference" and row["selected_by"].strip()]
    groups = _grouped(
        chosen, lambda row: (Words(row["selected_by"].strip().rstrip("."), LONGEST_NOTE),)
    )
    return [
        ("How the settings of ", *who(group), " were chosen: ", *words, ".")
        for words, group in groups.items()
    ]


def _speed_notes(rows: list[_Row]) -> list[Line]:
    def place(row: _Row) -> Line:
        batch = cells.integer(row["batch_size"])
        device = Words(row["device"], LONGEST_NOTE)
        return (device, *[f", batch {batch}"] * (batch != cells.MISSING))

    timed = [row for row in rows if not cells.is_missing(row["images_per_second"])]
    return _by_group("images/s", "on", _grouped(timed, place))


def _revision_notes(rows: list[_Row]) -> list[Line]:
    def state(row: _Row) -> Line:
        if cells.is_missing(row["commit"]):
            return ("an unknown commit",)
        changed = not cells.is_missing(row["dirty"]) and bool(row["dirty"])
        return ("commit ", Code(row["commit"][:12]), *[" with changes"] * changed)

    return _by_group("Code", "at", _grouped(rows, state))


def _training_notes(rows: list[_Row]) -> list[Line]:
    def cost(row: _Row) -> Line:
        return (cells.training_cost(row["training"]),)

    trained = [row for row in rows if row["section"] == "Distill." and cost(row) != ("",)]
    groups = _grouped(trained, cost)
    return [("Training of ", *who(group), ": ", *took, ".") for took, group in groups.items()]


def _grouped(rows: list[_Row], key: Callable[[_Row], Line]) -> _Groups:
    groups: _Groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _by_group(what: str, preposition: str, groups: _Groups) -> list[Line]:
    """A note for each group, which says whose it is only if there are several."""
    if len(groups) == 1:
        return [(f"{what} {preposition} ", *shared, ".") for shared in groups]
    return [
        (f"{what} of ", *who(rows), f" {preposition} ", *shared, ".")
        for shared, rows in groups.items()
    ]


def _results(count: int) -> str:
    return f"{count:,} result" if count == 1 else f"{count:,} results"


_MeasuredRow = dict[str, Any]


def measured_blocks(part: ProtocolReport) -> list[Block]:
    """One table with all that belongs to it, or a line that says that there is nothing yet."""
    left_out = excluded_notes(part.excluded)
    if part.frame.empty:
        name = protocol_name(part.protocol)
        nothing = ("No results under protocol ", *name, " yet; make them with ")
        blocks: list[Block] = [Paragraph((*nothing, Code("dimo bench"), "."))]
        return [*blocks, *[Bullets(tuple(left_out))] * bool(left_out)]
    rows = cells.rows(part.frame)
    return [
        _results_table(part, rows),
        Bullets((*table_notes(rows, part.protocol), *left_out)),
        Heading(2, ("Settings of each row",), is_detail=True),
        _settings_table(part, rows),
    ]


def _results_table(part: ProtocolReport, rows: list[_MeasuredRow]) -> Table:
    metrics = [metric.name for metric in part.protocol.metrics]
    competing = part.frame["section"] != "Reference"
    columns = []
    for name in metrics:
        values = part.frame[name].where(competing)
        decimals = decimals_of(name, values)
        places = best_and_second(
            values, higher_is_better=METRICS[name].higher_is_better, decimals=decimals
        )
        columns.append(
            [_value(row, name, decimals, place) for row, place in zip(rows, places, strict=True)]
        )
    body = tuple(
        (
            (Words(row["method"], LONGEST_NAME),),
            (cells.integer(row["num_steps"]),),
            (cells.integer(row["nfe"]),),
            *values,
            (cells.speed(row["images_per_second"]),),
        )
        for row, values in zip(rows, zip(*columns, strict=True), strict=True)
    )
    headings = map(cells.metric_heading, metrics)
    return Table(
        header=("Method", "Steps (↓)", "NFE", *headings, "images/s"),
        body=body,
        sections=tuple(row["section"] for row in rows),
        caption=caption(part.protocol),
    )


def _value(row: _MeasuredRow, name: str, decimals: int, place: int) -> Line:
    if cells.is_missing(row[name]):
        return (cells.MISSING,)
    shown = Mark(cells.number(row[name], decimals), place)
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if cells.is_missing(low):
        return (shown,)
    return (shown, " ±" + cells.half_width((high - low) / 2, decimals))


def _settings_table(part: ProtocolReport, rows: list[_MeasuredRow]) -> Table:
    """The settings that any row has; what no row has, or the protocol gives, gets no column."""
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("sampler", "Sampler", str),
        ("mask_schedule", "Schedule", str),
        ("token_counts", "Tokens a step", _token_counts),
        ("guidance_scale", "Guidance", "{:g}".format),
        ("temperature", "Temp.", "{:g}".format),
        ("choice_temperature", "Choice temp.", "{:g}".format),
        ("final_temperature", "Final temp.", "{:g}".format),
        ("theta", "Theta", "{:g}".format),
        ("random_start", "Random start", lambda _: "yes"),
        ("top_k", "Top-k", cells.integer),
        ("top_p", "Top-p", "{:g}".format),
        *((name, knob.heading, knob.show) for name, knob in cells.other_knobs().items()),
        ("network_precision", "Network in", str),
        ("seed", "Seed", cells.integer),
        ("weights_sha256", "Weights", lambda value: value[:12]),
        ("run_id", "Run", lambda value: value[:8]),
        ("training", "Training", _training),
    ]
    kept = [column for column in columns if any(_has(row[column[0]]) for row in rows)]
    if all(row["seed"] == part.protocol.seeds.report for row in rows):
        kept = [column for column in kept if column[0] != "seed"]
    texts = {"sampler", "mask_schedule", "token_counts", "random_start", "network_precision"}
    texts |= {"weights_sha256", "run_id", "training"}
    longest = {"training": 120}
    body = tuple(
        (
            (Words(row["method"], LONGEST_NAME),),
            (cells.integer(row["num_steps"]),),
            *(
                (Words(show(row[name]), longest.get(name, 60)),)
                if _has(row[name])
                else (cells.MISSING,)
                for name, _, show in kept
            ),
        )
        for row in rows
    )
    return Table(
        header=("Method", "Steps", *(heading for _, heading, _ in kept)),
        body=body,
        left=(0, *(2 + i for i, (name, _, _) in enumerate(kept) if name in texts)),
        sections=tuple(row["section"] for row in rows),
    )


def _token_counts(counts: Sequence[int]) -> str:
    """Tokens revealed at each step, runs of one number written once: `3 x 1, 2, 11`."""
    runs = [(count, len(list(group))) for count, group in groupby(counts)]
    return ", ".join(str(n) if times == 1 else f"{times} x {n}" for n, times in runs)


def _training(facts: dict[str, Any]) -> str:
    """`recipe digits, seconds 372.1, images_seen 76,800`: whatever is a number, text or unknown."""
    shown = []
    for name, value in facts.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            shown.append(f"{name} {value:,.6g}" if abs(value) < 1e6 else f"{name} {value:,.0f}")
        elif isinstance(value, str):
            shown.append(f"{name} {value}")
        elif value is None:
            shown.append(f"{name} unknown")
    return ", ".join(shown)


def _has(value: Any) -> bool:
    return not cells.is_missing(value) and value not in ((), {}, "")
