"""Choosing sampler settings on the selection seed, never on the reporting one."""

__all__ = ["parse_grid", "tune"]

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.generate import SamplerSettings, settings_of
from bench.jobs import Job
from bench.plan import RANGES
from bench.run import Workbench
from dimo.errors import DimoError

_TUNABLE = tuple(name for name in RANGES if name != "top_k")  # numbers with a fraction


def tune(workbench: Workbench, job: Job, grid: Mapping[str, Sequence[float]]) -> Job:
    """The job with the settings of lowest FID on the protocol's selection seed.

    Settings that the job's sampler does not have are left out of its grid; a job that has none of
    them stays as it is. A temperature that is tried holds at every step, unless the grid has a
    final temperature too. The reporting seed is never looked at.

    Args:
        workbench: Where to score.
        job: A network's job.
        grid: Setting -> values to try, all combinations.

    Raises:
        DimoError: A setting that cannot be tuned, or a value out of range.
    """
    seeds = workbench.protocol.seeds
    settings = job.settings
    if settings is None:
        return job
    known = settings_of(settings.sampler)
    axes = {key: values for key, values in grid.items() if key in known}
    if not axes:
        return job
    best: tuple[float, SamplerSettings] | None = None
    for values in itertools.product(*axes.values()):
        changes: dict[str, Any] = dict(zip(axes, values, strict=True))
        tried = settings.changed(**changes)
        found = workbench.fid(
            dataclasses.replace(job, settings=tried), seed=seeds.select, num_images=seeds.n_select
        )
        if best is None or found < best[0]:
            best = (found, tried)
    assert best is not None
    tried_text = " x ".join(f"{key} in {_numbers(values)}" for key, values in axes.items())
    selected_by = f"lowest FID on seed {seeds.select}, {seeds.n_select} images, over {tried_text}"
    return dataclasses.replace(job, settings=dataclasses.replace(best[1], selected_by=selected_by))


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
            if not is_allowed(value):
                raise DimoError(f"--tune {option!r}: {value:g} must be {words}")
        grid[key] = values
    return grid


def _numbers(values: Sequence[float]) -> str:
    return "{" + ", ".join(f"{value:g}" for value in values) + "}"
