"""GenEval's prompt lists: the official file, or one of the same form; read strictly.

A list has one JSON object per line: "tag", "include", "exclude" where needed, "prompt". Its hash is
that of the official file if and only if the content and order are the same.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from bench.metrics.geneval import COLORS, RELATIONS, TAGS
from bench.protocol import Prompts
from bench.protocol.catalog import ANY
from bench.protocol.networks import BUNDLED_PROMPTS
from dimo.data.scenes.prompts import prompts as scene_prompts
from dimo.errors import DimoError
from dimo.util.files import sha256_bytes
from dimo.util.schema import Origin, unique_keys

Metadata = dict[str, Any]

_NEXT_STEP = "use GenEval's evaluation_metadata.jsonl, or a file of the same form"
_KEYS = ("tag", "include", "exclude", "prompt")
_CLAUSE = {"include": ("class", "count", "color", "position"), "exclude": ("class", "count")}


def bundled_prompts() -> tuple[Metadata, ...]:
    """The held-out prompts of `scenes` in the official form."""
    return tuple(prompt.metadata for prompt in scene_prompts("held-out"))


def prompts_of(named: Prompts, path: Path | None) -> tuple[Metadata, ...]:
    """The prompts of a protocol, from a file of the official form; None: the bundled list.

    Raises:
        DimoError: They are not bundled and no file is given, or the file is another list.
    """
    if path is not None:
        return read_prompts(path, sha256=named.sha256)
    if named.name != BUNDLED_PROMPTS:
        raise DimoError(
            f"prompts {named.name} do not come with dimo; give the official file with --prompts"
        )
    prompts = bundled_prompts()
    if not same_list(prompts, named.sha256):
        raise DimoError(
            f"prompts {named.name} have sha256 {list_sha256(prompts)[:12]}..., the protocol names "
            f"{named.sha256[:12]}...; use the protocol that comes with this dimo"
        )
    return prompts


def read_prompts(path: str | PathLike[str], *, sha256: str = ANY) -> tuple[Metadata, ...]:
    """Reads a list that must have this hash; "any" accepts all.

    Raises:
        DimoError: It cannot be read, is empty, a line is not metadata, or it is another list.
    """
    origin = Origin(str(path), _NEXT_STEP)
    prompts = tuple(
        check_metadata(parse_metadata(line, origin, f"line {number}"), origin, f"line {number}")
        for number, line in enumerate(read_lines(Path(path), origin, "prompts"), start=1)
    )
    if not same_list(prompts, sha256):
        raise origin.error(
            f"these {len(prompts)} prompts have sha256 {list_sha256(prompts)[:12]}..., "
            f"the protocol names {sha256[:12]}..."
        )
    return prompts


def read_lines(path: Path, origin: Origin, what: str) -> list[str]:
    """The lines of a text file; a DimoError if it cannot be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise origin.error(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise origin.error("not a text file") from error
    if not text.strip():
        raise origin.error(f"no {what}: the file is empty")
    return text.rstrip().split("\n")


def list_sha256(prompts: Sequence[Metadata]) -> str:
    """Hash of a list, written by `json.dumps` with one prompt per line."""
    return sha256_bytes(_text(prompts).encode())


def same_list(prompts: Sequence[Metadata], sha256: str) -> bool:
    """Whether a list has this hash, with or without a final newline; "any" matches all."""
    text = _text(prompts).encode()
    return sha256 in (ANY, sha256_bytes(text), sha256_bytes(text[:-1]))


def tag_counts(prompts: Sequence[Metadata]) -> Counter[str]:
    """Number of prompts of each tag, in order of first appearance."""
    return Counter(prompt["tag"] for prompt in prompts)


def parse_metadata(text: str, origin: Origin, where: str) -> Any:
    """One line, or the file of one prompt, as JSON data; a DimoError if it is not JSON."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise origin.error(f"{where} is not valid JSON: {error}") from error


def check_metadata(data: Any, origin: Origin, where: str) -> Metadata:
    """What one prompt asks for, checked, with its keys in the order of the official files.

    Errors name the file by `origin` and the prompt by `where`.

    Raises:
        DimoError: Unknown tag, key, colour or relation, a missing key, a value of another type, or
            a position whose target is not an earlier object.
    """
    problem = _problem(data)
    if problem:
        raise origin.error(f"{where}: {problem}")
    checked: Metadata = {key: data[key] for key in _KEYS if key in data}
    for name, keys in _CLAUSE.items():
        if name in data:
            checked[name] = [{k: clause[k] for k in keys if k in clause} for clause in data[name]]
    return checked


def _problem(data: Any) -> str:
    if not isinstance(data, Mapping):
        return f"must be a table of named values, not {_shown(data)}"
    for key in data:
        if key not in _KEYS:
            return f"unknown key {_shown(key)}; allowed: {', '.join(_KEYS)}"
    if data.get("tag") not in TAGS:
        return f"unknown tag {_shown(data.get('tag'))}; allowed: {', '.join(TAGS)}"
    if not isinstance(data.get("prompt"), str) or not data["prompt"].strip():
        return f"'prompt' must be a text, not {_shown(data.get('prompt'))}"
    if not data.get("include"):
        return "'include' must name at least one object"
    for key in ("include", "exclude"):
        clauses = data.get(key, [])
        if not isinstance(clauses, list):
            return f"{key!r} must be a list, not {_shown(clauses)}"
        for number, clause in enumerate(clauses):
            problem = _clause_problem(clause, number, _CLAUSE[key])
            if problem:
                return f"'{key}[{number}]' {problem}"
    return ""


def _clause_problem(clause: Any, number: int, allowed: tuple[str, ...]) -> str:
    if not isinstance(clause, Mapping):
        return f"must be a table of named values, not {_shown(clause)}"
    for key in clause:
        if key not in allowed:
            return f"has the unknown key {_shown(key)}; allowed: {', '.join(allowed)}"
    count = clause.get("count")
    if not isinstance(clause.get("class"), str) or not clause["class"]:
        return f"needs a 'class', not {_shown(clause.get('class'))}"
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        return f"needs a 'count' of 1 or more, not {_shown(count)}"
    if "color" in clause and clause["color"] not in COLORS:
        return f"has the unknown color {_shown(clause['color'])}; allowed: {', '.join(COLORS)}"
    if "position" not in clause:
        return ""
    position = clause["position"]
    if not isinstance(position, list) or len(position) != 2 or position[0] not in RELATIONS:
        return f"has the position {_shown(position)}; allowed: [one of {', '.join(RELATIONS)}; n]"
    target = position[1]
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < number:
        return f"has the target {_shown(target)}; allowed: the number of an earlier object"
    return ""


def _text(prompts: Sequence[Metadata]) -> str:
    return "".join(json.dumps(prompt) + "\n" for prompt in prompts)


def _shown(value: object) -> str:
    return ascii(value)[:80]
