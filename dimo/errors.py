"""The one exception type a user is meant to read."""

import difflib
from collections.abc import Iterable


class DimoError(ValueError):
    """Bad input. The message is one line: the value, what is allowed, the next step."""

    is_shared = False  # whether all ranks raise it, so that the first one says it


def unknown_name(
    kind: str, value: object, allowed: Iterable[str], next_step: str = ""
) -> DimoError:
    """The error for an unknown name of a `kind` (e.g. "teacher"), with the nearest allowed one."""
    names = sorted(allowed)
    near = difflib.get_close_matches(str(value), names, n=1)
    parts = [f"unknown {kind} {value!r}; allowed: {', '.join(names)}"]
    if near:
        parts.append(f"did you mean {near[0]!r}?")
    if next_step:
        parts.append(next_step)
    return DimoError("; ".join(parts))
