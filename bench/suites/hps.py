"""HPSv2's benchmark: images in one folder per style, one per prompt -> scores -> record.

Human Preference Score v2 (arXiv 2306.09341): a CLIP ViT-H/14 fine-tuned on human choices.

Versions 2.0 and 2.1 are two sets of weights whose scores do not compare. The published tables come
from a resize whose antialiasing changed with torchvision, so the preprocessing is named too.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.features.clip import CLIPPairs, load_pairs
from bench.metrics.base import Score
from bench.metrics.per_image import STYLES, cosines, hps_summary
from bench.protocol import Protocol
from bench.protocol.catalog import ANY, METRICS
from bench.protocol.networks import SCORERS
from bench.rows.generate import FileImages
from bench.rows.rows import Arrays, image_set_method
from bench.suites.base import ImageOrigin, Measured, Suite
from bench.suites.captions import check_prompts, prompts_path, read_texts
from dimo.errors import DimoError, unknown_name
from dimo.util.files import sha256_file
from dimo.weights.catalog import locate

PROMPTS_PER_STYLE = 800
_CHUNK = 64  # images decoded before the network sees them
_SUFFIXES = (".png", ".jpg", ".jpeg")
_Floats = npt.NDArray[np.float64]


def hps_prompts(
    folder: Path, *, prompts_per_style: int = PROMPTS_PER_STYLE
) -> Mapping[str, tuple[str, ...]]:
    """Style -> prompts, from one `STYLE.json` with a list of texts per style.

    Args:
        folder: The folder `benchmark` of the data set zhwang/HPDv2.

    Raises:
        DimoError: A missing file, or one that is not a list of that many texts.
    """
    next_step = "give the folder benchmark of the data set zhwang/HPDv2"
    return {
        style: read_texts(folder / f"{style}.json", prompts_per_style, next_step)
        for style in STYLES
    }


def hps_images(
    folder: Path, *, prompts_per_style: int = PROMPTS_PER_STYLE
) -> Mapping[str, tuple[Path, ...]]:
    """Style -> its images in the order of the prompts: `STYLE/00000.png` (or `.jpg`) and so on.

    Raises:
        DimoError: Missing folders or images, one image in two formats, or extra images.
    """
    absent = [style for style in STYLES if not (folder / style).is_dir()]
    if absent:
        raise DimoError(
            f"{folder} has no folder {', '.join(absent)}; HPS needs {', '.join(STYLES)}, each with "
            f"{prompts_per_style} images"
        )
    files, missing = dict[str, tuple[Path, ...]](), list[str]()
    for style in STYLES:
        present: dict[str, list[Path]] = {}
        for path in sorted((folder / style).iterdir()):
            if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."):
                present.setdefault(path.stem, []).append(path)
        wanted = [f"{number:05d}" for number in range(prompts_per_style)]
        missing += [f"{style}/{stem}.png" for stem in wanted if stem not in present]
        if twice := next((paths for paths in present.values() if len(paths) > 1), None):
            raise DimoError(f"{folder / style} has {twice[0].name} and {twice[1].name}; remove one")
        if others := sorted(present.keys() - wanted):
            raise DimoError(
                f"{folder / style} has {len(others)} images in excess of its "
                f"{prompts_per_style} prompts, the first is {present[others[0]][0].name}; remove "
                "them"
            )
        files[style] = tuple(present[stem][0] for stem in wanted if stem in present)
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise DimoError(
            f"{folder} lacks {', '.join(missing[:3])}{more} (or .jpg); HPS needs one image for "
            f"each of {prompts_per_style} prompts per style; generate the missing ones"
        )
    return files


HPS_VERSIONS: Mapping[str, str] = SCORERS["hps"].versions  # version -> its published file


@dataclass(frozen=True, eq=False)
class HPSScorer:
    """Predicts human preference for images, given their prompts."""

    clip: CLIPPairs
    version: str  # a key of `HPS_VERSIONS`
    sha256: str  # hash of the weights file

    def score(self, images: Iterable[npt.NDArray[np.uint8]], prompts: Sequence[str]) -> _Floats:
        """Cosine of each image with its own prompt, times 100: float64 [N].

        Images are read batch by batch; a DimoError if there is not one per prompt.
        """
        if not prompts:
            raise DimoError("no prompts to score images with; give one per image")
        return 100 * cosines(images=self.clip.images(images), texts=self.clip.texts(prompts))


def load_hps(
    weights: Path, *, version: str, preprocessing: str, sha256: str, device: torch.device
) -> HPSScorer:
    """The scorer of a protocol, from the published checkpoint or another file with its keys.

    Args:
        preprocessing: As for `bench.features.clip.CLIPPairs`.
        sha256: Hash of the weights file; "any" accepts the published file by its name.

    Raises:
        DimoError: Unknown version or preprocessing; a missing or foreign file; a file of the other
            version, or one whose version neither its name nor its hash tells.
    """
    if version not in HPS_VERSIONS:
        raise unknown_name("HPS version", version, HPS_VERSIONS)
    if not weights.is_file():
        raise DimoError(
            f"no weights of HPS {version} at {weights}; fetch them with: "
            f"dimo weights fetch hps-{version}"
        )
    digest = sha256_file(weights)
    _check_version(weights, version, digest, sha256)
    clip = load_pairs(weights, SCORERS["hps"].model, preprocessing).to(device)
    return HPSScorer(clip, version, digest)


def _check_version(weights: Path, version: str, digest: str, sha256: str) -> None:
    names = {name.removesuffix(".pt"): key for key, name in HPS_VERSIONS.items()}
    named = names.get(weights.name.partition(".pt")[0].removesuffix(".safetensors"))
    if named not in (None, version):
        raise DimoError(
            f"{weights} is the checkpoint of HPS {named}, but {version} is declared, and their "
            f"scores do not compare; give {HPS_VERSIONS[version]}"
        )
    if sha256 == ANY and named is None:
        raise DimoError(
            f"{weights} may be any version of HPS; rename it to {HPS_VERSIONS[version]} if it is "
            "that file, or declare its sha256 in the protocol"
        )
    if sha256 not in (ANY, digest):
        raise DimoError(
            f"{weights} has sha256 {digest[:12]}..., but {sha256[:12]}... is declared for HPS "
            f"{version}; give the weights that belong to the protocol's version"
        )


class HPSSuite(Suite):
    """HPS of images in the official layout, `anime/00000.jpg` and so on."""

    one_folder = "the folder of all styles"
    files_take = ("prompts",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        named, declared = self.protocol.prompts, self.protocol.scorer
        assert named is not None
        assert declared is not None
        self._named = named
        self._each = next(iter(named.tags.values()))  # prompts per style, the same for all
        path = prompts_path(self.protocol, self.assets.prompts)
        self._texts = hps_prompts(path, prompts_per_style=self._each)
        self._prompts_sha256 = check_prompts(chain(*self._texts.values()), named, path)
        self.scorer = load_hps(
            self.assets.extractor or locate(f"hps-{declared.version}"),
            version=declared.version,
            preprocessing=declared.preprocessing,
            sha256=declared.sha256,
            device=self.runtime.device,
        )

    @property
    def evidence(self) -> Mapping[str, str]:
        return {
            "scorer_sha256": self.scorer.sha256,
            "prompts": self._named.name,
            "prompts_sha256": self._prompts_sha256,
        }

    def measure_paths(self, paths: Sequence[Path], origin: ImageOrigin) -> Measured | None:
        start, (path,) = time.monotonic(), paths
        files = self.runtime.ranks.synchronized(
            lambda: hps_images(path, prompts_per_style=self._each)
        )
        texts = [text for style in files for text in self._texts[style]]
        images = FileImages(path, list(chain(*files.values())), range(len(texts)))

        def look(pixels: list[npt.NDArray[np.uint8]], rows: range) -> Arrays:
            return {"score": self.scorer.score(pixels, texts[rows.start : rows.stop])}

        collected = self._collect(images, look, batch_size=_CHUNK)

        def scored() -> Measured:
            assert collected is not None
            values = np.split(collected.found["score"], len(files))
            scores = hps_scores(dict(zip(files, values, strict=True)), self.protocol)
            counts = {name: len(score.contributions) for name, score in scores.items()}
            method = image_set_method(origin.name, origin.section, origin.num_steps)
            return self._measured(scores, counts, collected.content, method, start)

        return self.on_first(scored)


def hps_scores(by_style: Mapping[str, _Floats], protocol: Protocol) -> dict[str, Score]:
    """Each metric of HPS that the protocol names, from [N] scores per style in prompt order.

    A contribution is the score of an image, one per prompt; the average is resampled within styles,
    whose numbers of prompts are fixed.

    Raises:
        DimoError: As `hps_summary`.
    """
    each = len(next(iter(by_style.values()), ()))
    summary = hps_summary(by_style, prompts_per_style=each)
    values = np.concatenate([by_style[style] for style in summary.styles])
    labels = np.repeat(np.arange(len(summary.styles)), each)
    average = Score(summary.average, values, labels=labels, smallest=None)
    styles = {
        style: Score(one.mean, by_style[style], extra={"std": one.std}, smallest=None)
        for style, one in summary.styles.items()
    }
    tags = {metric.name: METRICS[metric.name].tag for metric in protocol.metrics}
    return {name: styles[tag] if tag else average for name, tag in tags.items()}
