"""Plain data (parsed TOML or JSON) <-> frozen dataclasses, strictly.

Nothing is guessed or converted: a key that is not a field, a field that is not a key and a value of
another type are errors of one line that name the file, the key and what would be accepted. A field
with a default may be left out, so that a file format can grow without breaking old files.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import math
import types
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dimo.errors import DimoError

T = TypeVar("T")
_KINDS = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}


@dataclass(frozen=True)
class Origin:
    """Where data came from, for error messages."""

    source: str  # file name or other name of the data, first in every message
    next_step: str  # last in every message

    def error(self, problem: str) -> DimoError:
        """The one-line error for `problem`."""
        return DimoError(f"{_one_line(self.source)}: {problem}; {self.next_step}")

    def unknown_key(self, path: str, key: object, allowed: list[str]) -> DimoError:
        """The error for `key` in the table `path`, which may only have `allowed` keys."""
        near = difflib.get_close_matches(str(key), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(allowed)
        return self.error(f"unknown key {_shown(_join(path, str(key)))}{hint}; allowed: {known}")


def decode(cls: type[T], data: object, origin: Origin) -> T:
    """Builds the dataclass `cls` from what a TOML or JSON parser returned.

    Its fields may be bool, int, float, str, Literal, dict, tuple, optional or dataclasses; `Any`
    stands for one JSON value. A field with `init=False` is not data.

    Raises:
        DimoError: An unknown or missing key, or a value of another type.
    """
    value: T = _decode(cls, data, "", origin)
    return value


def encode(value: Any) -> Any:
    """Dataclasses and tuples -> dicts and lists, fit for JSON; the inverse of `decode`."""
    if dataclasses.is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def canonical_json(data: Any) -> str:
    """One text for equal data, to be hashed: keys sorted, no spaces, ASCII, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of `json.loads` that refuses a key written twice with a ValueError."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {_shown(twice)} is written twice")
    return result


def _decode(hint: Any, value: object, path: str, origin: Origin) -> Any:
    if hint is Any:
        return _decode_json(value, path, origin)
    if hint in _KINDS:
        return _decode_scalar(hint, value, path, origin)
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, value, path, origin)
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise _mismatch("one of " + ", ".join(map(repr, arguments)), value, path, origin)
        return value
    if kind in (Union, types.UnionType):  # only `X | None` is used
        return None if value is None else _decode(arguments[0], value, path, origin)
    if kind is dict:
        table = _table(value, path, origin)
        return {key: _decode(arguments[1], table[key], _join(path, key), origin) for key in table}
    assert kind is tuple, f"no rule for the field type {hint}"
    return _decode_tuple(arguments, value, path, origin)


def _decode_scalar(kind: type, value: object, path: str, origin: Origin) -> Any:
    accepted = (int, float) if kind is float else kind
    is_kind = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    if is_kind and kind is float:
        with contextlib.suppress(OverflowError):
            value = float(value)  # type: ignore[arg-type]
        is_kind = isinstance(value, float) and math.isfinite(value)
    if is_kind and kind is str:
        is_kind = not any("\ud800" <= c <= "\udfff" for c in str(value))  # cannot be written
    if not is_kind:
        raise _mismatch(_KINDS[kind], value, path, origin)
    return value


def _decode_dataclass(cls: Any, value: object, path: str, origin: Origin) -> Any:
    table = _table(value, path, origin)
    hints = _type_hints(cls)
    for key in table:
        if key not in hints:
            raise origin.unknown_key(path, key, list(hints))
    given: dict[str, Any] = {}
    for field in (field for field in dataclasses.fields(cls) if field.init):
        if field.name in table:
            below = _join(path, field.name)
            given[field.name] = _decode(hints[field.name], table[field.name], below, origin)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise origin.error(f"missing key {_join(path, field.name)!r}")
    return cls(**given)


def _decode_tuple(arguments: tuple[Any, ...], value: object, path: str, origin: Origin) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _mismatch("a list", value, path, origin)
    hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
    if len(value) != len(hints):
        raise _mismatch(f"a list of {len(hints)} values", value, path, origin)
    return tuple(
        _decode(hint, item, f"{path}[{index}]", origin)
        for index, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _decode_json(value: object, path: str, origin: Origin) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return _decode_scalar(float, value, path, origin)
    if isinstance(value, (list, tuple)):
        return list(_decode(tuple[Any, ...], value, path, origin))
    if isinstance(value, dict):
        return _decode(dict[str, Any], value, path, origin)
    raise _mismatch("a JSON value", value, path, origin)


def _table(value: object, path: str, origin: Origin) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _mismatch("a table of named values", value, path, origin)
    return value


@functools.cache
def _type_hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _mismatch(expected: str, value: object, path: str, origin: Origin) -> DimoError:
    where = _shown(path) if path else "the content"
    return origin.error(f"{where} must be {expected}, not {_shown(value)}")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
