"""Metrics: pure functions from arrays to numbers. They see no path, model or protocol."""

__all__ = [
    "CMMD",
    "PRDC",
    "InceptionScore",
    "KernelDistance",
    "ManifoldMembership",
    "class_accuracy",
    "class_hits",
    "cmmd",
    "coverage_ceiling",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "manifold_membership",
    "prdc",
]

from bench.metrics.class_accuracy import class_accuracy, class_hits
from bench.metrics.frechet import frechet_distance
from bench.metrics.inception_score import InceptionScore, inception_score
from bench.metrics.kernel import CMMD, KernelDistance, cmmd, kernel_distance
from bench.metrics.prdc import (
    PRDC,
    ManifoldMembership,
    coverage_ceiling,
    manifold_membership,
    prdc,
)
