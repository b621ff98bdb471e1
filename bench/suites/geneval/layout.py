"""GenEval's files: the folder of images, and the verdicts of `results.jsonl`, one JSON per image.

The folder has `00000/metadata.jsonl` and `00000/samples/0000.png` for each prompt.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.images.codec import IMAGE_SUFFIXES
from bench.metrics.geneval import Detected, judge
from bench.protocol import Prompts
from bench.suites.geneval.prompts import (
    Metadata,
    check_metadata,
    parse_metadata,
    read_lines,
    same_list,
)
from dimo.util.schema import Origin

_LAYOUT = "make it as GenEval does: 00000/metadata.jsonl and 00000/samples/0000.png for each prompt"
_NAMED = 8  # as many are listed by name


@dataclass(frozen=True)
class PromptFolder:
    """One prompt and its images."""

    number: int  # of the prompt in its list
    metadata: Metadata  # in the official format
    images: tuple[Path, ...]  # in the order of their numbers


def read_folder(path: Path, prompts: Prompts) -> tuple[list[PromptFolder], list[str]]:
    """Reads the layout, without the images themselves.

    Returns:
        The prompts that have images, in order, and why the set is off-protocol, if it is.

    Raises:
        DimoError: No such folder, no folder of a prompt in it, or metadata that cannot be read.
    """
    origin = Origin(str(path), _LAYOUT)
    if not path.is_dir():
        raise origin.error("no such folder" if not path.exists() else "not a folder")
    paths = sorted((p for p in path.iterdir() if p.is_dir() and p.name.isdigit()), key=_number)
    if not paths:
        raise origin.error("no folder of a prompt in it")
    count, numbers = sum(prompts.tags.values()), Counter(int(folder.name) for folder in paths)
    twice = [f"{number:05d}" for number, folders in numbers.items() if folders > 1]
    if twice:
        raise origin.error(f"two folders of one prompt: {_listed(twice)}")
    problems = []
    missing = [f"{number:05d}" for number in range(count) if number not in numbers]
    if missing:
        problems.append(f"{len(missing)} of {count} prompt folders are missing: {_listed(missing)}")
    more = [folder.name for folder in paths if int(folder.name) >= count]
    if more:
        problems.append(f"{len(more)} folders in excess of the {count} prompts: {_listed(more)}")
    folders = [_read_prompt(folder, origin) for folder in paths]
    counts = {path.name: len(folder.images) for path, folder in zip(paths, folders, strict=True)}
    if not any(counts.values()):
        raise origin.error("no images in the folders of its prompts")
    wrong = [f"{name} has {n}" for name, n in counts.items() if n != prompts.images_per_prompt]
    if wrong:
        problems.append(f"not {prompts.images_per_prompt} images: {_listed(wrong)}")
    if not problems and not same_list([folder.metadata for folder in folders], prompts.sha256):
        problems.append(f"the prompts are not those of the list {prompts.name}")
    return [folder for folder in folders if folder.images], problems


def _read_prompt(folder: Path, origin: Origin) -> PromptFolder:
    where = f"{folder.name}/metadata.jsonl"
    try:
        text = (folder / "metadata.jsonl").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise origin.error(f"{where} cannot be read: {error}") from error
    metadata = check_metadata(parse_metadata(text, origin, where), origin, where)
    images = [
        path
        for path in (folder / "samples").glob("*")
        if path.stem.isdecimal() and path.suffix.lower() in IMAGE_SUFFIXES
    ]
    numbers = Counter(int(path.stem) for path in images)
    if twice := [f"{number:04d}" for number, paths in numbers.items() if paths > 1]:
        raise origin.error(f"two images of one number in {folder.name}/samples: {_listed(twice)}")
    return PromptFolder(int(folder.name), metadata, tuple(sorted(images, key=_number)))


def _number(path: Path) -> tuple[int, str]:
    return int(path.stem), path.name


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


_KEYS = ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")
_NEXT_STEP = "give the results.jsonl that GenEval's evaluate_images.py or dimo eval wrote"


@dataclass(frozen=True)
class ImageResult:
    """The verdict on one image."""

    filename: str
    correct: bool  # whether it shows what its prompt asks for
    reason: str  # why it does not; empty if it does
    metadata: Metadata  # its prompt in the official format
    details: dict[str, list[list[float]]]  # boxes by class: x1, y1, x2, y2, score


def results_text(results: Sequence[ImageResult]) -> str:
    """The text of a `results.jsonl`."""
    rows = (
        {
            "filename": result.filename,
            "tag": result.metadata["tag"],
            "prompt": result.metadata["prompt"],
            "correct": result.correct,
            "reason": result.reason,
            "metadata": json.dumps(result.metadata),
            "details": json.dumps(result.details),
        }
        for result in results
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_results(path: Path) -> list[ImageResult]:
    """Reads a `results.jsonl`.

    Raises:
        DimoError: It cannot be read, is empty, or a line is not a verdict.
    """
    origin = Origin(str(path), _NEXT_STEP)
    lines = read_lines(path, origin, "verdicts")
    return [_result(line, origin, f"line {number}") for number, line in enumerate(lines, start=1)]


def by_prompt(results: Sequence[ImageResult], sha256: str) -> list[list[ImageResult]]:
    """The verdicts of each prompt, prompts in the order of the list of this hash.

    Prompts are told apart by what they ask for, so their images may be in several folders, as
    several GPUs write them. Their order is that of the numbers of these folders, or of the paths,
    whichever gives the list; the former if neither does.
    """
    by_path = sorted(results, key=lambda result: _numbers(result.filename))
    by_folder = sorted(by_path, key=lambda result: _folder_number(result.filename))
    orders: list[list[list[ImageResult]]] = []
    for ordered in (by_folder, by_path):
        groups: dict[str, list[ImageResult]] = {}
        for result in ordered:
            groups.setdefault(json.dumps(result.metadata), []).append(result)
        orders.append(list(groups.values()))
        if same_list([group[0].metadata for group in orders[-1]], sha256):
            return orders[-1]
    return orders[0]


def _numbers(name: str) -> list[tuple[str, int]]:
    """Sorts names by their text and, where that is alike, by the numbers in it."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _folder_number(name: str) -> int:
    """Number of the innermost folder that is called by a number; -1 without one."""
    numbers = [int(part) for part in Path(name).parts[:-1] if part.isdecimal()]
    return numbers[-1] if numbers else -1


