"""GenEval: images -> detections -> correctness of each image -> record."""

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.images.checks import Content, Tally
from bench.images.labels import labels_sha256
from bench.metrics.geneval import summarize
from bench.protocol.catalog import BUNDLED_PROMPTS, DETECTORS
from bench.records.record import MethodInfo
from bench.rows.rows import Job, method_info
from bench.suites.base import ImageOrigin, Measured, Suite, image_set_method
from bench.suites.geneval.detectors import ObjectDetector, Pixels, load_detector, verdicts
from bench.suites.geneval.layout import (
    ImageResult,
    PromptFolder,
    by_prompt,
    contradictions,
    read_folder,
    read_results,
    results_text,
)
from bench.suites.geneval.prompts import Metadata, list_sha256, prompts_of, same_list, tag_counts
from bench.suites.geneval.scores import (
    Secondary,
    Seen,
    geneval_scores,
    image_counts,
    load_secondary,
)
from bench.suites.geneval.sheet import chosen, draw_sheet, thumbnail
from dimo.data import scenes
from dimo.errors import DimoError
from dimo.util.files import sha256_file

_CHUNK = 64  # images decoded before the networks see them


@dataclass(frozen=True)
class _Asked:
    """One image and its prompt."""

    filename: str
    number: int  # of the prompt
    metadata: Metadata


_Batches = Iterable[tuple[Sequence[Pixels], Sequence[_Asked]]]


@dataclass(frozen=True)
class _Judged:
    """Results for the images of one row, in order."""

    results: list[ImageResult]
    numbers: list[int]  # of each image's prompt
    seen: list[Seen]  # batch by batch

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

    @functools.cached_property
    def detector(self) -> ObjectDetector:
        """The protocol's detector; a DimoError if it does not run in dimo."""
        return load_detector(self._named, weights=self.assets.extractor, device=self.runtime.device)

    @functools.cached_property
    def _secondary(self) -> Secondary:
        """Loaded when a row is measured: settings are chosen by the detector alone."""
        return load_secondary(self.protocol, self.runtime.device)

    @functools.cached_property
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

    def measure(self, row: Job, *, seed: int | None = None) -> Measured:
        start, seed = time.monotonic(), self.protocol.seeds.report if seed is None else seed
        secondary, speed, samples = self._secondary, None, None
        if row.images is not None:
            assert row.labels is not None
            tally = Tally()
            batches = self._batches_of(row.images, row.labels, tally)
            judged = self._judge(self._with_prompts(batches), secondary)
        else:
            maker = self._maker(row, seed, self.num_images)
            judged = self._judge(self._with_prompts(maker.batches()), secondary)
            tally, speed, samples = maker.tally, maker.speed(), maker.samples
        method = method_info(row, samples)
        return self._scored(judged, tally.content(), method, start, speed=speed, seed=seed)

    def measure_paths(self, paths: Sequence[Path], origin: ImageOrigin) -> Measured:
        """Scores a folder in the official layout, or reads a results.jsonl or a folder with it.

        The latter where the protocol's detector does not run in dimo.
        """
        start, (path,) = time.monotonic(), paths
        method = image_set_method(origin)
        if self._reads_results:
            judged, content = self._read(path)
            self._refuse(path, content.nonconforming)
            return self._scored(judged, content, method, start)
        folders, problems = read_folder(path, self._prompts)
        self._refuse(path, problems)
        tally, tiles = Tally(), dict[str, Pixels]()
        judged = self._judge(self._read_images(path, folders, tally, tiles), self._secondary)
        sheet = {".png": draw_sheet(tiles)} if tiles else {}
        return self._scored(judged, tally.content(path, problems), method, start, files=sheet)

    def quality(self, row: Job, *, seed: int, num_images: int) -> float:
        """The overall GenEval score."""
        maker = self._maker(row, seed, num_images)
        judged = self._judge(self._with_prompts(maker.batches()), Secondary())
        return summarize(judged.tags, judged.numbers, judged.correct).overall

    def _real_data(self) -> tuple[Tensor, Tensor] | None:
        if self._prompts.name != BUNDLED_PROMPTS:
            return None
        index = torch.arange(self.protocol.images.num_images)
        return scenes.batch(self.protocol.seeds.report, index, "held-out")

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
            scores |= self._secondary.scores(self.protocol, judged.seen, numbers, tags)
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

    def _judge(self, batches: _Batches, secondary: Secondary) -> _Judged:
        judged = _Judged([], [], [])
        for pixels, asked in batches:
            judgements = verdicts(self.detector, pixels, [image.metadata for image in asked])
            judged.seen.append(secondary.look(pixels, [i.metadata["prompt"] for i in asked]))
            for image, verdict in zip(asked, judgements, strict=True):
                boxes = {name: group.boxes.tolist() for name, group in verdict.kept.items()}
                name, metadata = image.filename, image.metadata
                judged.results.append(
                    ImageResult(name, verdict.correct, verdict.reason, metadata, boxes)
                )
                judged.numbers.append(image.number)
        return judged

    def _with_prompts(self, batches: Iterable[tuple[Tensor, Tensor]]) -> _Batches:
        """Images made here, uint8 [B, 3, H, W] with their prompts' numbers int64 [B]."""
        done, count = 0, len(self._metadata)
        for images, labels in batches:
            asked = [
                _Asked(
                    f"{(done + i) % count:05d}/samples/{(done + i) // count:04d}.png",
                    number,
                    self._metadata[number],
                )
                for i, number in enumerate(labels.tolist())
            ]
            done += len(asked)
            yield list(images.permute(0, 2, 3, 1).contiguous().cpu().numpy()), asked

    def _read_images(
        self, path: Path, folders: Sequence[PromptFolder], tally: Tally, tiles: dict[str, Pixels]
    ) -> Iterator[tuple[list[Pixels], list[_Asked]]]:
        """Images of a folder; thumbnails of some are added to `tiles`, by file name."""
        files = [(folder, file) for folder in folders for file in folder.images]
        shown = set(chosen([folder.metadata["tag"] for folder, _ in files]))
        numbers = (folder.number for folder, _ in files)
        images = tally.read([file for _, file in files], numbers, self.runtime.progress)
        for start in range(0, len(files), _CHUNK):
            pixels, asked = [], []
            for place, (folder, file) in enumerate(files[start : start + _CHUNK], start):
                image, name = next(images), str(file.relative_to(path))
                if place in shown:
                    tiles[name] = thumbnail(image)
                pixels.append(image)
                asked.append(_Asked(name, folder.number, folder.metadata))
            yield pixels, asked
        self.runtime.progress("images", len(files), len(files), "images")

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
        return _Judged(results, numbers, []), content
