"""CLIP score of images and their captions, beside the metrics of a feature extractor.

CLIP score (arXiv 2104.08718): cosine of an image and its prompt under a named CLIP. Published
numbers come from different networks, prefixes and scales, and do not compare.
GigaGAN's script, which Di[M]O uses: ViT-g-14, prefix "A photo depicts ", the plain cosine.
torchmetrics: OpenAI's ViT-L-14, no prefix, 100 max(cosine, 0).
`scenes` has a small CLIP that only knows its words and pictures.
"""

import csv
import json
import re
import typing
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.features import FORWARD_BATCH
from bench.images import ImageSet, open_images
from bench.images.codec import IMAGE_SUFFIXES
from bench.images.source import shown
from bench.metrics.base import Score
from bench.metrics.per_image import cosines, scaled_cosines
from bench.protocol import Prompts, Protocol, Scorer
from bench.protocol.catalog import ANY, METRICS, load
from bench.protocol.networks import SCORERS
from bench.suites.base import ImageOrigin, Suite
from bench.suites.features import FeaturesSuite
from dimo.errors import DimoError, unknown_name
from dimo.util.files import sha256_bytes, sha256_file
from dimo.util.schema import Origin, unique_keys

_NEXT_STEP = (
    'give a .json file with a list of texts or {"000.png": "a cat", ...}, a .txt file with one '
    "text per line, or a .csv file with the columns file,caption"
)
_LONG = 20  # letters of a name that may be the beginning of a caption


@dataclass(frozen=True)
class Captions:
    """The captions of a set, and the names of its images where the file of captions gives them."""

    texts: tuple[str, ...]  # one per prompt, in order
    images: Mapping[str, int] | None = None  # name -> number of its text


def texts_sha256(texts: Iterable[str]) -> str:
    """Hash of a list of texts, written by `json.dumps` with one text per line."""
    return sha256_bytes("".join(json.dumps(text) + "\n" for text in texts).encode())


def read_captions(path: Path, named: Prompts) -> Captions:
    """Reads the protocol's prompts: a JSON list `["a cat on a mat", ...]`, lines of a .txt file, or
    texts with the names of their images, `{"000.png": "a cat", ...}` or .csv `file,caption`; or a
    folder with a list of each tag, `TAG.json`, whose images are `TAG/00000.png` and so on.

    Raises:
        DimoError: It cannot be read, does not hold that many texts, or is another list.
    """
    origin, each = Origin(str(path), _NEXT_STEP), named.images_per_prompt
    content = _of_tags(path, named.tags) if path.is_dir() else _read(path, origin)
    if isinstance(content, dict):
        texts = _checked(list(content.values()), origin)
        kept = texts if each == 1 else tuple(dict.fromkeys(texts))  # a row is one image
        rows = range(len(texts)) if each == 1 else map(kept.index, texts)
        captions = Captions(kept, dict(zip(content, rows, strict=True)))
    else:
        captions = Captions(_checked(content, origin))
    _check_count(captions.texts, sum(named.tags.values()), origin)
    check_prompts(captions.texts, named, path)
    return captions


def _of_tags(folder: Path, tags: Mapping[str, int]) -> dict[str, str]:
    """Name of an image without suffix -> its text, as HPSv2 lays them out."""
    next_step = f"give a folder with {', '.join(f'{tag}.json' for tag in tags)}, a list each"
    lists = {
        tag: read_texts(folder / f"{tag}.json", count, next_step) for tag, count in tags.items()
    }
    return {f"{tag}/{n:05d}": text for tag, texts in lists.items() for n, text in enumerate(texts)}


def read_texts(path: Path, count: int, next_step: str) -> tuple[str, ...]:
    """The texts of a JSON list of `count`, or a DimoError that ends with `next_step`."""
    origin = Origin(str(path), next_step)
    texts = _checked(_read(path, origin), origin)
    _check_count(texts, count, origin)
    return texts


