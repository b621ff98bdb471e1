"""GenEval on one screen: images in the official layout -> detections -> verdicts -> record."""

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.images import content_sha256
from bench.images.codec import ImageInfo, read_image
from bench.images.labels import labels_sha256
from bench.protocol import Detector, Prompts, Protocol
from bench.protocol.catalog import DETECTORS
from bench.records.compare import pack_contributions
from bench.records.record import Evidence, MethodInfo, Section, Speed, new_record
from bench.rows.generate import no_speed
from bench.suites.base import image_set_method
from bench.suites.features import Measured
from bench.suites.geneval.detectors import ObjectDetector, load_detector, verdicts
from bench.suites.geneval.layout import (
    ImageResult,
    PromptFolder,
    check_complete,
    contradictions,
    read_folder,
    read_results,
    results_text,
)
from bench.suites.geneval.prompts import Metadata, list_sha256, same_list, tag_counts
from bench.suites.geneval.scores import Beside, Looks, geneval_scores, geneval_values, load_beside
from bench.suites.geneval.sheet import chosen, draw_sheet, thumbnail
from dimo.errors import DimoError
from dimo.util.files import sha256_bytes, sha256_file, write_atomic
from dimo.util.terminal import Progress

_CHUNK = 64  # images decoded before they are looked at


@dataclass(frozen=True)
class Measurement:
    """A record with its contributions, and the verdict on each image.

    Attributes:
        measured: The record.
        results: In the order of the images.
        sheet: A PNG of some of them (`bench.suites.geneval.sheet`); None where no image was looked
        at.
    """

    measured: Measured
    results: list[ImageResult]
    sheet: bytes | None = None


@dataclass(frozen=True)
class Verdicts:
    """Everything a record says of the images."""

    results: list[ImageResult]
    prompts: list[int]  # number of each image's prompt
    images_sha256: str
    copies: int
    detector_sha256: str
    problems: list[str]
    notes: list[str]
    sheet: bytes | None = None
    looks: Looks | None = None  # what the networks beside the detector saw; None: nothing


def measure_geneval(
    path: Path,
    protocol: Protocol,
    *,
    name: str,
    section: Section = "Image sets",
    num_steps: int | None = None,
    weights: Path | None = None,
    device: torch.device,
    nonconforming: bool = False,
    progress: Progress = lambda what, done, total, unit: None,
) -> Measurement:
    """Scores a set of images, or reads what the official evaluator made of it.

    Args:
        path: Folder in the official layout; for a detector that is not run here, the official
            results.jsonl, or a folder with it.
        protocol: With prompts and a detector.
        name: Of the row.
        section: Block of the table.
        num_steps: Sampling steps the images were made with, if known.
        weights: Of the detector.
        device: Where networks run.
        nonconforming: Whether a set that is not the protocol's is scored all the same.
        progress: Told how many images are done.

    Raises:
        DimoError: The set is incomplete or of other prompts, an image cannot be read, or weights
            or the reference are missing or others than the protocol's.
    """
    start = time.monotonic()
    assert protocol.prompts is not None
    assert protocol.detector is not None
    if DETECTORS[protocol.detector.name].reads_results:
        found = _read(_results_file(path, protocol.detector), protocol.prompts)
    else:
        folders, problems = read_folder(path, protocol.prompts)
        if not nonconforming:
            check_complete(path, problems, protocol.name)
        detector = load_detector(protocol.detector, weights=weights, device=device)
        looks = Looks(load_beside(protocol, device))
        found = _detect(path, folders, detector, looks, problems, progress)
    if not nonconforming:
        check_complete(path, found.problems, protocol.name)
    return record_verdicts(
        found,
        protocol,
        images=(str(path),),
        method=image_set_method(name, section, num_steps),
        speed=no_speed(device),
        seed=None,
        start=start,
    )


def record_verdicts(
    found: Verdicts,
    protocol: Protocol,
    *,
    images: tuple[str, ...],
    method: MethodInfo,
    speed: Speed,
    seed: int | None,
    start: float,
) -> Measurement:
    """The record of images that were judged.

    Args:
        found: The verdicts.
        protocol: With prompts and a detector.
        images: Where they are; empty: they were made in process.
        method: What made them.
        speed: Of making them.
        seed: They were made with; None: not known, or none.
        start: `time.monotonic()` when the work began.
    """
    assert protocol.prompts is not None
    assert protocol.detector is not None
    tags = [result.metadata["tag"] for result in found.results]
    scores = geneval_scores(protocol, tags, found.prompts, [r.correct for r in found.results])
    if found.looks is not None:
        scores |= found.looks.scores(protocol, found.prompts, tags)
    scores = {m.name: scores[m.name] for m in protocol.metrics if m.name in scores}
    contributions = pack_contributions(scores)
    record = new_record(
        protocol=protocol,
        method=method,
        metrics=geneval_values(scores, protocol, tags),
        speed=speed,
        seed=seed,
        command=shlex.join(["dimo", *sys.argv[1:]]),
        seconds=time.monotonic() - start,
        evidence=_evidence(found, protocol, images, contributions),
    )
    return Measurement(Measured(record, contributions), found.results, found.sheet)


