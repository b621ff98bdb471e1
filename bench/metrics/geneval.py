"""GenEval: whether an image shows what its prompt asks for, judged from a detector's output.

Ghosh, Hajishirzi & Schmidt, "GenEval: An Object-Focused Framework for Evaluating Text-to-Image
Alignment", NeurIPS 2023, arXiv:2310.11513. The decisions are those of the official evaluator, in
its single precision. Where the official code is ambiguous, this module decides as follows:

- Of equal scores, the detection that comes first in the detector's list counts as the higher.
- A reason that names two relations names them in the order of `RELATIONS`.
- A position whose target is not an earlier clause ends the official evaluator; here the image is
  wrong, for want of a target.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dimo.errors import DimoError

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

_Box: TypeAlias = npt.NDArray[np.floating[Any]] | Sequence[float]


@dataclass(frozen=True, eq=False)
class Detected:
    """Detections of one class in one image.

    Attributes:
        boxes: float32 [n, 5]: x1, y1, x2, y2 in pixels, score in [0, 1].
        masks: bool [n, H, W], or None.
    """

    boxes: npt.NDArray[np.float32]
    masks: npt.NDArray[np.bool_] | None = None

    def at(self, rows: Sequence[int]) -> "Detected":
        """The detections in `rows`, in that order."""
        rows = list(rows)
        return Detected(self.boxes[rows], None if self.masks is None else self.masks[rows])


# (class name, objects of that class on the picture) -> colour of each
ColorClassifier: TypeAlias = Callable[[str, Detected], Sequence[str]]


@dataclass(frozen=True)
class Rules:
    """The thresholds; the defaults are official.

    Attributes:
        threshold: Scores must be above it.
        counting_threshold: The same, for the tag "counting".
        max_objects: Number of highest-scoring detections considered per class.
        max_overlap: IoU threshold of non-maximum suppression within a class; 1 disables it.
        position_threshold: Fraction of both sizes by which centres must differ to count at all.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


@dataclass(frozen=True, eq=False)
class Verdict:
    """The decision on one image.

    Attributes:
        reason: What is missing, one item per line; empty if the image is correct.
        kept: Detections that were considered, by class, in descending order of score.
    """

    correct: bool
    reason: str
    kept: dict[str, Detected]


def judge(
    detections: Mapping[str, Detected],
    metadata: Mapping[str, Any],
    *,
    colors: ColorClassifier,
    rules: Rules | None = None,
) -> Verdict:
    """Judges one image.

    Args:
        detections: By class name, in the order of the detector's classes.
        metadata: Official format: "tag", "include" and, where needed, "exclude".
        colors: Called only where the prompt names a colour.
        rules: The thresholds; None: the official ones.
    """
    rules = rules or Rules()
    kept = keep_detections(detections, metadata["tag"], rules)
    reasons: list[str] = []
    groups: list[Detected | None] = []  # what each clause found, None where it failed
    for clause in metadata.get("include", ()):
        group, reason = _check_clause(clause, kept, groups, colors, rules)
        reasons += reason
        groups.append(None if reason else group)
    for clause in metadata.get("exclude", ()):
        name, limit = clause["class"], clause["count"]
        number = len(kept[name].boxes) if name in kept else 0
        if number >= limit:
            reasons.append(f"expected {name}<{limit}, found {number}")
    return Verdict(not reasons, "\n".join(reasons), kept)


def keep_detections(
    detections: Mapping[str, Detected], tag: str, rules: Rules
) -> dict[str, Detected]:
    """Detections above the threshold by class, best first; classes without any are left out."""
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    kept = {}
    for name, detected in detections.items():
        boxes = detected.boxes
        scores = np.asarray(boxes, dtype=np.float32).reshape(-1, 5)[:, 4]
        order = np.argsort(-scores, kind="stable")
        chosen: list[int] = []
        for row in order[scores[order] > np.float32(threshold)][: rules.max_objects].tolist():
            if rules.max_overlap == 1 or all(
                box_overlap(boxes[better], boxes[row]) < rules.max_overlap for better in chosen
            ):
                chosen.append(row)
        if chosen:
            kept[name] = detected.at(chosen)
    return kept


