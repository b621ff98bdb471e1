"""Metrics: pure functions from arrays to numbers. They see no path, model or protocol."""

__all__ = [
    "PRDC",
    "HPSSummary",
    "ManifoldMembership",
    "authpct",
    "class_accuracy",
    "class_hits",
    "cmmd",
    "codebook_histogram",
    "cosines",
    "coverage_ceiling",
    "frechet_distance",
    "hps_summary",
    "inception_score",
    "kernel_distance",
    "manifold_membership",
    "mind",
    "prdc",
    "psnr",
    "scaled_cosines",
    "ssim",
]

from bench.metrics.frechet import frechet_distance, mind
from bench.metrics.inception_score import inception_score
from bench.metrics.kernel import cmmd, kernel_distance
from bench.metrics.per_image import (
    HPSSummary,
    class_accuracy,
    class_hits,
    cosines,
    hps_summary,
    scaled_cosines,
)
from bench.metrics.prdc import (
    PRDC,
    ManifoldMembership,
    authpct,
    coverage_ceiling,
    manifold_membership,
    prdc,
)
from bench.metrics.reconstruction import codebook_histogram, psnr, ssim
