"""CLIP score of images and their captions, beside the metrics of a feature extractor.

CLIP score (arXiv 2104.08718): cosine of an image and its prompt under a named CLIP. Published
numbers come from different networks, prefixes and scales, and do not compare.
GigaGAN's script, which Di[M]O uses: ViT-g-14, prefix "A photo depicts ", the plain cosine.
torchmetrics: OpenAI's ViT-L-14, no prefix, 100 max(cosine, 0).
`scenes` has a small CLIP that only knows its words and pictures.
"""

import json
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.images import open_images
from bench.metrics.base import Score
from bench.metrics.per_image import cosines, scaled_cosines
from bench.protocol import Prompts, Protocol, Scorer
from bench.protocol.catalog import ANY, SCORERS, load
from bench.suites.base import ImageOrigin, Suite
from bench.suites.features import FeaturesSuite
from dimo.errors import DimoError, unknown_name
from dimo.util.files import sha256_bytes, sha256_file
from dimo.util.schema import Origin

_NEXT_STEP = "give a JSON file with a list of texts, one for each image in the order of the images"


def texts_sha256(texts: Iterable[str]) -> str:
    """Hash of a list of texts, written by `json.dumps` with one text per line."""
    return sha256_bytes("".join(json.dumps(text) + "\n" for text in texts).encode())


def read_captions(path: Path, named: Prompts) -> tuple[str, ...]:
    """Reads a JSON list of texts, `["a cat on a mat", ...]`: the protocol's prompts.

    Raises:
        DimoError: It cannot be read, is not a list of that many texts, or is another list.
    """
    texts = read_texts(path, sum(named.tags.values()), _NEXT_STEP)
    check_prompts(texts, named, path)
    return texts


