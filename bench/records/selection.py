"""The metric that sampler settings are chosen by, and the sweep that chose them; light imports."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.protocol import Protocol
from bench.protocol.catalog import METRICS
from dimo.errors import DimoError
from dimo.util.schema import Origin

# metrics that settings are chosen by: the first that a protocol has; a detector's come first
CRITERIA = tuple(
    name
    for name, kind in sorted(METRICS.items(), key=lambda item: item[1].needs != "detections")
    if kind.tunable
)


@dataclass(frozen=True)
class Criterion:
    """A metric that settings are chosen by, one of `CRITERIA`."""

    metric: str

    @property
    def label(self) -> str:
        return METRICS[self.metric].label

    @property
    def higher_is_better(self) -> bool:
        return METRICS[self.metric].higher_is_better

    @property
    def words(self) -> str:
        """What is chosen: "lowest FID"."""
        return f"{'highest' if self.higher_is_better else 'lowest'} {self.label}"

    def best(self, values: Sequence[float]) -> int:
        """Position of the best value, the first of them at a tie."""
        return values.index(max(values) if self.higher_is_better else min(values))


def criterion_of(protocol: Protocol) -> Criterion | None:
    """The metric that settings are chosen by under a protocol; None if it has none."""
    named = {metric.name for metric in protocol.metrics if not metric.supplementary}
    return next((Criterion(name) for name in CRITERIA if name in named), None)


def needed_criterion(protocol: Protocol, what: str, advice: str) -> Criterion:
    """As `criterion_of`; a `DimoError` with that advice if the protocol has none."""
    criterion = criterion_of(protocol)
    if criterion is None:
        labels = ", ".join(Criterion(name).label for name in CRITERIA)
        raise DimoError(
            f"{what} one of {labels}, and protocol {protocol.name!r} has none; {advice}"
        )
    return criterion


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, and their score by one of `CRITERIA`; the others are None.

    `settings` has a value for each setting that was varied, by the names of
    `bench.records.record.MethodInfo`; all others are as in the record. Early records have any
    Fréchet distance as `fid`, and no `other_scores`, which decide nothing: those by the protocol's
    other metrics, on the same images.
    """

    settings: dict[str, float]
    fid: float | None = None
    fd_dinov2: float | None = None
    geneval: float | None = None
    other_scores: dict[str, float] | None = None  # None, and not in the file: not kept

    @property
    def scores(self) -> dict[str, float]:
        """Scores by those of `CRITERIA`; a trial in a record has one."""
        scores = {name: getattr(self, name) for name in CRITERIA}
        return {name: value for name, value in scores.items() if value is not None}

    @property
    def metrics(self) -> dict[str, float]:
        """Every score that was kept, by metric."""
        return {**(self.other_scores or {}), **self.scores}


@dataclass(frozen=True)
class Tuning:
    """The sweep that chose a row's settings, on images that are never reported.

    In a file: `{"seed": 2000, "num_images": 1000, "trials": [{"settings": {"temperature": 0.8},
    "fid": 1.5}, {"settings": {"temperature": 1.0}, "fid": 1.25}], "chosen": 1}`; a trial may also
    have `"other_scores": {"recall": 0.8}`.
    """

    seed: int  # the protocol's selection seed
    num_images: int  # of each trial, the protocol's `n_select`
    trials: tuple[Trial, ...]  # in the order they were tried: the last setting varies fastest
    chosen: int  # position in `trials` of the best score, the first of them at a tie

    @property
    def criterion(self) -> Criterion:
        """What the settings were chosen by."""
        (metric,) = self.trials[0].scores
        return Criterion(metric)

    @property
    def values(self) -> tuple[float, ...]:
        """The score of each trial, by `criterion`."""
        metric = self.criterion.metric
        return tuple(trial.scores[metric] for trial in self.trials)


def check_tuning(tuning: Tuning, origin: Origin) -> None:
    """Raises a DimoError if the sweep contradicts itself."""
    trials = tuning.trials
    if not trials:
        raise origin.error("'method.tuning.trials' must not be empty")
    if any(trial.settings.keys() != trials[0].settings.keys() for trial in trials):
        raise origin.error("'method.tuning.trials' must all have the same settings")
    scored = {tuple(trial.scores) for trial in trials}
    if len(scored) > 1 or len(trials[0].scores) != 1:
        raise origin.error(
            f"'method.tuning.trials' must each have one of {', '.join(CRITERIA)}, all the same one"
        )
    best = tuning.criterion.best(tuning.values)
    if tuning.chosen != best:
        raise origin.error(
            f"'method.tuning.chosen' must be {best}, the first of {tuning.criterion.words}, "
            f"not {tuning.chosen}"
        )