def contradictions(results: Sequence[ImageResult]) -> list[str]:
    """Files whose verdict contradicts the boxes beside it, by the official rules.

    Detected colours are not in the file, so a negative verdict on a prompt with colours is always
    accepted. Without any boxes nothing can be checked.
    """
    if not any(result.details for result in results):
        return []
    wrong = []
    for result in results:
        boxes = {
            name: Detected(np.array(rows, dtype=np.float32).reshape(-1, 5))
            for name, rows in result.details.items()
        }
        clauses = result.metadata["include"]
        bare = [{k: v for k, v in clause.items() if k != "color"} for clause in clauses]
        verdict = judge(boxes, result.metadata | {"include": bare}, colors=_not_asked)
        believed = bare != clauses and not result.correct
        if verdict.correct != result.correct and not believed:
            wrong.append(result.filename)
    return wrong


def _not_asked(name: str, objects: Detected) -> list[str]:
    raise AssertionError(f"no clause asks for the colour of {name}")


def _result(line: str, origin: Origin, where: str) -> ImageResult:
    row = parse_metadata(line, origin, where)
    if not isinstance(row, dict) or set(row) != set(_KEYS):
        raise origin.error(f"{where} must have the keys {', '.join(_KEYS)}")
    for key in _KEYS:
        kind, words = (bool, "true or false") if key == "correct" else (str, "a text")
        if not isinstance(row[key], kind):
            raise origin.error(f"{where}: {key!r} must be {words}, not {ascii(row[key])[:80]}")
    metadata = check_metadata(parse_metadata(row["metadata"], origin, where), origin, where)
    if (metadata["tag"], metadata["prompt"]) != (row["tag"], row["prompt"]):
        raise origin.error(f"{where}: 'tag' and 'prompt' are not those of 'metadata'")
    details = parse_metadata(row["details"], origin, where)
    if not isinstance(details, dict) or not all(
        isinstance(rows, list) and all(map(_is_box, rows)) for rows in details.values()
    ):
        raise origin.error(f"{where}: 'details' must have lists of 5 numbers for each class")
    return ImageResult(row["filename"], row["correct"], row["reason"], metadata, details)


def _is_box(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 5 and all(isinstance(x, int | float) for x in row)
