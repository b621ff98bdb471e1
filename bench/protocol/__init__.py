"""A protocol: everything a benchmark fixes, read from one TOML file and named by its hash.

What the protocol fixes, the model may not choose. Two results are comparable when, and only when,
their protocols have the same `protocol_sha256`. Each key is explained in `protocols/README.md`.
"""

__all__ = [
    "Detector",
    "Extractor",
    "Images",
    "Metric",
    "Prompts",
    "Protocol",
    "Reference",
    "Scorer",
    "Seeds",
    "Uncertainty",
    "list_protocols",
    "load_protocol",
    "protocol_sha256",
    "protocol_text",
    "validate_file",
]

import os
import tomllib
from pathlib import Path
from typing import Any

from bench.protocol.catalog import METRICS, data_dir
from bench.protocol.checks import contradictions
from bench.protocol.schema import (
    Detector,
    Extractor,
    Images,
    Metric,
    Prompts,
    Protocol,
    Reference,
    Scorer,
    Seeds,
    Uncertainty,
    protocol_sha256,
)
from dimo.errors import DimoError, unknown_name
from dimo.util.schema import Origin, decode

_FORMAT = 1
_NEXT_STEP = "the keys are explained in protocols/README.md"


def load_protocol(name_or_path: str | os.PathLike[str]) -> Protocol:
    """Reads a shipped protocol by name, or any `.toml` file by its path.

    Raises: DimoError: The name is unknown, or the file is not a valid protocol.
    """
    return validate_file(_find(name_or_path))


def list_protocols() -> list[Protocol]:
    """Every shipped protocol, sorted by name."""
    return [validate_file(path) for _, path in sorted(_shipped().items())]


def protocol_text(name_or_path: str | os.PathLike[str]) -> str:
    """The text of a valid protocol's file, comments included; errors as `load_protocol`."""
    path = _find(name_or_path)
    validate_file(path)
    return path.read_text(encoding="utf-8-sig")


def validate_file(path: str | os.PathLike[str]) -> Protocol:
    """Reads one file strictly.

    Raises: DimoError: Unreadable file, no TOML, an unknown, missing or ill-typed key, or values
        that contradict one another. The message names the file and the key.
    """
    origin = Origin(str(path), _NEXT_STEP)
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DimoError(
            f"cannot read {path}: {error.strerror}; list the protocols with: dimo protocols list"
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise origin.error(f"not valid TOML: {error}") from error
    version = data.get("format", _FORMAT)
    if isinstance(version, bool) or version != _FORMAT:
        raise origin.error(f"'format' must be {_FORMAT}, the one this dimo reads, not {version!r}")
    if isinstance(data.get("metrics"), list):
        data["metrics"] = [
            _gather_params(table, f"metrics[{index}]", origin)
            for index, table in enumerate(data["metrics"])
        ]
    protocol = decode(Protocol, data, origin)
    problem = next(contradictions(protocol, Path(path).stem), None)
    if problem is not None:
        raise origin.error(problem)
    return protocol


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in data_dir("protocols").glob("*.toml")}


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    text = os.fspath(name_or_path)
    if not isinstance(name_or_path, str) or text.endswith(".toml") or os.sep in text:
        return Path(text)
    shipped = _shipped()
    if text not in shipped:
        advice = "or give the path of a .toml file; list them with: dimo protocols list"
        raise unknown_name("protocol", text, shipped, advice)
    return shipped[text]


def _gather_params(table: Any, path: str, origin: Origin) -> Any:
    """A `[[metrics]]` table -> the fields of `Metric`; anything ill-typed is left to `decode`."""
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        return table
    if table["name"] not in METRICS:
        raise origin.error(str(unknown_name(f"'{path}.name'", table["name"], METRICS)))
    kind = METRICS[table["name"]]
    fields = ("name", "higher_is_better", "supplementary")
    all_given = any(param.optional and key in table for key, param in kind.params.items())
    params = [key for key, param in kind.params.items() if all_given or not param.optional]
    for key in table:
        if key not in (*fields, *params):
            raise origin.unknown_key(path, key, [*fields, *kind.params])
    for key in params:
        if key not in table:
            raise origin.error(f"missing key '{path}.{key}' of the metric {table['name']!r}")
        if isinstance(table[key], bool) or not isinstance(table[key], int):
            raise origin.error(f"'{path}.{key}' must be an integer, not {table[key]!r}")
    gathered = {key: table[key] for key in fields if key in table}
    return gathered | {"params": {key: table[key] for key in params}}
