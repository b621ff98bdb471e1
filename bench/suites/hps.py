"""HPSv2's benchmark on disk: its prompts by style, and one image a prompt in a folder a style.

Human Preference Score v2 (arXiv 2306.09341): a CLIP ViT-H/14 tuned on people's choices.

Versions 2.0 and 2.1 are two sets of weights whose scores do not compare. The published tables come
from a resize whose antialiasing changed with torchvision, so the preprocessing is named too.

HPSv2's benchmark on one screen: images of four styles -> scores -> record.
"""

import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench.features.clip import CLIPPairs, load_pairs
from bench.images import content_sha256
from bench.images.codec import LOSSY_CODECS, ImageInfo, read_image
from bench.images.labels import labels_sha256
from bench.metrics.base import Score
from bench.metrics.clip_score import cosines
from bench.metrics.hps import STYLES, hps_summary
from bench.metrics.scores import metric_values
from bench.protocol import Protocol
from bench.protocol.catalog import ANY, METRICS, NONE, SCORERS
from bench.records.compare import pack_contributions
from bench.records.record import Evidence, MetricValue, Section, Speed, new_record
from bench.suites.base import image_set_method
from bench.suites.captions import check_prompts
from bench.suites.features import Measured
from dimo.engine.distributed import device_name
from dimo.errors import DimoError, unknown_name
from dimo.util.files import sha256_bytes, sha256_file
from dimo.util.schema import Origin
from dimo.util.terminal import Progress

PROMPTS_PER_STYLE = 800
_SUFFIXES = (".png", ".jpg")


def hps_prompts(
    folder: Path, *, prompts_per_style: int = PROMPTS_PER_STYLE
) -> Mapping[str, tuple[str, ...]]:
    """Style -> prompts, from `STYLE.json`, a list of texts each.

    Args:
        folder: The folder `benchmark` of the data set zhwang/HPDv2.
        prompts_per_style: Length of each list.

    Raises:
        DimoError: A missing file, or one that is not a list of so many texts.
    """
    found: dict[str, tuple[str, ...]] = {}
    for style in STYLES:
        path = folder / f"{style}.json"
        origin = Origin(str(path), "give the folder benchmark of the data set zhwang/HPDv2")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise origin.error(f"cannot read prompts: {error.strerror}") from None
        except ValueError as error:
            raise origin.error(f"not valid JSON: {error}") from error
        if not isinstance(content, list) or not all(
            isinstance(prompt, str) and prompt.strip() for prompt in content
        ):
            raise origin.error("not a list of texts")
        if len(content) != prompts_per_style:
            raise origin.error(f"{len(content)} prompts instead of {prompts_per_style}")
        found[style] = tuple(content)
    return found


def hps_images(
    folder: Path, *, prompts_per_style: int = PROMPTS_PER_STYLE
) -> Mapping[str, tuple[Path, ...]]:
    """Style -> its images in the order of the prompts: `STYLE/00000.png` and on, or `.jpg`.

    Args:
        folder: Holds a folder for each style.
        prompts_per_style: Images in each.

    Raises:
        DimoError: Missing folders or images, an image that is there twice, or further images.
    """
    absent = [style for style in STYLES if not (folder / style).is_dir()]
    if absent:
        raise DimoError(
            f"{folder} has no folder {', '.join(absent)}; HPS needs {', '.join(STYLES)}, each with "
            f"{prompts_per_style} images"
        )
    found: dict[str, tuple[Path, ...]] = {}
    missing: list[str] = []
    for style in STYLES:
        present = {path.name for path in (folder / style).iterdir()}
        images: list[Path] = []
        for number in range(prompts_per_style):
            names = [f"{number:05d}{suffix}" for suffix in _SUFFIXES]
            there = [name for name in names if name in present]
            if len(there) == 2:
                raise DimoError(f"{folder / style} has {names[0]} and {names[1]}; remove one")
            missing += [] if there else [f"{style}/{names[0]}"]
            images += [folder / style / name for name in there]
        others = sorted(
            name
            for name in present - {path.name for path in images}
            if Path(name).suffix in _SUFFIXES
        )
        if others:
            raise DimoError(
                f"{folder / style} has {len(others)} images more than its {prompts_per_style} "
                f"prompts, the first is {others[0]}; remove them"
            )
        found[style] = tuple(images)
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise DimoError(
            f"{folder} misses {', '.join(missing[:3])}{more} (or .jpg); HPS needs one image for "
            f"each of {prompts_per_style} prompts a style; generate them again"
        )
    return found