def box_overlap(a: _Box, b: _Box) -> float:
    """Intersection over union of two boxes, their last pixels included."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(a[0], a[1], a[2], a[3]) + area(b[0], b[1], b[2], b[3]) - both
    return float(both / union) if union else 0.0


def relations(a: _Box, b: _Box, *, position_threshold: float = 0.1) -> tuple[str, ...]:
    """Position of box a relative to box b (y downwards): up to two of `RELATIONS`, in that order.

    The offset of the centres, less `position_threshold` times both sizes, must be more than half of
    the distance along an axis.
    """
    corners = np.array([a, b])[:, :4].reshape(2, 2, 2)  # object, corner, axis
    centers = corners.mean(axis=1)
    sizes = np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    beyond = np.abs(offset) - position_threshold * (sizes[0] + sizes[1])
    revised = np.maximum(beyond, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return ()
    x, y = revised / np.linalg.norm(offset)
    return tuple(
        name
        for name, holds in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True)
        if holds
    )


def _check_clause(
    clause: Mapping[str, Any],
    kept: Mapping[str, Detected],
    groups: Sequence[Detected | None],
    colors: ColorClassifier,
    rules: Rules,
) -> tuple[Detected | None, list[str]]:
    """The objects that a clause of "include" refers to, and why they are wrong."""
    name, count = clause["class"], clause["count"]
    objects = kept[name].at(range(min(count, len(kept[name].boxes)))) if name in kept else None
    number = 0 if objects is None else len(objects.boxes)
    if objects is None or number < count:
        return objects, [f"expected {name}>={count}, found {number}"] if number < count else []
    if "color" in clause:
        seen, color = list(colors(name, objects)), clause["color"]
        if seen.count(color) < count:
            others = ", ".join(f"{seen.count(c)} {c}" for c in COLORS if c in seen)
            fault = f"expected {color} {name}>={count}, found {seen.count(color)} {color}"
            return objects, [f"{fault}; and {others}"]
    if "position" in clause:
        relation, index = clause["position"]
        target = groups[index] if -len(groups) <= index < len(groups) else None
        if target is None:
            return objects, [f"no target for {name} to be {relation}"]
        for box, other in itertools.product(objects.boxes, target.boxes):
            actual = relations(box, other, position_threshold=rules.position_threshold)
            if relation not in actual:
                words = " and ".join(actual)
                return objects, [f"expected {name} {relation} target, found {words} target"]
    return objects, []


@dataclass(frozen=True)
class TagScore:
    """Fraction of correct images of one tag."""

    score: float
    correct: int
    total: int


@dataclass(frozen=True)
class Summary:
    """GenEval's summary of a set of images.

    Attributes:
        correct_images: Fraction of images that are correct.
        correct_prompts: Fraction of prompts with a correct image.
        tags: By tag, in order of first appearance.
        overall: Mean over the tags, each with the same weight.
    """

    total_images: int
    total_prompts: int
    correct_images: float
    correct_prompts: float
    tags: dict[str, TagScore]
    overall: float


def summarize(tags: Sequence[str], prompts: Sequence[Hashable], correct: Sequence[bool]) -> Summary:
    """The summary, from each image's tag, identifier of its prompt, and correctness.

    Raises: DimoError: The lengths differ, or there are no images.
    """
    if not len(tags) == len(prompts) == len(correct) or not tags:
        raise DimoError(
            f"{len(tags)} tags, {len(prompts)} prompts and {len(correct)} decisions; allowed: "
            "equally many, one an image and one image or more; judge every image"
        )
    totals = Counter(tags)
    rights = Counter(tag for tag, right in zip(tags, correct, strict=True) if right)
    scores = {tag: TagScore(rights[tag] / n, rights[tag], n) for tag, n in totals.items()}
    solved = {prompt for prompt, right in zip(prompts, correct, strict=True) if right}
    return Summary(
        total_images=len(correct),
        total_prompts=len(set(prompts)),
        correct_images=rights.total() / len(correct),
        correct_prompts=len(solved) / len(set(prompts)),
        tags=scores,
        overall=sum(score.score for score in scores.values()) / len(scores),
    )
