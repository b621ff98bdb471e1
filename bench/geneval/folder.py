"""GenEval's folder layout: `00000/metadata.jsonl` and `00000/samples/0000.png` for each prompt."""

__all__ = ["PromptFolder", "read_folder", "write_prompts"]

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.geneval.prompts import Metadata, check_metadata, parse_metadata, same_list
from bench.protocol import Prompts
from dimo.errors import DimoError
from dimo.files import write_atomic
from dimo.strict import Origin

_LAYOUT = "make it as GenEval does: 00000/metadata.jsonl and 00000/samples/0000.png for each prompt"
_NAMED = 8  # as many are listed by name


@dataclass(frozen=True)
class PromptFolder:
    """One prompt and its images.

    Attributes:
        number: Of the prompt in its list.
        metadata: In the official format.
        images: Files, in the order of their numbers.
    """

    number: int
    metadata: Metadata
    images: tuple[Path, ...]


def read_folder(path: Path, wanted: Prompts) -> tuple[list[PromptFolder], list[str]]:
    """Reads the layout, without the images themselves.

    Args:
        path: The outer folder.
        wanted: What the protocol asks for.

    Returns:
        The prompts that have images, in order, and why the set is not the protocol's; such a set
        may not be compared with any other.

    Raises:
        DimoError: No such folder, none of a prompt in it, or metadata that cannot be read.
    """
    origin = Origin(str(path), _LAYOUT)
    if not path.is_dir():
        raise origin.error("no such folder" if not path.exists() else "not a folder")
    names = sorted((p for p in path.iterdir() if p.is_dir() and p.name.isdigit()), key=_number)
    if not names:
        raise origin.error("no folder of a prompt in it")
    count = sum(wanted.tags.values())
    numbers = [int(folder.name) for folder in names]
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise origin.error(f"two folders of one prompt: {_listed([f'{n:05d}' for n in twice])}")
    problems = []
    missing = [f"{number:05d}" for number in sorted(set(range(count)) - set(numbers))]
    if missing:
        problems.append(f"{len(missing)} of {count} prompt folders are missing: {_listed(missing)}")
    more = [folder.name for folder in names if int(folder.name) >= count]
    if more:
        problems.append(f"{len(more)} folders more than the {count} prompts: {_listed(more)}")
    folders = [_read_prompt(folder, origin) for folder in names]
    wrong = [
        f"{folder.name} has {len(found.images)}"
        for folder, found in zip(names, folders, strict=True)
        if len(found.images) != wanted.images_per_prompt
    ]
    if wrong:
        problems.append(f"not {wanted.images_per_prompt} images: {_listed(wrong)}")
    if not problems and not same_list([found.metadata for found in folders], wanted.sha256):
        problems.append(f"the prompts are not those of the list {wanted.name}")
    return [found for found in folders if found.images], problems


def write_prompts(path: Path, prompts: Sequence[Metadata]) -> None:
    """Writes the metadata of every prompt into its folder, so that only images are wanting.

    Raises:
        DimoError: The folder cannot be written.
    """
    for number, metadata in enumerate(prompts):
        write_atomic(path / f"{number:05d}" / "metadata.jsonl", json.dumps(metadata))


def _read_prompt(folder: Path, origin: Origin) -> PromptFolder:
    file = folder / "metadata.jsonl"
    where = f"{folder.name}/metadata.jsonl"
    try:
        data: Any = parse_metadata(file.read_text(encoding="utf-8"), origin, where)
    except (OSError, UnicodeDecodeError) as error:
        raise origin.error(f"{where} cannot be read: {error}") from error
    images = [p for p in (folder / "samples").glob("*.png") if re.fullmatch(r"\d+\.png", p.name)]
    return PromptFolder(
        int(folder.name), check_metadata(data, origin, where), tuple(sorted(images, key=_number))
    )


def _number(path: Path) -> tuple[int, str]:
    return int(path.stem), path.name


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def check_complete(path: Path, problems: Sequence[str], protocol: str) -> None:
    """Refuses a set with problems.

    Raises:
        DimoError: There is one.
    """
    if problems:
        raise DimoError(
            f"{path} does not conform to protocol {protocol!r}: {'; '.join(problems)}; make it as "
            "the protocol asks, or score it outside the protocol with --nonconforming"
        )
