"""Monitoring of training: trackers, sample grids, and scores of the EMA under a protocol."""

import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from bench.features.extraction import cache_folder
from bench.protocol import Protocol
from bench.protocol.networks import BUNDLED_PROMPTS
from bench.records.selection import criterion_of, needed_criterion
from bench.rows.grid import Row, draw_samples, sample_rows
from bench.rows.rows import Job, jobs_of
from bench.rows.settings import protocol_for
from bench.suites.base import Assets, Suite, load_suite
from dimo.engine.distributed import Runtime
from dimo.engine.loop import Task, Watcher
from dimo.engine.tracking import (
    Trackers,
    check_wandb,
    is_due,
    open_tensorboard,
    open_wandb,
    put_on_curve,
    read_curve,
    undisturbed,
    watch_interval,
)
from dimo.errors import DimoError
from dimo.methods import METHODS
from dimo.methods.base import DistillationRecipe
from dimo.methods.pretraining import TrainRecipe
from dimo.models import MaskedModel, Tokenizer
from dimo.models.text import Conditions, TextConditioned
from dimo.util import terminal
from dimo.zoo.generator import Generator
from dimo.zoo.loading import load_prompts, weights_file
from dimo.zoo.students import StudentConfig
from dimo.zoo.teachers import Teacher, get_teacher

_PICTURE_SEED = 0  # not used by any protocol
_TEACHER_STEPS = (1, 16)
_SCORE_BATCH = 100  # images at a time; changes speed and memory, never a score


@dataclass(frozen=True)
class Watching:
    """Options for monitoring a run; intervals in steps, 0: never, None: about ten."""

    sample_every: int | None = None
    score_every: int | None = None  # None: only if there is a protocol
    # name or file; "": the teacher's if its data are here or `score_every` is given, else none
    score_protocol: str = ""
    reference: Path | None = None  # of the protocol; None: the bundled one
    extractor_weights: Path | None = None  # or of the detector; None: the bundled ones
    wandb: str = ""  # project of Weights & Biases; "": not used


@contextmanager
def watching(
    options: Watching,
    recipe: DistillationRecipe | TrainRecipe,
    folder: Path,
    *,
    device: torch.device,
    weights: Path | None,
    is_first: bool = True,
) -> Iterator[tuple[Watcher, ...]]:
    """The watchers of one run; trackers are closed at the end, however it ends.

    Everything is checked here, before the run folder is created; it gets `tensorboard/`,
    `samples/`, `curve.jsonl`. `weights`: folder of the teacher's weights; None: those bundled or
    downloaded. Ranks other than the first have no watchers.

    Raises:
        DimoError: A negative interval; an unknown protocol, one that does not fit the teacher, has
            nothing to score by or prompts that do not come with dimo, or whose reference, extractor
            or detector is missing; missing weights; wandb is not installed.
    """
    row = get_teacher(recipe.teacher or str(folder))
    sample_every = watch_interval(options.sample_every, recipe.steps, "--sample-every")
    score_every = watch_interval(options.score_every, recipe.steps, "--score-every")
    if not is_first:
        yield ()
        return
    if options.wandb:
        check_wandb()
    protocol = _protocol(options, row) if score_every else None
    student = None
    if recipe.kind != TrainRecipe.kind:
        student = StudentConfig.of_recipe(cast(DistillationRecipe, recipe), "")
        weights_file(row, "transformer", weights)  # missing weights of the run are reported first
    needed = protocol is not None or bool(options.sample_every)
    tokenizer = _tokenizer(row, weights, device, needed) if sample_every or needed else None
    openers = [partial(open_tensorboard, folder / "tensorboard")]
    if options.wandb:
        openers.append(partial(open_wandb, options.wandb, folder, dataclasses.asdict(recipe)))
    trackers = Trackers(openers)
    watchers: list[Watcher] = [trackers.watch]
    if tokenizer is not None:
        view = _View(row, student, recipe.steps, tokenizer, device)
        if sample_every:
            watchers.append(_Pictures(view, folder / "samples", sample_every, trackers).watch)
        if protocol is not None:
            suite, scored = _scoring(view, protocol, options, weights)
            curve = folder / "curve.jsonl"
            watchers.append(_Scores(scored, suite, curve, score_every, trackers).watch)
    try:
        yield tuple(watchers)
    finally:
        trackers.close()


def _protocol(options: Watching, teacher: Teacher) -> Protocol | None:
    named = options.score_protocol
    if not (named or options.score_every or (teacher.has_data and teacher.protocol)):
        return None
    protocol = protocol_for(teacher, named, option="--score-protocol")
    advice = "name another --score-protocol, or leave scores out with --score-every 0"
    needed_criterion(protocol, "runs are scored by", advice)
    if protocol.prompts is not None and protocol.prompts.name != BUNDLED_PROMPTS:
        raise DimoError(
            f"runs are scored on bundled prompts, and those of protocol "
            f"{protocol.name!r} do not; leave scores out with --score-every 0, and score the "
            "student with dimo bench"
        )
    return protocol


