"""Choosing sampler settings and the target of a distillation on the selection seed.

Nothing is ever chosen on the reporting seed.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.protocol import Protocol
from bench.records.record import MethodInfo, ResultRecord
from bench.records.selection import Trial, Tuning, criterion_of, needed_criterion
from bench.rows.rows import Job, Planned, load_planned
from bench.rows.settings import SamplerSettings, settings_of
from bench.suites.base import Assets, Suite, check_inputs, load_suite
from dimo.engine.distributed import Runtime
from dimo.errors import DimoError, unknown_name
from dimo.guidance import GUIDANCE_RULES
from dimo.samplers import SAMPLERS, Knob, all_knobs
from dimo.zoo.teachers import Teacher


def score_laws(
    teacher: Teacher,
    laws: Sequence[SamplerSettings],
    protocol: Protocol,
    runtime: Runtime,
    assets: Assets,
    *,
    num_images: int | None = None,
    batch_size: int = 500,
) -> tuple[list[ResultRecord], int]:
    """Records of laws that Di[M]O could distil, on the selection seed, and the best one's position.

    Where a distillation has converged, its student draws what exact random-order sampling draws
    from the conditionals of its teacher, guided and tempered by the recipe. So `laws` are settings
    of the sampler `random`, see `laws_of`. The best is chosen as in `tune`.

    Raises:
        DimoError: A protocol that has no metric to choose by, unused or missing files, a number of
            images (None: the protocol's `n_select`) that the protocol cannot have.
    """
    criterion = needed_criterion(protocol, "laws are compared by", "name another --protocol")
    check_inputs(protocol, assets)
    count, scored = num_images or protocol.seeds.n_select, list[ResultRecord]()

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if unit == "images":
            runtime.progress("laws", len(scored) * count + done, len(laws) * count, unit)

    told = dataclasses.replace(runtime, progress=progress)
    suite = load_suite(protocol, told, assets, batch_size=batch_size, num_images=count)
    planned, device, weights = [Planned(teacher, laws)], runtime.device, assets.weights
    jobs = load_planned(planned, device=device, weights=weights, prompts=suite.prompts)
    for law, job in zip(laws, jobs, strict=True):
        rule = "" if law.guidance_rule == "constant" else f", {law.guidance_rule}"
        last = "" if law.final_temperature is None else f" to {law.final_temperature:g}"
        name = f"s={law.guidance_scale:g}, T={law.temperature:g}{last}{rule}"
        row = dataclasses.replace(job, name=name)
        measured = suite.measure(row, seed=protocol.seeds.select)
        assert measured is not None, "this process is the only rank"
        scored.append(measured.record)
    suite.forget()
    return scored, criterion.best([r.metrics[criterion.metric].value for r in scored])


def recipe_keys(law: SamplerSettings) -> dict[str, Any]:
    """The recipe keys that make a law the target of a distillation."""
    last = law.final_temperature
    return {
        "teacher_temperature": law.temperature,
        **({} if last is None else {"teacher_final_temperature": last}),
        "teacher_guidance_scale": law.guidance_scale,
        "teacher_guidance": law.guidance_rule,
    }


def laws_of(
    guidance: str, temperature: str, rule: str, steps: int, final_temperature: str = ""
) -> list[SamplerSettings]:
    """All combinations of values with commas between them; without guidance, one rule is enough.

    Without a `final_temperature` each temperature holds throughout.

    Raises:
        DimoError: Not numbers, values out of range or given twice, an unknown rule.
    """
    knobs, rules = all_knobs(), [name.strip() for name in rule.split(",")]
    scales = _numbers(f"--guidance {guidance}", guidance, knobs["guidance_scale"])
    temperatures = _numbers(f"--temperature {temperature}", temperature, knobs["temperature"])
    if unknown := set(rules) - set(GUIDANCE_RULES):
        raise unknown_name("guidance rule", unknown.pop(), GUIDANCE_RULES)
    finals: Sequence[float | None] = [None]
    if final_temperature:
        given = f"--final-temperature {final_temperature}"
        finals = _numbers(given, final_temperature, knobs["final_temperature"])
    return [
        SamplerSettings(
            "random",
            steps,
            guidance_scale=s,
            guidance_rule=name,
            temperature=t,
            final_temperature=final,
        )
        for name, s, t, final in itertools.product(rules, scales, temperatures, finals)
        if s != 1 or name == rules[0]
    ]


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
    axes, combinations = _combinations(row, grid)
    if settings is None or not axes:
        return row
    assert criterion is not None, "check_grid refuses such a protocol"
    trials = []
    for done, tried in enumerate(combinations):
        progress(f"tuning {row.caption}", done, len(combinations), "settings")
        changed = dataclasses.replace(row, settings=settings.changed(**tried))
        scores = suite.qualities(changed, seed=seeds.select, num_images=seeds.n_select)
        value = {criterion.metric: scores.pop(criterion.metric)}
        trials.append(Trial(tried, other_scores=scores or None, **value))
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


def as_tuned(
    row: Job, grid: Mapping[str, Sequence[float]], protocol: Protocol, method: MethodInfo
) -> Job | None:
    """The row with the settings that a recorded sweep over `grid` chose; None if it is another."""
    axes, combinations = _combinations(row, grid)
    tuning, seeds = method.tuning, protocol.seeds
    if row.settings is None or not axes:
        return row if tuning is None else None
    if tuning is None or [trial.settings for trial in tuning.trials] != combinations:
        return None
    if (tuning.seed, tuning.num_images) != (seeds.select, seeds.n_select):
        return None
    chosen = row.settings.changed(**combinations[tuning.chosen], selected_by=method.selected_by)
    return dataclasses.replace(row, settings=chosen)


def trials_of(row: Job, grid: Mapping[str, Sequence[float]]) -> int:
    """Number of settings that `tune` tries for a row."""
    axes, combinations = _combinations(row, grid)
    return len(combinations) if axes else 0


def _combinations(
    row: Job, grid: Mapping[str, Sequence[float]]
) -> tuple[dict[str, Sequence[float]], list[dict[str, float]]]:
    """What of the grid the row's sampler has, and all combinations of it."""
    known = settings_of(row.settings.sampler) if row.settings is not None else ()
    axes = {key: values for key, values in grid.items() if key in known}
    return axes, [dict(zip(axes, v, strict=True)) for v in itertools.product(*axes.values())]


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
    advice = "leave it out, or tune under a protocol that has one and give the settings as options"
    needed_criterion(protocol, "--tune chooses by", advice)
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
        given = f"--tune {option!r}"
        if key not in knobs or not text:
            raise DimoError(
                f"{given} is not SETTING=VALUE,VALUE,...; "
                f"settings: {', '.join(knobs)}; e.g. --tune temperature=0.8,1"
            )
        if key in grid:
            raise DimoError(f"{given} names {key} again; name each setting once")
        grid[key] = _numbers(given, text, knobs[key])
    return grid


def _numbers(given: str, text: str, knob: Knob) -> list[float]:
    """Comma-separated values of a setting; `given` is the option in errors."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise DimoError(f"{given} is not a list of numbers; give e.g. 0.8,1") from None
    for value in values:
        if not knob.is_allowed(value) or not math.isfinite(value):
            raise DimoError(f"{given}: {value:g} must be {knob.rule}")
    if len(set(values)) < len(values):
        raise DimoError(f"{given} names a value twice; name each once")
    return values
