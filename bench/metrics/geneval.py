"""GenEval: whether an image shows what its prompt asks for, judged from a detector's output.

Ghosh, Hajishirzi & Schmidt, "GenEval: An Object-Focused Framework for Evaluating Text-to-Image
Alignment", NeurIPS 2023, arXiv:2310.11513. The decisions are those of the official evaluator, its
single precision included. Where that leaves something to chance, this is what happens:

- Of equal scores, the detection that comes first in the detector's list counts as the higher.
- A reason that names two relations names them in the order of `RELATIONS`.
- A position whose target is no earlier clause ends the official evaluator; here the picture is
  wrong, for want of a target.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dimo.errors import DimoError

COLORS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
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
        """Those of these rows, in their order."""
        chosen = list(rows)
        return Detected(self.boxes[chosen], None if self.masks is None else self.masks[chosen])


# (class name, objects of that class on the picture) -> colour of each
ColorClassifier: TypeAlias = Callable[[str, Detected], Sequence[str]]


@dataclass(frozen=True)
class Rules:
    """The thresholds; the defaults are official.

    Attributes:
        threshold: Scores must be above it.
        counting_threshold: The same, for the tag "counting".
        max_objects: Number of highest-scoring detections considered per class.
        max_overlap: A box that overlaps a surer one of its class by as much is dropped; 1 is off.
        position_threshold: Share of both sizes by which centres must differ to count at all.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


@dataclass(frozen=True, eq=False)
class Verdict:
    """The decision on one picture.

    Attributes:
        correct: Whether everything the prompt asks for is present.
        reason: What is missing, one item per line; empty if nothing is.
        kept: Detections that were looked at, by class, the surest first.
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
    """Decides one picture.

    Args:
        detections: By class name, in the order of the detector's classes.
        metadata: Official format: "tag", "include" and, where needed, "exclude".
        colors: Asked only where the prompt names a colour.
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
        name, count = clause["class"], clause["count"]
        found = len(kept[name].boxes) if name in kept else 0
        if found >= count:
            reasons.append(f"expected {name}<{count}, found {found}")
    return Verdict(not reasons, "\n".join(reasons), kept)


def keep_detections(
    detections: Mapping[str, Detected], tag: str, rules: Rules
) -> dict[str, Detected]:
    """Sure enough detections by class, the surest first; classes without any are left out."""
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    kept = {}
    for name, found in detections.items():
        scores = np.asarray(found.boxes, dtype=np.float32).reshape(-1, 5)[:, 4]
        order = np.argsort(-scores, kind="stable")
        waiting = order[scores[order] > np.float32(threshold)][: rules.max_objects].tolist()
        chosen: list[int] = []
        while waiting:
            surest = waiting.pop(0)
            chosen.append(surest)
            if rules.max_overlap != 1:
                waiting = [
                    row
                    for row in waiting
                    if box_overlap(found.boxes[surest], found.boxes[row]) < rules.max_overlap
                ]
        if chosen:
            kept[name] = found.at(chosen)
    return kept


def box_overlap(a: _Box, b: _Box) -> float:
    """Intersection over union of two boxes, their last pixels counted in."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(a[0], a[1], a[2], a[3]) + area(b[0], b[1], b[2], b[3]) - both
    return float(both / union) if union else 0.0


def relations(a: _Box, b: _Box, *, position_threshold: float = 0.1) -> tuple[str, ...]:
    """Where a is, seen from b: none, one or two of `RELATIONS`, in that order.

    The offset of the centres, less a share of both sizes, must be more than half of the distance
    along an axis.

    Args:
        a: x1, y1, x2, y2, y downwards.
        b: The same.
        position_threshold: The share of the sizes.
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
    """The objects that a clause of "include" means, and why they are not right."""
    name, count = clause["class"], clause["count"]
    found = kept[name].at(range(min(count, len(kept[name].boxes)))) if name in kept else None
    number = 0 if found is None else len(found.boxes)
    if found is None or number < count:
        return found, [f"expected {name}>={count}, found {number}"] if number < count else []
    if "color" in clause:
        seen, wanted = list(colors(name, found)), clause["color"]
        if seen.count(wanted) < count:
            others = ", ".join(f"{seen.count(c)} {c}" for c in COLORS if c in seen)
            fault = f"expected {wanted} {name}>={count}, found {seen.count(wanted)} {wanted}"
            return found, [f"{fault}; and {others}"]
    if "position" in clause:
        relation, target = clause["position"]
        exists = -len(groups) <= target < len(groups)
        others_found = groups[target] if exists else None
        if others_found is None:
            return found, [f"no target for {name} to be {relation}"]
        for box in found.boxes:
            for other in others_found.boxes:
                seen_relations = relations(box, other, position_threshold=rules.position_threshold)
                if relation not in seen_relations:
                    words = " and ".join(seen_relations)
                    return found, [f"expected {name} {relation} target, found {words} target"]
    return found, []


@dataclass(frozen=True)
class TagScore:
    """Share of correct images of one tag."""

    score: float
    correct: int
    total: int


@dataclass(frozen=True)
class Summary:
    """GenEval's summary of a set of images.

    Attributes:
        total_images: Number of images.
        total_prompts: Number of prompts.
        correct_images: Share of images that are correct.
        correct_prompts: Share of prompts with a correct image.
        tags: By tag, in the order in which they come.
        overall: Mean over the tags, each counting the same.
    """

    total_images: int
    total_prompts: int
    correct_images: float
    correct_prompts: float
    tags: dict[str, TagScore]
    overall: float


def summarize(tags: Sequence[str], prompts: Sequence[Hashable], correct: Sequence[bool]) -> Summary:
    """The summary of a set of decided images.

    Args:
        tags: Tag of each image.
        prompts: Identifier of each image's prompt.
        correct: Whether each image is correct.

    Raises:
        DimoError: Not one of each for every image, or no image.
    """
    if not len(tags) == len(prompts) == len(correct) or not tags:
        raise DimoError(
            f"{len(tags)} tags, {len(prompts)} prompts and {len(correct)} decisions; allowed: "
            "equally many, one an image and one image or more; judge every image"
        )
    by_tag: dict[str, list[bool]] = {}
    by_prompt: dict[Hashable, bool] = {}
    for tag, prompt, right in zip(tags, prompts, correct, strict=True):
        by_tag.setdefault(tag, []).append(bool(right))
        by_prompt[prompt] = by_prompt.get(prompt, False) or bool(right)
    scores = {
        tag: TagScore(sum(rights) / len(rights), sum(rights), len(rights))
        for tag, rights in by_tag.items()
    }
    return Summary(
        total_images=len(correct),
        total_prompts=len(by_prompt),
        correct_images=sum(map(bool, correct)) / len(correct),
        correct_prompts=sum(by_prompt.values()) / len(by_prompt),
        tags=scores,
        overall=sum(score.score for score in scores.values()) / len(scores),
    )