def _read(path: Path, origin: Origin) -> Any:
    """What a file of texts holds: a list, or a dict of texts by name; unchecked."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".txt":
            return text.rstrip().split("\n")
        if path.suffix.lower() != ".csv":
            return json.loads(text, object_pairs_hook=unique_keys)
        rows = list(csv.DictReader(text.splitlines(), strict=True))
    except OSError as error:
        raise origin.error(f"cannot read prompts: {error.strerror}") from error
    except (ValueError, csv.Error, RecursionError) as error:
        kind = path.suffix.lower().lstrip(".") or "json"
        raise origin.error(f"not valid {kind.upper()}: {error}") from error
    if not rows or "caption" not in rows[0]:
        raise origin.error(f"no column caption, but {', '.join(map(str, rows[0] if rows else ()))}")
    if "file" not in rows[0]:
        return [row["caption"] for row in rows]
    files = [row["file"] for row in rows]
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise origin.error(f"{twice!r} is named more than once")
    return {row["file"]: row["caption"] for row in rows}


def _checked(content: Any, origin: Origin) -> tuple[str, ...]:
    if not isinstance(content, list) or not all(
        isinstance(text, str) and text.strip() for text in content
    ):
        raise origin.error("not a list of texts")
    return tuple(content)


def _check_count(texts: Sequence[str], count: int, origin: Origin) -> None:
    if len(texts) != count:
        raise origin.error(f"{len(texts):,} prompts instead of {count:,}")


def paired(names: Sequence[str], captions: Captions, each: int) -> list[int]:
    """The number of each image's caption, by a key that allows one pairing only.

    That is the name in the file of captions, the place in an array, a caption as name, or a number
    in the names that counts all images; with `each` images per caption, consecutive ones, or a
    number that counts the captions and one that counts the images of each.

    Raises:
        DimoError: Not `each` images per caption, or names that could be paired otherwise.
    """
    texts = captions.texts
    if len(names) != len(texts) * each:
        raise DimoError(
            f"{len(names):,} images do not match {len(texts):,} captions; allowed: "
            f"{each} per caption; add the missing images or remove the extra ones"
        )
    numbers: list[int] | None
    if captions.images is not None:
        numbers = _by_table(names, captions.images)
    elif not any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):  # rows of arrays
        numbers = [row // each for row in range(len(names))]
    else:
        numbers = _by_text(names, texts, each) or _by_number(names, len(texts), each)
    if numbers is None:
        raise DimoError(
            f"which image shows which caption cannot be told from their names ({shown(names)}); "
            "allowed: names numbered from 0 in the order of the captions, such as 00000.png, or "
            'captions with the names of their images: a .json file {"000.png": "a cat", ...}, or '
            "a .csv file with the columns file,caption"
        )
    wrong = np.flatnonzero(np.bincount(numbers, minlength=len(texts)) != each)
    if len(wrong):
        raise DimoError(
            f"{len(wrong):,} captions do not have {each} of the images, the first is "
            f"{texts[wrong[0]][:60]!r}; correct the names"
        )
    return numbers


def _by_table(names: Sequence[str], numbers: Mapping[str, int]) -> list[int]:
    """By the names of a file of captions, with the suffix or, in all, without it."""
    bare = not any(name.lower().endswith(IMAGE_SUFFIXES) for name in numbers)
    keys = [str(PurePosixPath(name).with_suffix("")) if bare else name for name in names]
    missing = [name for name, key in zip(names, keys, strict=True) if key not in numbers]
    if missing:
        raise DimoError(
            f"the file of captions has none for {len(missing):,} of {len(names):,} images "
            f"({shown(missing)}); add them"
        )
    return [numbers[key] for key in keys]


def _by_text(names: Sequence[str], texts: Sequence[str], each: int) -> list[int] | None:
    """By the caption in each name, cut or numbered where it must be; None where that fails."""
    waiting: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        waiting.setdefault(_letters(text), []).extend([number] * each)
    known, found = sorted(waiting), list[int]()
    for name in names:
        stem = _letters(PurePosixPath(name).stem)
        key = next((k for k in (stem, stem.rstrip("0123456789")) if waiting.get(k)), None)
        if key is None and len(stem) >= _LONG:
            place = bisect_left(known, stem)
            longer = [k for k in known[place : place + 2] if k.startswith(stem)]
            key = longer[0] if len(longer) == 1 and waiting[longer[0]] else None
        if not key or len({texts[number] for number in waiting[key]}) > 1:
            return None
        found.append(waiting[key].pop(0))
    return found


def _letters(text: str) -> str:
    """What is left of a text in a file name: letters and digits, without case or accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text).casefold() if c.isalnum())


