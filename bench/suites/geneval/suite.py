"""GenEval: images -> detections -> correctness of each image -> record."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.features import Features
from bench.images.checks import Content
from bench.images.labels import labels_sha256
from bench.metrics.base import Score
from bench.metrics.geneval import summarize
from bench.protocol.networks import BUNDLED_PROMPTS, DETECTORS
from bench.records.record import MethodInfo
from bench.rows.generate import FileImages, FixedImages
from bench.rows.rows import Arrays, Job, Look, RowImages, image_set_method
from bench.suites.base import ImageOrigin, Measured, Suite
from bench.suites.geneval.detectors import ObjectDetector, load_detector, verdicts
from bench.suites.geneval.layout import (
    ImageResult,
    by_prompt,
    contradictions,
    read_folder,
    read_results,
    results_text,
)
from bench.suites.geneval.prompts import Metadata, list_sha256, prompts_of, same_list, tag_counts
from bench.suites.geneval.scores import (
    Secondary,
    geneval_scores,
    image_counts,
    load_secondary,
)
from bench.suites.geneval.sheet import chosen, draw_sheet, thumbnail
from dimo.data import scenes
from dimo.errors import DimoError
from dimo.util.files import sha256_file

_CHUNK = 64  # images decoded before the networks see them
_VERDICT = ("correct", "reason", "boxes")


@dataclass(frozen=True)
class _Asked:
    """One image and its prompt."""

    filename: str
    number: int  # of the prompt
    metadata: Metadata


@dataclass(frozen=True)
class _Judged:
    """Results for the images of one row, in order."""

    results: list[ImageResult]
    numbers: list[int]  # of each image's prompt
    features: Features | None  # of the secondary extractor
    fits: npt.NDArray[np.float64] | None  # CLIP score of each image

    @property
    def tags(self) -> list[str]:
        return [result.metadata["tag"] for result in self.results]

    @property
    def correct(self) -> list[bool]:
        return [result.correct for result in self.results]

    @property
    def prompts_sha256(self) -> str:
        prompts = {n: r.metadata for n, r in zip(self.numbers, self.results, strict=True)}
        return list_sha256([prompts[number] for number in sorted(prompts)])


def _judged(arrays: Arrays, asked: Sequence[_Asked]) -> _Judged:
    """What `GenEvalSuite._look` found of all images."""
    found = dict(arrays)
    verdicts = zip(asked, *(found.pop(name) for name in _VERDICT), strict=True)
    results = [
        ImageResult(image.filename, bool(correct), reason, image.metadata, json.loads(boxes))
        for image, correct, reason, boxes in verdicts
    ]
    fits = found.pop("fits", None)
    features = Features(**found) if found else None
    return _Judged(results, [image.number for image in asked], features, fits)


class GenEvalSuite(Suite):
    """A detector decides whether images show what their prompts ask for."""

    one_folder = "the folder of all prompts"
    rows_take = ("prompts",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        named, prompts = self.protocol.detector, self.protocol.prompts
        assert named is not None
        assert prompts is not None
        self._named, self._prompts = named, prompts
        self._reads_results = DETECTORS[named.name].reads_results
        if not self._reads_results:
            _ = self.detector  # a missing one shows before any work

    @cached_property
    def detector(self) -> ObjectDetector:
        """The protocol's detector; a DimoError if it does not run in dimo."""
        return load_detector(self._named, weights=self.assets.extractor, device=self.runtime.device)

    @cached_property
    def _secondary(self) -> Secondary:
        """Loaded when a row is measured or tuned: training curves need the detector alone."""
        return load_secondary(self.protocol, self.runtime.device)

    @cached_property
    def _metadata(self) -> tuple[Metadata, ...]:
        return prompts_of(self._prompts, self.assets.prompts)

    @property
    def prompts(self) -> Sequence[str]:
        return [metadata["prompt"] for metadata in self._metadata]

    @property
    def evidence(self) -> Mapping[str, str]:
        return self._evidence(list_sha256(self._metadata))

    def _evidence(self, prompts_sha256: str) -> dict[str, str]:
        secondary = {} if self._reads_results else self._secondary.evidence
        return {
            **secondary,
            "detector": self._named.name,
            "detector_sha256": "" if self._reads_results else self.detector.sha256,
            "prompts": self._prompts.name,
            "prompts_sha256": prompts_sha256,
        }

    def measure(self, row: Job, *, seed: int | None = None) -> Measured | None:
        def score(images: RowImages, found: Arrays, *about: Any, **made: Any) -> Measured:
            return self._scored(_judged(found, self._asked_of(images)), *about, **made)

        return self._score_row(row, seed, score)

    def measure_paths(self, paths: Sequence[Path], origin: ImageOrigin) -> Measured | None:
        """Scores a folder in the official layout, or reads a results.jsonl or a folder with it.

        The latter where the protocol's detector does not run in dimo.
        """
        start, (path,) = time.monotonic(), paths
        method = image_set_method(origin.name, origin.section, origin.num_steps)
        if self._reads_results:
            return self.on_first(lambda: self._measure_results(path, method, start))
        folders, problems = self.runtime.ranks.synchronized(
            lambda: read_folder(path, self._prompts)
        )
        self._refuse(path, problems)
        asked = [
            _Asked(str(file.relative_to(path)), folder.number, folder.metadata)
            for folder in folders
            for file in folder.images
        ]
        files = [path / image.filename for image in asked]
        images = FileImages(path, files, [image.number for image in asked])
        look = partial(self._look, asked, self._secondary)
        collected = self._collect(images, look, batch_size=_CHUNK)

        def scored() -> Measured:
            assert collected is not None
            shown = chosen([image.metadata["tag"] for image in asked])
            tiles = {
                asked[n].filename: thumbnail(images.read(range(n, n + 1))[0][0]) for n in shown
            }
            content = replace(collected.content, nonconforming=tuple(problems))
            sheet = {".png": draw_sheet(tiles)} if tiles else {}
            judged = _judged(collected.found, asked)
            return self._scored(judged, content, method, start, files=sheet)

        return self.on_first(scored)

    def _measure_results(self, path: Path, method: MethodInfo, start: float) -> Measured:
        judged, content = self._read(path)
        self._refuse(path, content.nonconforming)
        return self._scored(judged, content, method, start)

    def quality(self, row: Job, *, seed: int, num_images: int) -> float:
        """The overall GenEval score."""
        images = self.images_of(row, seed, num_images)
        asked = self._asked_of(images)
        look = partial(self._look, asked, Secondary())
        collected = self._collect(images, look, what="detections")

        def overall() -> float:
            if collected is None:
                return 0.0
            judged = _judged(collected.found, asked)
            return summarize(judged.tags, judged.numbers, judged.correct).overall

        return self.runtime.ranks.all_gather(overall)[0]

    def _scores(self, images: RowImages, found: Arrays, gaps: dict[str, str]) -> dict[str, Score]:
        judged = _judged(found, self._asked_of(images))
        tags, numbers = judged.tags, judged.numbers
        return {
            **geneval_scores(self.protocol, tags, numbers, judged.correct),
            **self._secondary.scores(
                self.protocol, judged.features, judged.fits, numbers, tags, gaps
            ),
        }

    def _real_images(self) -> RowImages | None:
        if self._prompts.name != BUNDLED_PROMPTS:
            return None
        index = torch.arange(self.protocol.images.num_images)
        return FixedImages(*scenes.batch(self.protocol.seeds.report, index, "held-out"))

    def _scored(
        self,
        judged: _Judged,
        content: Content,
        method: MethodInfo,
        start: float,
        *,
        files: Mapping[str, bytes] | None = None,
        **made: Any,
    ) -> Measured:
        tags, numbers = judged.tags, judged.numbers
        scores = geneval_scores(self.protocol, tags, numbers, judged.correct)
        if not self._reads_results:
            scores |= self._secondary.scores(
                self.protocol, judged.features, judged.fits, numbers, tags
            )
        return self._measured(
            scores,
            image_counts(list(scores), tags),
            content,
            method,
            start,
            evidence=self._evidence(judged.prompts_sha256),
            files={**(files or {}), ".jsonl": results_text(judged.results).encode()},
            **made,
        )

    def _look(
        self,
        asked: Sequence[_Asked],
        secondary: Secondary,
        images: Any,
        rows: range,
    ) -> Arrays:
        """Verdicts on some images, uint8 [B, 3, H, W] or a list of [H, W, 3]; see `_judged`."""
        if isinstance(images, Tensor):
            images = list(images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        wanted = [asked[row].metadata for row in rows]
        found = verdicts(self.detector, images, wanted)
        boxes = [{name: group.boxes.tolist() for name, group in v.kept.items()} for v in found]
        return {
            **secondary.look(images, [metadata["prompt"] for metadata in wanted]),
            "correct": np.array([verdict.correct for verdict in found]),
            "reason": np.array([verdict.reason for verdict in found]),
            "boxes": np.array([json.dumps(some) for some in boxes]),
        }

    def look_at(self, images: RowImages) -> Look:
        """Verdicts of the detector, and what the secondary networks see."""
        return partial(self._look, self._asked_of(images), self._secondary)

    def _asked_of(self, images: RowImages) -> list[_Asked]:
        """The prompts of images that are made here, and the file names they would have."""
        count = len(self._metadata)
        assert images.labels is not None, "they are the numbers of prompts"
        return [
            _Asked(f"{i % count:05d}/samples/{i // count:04d}.png", number, self._metadata[number])
            for i, number in enumerate(images.labels.tolist())
        ]

    def _read(self, path: Path) -> tuple[_Judged, Content]:
        """The official evaluator's results, and why they are off-protocol, if they are."""
        named = self._prompts
        file = path / "results.jsonl" if path.is_dir() else path
        if not file.is_file():
            raise DimoError(
                f"no results at {file}: detector {self._named.name!r} is not run by dimo; give "
                "the results.jsonl that GenEval's evaluate_images.py wrote, or score the images "
                "with --protocol geneval-hf"
            )
        groups = by_prompt(read_results(file), named.sha256)
        results = [result for group in groups for result in group]
        prompts = [group[0].metadata for group in groups]
        numbers = [number for number, group in enumerate(groups) for _ in group]
        problems, counts = [], tag_counts(prompts)
        few = [f"{counts[tag]} of {n} {tag}" for tag, n in named.tags.items() if counts[tag] != n]
        if few:
            total = sum(named.tags.values())
            problems.append(f"{len(prompts)} of {total} prompts: {', '.join(few)}")
        wrong = int((np.bincount(numbers) != named.images_per_prompt).sum())
        if wrong:
            problems.append(f"{wrong} prompts do not have {named.images_per_prompt} images")
        if not problems and not same_list(prompts, named.sha256):
            problems.append(f"the prompts are not those of the list {named.name}")
        against = contradictions(results)
        if against:
            problems.append(
                f"{len(against)} verdicts contradict the boxes beside them, the first on "
                + against[0]
            )
        notes = () if any(r.details for r in results) else ("no boxes to check verdicts by",)
        content = Content(
            sha256_file(file),
            labels_sha256(np.array(numbers, dtype=np.int64)),
            paths=(str(path),),
            notes=notes,
            nonconforming=tuple(problems),
        )
        return _Judged(results, numbers, None, None), content