def read_texts(path: Path, count: int, next_step: str) -> tuple[str, ...]:
    """The texts of a JSON list of `count`, or a DimoError that ends with `next_step`."""
    origin = Origin(str(path), next_step)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise origin.error(f"cannot read prompts: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise origin.error(f"not valid JSON: {error}") from error
    if not isinstance(content, list) or not all(
        isinstance(text, str) and text.strip() for text in content
    ):
        raise origin.error("not a list of texts")
    if len(content) != count:
        raise origin.error(f"{len(content):,} prompts instead of {count:,}")
    return tuple(content)


def check_prompts(texts: Iterable[str], named: Prompts, path: Path) -> str:
    """The hash of the prompts; a DimoError if it is not that of the protocol."""
    digest = texts_sha256(texts)
    if named.sha256 not in (ANY, digest):
        raise Origin(str(path), f"give the prompts {named.name}").error(
            f"these prompts have sha256 {digest[:12]}..., the protocol names {named.sha256[:12]}..."
        )
    return digest


_Scores = npt.NDArray[np.float64]
_SCALES: Mapping[str, Callable[..., _Scores]] = {"cosine": cosines, "scaled": scaled_cosines}


class Towers(typing.Protocol):
    """The CLIP of a CLIP score: images uint8 [H, W, 3] or texts -> unit rows float32 [N, D]."""

    def images(self, images: Iterable[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]: ...

    def texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, eq=False)
class CLIPScorer:
    """Scores how well images match their prompts; raises a DimoError for an unknown scale."""

    clip: Towers
    prefix: str  # put before each prompt unchanged, including a trailing space
    scale: str  # "cosine", or "scaled": 100 max(cosine, 0)
    sha256: str = ""  # hash of the weights

    def __post_init__(self) -> None:
        if self.scale not in _SCALES:
            raise unknown_name("CLIP score scale", self.scale, _SCALES)

    def score(self, images: Iterable[npt.NDArray[np.uint8]], prompts: Sequence[str]) -> _Scores:
        """One score per image, float64 [N]; the CLIP score is their mean.

        Args:
            images: uint8 [H, W, 3] each, one per prompt; read batch by batch.

        Raises:
            DimoError: No prompts, or not one image per prompt.
        """
        if not prompts:
            raise DimoError("no prompts to score images with; give one per image")
        texts = self.clip.texts([self.prefix + prompt for prompt in prompts])
        return _SCALES[self.scale](images=self.clip.images(images), texts=texts)


_READ_AHEAD = 64  # images decoded while the network works on as many


def load_clip_scorer(named: Scorer, weights: Path | None, device: torch.device) -> CLIPScorer:
    """The scorer of a protocol; without `weights`, that of the bundled file.

    Raises:
        DimoError: The file is missing, not that of the protocol, or of another network.
    """
    kind = SCORERS[named.name]
    weights = weights or kind.shipped
    if weights is None:
        raise DimoError(
            f"scorer {named.name!r} needs the weights of CLIP {named.model}; give them with "
            "--clip-weights"
        )
    if not weights.is_file():
        raise DimoError(
            f"no weights of CLIP at {weights}; give those of {named.model or named.name} with "
            "--clip-weights"
        )
    digest = sha256_file(weights)
    if named.sha256 not in (ANY, digest):
        raise DimoError(
            f"{weights} has sha256 {digest[:12]}..., the protocol names {named.sha256[:12]}...; "
            "give the weights that belong to the protocol's version"
        )
    settings = () if kind.shipped else (named.model, named.preprocessing)
    towers: Towers = load(kind.loader)(weights, *settings).to(device)
    return CLIPScorer(towers, named.prefix, named.scale, digest)


def clip_scores(
    protocol: Protocol, values: _Scores, prompts: Sequence[int], tags: Sequence[str] | None = None
) -> dict[str, Score]:
    """The CLIP score, if the protocol names it, of `values`: float64 [N], one per image.

    Images of one prompt are not independent samples, so a contribution is that of a prompt: the
    mean score of its images if all prompts have the same number of images.

    Args:
        prompts: Number of each image's prompt.
        tags: Tag of each image; prompts are resampled within tags, whose numbers are fixed. None:
            prompts have no tags.
    """
    _, first, row = np.unique(np.asarray(prompts), return_index=True, return_inverse=True)
    contributions = np.bincount(row, weights=values) * len(first) / len(values)
    labels = None
    if tags is not None:
        labels = np.unique([tags[i] for i in first], return_inverse=True)[1].astype(np.int64)
    score = Score(float(values.mean()), contributions, labels=labels, smallest=None)
    return {metric.name: score for metric in protocol.metrics if metric.name == "clip_score"}


class CaptionsSuite(FeaturesSuite):
    """FID and CLIP score of images that show captions, in the order of the captions."""

    files_take = (*FeaturesSuite.files_take, "prompts", "clip")
    measure, quality = Suite.measure, Suite.quality  # images come in files

    def __init__(self, *args: Any, **options: Any) -> None:
        Suite.__init__(self, *args, **options)
        named, scorer = self.protocol.prompts, self.protocol.scorer
        assert named is not None
        assert scorer is not None
        if self.runtime.ranks.is_first:
            self.captions = read_captions(prompts_path(self.protocol, self.assets.prompts), named)
            self.scorer = load_clip_scorer(scorer, self.assets.clip, self.runtime.device)
        super().__init__(*args, **options)

    @property
    def evidence(self) -> Mapping[str, str]:
        assert self.protocol.prompts is not None
        return {
            **super().evidence,
            "scorer_sha256": self.scorer.sha256,
            "prompts": self.protocol.prompts.name,
            "prompts_sha256": texts_sha256(self.captions),
        }

    def _other_scores(self, paths: Sequence[Path], origin: ImageOrigin) -> dict[str, Score]:
        """Raises a DimoError if images and captions do not match in number."""
        assert self.protocol.prompts is not None
        each, progress = self.protocol.prompts.images_per_prompt, self.runtime.progress
        images = open_images(paths, recursive=origin.recursive, labels=origin.labels)
        texts = [text for text in self.captions for _ in range(each)]
        if len(images) != len(texts):
            raise DimoError(
                f"{len(images):,} images do not match {len(texts):,} captions; allowed: "
                f"{each} per caption; add the missing images or remove the extra ones"
            )

        def pixels() -> Iterator[npt.NDArray[np.uint8]]:
            done = 0
            for batch in images.batches(range(len(images)), _READ_AHEAD):
                progress("CLIP score", done, len(images), "images")
                yield from batch.permute(0, 2, 3, 1).numpy()
                done += len(batch)

        values = self.scorer.score(pixels(), texts)
        progress("CLIP score", len(images), len(images), "images")
        return clip_scores(self.protocol, values, [i // each for i in range(len(texts))])


def prompts_path(protocol: Protocol, path: Path | None) -> Path:
    """The path; a DimoError if it is None."""
    if path is None:
        assert protocol.prompts is not None
        raise DimoError(
            f"protocol {protocol.name!r} needs the prompts of the images "
            f"({protocol.prompts.name}); give them with --prompts"
        )
    return path
