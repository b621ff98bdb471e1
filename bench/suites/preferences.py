"""Scores of human preference: images of any sizes and their prompts -> one network -> record.

PickScore, ImageReward and HPSv3 differ in the network alone: a row of `SCORERS` names it. Images
find their prompts as in `bench.suites.captions`; with a folder of prompts they lie in the layout
of HPSv2's benchmark, so that one folder of images serves all of these protocols.
"""

import time
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from bench.images.codec import IMAGE_SUFFIXES
from bench.protocol import Scorer
from bench.protocol.catalog import load
from bench.protocol.networks import SCORERS
from bench.rows.generate import FileImages
from bench.rows.rows import Arrays, image_set_method
from bench.suites.base import ImageOrigin, Measured, Suite
from bench.suites.captions import (
    checked_sha256,
    pair_scores,
    paired,
    prompts_path,
    read_captions,
    texts_sha256,
)
from dimo.errors import DimoError

_CHUNK = 64  # images decoded before the network sees them


class PairScorer(typing.Protocol):
    """A network that scores images for their prompts; a `torch.nn.Module`."""

    def to(self, device: torch.device) -> Self: ...

    def score(
        self, images: Sequence[npt.NDArray[np.uint8]], prompts: Sequence[str]
    ) -> npt.NDArray[np.float64]:
        """One score per image uint8 [H, W, 3] and its own prompt, float64 [N]."""


def load_preference(
    named: Scorer, weights: Path | None, device: torch.device
) -> tuple[PairScorer, str]:
    """The scorer of a protocol, and the hash of its weights file.

    Raises:
        DimoError: The file is missing, not that of the protocol, or of another network.
    """
    kind = SCORERS[named.name]
    if weights is None or not weights.is_file():
        found = "no weights given" if weights is None else f"no file {weights}"
        raise DimoError(
            f"{found}; scorer {named.name!r} needs {kind.weights}; give the file with "
            "--extractor-weights"
        )
    digest = checked_sha256(weights, named)
    scorer: PairScorer = load(kind.loader)(weights)
    return scorer.to(device), digest


class PreferencesSuite(Suite):
    """One preference score per image and prompt; see `paired` for which belong together."""

    one_folder = "the folder of images"
    files_take = ("prompts",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        named, scorer = self.protocol.prompts, self.protocol.scorer
        assert named is not None
        assert scorer is not None
        self._named = named
        self.captions = read_captions(prompts_path(self.protocol, self.assets.prompts), named)
        self.scorer, self._sha256 = load_preference(
            scorer, self.assets.extractor, self.runtime.device
        )

    @property
    def evidence(self) -> Mapping[str, str]:
        return {
            "scorer_sha256": self._sha256,
            "prompts": self._named.name,
            "prompts_sha256": texts_sha256(self.captions.texts),
        }

    def measure_paths(self, paths: Sequence[Path], origin: ImageOrigin) -> Measured | None:
        start, (path,) = time.monotonic(), paths
        files, shown = self.runtime.ranks.synchronized(lambda: self._paired(path))
        texts = [self.captions.texts[number] for number in shown]

        def look(pixels: list[npt.NDArray[np.uint8]], rows: range) -> Arrays:
            return {"score": self.scorer.score(pixels, texts[rows.start : rows.stop])}

        images = FileImages(path, files, shown)
        collected = self._collect(images, look, batch_size=_CHUNK)

        def scored() -> Measured:
            assert collected is not None
            tags = [tag for tag, count in self._named.tags.items() for _ in range(count)]
            of_images = [tags[number] for number in shown]
            scores = pair_scores(self.protocol, collected.found["score"], shown, of_images)
            counts = dict.fromkeys(scores, len(files))
            method = image_set_method(origin.name, origin.section, origin.num_steps)
            return self._measured(scores, counts, collected.content, method, start)

        return self.on_first(scored)

    def _paired(self, folder: Path) -> tuple[list[Path], list[int]]:
        """The images of a folder and its subfolders, and the number of each one's prompt."""
        if not folder.is_dir():
            raise DimoError(f"{folder} is no folder; give {self.one_folder}")
        found = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
        names = {
            name.as_posix(): path
            for name, path in found.items()
            if name.suffix.lower() in IMAGE_SUFFIXES
            and not any(part.startswith(".") for part in name.parts)
        }
        each = self._named.images_per_prompt
        return list(names.values()), paired(list(names), self.captions, each)