def _by_number(names: Sequence[str], count: int, each: int) -> list[int] | None:
    """By numbers that differ among the names, in names alike but for them, or by leading ones."""
    stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
    alike = len({re.sub(r"\d+", "0", stem) for stem in stems}) == 1
    digits = [re.findall(r"\d+" if alike else r"^\d+", stem) for stem in stems]
    if not all(digits):
        return None
    columns = [column for column in zip(*digits, strict=True) if len(set(column)) > 1]
    counted = [[int(text) - min(map(int, column)) for text in column] for column in columns]
    rows, shape = list(zip(*counted, strict=True)), {1: (count * each,), 2: (count, each)}
    if sorted(rows) != list(product(*map(range, shape.get(len(columns), (0,))))):
        return None
    return [row[0] // each if len(row) == 1 else row[0] for row in rows]


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
    digest = checked_sha256(weights, named)
    settings = () if kind.shipped else (named.model, named.preprocessing)
    towers: Towers = load(kind.loader)(weights, *settings).to(device)
    return CLIPScorer(towers, named.prefix, named.scale, digest)


def checked_sha256(weights: Path, named: Scorer) -> str:
    """The hash of a scorer's weights file; a DimoError if it is not that of the protocol."""
    digest = sha256_file(weights)
    if named.sha256 not in (ANY, digest):
        raise DimoError(
            f"{weights} has sha256 {digest[:12]}..., the protocol names {named.sha256[:12]}...; "
            "give the weights that belong to the protocol's version"
        )
    return digest


def pair_scores(
    protocol: Protocol, values: _Scores, prompts: Sequence[int], tags: Sequence[str] | None = None
) -> dict[str, Score]:
    """The protocol's metric of image and prompt, if any, of `values`: float64 [N], one per image.

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
    names = [m.name for m in protocol.metrics if METRICS[m.name].needs == "pairs"]
    return dict.fromkeys(names, score)


class CaptionsSuite(FeaturesSuite):
    """FID and CLIP score of images that show captions, see `paired`."""

    files_take = (*FeaturesSuite.files_take, "prompts", "clip")
    measure, quality = Suite.measure, Suite.quality  # images come in files

    def __init__(self, *args: Any, **options: Any) -> None:
        Suite.__init__(self, *args, **options)
        named, scorer = self.protocol.prompts, self.protocol.scorer
        assert named is not None
        assert scorer is not None
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
            "prompts_sha256": texts_sha256(self.captions.texts),
        }

    def _set(self, paths: Sequence[Path], origin: ImageOrigin) -> ImageSet:
        return open_images(paths, recursive=origin.recursive, labels=origin.labels)

    def _other_gaps(self, paths: Sequence[Path], origin: ImageOrigin) -> dict[str, str]:
        """Finds the caption of each image before anything is computed."""
        assert self.protocol.prompts is not None
        names = self._set(paths, origin).names
        try:
            self._shown = paired(names, self.captions, self.protocol.prompts.images_per_prompt)
        except DimoError as error:
            if not self.nonconforming:
                raise
            return {"clip_score": str(error)}
        return {}

    def _other_scores(self, paths: Sequence[Path], origin: ImageOrigin) -> dict[str, Score]:
        if "clip_score" in self._gaps:
            return {}
        images, ranks = self._set(paths, origin), self.runtime.ranks
        rows = ranks.split(len(images), FORWARD_BATCH)
        texts = [self.captions.texts[self._shown[row]] for row in rows]

        def pixels() -> Iterator[npt.NDArray[np.uint8]]:
            done = 0
            for batch in images.batches(rows, _READ_AHEAD):
                self._told(done, rows, len(images))
                yield from batch.permute(0, 2, 3, 1).numpy()
                done += len(batch)
            self._told(done, rows, len(images))

        parts = ranks.all_gather(
            lambda: self.scorer.score(pixels(), texts) if rows else np.empty(0), first_only=True
        )
        if not ranks.is_first:
            return {}
        return pair_scores(self.protocol, np.concatenate(parts), self._shown)

    def _told(self, done: int, rows: range, total: int) -> None:
        """Progress of all ranks, shown by the first one."""
        if self.runtime.ranks.is_first:
            self.runtime.progress("CLIP score", total * done // len(rows), total, "images")


def prompts_path(protocol: Protocol, path: Path | None) -> Path:
    """The path; a DimoError if it is None."""
    if path is None:
        assert protocol.prompts is not None
        raise DimoError(
            f"protocol {protocol.name!r} needs the prompts of the images "
            f"({protocol.prompts.name}); give them with --prompts"
        )
    return path