def _evidence(
    found: Verdicts, protocol: Protocol, images: tuple[str, ...], contributions: bytes
) -> Evidence:
    """Detector and prompts stand as extractor and reference where the protocol has none."""
    assert protocol.prompts is not None
    assert protocol.detector is not None
    prompts_sha256 = list_sha256(_prompts_in_order(found))
    evidence = Evidence(
        images=images,
        images_sha256=found.images_sha256,
        labels_sha256=labels_sha256(np.array(found.prompts, dtype=np.int64)),
        extractor=protocol.detector.name,
        extractor_sha256=found.detector_sha256,
        reference=protocol.prompts.name,
        reference_sha256=prompts_sha256,
        copies=found.copies,
        notes=tuple(found.notes),
        nonconforming=tuple(found.problems),
        contributions_sha256=sha256_bytes(contributions),
    )
    beside = found.looks.beside if found.looks is not None else Beside()
    if beside.scorer is not None:
        evidence = dataclasses.replace(evidence, scorer_sha256=beside.scorer.sha256)
    if beside.extractor is None or beside.reference is None:
        return evidence
    return dataclasses.replace(
        evidence,
        extractor=beside.extractor.identity,
        extractor_sha256=beside.extractor.sha256,
        reference=beside.reference.name,
        reference_sha256=beside.reference.sha256,
        detector_sha256=found.detector_sha256,
        prompts_sha256=prompts_sha256,
    )


def keep_verdicts(found: Measurement, results: Path) -> Path:
    """Writes `verdicts/<run_id>.jsonl` beside the records, with a `.png` of some of the images.

    Args:
        found: What was measured.
        results: Folder of the records.

    Returns:
        The file of verdicts.

    Raises:
        DimoError: It cannot be written.
    """
    file = results / "verdicts" / f"{found.measured.record.run_id}.jsonl"
    if found.sheet is not None:
        write_atomic(file.with_suffix(".png"), found.sheet)
    write_atomic(file, results_text(found.results))
    return file


def _detect(
    path: Path,
    folders: Sequence[PromptFolder],
    detector: ObjectDetector,
    looks: Looks,
    problems: list[str],
    progress: Progress,
) -> Verdicts:
    files = [(folder, file) for folder in folders for file in folder.images]
    results: list[ImageResult] = []
    infos: list[ImageInfo] = []
    shown = set(chosen([folder.metadata["tag"] for folder, _ in files]))
    tiles = {}
    for start in range(0, len(files), _CHUNK):
        progress("images", start, len(files), "images")
        chunk = files[start : start + _CHUNK]
        pixels = []
        for _, file in chunk:
            info, image = read_image(file)
            if len(infos) in shown:
                tiles[str(file.relative_to(path))] = thumbnail(image)
            infos.append(info)
            pixels.append(image)
        asked = [folder.metadata for folder, _ in chunk]
        judged = verdicts(detector, pixels, asked)
        looks.add(pixels, [metadata["prompt"] for metadata in asked])
        for (folder, file), found in zip(chunk, judged, strict=True):
            details = {name: group.boxes.tolist() for name, group in found.kept.items()}
            results.append(
                ImageResult(
                    str(file.relative_to(path)),
                    found.correct,
                    found.reason,
                    folder.metadata,
                    details,
                )
            )
    progress("images", len(files), len(files), "images")
    numbers = [folder.number for folder, _ in files]
    copies = len(infos) - len({info.sha256 for info in infos})
    notes = [f"{copies} images are copies of others"] if copies else []
    return Verdicts(
        results,
        numbers,
        content_sha256(infos, np.array(numbers, dtype=np.int64)),
        copies,
        detector.sha256,
        problems,
        notes,
        draw_sheet(tiles) if tiles else None,
        looks,
    )


def _results_file(path: Path, detector: Detector) -> Path:
    file = path / "results.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise DimoError(
            f"no results at {file}: detector {detector.name!r} is not run by dimo; give the "
            "results.jsonl that GenEval's evaluate_images.py wrote, or score the images with "
            "--protocol geneval-hf"
        )
    return file


def _read(file: Path, wanted: Prompts) -> Verdicts:
    results = sorted(read_results(file), key=lambda result: result.filename)
    prompts: list[Metadata] = []
    numbers: list[int] = []
    for found in results:  # files of one prompt follow one another
        if not prompts or prompts[-1] != found.metadata:
            prompts.append(found.metadata)
        numbers.append(len(prompts) - 1)
    problems = []
    counts = {tag: tag_counts(prompts).get(tag, 0) for tag in wanted.tags}
    few = [f"{counts[tag]} of {n} {tag}" for tag, n in wanted.tags.items() if counts[tag] != n]
    if few:
        problems.append(f"{len(prompts)} of {sum(wanted.tags.values())} prompts: {', '.join(few)}")
    images = [numbers.count(number) for number in range(len(prompts))]
    wrong = sum(count != wanted.images_per_prompt for count in images)
    if wrong:
        problems.append(f"{wrong} prompts have not {wanted.images_per_prompt} images")
    if not problems and not same_list(prompts, wanted.sha256):
        problems.append(f"the prompts are not those of the list {wanted.name}")
    against = contradictions(results)
    if against:
        problems.append(
            f"{len(against)} verdicts are not what the rules make of the boxes beside them, first "
            f"that on {against[0]}"
        )
    notes = [] if any(found.details for found in results) else ["no boxes to check verdicts by"]
    return Verdicts(results, numbers, sha256_file(file), 0, "", problems, notes)


def _prompts_in_order(found: Verdicts) -> list[Metadata]:
    by_number = {n: r.metadata for n, r in zip(found.prompts, found.results, strict=True)}
    return [by_number[number] for number in sorted(by_number)]
