"""HPSv2's benchmark on one screen: images of four styles -> scores -> record."""

__all__ = ["hps_scores", "measure_hps"]

import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench.catalog import METRICS, NONE
from bench.compare import pack_contributions
from bench.content import image_set_method, labels_sha256
from bench.evaluate import Progress
from bench.features.hps import load_hps
from bench.images import LOSSY_CODECS, ImageInfo, read_image
from bench.inputs import content_sha256
from bench.inputs.hps import hps_images, hps_prompts
from bench.metrics.hps import hps_summary
from bench.pairs.prompts import check_prompts
from bench.protocol import Protocol
from bench.record import Evidence, MetricValue, Section, Speed, new_record
from bench.run import Measured
from bench.scores import Score, metric_values
from dimo.files import sha256_bytes
from dimo.launch import device_name

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
