"""The metric that sampler settings are chosen by, and the sweep that chose them; light imports."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.protocol import Protocol
from bench.protocol.catalog import METRICS
from dimo.util.schema import Origin

# metrics that settings are chosen by: the first that a protocol has; a detector's come first
CRITERIA = tuple(
    sorted(
        (name for name, kind in METRICS.items() if kind.tunable),
        key=lambda name: METRICS[name].needs != "detections",
    )
)


@dataclass(frozen=True)
class Criterion:
    """A metric that settings are chosen by.

    Attributes:
        metric: One of `CRITERIA`.
    """

    metric: str

    @property
    def label(self) -> str:
        """Its heading in tables."""
        return METRICS[self.metric].label

    @property
    def higher_is_better(self) -> bool:
        """Its direction."""
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
    named = {metric.name for metric in protocol.metrics}
    return next((Criterion(name) for name in CRITERIA if name in named), None)


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, and their score by one of `CRITERIA`.

    Attributes:
        settings: Value by name of each setting that was varied, the same names in every trial of a
            sweep; names are those of `bench.records.record.MethodInfo`. All others are as in the
            record.
        fid: FID on the selection seed; in early records any Fréchet distance.
        fd_dinov2: FD-DINOv2 on the selection seed.
        geneval: Overall GenEval score on the selection seed.

    A score is in a file only where it is not None.
    """

    settings: dict[str, float]
    fid: float | None = None
    fd_dinov2: float | None = None
    geneval: float | None = None

    @property
    def scores(self) -> dict[str, float]:
        """Scores by metric; a trial in a record has one."""
        scores = {name: getattr(self, name) for name in CRITERIA}
        return {name: value for name, value in scores.items() if value is not None}


@dataclass(frozen=True)
class Tuning:
    """The sweep that chose a row's settings, on images that are never reported.

    In a file: `{"seed": 2000, "num_images": 1000, "trials": [{"settings": {"temperature": 0.8},
    "fid": 1.5}, {"settings": {"temperature": 1.0}, "fid": 1.25}], "chosen": 1}`.

    Attributes:
        seed: The protocol's selection seed.
        num_images: Images of each trial, the protocol's `n_select`.
        trials: In the order in which they were tried: the last setting varies fastest.
        chosen: Position in `trials` of the best score, the first of them at a tie.
    """

    seed: int
    num_images: int
    trials: tuple[Trial, ...]
    chosen: int

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
    """
    Raises:
        DimoError: The sweep contradicts itself.
    """
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