_ARCHITECTURE = SCORERS["hps"].model
HPS_VERSIONS: Mapping[str, str] = SCORERS["hps"].versions  # version -> its published file


@dataclass(frozen=True, eq=False)
class HPSScorer:
    """Scores images by how people would like them for a prompt.

    Attributes:
        clip: Both towers.
        version: A key of `HPS_VERSIONS`.
        sha256: Of the weights file.
    """

    clip: CLIPPairs
    version: str
    sha256: str

    def score(
        self, images: Iterable[npt.NDArray[np.uint8]], prompts: Sequence[str]
    ) -> npt.NDArray[np.float64]:
        """Cosine of each image with its own prompt, times 100: float64 [N].

        Args:
            images: uint8 [H, W, 3] each, one a prompt; taken one batch after the other.
            prompts: N texts.

        Raises:
            DimoError: Another number of images than of prompts, or no prompt.
        """
        if not prompts:
            raise DimoError("there is no prompt to score images with; give one an image")
        return 100 * cosines(images=self.clip.images(images), texts=self.clip.texts(prompts))


def load_hps(
    weights: Path, *, version: str, preprocessing: str, sha256: str, device: torch.device
) -> HPSScorer:
    """The scorer of a protocol.

    Args:
        weights: The published checkpoint, or another file with its keys.
        version: What the protocol declares, a key of `HPS_VERSIONS`.
        preprocessing: As for `bench.features.clip.CLIPPairs`.
        sha256: Of the weights file; "any" takes the published file by its name.
        device: Where the network shall be.

    Raises:
        DimoError: Unknown version or preprocessing; a missing or foreign file; one of the other
            version, or one that neither its name nor its hash tells to be of this version.
    """
    if version not in HPS_VERSIONS:
        raise unknown_name("HPS version", version, HPS_VERSIONS)
    if not weights.is_file():
        raise DimoError(
            f"HPS {version} finds no weights file at {weights}; fetch it with: "
            f"dimo weights fetch hps-{version}"
        )
    found = sha256_file(weights)
    _check_version(weights, version, found, sha256)
    clip = load_pairs(weights, _ARCHITECTURE, preprocessing).to(device)
    return HPSScorer(clip, version, found)


def _check_version(weights: Path, version: str, found: str, sha256: str) -> None:
    """
    Raises:
        DimoError: The file is not, or not known to be, of that version.
    """
    names = {name.removesuffix(".pt"): key for key, name in HPS_VERSIONS.items()}
    named = names.get(weights.name.partition(".pt")[0].removesuffix(".safetensors"))
    if named not in (None, version):
        raise DimoError(
            f"{weights} is the checkpoint of HPS {named}, but {version} is declared, and their "
            f"scores do not compare; give {HPS_VERSIONS[version]}"
        )
    if sha256 == ANY and named is None:
        raise DimoError(
            f"{weights} may be of any version of HPS; name it {HPS_VERSIONS[version]} if it is "
            "that file, or declare its sha256 in the protocol"
        )
    if sha256 not in (ANY, found):
        raise DimoError(
            f"{weights} has sha256 {found[:12]}..., but {sha256[:12]}... is declared for HPS "
            f"{version}; give the weights that belong to the protocol's version"
        )


_Floats = npt.NDArray[np.float64]


