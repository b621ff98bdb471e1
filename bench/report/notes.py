"""What is said next to a table of measured rows, in the same words in every format."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
_Groups = dict[Line, list[_Row]]


def table_notes(rows: list[_Row], protocol: Protocol) -> list[Line]:
    """Uncertainty, ranks, N, ceiling, choice of settings, training, speed and code of the rows.

    Args:
        rows: Rows of `bench.report.table.results_frame` as dicts.
        protocol: The protocol they were measured under.
    """
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
    groups: dict[str, list[Excluded]] = {}
    for one in excluded:
        groups.setdefault(one.kind, []).append(one)
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
            names = ", ".join(
                one_line(name) for name in dict.fromkeys(r.method.name for r in records)
            )
            notes.append(
                (f"{count} of image sets that do not conform to the protocol: ", names, ".")
            )
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
    name = protocol_name(protocol)
    return (
        Styled("Protocol", "strong"),
        " ",
        *name,
        ": ",
        *joined(rules, "; "),
        ". Source: ",
        paper,
        ".",
    )


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
        yield (
            "objects by ",
            code(detector.name),
            known,
            ", colours by ",
            one_line(detector.colors),
        )
    if scorer is not None:
        version = f" {scorer.version}" if scorer.version else ""
        resized = scorer.preprocessing
        prefix: Line = (", prefix ", code(scorer.prefix.strip())) if scorer.prefix else ()
        yield (
            "scores of ",
            code(f"{scorer.name}{version}"),
            *((", ", one_line(scorer.model)) if scorer.model else ()),
            *((", images resized by ", code(resized)) if resized else ()),
            *prefix,
        )


def protocol_name(protocol: Protocol) -> Line:
    """Name, version and the first digits of the hash."""
    digest = protocol_sha256(protocol)[:12]
    return (code(protocol.name), f", version {protocol.version}, ", code(digest))


def who(rows: list[_Row]) -> Line:
    """`MaskGIT (16, 8 steps), Di[M]O (1 step)`."""
    steps: dict[str, list[str]] = {}
    for row in rows:
        listed = steps.setdefault(row["method"], [])
        listed += [] if cells.is_missing(row["num_steps"]) else [cells.integer(row["num_steps"])]
    return joined(
        (one_line(name, LONGEST_NAME), *[f" ({_counted(numbers)})"] * bool(numbers))
        for name, numbers in steps.items()
    )


def _counted(numbers: list[str]) -> str:
    """Numbers of steps in words; of very many, only the first."""
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
    groups: _Groups = {}
    for row in rows:
        counts = {metric.name: row[f"{metric.name}_n"] for metric in protocol.metrics}
        known = {name: int(n) for name, n in counts.items() if not cells.is_missing(n)}
        if any(n != _count_of(name, protocol) for name, n in known.items()):
            shown = " and ".join(f"{count:,}" for count in sorted(set(known.values())))
            groups.setdefault((shown,), []).append(row)
    return [("N = ", *shown, " for ", *who(group), ".") for shown, group in groups.items()]


def _count_of(metric: str, protocol: Protocol) -> int:
    """Number of images that a metric of a row is computed from."""
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
        chosen, lambda row: (one_line(row["selected_by"].strip().rstrip("."), LONGEST_NOTE),)
    )
    return [
        ("How the settings of ", *who(group), " were chosen: ", *words, ".")
        for words, group in groups.items()
    ]


def _speed_notes(rows: list[_Row]) -> list[Line]:
    def place(row: _Row) -> Line:
        batch = cells.integer(row["batch_size"])
        device = one_line(row["device"], LONGEST_NOTE)
        return (device, *[f", batch {batch}"] * (batch != cells.MISSING))

    timed = [row for row in rows if not cells.is_missing(row["images_per_second"])]
    return _by_group("images/s", "on", _grouped(timed, place))


def _revision_notes(rows: list[_Row]) -> list[Line]:
    def state(row: _Row) -> Line:
        if cells.is_missing(row["commit"]):
            return ("an unknown commit",)
        changed = not cells.is_missing(row["dirty"]) and bool(row["dirty"])
        return ("commit ", code(row["commit"][:12]), *[" with changes"] * changed)

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
    """A note per group, which names its rows if there are several groups."""
    if len(groups) == 1:
        return [(f"{what} {preposition} ", *shared, ".") for shared in groups]
    return [
        (f"{what} of ", *who(rows), f" {preposition} ", *shared, ".")
        for shared, rows in groups.items()
    ]
