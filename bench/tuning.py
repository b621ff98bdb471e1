"""Choosing sampler settings on the selection seed, never on the reporting one."""

import dataclasses
import itertools
import math
import typing
from collections.abc import Iterable, Mapping, Sequence

from bench.protocol import Protocol
from bench.records.selection import CRITERIA, Criterion, Trial, Tuning, criterion_of
from bench.rows.rows import Job
from bench.rows.settings import ALL_SAMPLERS, RANGES, settings_of
from dimo.errors import DimoError
from dimo.util.terminal import Progress

_TUNABLE = tuple(name for name in RANGES if name != "top_k")  # numbers with a fraction


class Bench(typing.Protocol):
    """What scores jobs: `bench.suites.features.Workbench`, or `DetectorBench` where a detector
    decides.

    Attributes:
        protocol: What is fixed.
        progress: Told how far the current row is.
    """

    protocol: Protocol
    progress: Progress

    def quality(self, job: Job, *, seed: int, num_images: int) -> float:
        """The one metric that settings are chosen by, `bench.records.selection.criterion_of`."""


def tune(bench: Bench, job: Job, grid: Mapping[str, Sequence[float]]) -> Job:
    """The job with the best settings on the protocol's selection seed, and the sweep.

    The best are those of the highest GenEval score where a detector decides, else those of the
    lowest Fréchet distance.

    Settings that the job's sampler does not have are left out of its grid; a job that has none of
    them stays as it is. A temperature that is tried holds at every step, unless the grid has a
    final temperature too. At a tie the settings tried first stay. The reporting seed is never
    looked at.

    Args:
        bench: Where to score; its `progress` is told of each trial.
        job: A network's job.
        grid: Setting -> values to try, all combinations.

    Raises:
        DimoError: A setting that cannot be tuned, or a value out of range.
    """
    settings, seeds, criterion = job.settings, bench.protocol.seeds, criterion_of(bench.protocol)
    axes = _axes(job, grid)
    if settings is None or not axes:
        return job
    assert criterion is not None, "check_grid refuses such a protocol"
    rows = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    trials = []
    for done, row in enumerate(rows):
        bench.progress(f"tuning {job.caption}", done, len(rows), "settings")
        tried = dataclasses.replace(job, settings=settings.changed(**row))
        found = bench.quality(tried, seed=seeds.select, num_images=seeds.n_select)
        trials.append(Trial(row, **{criterion.metric: found}))
    bench.progress(f"tuning {job.caption}", len(rows), len(rows), "settings")
    chosen = criterion.best([trial.scores[criterion.metric] for trial in trials])
    tried_text = " x ".join(f"{key} in {_numbers(values)}" for key, values in axes.items())
    selected_by = (
        f"{criterion.words} on seed {seeds.select}, {seeds.n_select} images, over {tried_text}"
    )
    return dataclasses.replace(
        job,
        settings=settings.changed(**rows[chosen], selected_by=selected_by),
        tuning=Tuning(seeds.select, seeds.n_select, tuple(trials), chosen),
    )


def check_grid(grid: Mapping[str, Sequence[float]], jobs: Iterable[Job], fixed: Protocol) -> None:
    """What nothing would be tuned with, or by, is refused before the first image is made.

    Raises:
        DimoError: A setting that no job's sampler has, or a protocol that has none of the metrics
            that settings are chosen by.
    """
    if not grid:
        return
    if criterion_of(fixed) is None:
        labels = ", ".join(Criterion(name).label for name in CRITERIA)
        raise DimoError(
            f"--tune chooses by one of {labels}, and protocol {fixed.name!r} has none; leave it "
            "out, or tune under a protocol that has one and give the settings as options"
        )
    used = sorted({job.settings.sampler for job in jobs if job.settings is not None})
    for key in grid:
        if not any(key in settings_of(sampler) for sampler in used):
            having = [sampler for sampler in ALL_SAMPLERS if key in settings_of(sampler)]
            raise DimoError(
                f"--tune {key} is a setting of no row: samplers {', '.join(used) or 'none'}; "
                f"it is one of {', '.join(having)}"
            )


def parse_grid(options: Iterable[str]) -> dict[str, list[float]]:
    """`["temperature=0.8,1"]` -> `{"temperature": [0.8, 1.0]}`.

    Raises:
        DimoError: Not of that form, an unknown setting, or a value out of its range.
    """
    grid: dict[str, list[float]] = {}
    for option in options:
        key, _, text = option.partition("=")
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            values = []
        if key not in _TUNABLE or not values:
            raise DimoError(
                f"--tune {option!r} is not SETTING=VALUE,VALUE,...; "
                f"settings: {', '.join(_TUNABLE)}; e.g. --tune temperature=0.8,1"
            )
        is_allowed, words = RANGES[key]
        for value in values:
            if not is_allowed(value) or not math.isfinite(value):
                raise DimoError(f"--tune {option!r}: {value:g} must be {words}")
        if key in grid or len(set(values)) < len(values):
            what = f"names {key} again" if key in grid else "names a value twice"
            raise DimoError(f"--tune {option!r} {what}; name each setting and value once")
        grid[key] = values
    return grid


def _axes(job: Job, grid: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The part of the grid that this job's sampler has settings for; empty for a fixed set."""
    known = settings_of(job.settings.sampler) if job.settings is not None else ()
    return {key: values for key, values in grid.items() if key in known}


def _numbers(values: Sequence[float]) -> str:
    return "{" + ", ".join(f"{value:g}" for value in values) + "}"