def measure_hps(
    path: Path,
    protocol: Protocol,
    *,
    prompts: Path,
    weights: Path,
    name: str,
    section: Section = "Image sets",
    num_steps: int | None = None,
    device: torch.device,
    progress: Progress = lambda what, done, total, unit: None,
) -> Measured:
    """Scores a set of images in the official layout, `anime/00000.jpg` and so on.

    Args:
        path: Folder with a folder a style.
        protocol: With prompts and the scorer "hps".
        prompts: Folder with a file of prompts a style.
        weights: The scorer's checkpoint.
        name: Of the row.
        section: Block of the table.
        num_steps: Sampling steps the images were made with, if known.
        device: Where the network runs.
        progress: Told how many images are done.

    Raises:
        DimoError: Images or prompts are missing, too many or unreadable, or the checkpoint is
            missing or of another version than the protocol's.
    """
    start = time.monotonic()
    assert protocol.prompts is not None
    assert protocol.scorer is not None
    each = next(iter(protocol.prompts.tags.values()))
    texts = hps_prompts(prompts, prompts_per_style=each)
    prompts_sha256 = check_prompts(chain.from_iterable(texts.values()), protocol.prompts, prompts)
    files = hps_images(path, prompts_per_style=each)
    scorer = load_hps(
        weights,
        version=protocol.scorer.version,
        preprocessing=protocol.scorer.preprocessing,
        sha256=protocol.scorer.sha256,
        device=device,
    )
    infos: list[ImageInfo] = []
    total = each * len(files)

    def pixels(style: str) -> Iterator[npt.NDArray[np.uint8]]:
        for file in files[style]:
            progress("images", len(infos), total, "images")
            info, image = read_image(file)
            infos.append(info)
            yield image

    found = {style: scorer.score(pixels(style), texts[style]) for style in files}
    progress("images", total, total, "images")
    scores = hps_scores(found, protocol)
    contributions = pack_contributions(scores)
    labels = np.arange(total, dtype=np.int64)
    copies = total - len({info.sha256 for info in infos})
    evidence = Evidence(
        images=(str(path),),
        images_sha256=content_sha256(infos, labels),
        labels_sha256=labels_sha256(labels),
        extractor=NONE,
        extractor_sha256="",
        reference=NONE,
        reference_sha256="",
        copies=copies,
        notes=tuple(_notes(infos, copies)),
        nonconforming=(),
        contributions_sha256=sha256_bytes(contributions),
        scorer_sha256=scorer.sha256,
        prompts_sha256=prompts_sha256,
    )
    record = new_record(
        protocol=protocol,
        method=image_set_method(name, section, num_steps),
        metrics=_values(scores, protocol),
        speed=Speed(None, None, None, None, device_name(device)),
        seed=None,
        command=shlex.join(["dimo", *sys.argv[1:]]),
        seconds=time.monotonic() - start,
        evidence=evidence,
    )
    return Measured(record, contributions)


def hps_scores(found: Mapping[str, _Floats], protocol: Protocol) -> dict[str, Score]:
    """Each metric of HPS that the protocol names.

    A contribution is the score of an image, one a prompt; the average is resampled within styles,
    whose numbers of prompts are fixed.

    Args:
        found: Style -> [N] scores in the order of its prompts.
        protocol: Names the metrics.

    Raises:
        DimoError: As `hps_summary`.
    """
    each = len(next(iter(found.values()), ()))
    summary = hps_summary(found, prompts_per_style=each)
    scores: dict[str, Score] = {}
    for metric in protocol.metrics:
        style = METRICS[metric.name].tag
        if style:
            mean, std = summary.styles[style].mean, summary.styles[style].std
            scores[metric.name] = Score(mean, found[style], extra={"std": std}, smallest=None)
        else:
            values = np.concatenate([found[style] for style in summary.styles])
            styles = np.repeat(np.arange(len(summary.styles)), each)
            scores[metric.name] = Score(summary.average, values, labels=styles, smallest=None)
    return scores


def _values(scores: dict[str, Score], protocol: Protocol) -> dict[str, MetricValue]:
    """The entries of a record; each stands on its own images."""
    values: dict[str, MetricValue] = {}
    for name, score in scores.items():
        values |= metric_values({name: score}, protocol, len(score.contributions))
    return values


def _notes(infos: list[ImageInfo], copies: int) -> Iterator[str]:
    if copies:
        yield f"{copies} images are copies of others"
    lossy = Counter(info.codec for info in infos if info.codec in LOSSY_CODECS)
    for codec, count in lossy.items():
        yield f"{count} images are stored with a loss ({codec})"
