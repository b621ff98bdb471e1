"""Records that differ in the training seed only: which they are, and their mean."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import TypeVar

from bench.protocol import Protocol
from bench.protocol.catalog import ANY, NONE
from bench.records.record import MethodInfo, MetricValue, ResultRecord
from dimo.util.schema import canonical_json

# said of a row or a difference that rests on one training run of each network
SINGLE_SEED = (
    "A single training seed: the interval is that of resampling images, and retraining moved FID "
    "3.2 times as much"
)
SOURCE = "arXiv:2606.20536"
_T = TypeVar("_T")
_K = TypeVar("_K")
# what two runs of one recipe may differ in
_OF_A_RUN = ("name", "student", "weights_sha256", "training", "selected_by", "tuning")
_SAMPLING = [name for name in MethodInfo.__dataclass_fields__ if name not in _OF_A_RUN]


def training_seed(record: ResultRecord) -> int | None:
    """Seed that the network of a row was trained with; None: unknown, or no row of a student."""
    seed = record.method.training.get("seed")
    return seed if isinstance(seed, int) else None


def seed_key(record: ResultRecord) -> str:
    """Equal for records that differ in the training seed only, as far as records know.

    It holds method, name and hash of the recipe, the images seen, and all that sampling depends on.
    """
    method, training = record.method, record.method.training
    known = ("recipe", "recipe_sha256", "ablation", "images_seen")
    trained = [training.get(name) for name in known]
    trained.append(training.get("method", "dimo"))  # records from before there was a choice
    if training_seed(record) is None:
        trained.append(method.weights_sha256 or record.run_id)
    sampling = [getattr(method, name) for name in _SAMPLING]
    images = [record.protocol.sha256, record.seed, record.num_images, record.off_protocol]
    return canonical_json([sampling, trained, images])


def newest_of_each_seed(records: Iterable[ResultRecord]) -> list[list[ResultRecord]]:
    """Groups records by `seed_key`; of each training seed the newest, in the order of seeds."""
    groups: dict[str, dict[int, ResultRecord]] = {}
    for record in sorted(records, key=age):
        groups.setdefault(seed_key(record), {})[training_seed(record) or 0] = record
    return [[group[seed] for seed in sorted(group)] for group in groups.values()]


def across_seeds(records: Iterable[ResultRecord]) -> list[list[ResultRecord]]:
    """Groups records that belong in one row, with one record of each training seed, in order.

    Records from before there was `recipe_sha256` hide a recipe that `dimo distill --set` changed
    under the same name; two networks of one training seed show it, and all are then separate rows.
    """
    rows: list[list[ResultRecord]] = []
    for alike in grouped(records, seed_key).values():
        networks = {(training_seed(record), record.method.weights_sha256) for record in alike}
        is_mean = 1 < len(networks) == len({seed for seed, _ in networks})
        rows += newest_of_each_seed(alike) if is_mean else [[record] for record in alike]
    return rows


def mean_of_seeds(records: Sequence[ResultRecord]) -> ResultRecord:
    """A row of `across_seeds` in the form of a record that is never written; one record is itself.

    Values are means over the training seeds, intervals the range of the seeds; everything else,
    also the speed, is of the first seed. The name is `recipe_name` unless all have one name.
    """
    first = records[0]
    if len(records) == 1:
        return first
    names = {record.method.name for record in records}
    name = recipe_name(first) if len(names) > 1 else first.method.name
    metrics = {}
    for metric, value in first.metrics.items():
        if all(metric in record.metrics for record in records):
            values = [record.metrics[metric].value for record in records]
            spread = (fmean(values), min(values), max(values))
            metrics[metric] = MetricValue(*spread, n=value.n, extra=value.extra)
    method = dataclasses.replace(first.method, name=name)
    return dataclasses.replace(first, method=method, metrics=metrics)


def recipe_name(record: ResultRecord) -> str:
    """Name of a student without its run: `Di[M]O (digits-full)`; of others, their own."""
    title, recipe = record.method.name.partition(" (")[0], record.method.training.get("recipe")
    return record.method.name if training_seed(record) is None else f"{title} ({recipe})"


def open_hashes(protocol: Protocol, record: ResultRecord) -> tuple[str, ...]:
    """Hashes of the reference and networks that a protocol leaves open; those of a table agree."""
    open_parts = [
        name
        for name in ("extractor", "reference", "scorer", "prompts", "detector")
        if (part := getattr(protocol, name)) and part.sha256 == ANY and part.name != NONE
    ]
    return tuple(getattr(record.evidence, f"{name}_sha256", None) or "" for name in open_parts)


def age(record: ResultRecord) -> tuple[str, str]:
    """Sorts records from old to new."""
    return record.created, record.run_id


def grouped(items: Iterable[_T], key: Callable[[_T], _K]) -> dict[_K, list[_T]]:
    """The items by key, keys in order of their first item."""
    groups: dict[_K, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
