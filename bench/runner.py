"""Models and images in, records out: tune -> measure -> store -> picture, over all ranks."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from bench.features import FORWARD_BATCH
from bench.features.extraction import cache_folder
from bench.protocol import Protocol, load_protocol
from bench.records.record import ResultRecord
from bench.records.store import append, load_all
from bench.rows.generate import try_out
from bench.rows.grid import write_picture
from bench.rows.rows import Job, Planned, load_planned, plan_models
from bench.rows.settings import check_protocol, protocol_for
from bench.suites.base import (
    Assets,
    ImageOrigin,
    Measured,
    Suite,
    check_inputs,
    load_suite,
)
from bench.tuning import as_tuned, check_grid, trials_of, tune
from dimo.engine.distributed import Runtime, choose_device, ranks
from dimo.errors import DimoError
from dimo.util.files import check_folder, write_atomic
from dimo.zoo.loading import weights_file

AnyPath: TypeAlias = str | PathLike[str]


@dataclass(frozen=True)
class Work:
    """The rows of a bench with their networks, before anything is measured; see `plan_work`."""

    suite: Suite
    rows: Sequence[Job]
    done: Mapping[int, ResultRecord]  # by position in `rows`: those that are on record
    grid: Mapping[str, Sequence[float]]
    results: Path

    def run(self) -> list[ResultRecord]:
        """Measures rows that are not on record: record, contributions and picture in `results`.

        Ranks share the images of each row; the records are returned on the first one, no others.

        Raises:
            Stopped: A signal came. The same call continues: rows on record are not measured again,
                and of an interrupted row what the cache holds is not.
            DimoError: Images that cannot be scored, or results that cannot be written.
        """
        suite, is_first = self.suite, self.suite.runtime.ranks.is_first
        if self.done and is_first:
            suite.runtime.warn(
                f"{len(self.done)} of {len(self.rows)} rows are on record in {self.results} and "
                "are not measured again; see --again"
            )
        records = []
        for number, row in enumerate(self.rows):
            if number in self.done:
                records.append(self.done[number])
                suite.on_first(partial(suite.forget, row))
                continue
            tuned = tune(suite, row, self.grid)
            measured = suite.measure(tuned)
            suite.on_first(partial(_recorded, suite, tuned, measured, self.results))
            records += [measured.record] if measured is not None else []
        return records if is_first else []

    def estimates(self) -> pd.DataFrame:
        """What each row costs, from sampling and looking at 32 images of it on this device.

        Columns: name, num_steps, nfe, images (of the row and of its sweep), on_record, seconds and
        bytes (on disk until the row is recorded); those of rows on record are 0. Metrics and their
        intervals, which take seconds to minutes, are not counted.
        """
        lines = []
        for number, row in enumerate(self.rows):
            images = self.suite.images_of(row, self.suite.protocol.seeds.select, FORWARD_BATCH)
            samples, count = images.samples, images.count
            if samples is not None:
                swept = trials_of(row, self.grid) * self.suite.protocol.seeds.n_select
                count = self.suite.num_images + swept
            seconds, size = 0.0, 0
            if number not in self.done:
                seconds, size = try_out(images, self.suite.look_at(images))
            lines.append(
                {
                    "name": row.name,
                    "num_steps": None if row.settings is None else row.settings.num_steps,
                    "nfe": None if samples is None else samples.nfe,
                    "images": count,
                    "on_record": number in self.done,
                    "seconds": seconds * count,
                    "bytes": 0 if samples is None else size * count,
                }
            )
        return pd.DataFrame(lines).convert_dtypes()


def plan_work(
    planned: Sequence[Planned],
    protocol: Protocol,
    runtime: Runtime,
    assets: Assets,
    *,
    results: Path,
    grid: Mapping[str, Sequence[float]] | None = None,
    reference_rows: bool = True,
    again: bool = False,
    **options: Any,
) -> Work:
    """Checks everything, loads networks, and finds the rows that are on record.

    Args:
        planned: From `bench.rows.rows.plan_jobs` or `plan_models`.
        results: Folder of records.
        grid: Setting -> values to choose from for every row that has it.
        reference_rows: Whether real data and the tokenizer are rows, too, where real images are
            bundled or given.
        again: Whether rows that are on record are measured, too.
        **options: `num_images`, `batch_size` and `command`, as of `bench.suites.base.Suite`.

    Raises:
        DimoError: Models that do not fit the protocol, unused or missing files.
    """
    check_inputs(protocol, assets)
    check_folder(results, "results folder")
    for entry in planned:
        check_protocol(entry.teacher, protocol)
        if entry.student is None:
            weights_file(entry.teacher, "transformer", assets.weights)
    samplers = [settings.sampler for entry in planned for settings in entry.rows]
    check_grid(grid or {}, samplers, protocol)
    suite = load_suite(protocol, runtime, assets, **options)
    rows = load_planned(
        planned, device=runtime.device, weights=assets.weights, prompts=suite.prompts
    )
    if reference_rows and not suite.off_protocol:
        rows = suite.reference_rows(rows[0].loaded) + rows
    elif assets.reference_images:
        raise DimoError(
            f"--reference-images {assets.reference_images[0]} is not used without rows for real "
            "data, as in a quick look; leave it out"
        )

    def known() -> dict[int, ResultRecord]:
        if again or not runtime.ranks.is_first or not results.is_dir():
            return {}
        return _on_record(suite, rows, grid or {}, load_all(results)[0])

    return Work(suite, rows, runtime.ranks.all_gather(known)[0], grid or {}, results)


def _on_record(
    suite: Suite,
    rows: Sequence[Job],
    grid: Mapping[str, Sequence[float]],
    known: Sequence[ResultRecord],
) -> dict[int, ResultRecord]:
    """Number of a row -> its newest record, where there is one that is the same to the code."""
    found = {}
    for number, row in enumerate(rows):
        for record in known:
            tuned = as_tuned(row, grid, suite.protocol, record.method)
            if tuned is not None and suite.is_same(record, tuned):
                found[number] = record
    return found


def _recorded(suite: Suite, row: Job, measured: Measured | None, results: Path) -> None:
    """Stores what was measured of a row, and its picture; then nothing is kept of it elsewhere."""
    assert measured is not None
    _store(measured, results)
    if row.settings is not None:
        seed, run_id = suite.protocol.seeds.report, measured.record.run_id
        write_picture(row, results, run_id, seed=seed, device=suite.runtime.device)
    suite.forget()


def _store(measured: Measured, results: Path) -> Path:
    """Adds a record to a folder of results, with all that belongs to it; returns its path."""
    record = measured.record
    for ending, data in measured.files.items():
        write_atomic(results / "verdicts" / f"{record.run_id}{ending}", data)
    return append(record, results, measured.contributions)


def score_images(
    paths: Sequence[Path],
    protocol: Protocol,
    runtime: Runtime,
    assets: Assets,
    *,
    origin: ImageOrigin,
    results: Path,
    nonconforming: bool = False,
    command: str = "",
    per_class: Path | None = None,
) -> tuple[ResultRecord, Path] | None:
    """Scores a set of image files; the record and its file, None on every rank but the first.

    Args:
        paths: Folders or archives: shards of one set, in order.
        nonconforming: Whether an off-protocol set is scored, too; it has a table apart.
        per_class: Where to write the metrics of each class, see `class_table`; None: nowhere.

    Raises:
        DimoError: The set cannot be read or is off-protocol; unused or missing files; no classes.
    """
    check_inputs(protocol, assets, paths, origin)
    check_folder(results, "results folder")
    if per_class is not None:
        if protocol.images.labels != "balanced" or protocol.images.num_classes < 2:
            raise DimoError(
                f"--per-class {per_class} is not used under {protocol.name!r}, which has no "
                "classes; leave it out"
            )
        check_folder(per_class.parent, "folder of the table of classes")
    origin = replace(origin, name=_row_name(origin.name, paths[0]))
    options: dict[str, Any] = {"nonconforming": nonconforming, "command": command}
    options |= {} if per_class is None else {"per_class": True}
    suite = load_suite(protocol, runtime, assets, **options)
    measured = suite.measure_paths(paths, origin)

    def stored() -> Path | None:
        if measured is not None and per_class is not None:
            write_atomic(per_class, measured.per_class)
        return None if measured is None else _store(measured, results)

    path = suite.on_first(stored)
    return None if measured is None or path is None else (measured.record, path)


def _row_name(given: str, path: Path) -> str:
    """The name of an image set: as given, else that of its path, also of `.`."""
    if given and not given.strip():
        raise DimoError(f"name {given!r} is blank; give a name, or none for that of the path")
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return given.strip() or name or "images"


def run(
    models: Sequence[str],
    *,
    protocol: AnyPath | None = None,
    steps: Sequence[int] = (1, 2, 4, 8, 16),
    tune: Mapping[str, Sequence[float]] | None = None,
    num_images: int | None = None,
    reference_rows: bool = True,
    results: AnyPath = "results",
    assets: Assets | None = None,
    device: str = "auto",
    batch_size: int = 500,
) -> pd.DataFrame:
    """Scores models under a protocol, as `dimo bench` does, and stores a record of each row.

    Args:
        models: `"[NAME=]MODEL[@STEPS]"` each: a teacher, a distilled model that comes with dimo, or
            a run folder; e.g. `"digits@1,2,4"`, `"digits-dimo"`, `"mine=runs/mine@2"`.
        protocol: Name or file of the protocol; None: that of the first model's teacher.
        steps: Step counts of multi-step models that name none; one-step students take one.
        tune: Setting -> values to choose from on the protocol's selection seed, e.g.
            `{"temperature": [0.8, 1.0]}`; None: settings as published.
        num_images: For a quick look, a number of images per row, equally many of each label or
            prompt: the protocol's first ones, or more. Such records are off-protocol and share no
            table with others. None: as many as the protocol asks for.
        reference_rows: Whether real data and the tokenizer are rows, too, where real images are
            bundled or given as `reference_images` of `assets`; a quick look has none.
        results: Folder of records. Rows that it has from the same code, weights, settings,
            packages and device are not measured again; another folder measures them.
        assets: Files that replace bundled or downloaded ones, such as a reference.
        device: auto, cpu, cuda or cuda:N.
        batch_size: Images generated at a time, 0: as many as memory holds; changes speed, never a
            result. Halved where memory runs out.

    Under torchrun the ranks share the images of each row, and the first one returns the table.

    Returns:
        One line per row, see `records_frame`.

    Raises:
        DimoError: Unknown models or protocol, models that do not fit it, missing files.
    """
    files = assets or Assets(cache=cache_folder())
    planned = plan_models(models, steps, weights=files.weights)
    fixed = protocol_for(planned[0].teacher, protocol)
    options = "" if num_images is None else f", num_images={num_images}"
    with ranks() as group:
        work = plan_work(
            planned,
            fixed,
            Runtime(choose_device(device), group, warn=warnings.warn),
            files,
            results=Path(results),
            grid=tune,
            num_images=num_images,
            reference_rows=reference_rows,
            batch_size=batch_size,
            command=f"bench.run({list(models)!r}, protocol={str(protocol or fixed.name)!r}"
            f"{options})",
        )
        records = work.run()
    return records_frame(records)


def evaluate(
    path: AnyPath,
    *,
    protocol: AnyPath,
    reference: AnyPath | None = None,
    name: str = "",
    labels: str = "",
    nonconforming: bool = False,
    results: AnyPath = "results",
    assets: Assets | None = None,
    device: str = "auto",
) -> ResultRecord:
    """Scores a set of image files, as `dimo eval` does, and stores its record.

    Options are those of `run` and `score_images`.

    Args:
        path: Folder, .zip, .tar or .npz of images.
        reference: File or folder of the protocol's reference; None: the bundled one.
        name: Name of the row; "": that of the path.
        labels: Where labels come from, as for `dimo eval --labels`; "": found in the set.

    Raises:
        DimoError: The set cannot be read or is off-protocol; missing files.
    """
    files = assets or Assets(cache=cache_folder())
    if reference is not None:
        files = replace(files, reference=Path(reference))
    scored = score_images(
        [Path(path)],
        load_protocol(str(protocol)),
        Runtime(choose_device(device), warn=warnings.warn),
        files,
        origin=ImageOrigin(name, labels=labels),
        results=Path(results),
        nonconforming=nonconforming,
        command=f"bench.evaluate({str(path)!r}, protocol={str(protocol)!r})",
    )
    assert scored is not None, "this process is the only rank"
    return scored[0]


def load_results(folder: AnyPath = "results") -> list[ResultRecord]:
    """Every record of a folder, oldest first; a warning for each file that is left out.

    Raises:
        DimoError: There is no such folder.
    """
    records, problems = load_all(folder)
    for problem in problems:
        warnings.warn(problem, stacklevel=2)
    return records


def records_frame(records: Iterable[ResultRecord]) -> pd.DataFrame:
    """One line per record: name, section, num_steps, nfe, each metric, images_per_second, run_id.

    What a row does not have is NaN or None.
    """
    return pd.DataFrame(
        [
            {
                "name": record.method.name,
                "section": record.method.section,
                "num_steps": record.method.num_steps,
                "nfe": record.method.nfe,
                **{name: metric.value for name, metric in record.metrics.items()},
                "images_per_second": record.speed.images_per_second,
                "off_protocol": bool(record.off_protocol),
                "run_id": record.run_id,
            }
            for record in records
        ]
    )
