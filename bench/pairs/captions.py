"""CLIP score of images and their captions, added to what the protocol's extractor measured."""

__all__ = ["clip_scores", "load_clip_scorer", "with_clip_score"]

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench.catalog import ANY, SCORERS
from bench.compare import add_contributions
from bench.evaluate import Progress
from bench.features.clip_score import CLIPScorer, Towers
from bench.inputs import open_images
from bench.pairs.prompts import texts_sha256
from bench.protocol import Protocol, Scorer
from bench.record import seal
from bench.run import Measured
from bench.scores import Score, metric_values
from dimo.errors import DimoError
from dimo.files import sha256_bytes, sha256_file
from dimo.weights import ASSETS

_READ_AHEAD = 64  # images decoded while the network works on as many


def load_clip_scorer(wanted: Scorer, weights: Path | None, device: torch.device) -> CLIPScorer:
    """The scorer of a protocol.

    Args:
        wanted: What the protocol says of it.
        weights: Of its network; None: they come with dimo.
        device: Where the network shall be.

    Raises:
        DimoError: The file is missing, not the protocol's, or of another network.
    """
    if weights is None and SCORERS[wanted.name].shipped:
        weights = ASSETS / f"{wanted.name}.safetensors"
    if weights is None:
        raise DimoError(
            f"scorer {wanted.name!r} needs the weights of CLIP {wanted.model}; give them with "
            "--clip-weights"
        )
    if not weights.is_file():
        raise DimoError(
            f"CLIP score finds no weights file at {weights}; give those of "
            f"{wanted.model or wanted.name} with --clip-weights"
        )
    found = sha256_file(weights)
    if wanted.sha256 not in (ANY, found):
        raise DimoError(
            f"{weights} has sha256 {found[:12]}..., the protocol names {wanted.sha256[:12]}...; "
            "give the weights that belong to the protocol's version"
        )
    return CLIPScorer(_towers(wanted, weights, device), wanted.prefix, wanted.scale, found)


def _towers(wanted: Scorer, weights: Path, device: torch.device) -> Towers:
    """The network; only its own libraries are loaded."""
    if SCORERS[wanted.name].shipped:
        from bench.features.scenes_clip import load_scene_clip

        return load_scene_clip(weights).to(device)
    from bench.features.clip import load_pairs

    return load_pairs(weights, wanted.model, wanted.preprocessing).to(device)


def clip_scores(
    protocol: Protocol,
    values: npt.NDArray[np.float64],
    prompts: Sequence[int],
    tags: Sequence[str] | None = None,
) -> dict[str, Score]:
    """The CLIP score, if the protocol names it.

    Images of one prompt are no independent samples, so a contribution is that of a prompt: the
    mean score of its images, where all prompts have as many.

    Args:
        protocol: Names the metrics.
        values: Score of each image.
        prompts: Number of each image's prompt.
        tags: Of each image; prompts are resampled within tags, whose numbers are fixed. None:
            prompts have none.
    """
    _, first, row = np.unique(np.asarray(prompts), return_index=True, return_inverse=True)
    contributions = np.bincount(row, weights=values) * len(first) / len(values)
    labels = None
    if tags is not None:
        labels = np.unique([tags[i] for i in first], return_inverse=True)[1].astype(np.int64)
    score = Score(float(values.mean()), contributions, labels=labels, smallest=None)
    return {metric.name: score for metric in protocol.metrics if metric.name == "clip_score"}


def with_clip_score(
    measured: Measured,
    paths: Sequence[Path],
    protocol: Protocol,
    *,
    scorer: CLIPScorer,
    captions: Sequence[str],
    recursive: bool = False,
    labels: str = "",
    progress: Progress = lambda what, done, total, unit: None,
) -> Measured:
    """The same measurement with the CLIP score of the same images.

    Args:
        measured: Of `bench.run.Workbench.measure_paths`, all metrics but this one.
        paths: The set it was of.
        protocol: With prompts and a scorer.
        scorer: Of `load_clip_scorer`.
        captions: As many as the protocol has, in the order of the images; of several images a
            prompt, those of one prompt follow one another.
        recursive: As for `measure_paths`.
        labels: As for `measure_paths`.
        progress: Told how many images are done.

    Raises:
        DimoError: There are more or fewer images than captions, or an image cannot be read.
    """
    start = time.monotonic()
    assert protocol.prompts is not None
    assert measured.record.evidence is not None
    images = open_images(paths, recursive=recursive, labels=labels)
    asked = [text for text in captions for _ in range(protocol.prompts.images_per_prompt)]
    if len(images) != len(asked):
        raise DimoError(
            f"{len(images):,} images do not fit {len(asked):,} captions; the score needs all of "
            "them, make the missing images or leave out what is more"
        )

    def pixels() -> Iterator[npt.NDArray[np.uint8]]:
        done = 0
        for batch in images.batches(range(len(images)), _READ_AHEAD):
            progress("CLIP score", done, len(images), "images")
            yield from batch.permute(0, 2, 3, 1).numpy()
            done += len(batch)

    values = scorer.score(pixels(), asked)
    progress("CLIP score", len(images), len(images), "images")
    numbers = [i // protocol.prompts.images_per_prompt for i in range(len(asked))]
    scores = clip_scores(protocol, values, numbers)
    contributions = add_contributions(measured.contributions, scores)
    record = measured.record
    metrics = record.metrics | metric_values(scores, protocol, len(images))
    return Measured(
        seal(
            dataclasses.replace(
                record,
                metrics={metric.name: metrics[metric.name] for metric in protocol.metrics},
                seconds=record.seconds + time.monotonic() - start,
                evidence=dataclasses.replace(
                    measured.record.evidence,
                    contributions_sha256=sha256_bytes(contributions),
                    scorer_sha256=scorer.sha256,
                    prompts_sha256=texts_sha256(captions),
                ),
            )
        ),
        contributions,
    )
