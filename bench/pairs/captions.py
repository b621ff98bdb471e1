"""CLIP score of images and their captions, added to what the protocol's extractor measured."""

__all__ = ["load_clip_scorer", "with_clip_score"]

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench.catalog import ANY
from bench.compare import add_contributions
from bench.evaluate import Progress
from bench.features.clip import load_pairs
from bench.features.clip_score import CLIPScorer
from bench.inputs import open_images
from bench.pairs.prompts import texts_sha256
from bench.protocol import Protocol, Scorer
from bench.record import seal
from bench.run import Measured
from bench.scores import Score, metric_values
from dimo.errors import DimoError
from dimo.files import sha256_bytes, sha256_file

_READ_AHEAD = 64  # images decoded while the network works on as many


def load_clip_scorer(wanted: Scorer, weights: Path, device: torch.device) -> tuple[CLIPScorer, str]:
    """The scorer of a protocol, and the SHA-256 of its weights.

    Raises:
        DimoError: The file is missing, not the protocol's, or of another network.
    """
    if not weights.is_file():
        raise DimoError(
            f"CLIP score finds no weights file at {weights}; give those of open_clip's "
            f"{wanted.model} with --clip-weights"
        )
    found = sha256_file(weights)
    if wanted.sha256 not in (ANY, found):
        raise DimoError(
            f"{weights} has sha256 {found[:12]}..., the protocol names {wanted.sha256[:12]}...; "
            "give the weights that belong to the protocol's version"
        )
    clip = load_pairs(weights, wanted.model, wanted.preprocessing).to(device)
    return CLIPScorer(clip, wanted.prefix, wanted.scale), found


def with_clip_score(
    measured: Measured,
    paths: Sequence[Path],
    protocol: Protocol,
    *,
    scorer: tuple[CLIPScorer, str],
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

    clip, sha256 = scorer
    values = clip.score(pixels(), asked)
    progress("CLIP score", len(images), len(images), "images")
    score = Score(float(values.mean()), values, smallest=None)
    scores = {m.name: score for m in protocol.metrics if m.name == "clip_score"}
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
                    scorer_sha256=sha256,
                    prompts_sha256=texts_sha256(captions),
                ),
            )
        ),
        contributions,
    )
