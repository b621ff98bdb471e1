"""Choosing sampler settings on the selection seed, never on the reporting one."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from bench.protocol import Protocol
from bench.records.selection import CRITERIA, Criterion, Trial, Tuning, criterion_of
from bench.rows.rows import Job
from bench.rows.settings import settings_of
from bench.suites.base import Suite
from dimo.errors import DimoError
from dimo.samplers import SAMPLERS, all_knobs


def tune(suite: Suite, row: Job, grid: Mapping[str, Sequence[float]]) -> Job:
    """The row with the best settings on the protocol's selection seed, and the sweep.

    The best are those of the highest GenEval score if the protocol has a detector, else those of
    the lowest Fréchet distance; at a tie, those tried first. The reporting seed is never used.

    Settings that the row's sampler does not have are left out of its `grid`, which maps settings to
    values, all combinations of which are tried; a row that has none of them is returned unchanged.
    A temperature that is tried holds at every step, unless the grid has a final temperature, too.

    Raises:
        DimoError: A setting that cannot be tuned, or a value out of range.
    """
    settings, protocol, progress = row.settings, suite.protocol, suite.runtime.progress
    seeds, criterion = protocol.seeds, criterion_of(protocol)
    known = settings_of(settings.sampler) if settings is not None else ()
    axes = {key: values for key, values in grid.items() if key in known}
    if settings is None or not axes:
        return row
    assert criterion is not None, "check_grid refuses such a protocol"
    combinations = [dict(zip(axes, v, strict=True)) for v in itertools.product(*axes.values())]
    trials = []
    for done, tried in enumerate(combinations):
        progress(f"tuning {row.caption}", done, len(combinations), "settings")
        changed = dataclasses.replace(row, settings=settings.changed(**tried))
        value = suite.quality(changed, seed=seeds.select, num_images=seeds.n_select)
        trials.append(Trial(tried, **{criterion.metric: value}))
    progress(f"tuning {row.caption}", len(combinations), len(combinations), "settings")
    chosen = criterion.best([trial.scores[criterion.metric] for trial in trials])
    axes_text = " x ".join(
        f"{key} in {{{', '.join(f'{value:g}' for value in values)}}}"
        for key, values in axes.items()
    )
    selected_by = (
        f"{criterion.words} on seed {seeds.select}, {seeds.n_select} images, over {axes_text}"
    )
    return dataclasses.replace(
        row,
        settings=settings.changed(**combinations[chosen], selected_by=selected_by),
        tuning=Tuning(seeds.select, seeds.n_select, tuple(trials), chosen),
    )


def check_grid(
    grid: Mapping[str, Sequence[float]], samplers: Iterable[str], protocol: Protocol
) -> None:
    """Refuses a grid that tunes nothing, or that nothing can be chosen by; `samplers` of all rows.

    Raises:
        DimoError: A setting that no sampler has, or a protocol that has none of the metrics that
            settings are chosen by.
    """
    if not grid:
        return
    if criterion_of(protocol) is None:
        labels = ", ".join(Criterion(name).label for name in CRITERIA)
        raise DimoError(
            f"--tune chooses by one of {labels}, and protocol {protocol.name!r} has none; leave it "
            "out, or tune under a protocol that has one and give the settings as options"
        )
    used = sorted(set(samplers))
    for key in grid:
        if not any(key in settings_of(sampler) for sampler in used):
            having = [sampler for sampler in SAMPLERS if key in settings_of(sampler)]
            raise DimoError(
                f"--tune {key} has no effect: no selected sampler ({', '.join(used) or 'none'}) "
                f"uses it; it applies to {', '.join(having)}"
            )


def parse_grid(options: Iterable[str]) -> dict[str, list[float]]:
    """`["temperature=0.8,1"]` -> `{"temperature": [0.8, 1.0]}`.

    Raises:
        DimoError: Not of that form, an unknown setting, or a value out of its range.
    """
    knobs = {name: knob for name, knob in all_knobs().items() if knob.kind is float}
    grid: dict[str, list[float]] = {}
    for option in options:
        key, _, text = option.partition("=")
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            values = []
        if key not in knobs or not values:
            raise DimoError(
                f"--tune {option!r} is not SETTING=VALUE,VALUE,...; "
                f"settings: {', '.join(knobs)}; e.g. --tune temperature=0.8,1"
            )
        for value in values:
            if not knobs[key].is_allowed(value) or not math.isfinite(value):
                raise DimoError(f"--tune {option!r}: {value:g} must be {knobs[key].rule}")
        if key in grid or len(set(values)) < len(values):
            what = f"names {key} again" if key in grid else "names a value twice"
            raise DimoError(f"--tune {option!r} {what}; name each setting and value once")
        grid[key] = values
    return grid