def _scoring(
    view: "_View", protocol: Protocol, options: Watching, weights: Path | None
) -> tuple[Suite, "_View"]:
    """The suite that scores the EMA, and the view it is sampled with: on the protocol's prompts."""
    runtime = Runtime(view.device, warn=terminal.warn)
    assets = Assets(
        extractor=options.extractor_weights, reference=options.reference, cache=cache_folder()
    )
    suite = load_suite(protocol, runtime, assets, batch_size=_SCORE_BATCH)
    if suite.prompts is None:
        return suite, view
    conditions = load_prompts(view.teacher, suite.prompts, weights)
    assert conditions is not None, "a protocol with prompts fits teachers of prompts alone"
    return suite, dataclasses.replace(view, conditions=conditions.to(view.device))


def _tokenizer(
    teacher: Teacher, weights: Path | None, device: torch.device, needed: bool
) -> Tokenizer | None:
    """The teacher's tokenizer; None, with a warning, if it is missing and not needed."""
    try:
        path = weights_file(teacher, "tokenizer", weights)
    except DimoError as error:
        if needed:
            raise
        terminal.warn(f"no pictures during training: {error}")
        return None
    return teacher.tokenizer(path).to(device)


@dataclass(frozen=True)
class _View:
    """How the networks of a run are sampled; `conditions` replace those of training."""

    teacher: Teacher
    student: StudentConfig | None  # None: the teacher itself is trained
    steps: int  # of the run
    tokenizer: Tokenizer
    device: torch.device
    conditions: Conditions | None = None

    def job(self, network: nn.Module, name: str) -> Job:
        """A student at its method's default steps and the recipe's temperature, a teacher at 16."""
        return self._jobs(network, name, self.student)[-1]

    def teacher_jobs(self, network: nn.Module) -> list[Job]:
        """At 1 and 16 steps, by its own sampler."""
        return self._jobs(network, self.teacher.title, None)

    def _jobs(self, network: nn.Module, name: str, student: StudentConfig | None) -> list[Job]:
        if next(network.parameters()).device.type != self.device.type:
            network = copy.deepcopy(network).to(self.device)
        if self.conditions is not None:
            network = TextConditioned(cast(TextConditioned, network).network, self.conditions)
        model = cast(MaskedModel, network)
        loaded = Generator(self.teacher, model, self.tokenizer, "", name, student)
        steps = sorted({min(count, self.teacher.num_tokens) for count in _TEACHER_STEPS})
        if student is None:
            return jobs_of(loaded, steps)
        return jobs_of(loaded, steps, student_steps=(METHODS[student.method].default_steps,))


class _Pictures:
    """`samples/step-N.png`: network and EMA, below a student's small teacher; fixed seed."""

    def __init__(self, view: _View, folder: Path, every: int, trackers: Trackers) -> None:
        self.view, self.folder, self.every, self.trackers = view, folder, every, trackers
        self.above: list[Row] | None = None

    def watch(self, step: int, scalars: Mapping[str, float], task: Task) -> None:
        """A watcher of `dimo.engine.loop.fit`."""
        view, path = self.view, self.folder / f"step-{step:07d}.png"
        is_start = self.above is None
        if self.above is None:
            self.above = []
            if view.teacher.has_data and view.student is not None:
                teacher = cast(Any, task).teacher
                with undisturbed(teacher):
                    jobs = view.teacher_jobs(teacher)
                    self.above = sample_rows(jobs, [], seed=_PICTURE_SEED, device=view.device)
        if not is_due(step, self.every, view.steps) or (is_start and path.is_file()):
            return
        name = "student" if "student" in task.networks else "model"
        network, ema = task.networks[name], task.networks["ema"]
        with undisturbed(network, ema):
            jobs = [view.job(network, name), view.job(ema, "EMA")]
            draw_samples(
                jobs, [], seed=_PICTURE_SEED, out=path, device=view.device, above=self.above
            )
        self.trackers.picture(step, "samples", path)


class _Scores:
    """`curve.jsonl`: score of the EMA on the protocol's selection seed, one line per step."""

    def __init__(
        self, view: _View, suite: Suite, path: Path, every: int, trackers: Trackers
    ) -> None:
        self.view, self.suite, self.path = view, suite, path
        self.every, self.trackers = every, trackers
        self.started = False

    def watch(self, step: int, scalars: Mapping[str, float], task: Task) -> None:
        """A watcher of `dimo.engine.loop.fit`."""
        is_start, self.started = not self.started, True
        if is_start and step in read_curve(self.path):
            return  # resumed at a step that has a score
        if not is_due(step, self.every, self.view.steps):
            return
        seeds, criterion = self.suite.protocol.seeds, criterion_of(self.suite.protocol)
        assert criterion is not None, "such a protocol was refused"
        start, ema = time.monotonic(), task.networks["ema"]
        with undisturbed(ema):
            job = self.view.job(ema, "EMA")
            value = self.suite.quality(job, seed=seeds.select, num_images=seeds.n_select)
        put_on_curve(
            self.path,
            {
                "step": step,
                criterion.metric: value,
                "images": seeds.n_select,
                "seed": seeds.select,
                "seconds": round(time.monotonic() - start, 3),
            },
        )
        self.trackers.scalars(step, {f"eval/{criterion.metric}": value})
