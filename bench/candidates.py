"""How a command names what it samples: `[NAME=]MODEL[@STEPS]`."""

__all__ = ["Candidate", "parse_candidate"]

import re
from dataclasses import dataclass
from pathlib import Path

from dimo.errors import DimoError

_FORM = "[NAME=]MODEL[@STEPS], e.g. runs/mine, di4c=runs/mine or di4c=runs/mine@2,4"


@dataclass(frozen=True)
class Candidate:
    """A network to sample, as it was named.

    Attributes:
        model: A teacher, a student with a name, a run folder, or a file.
        name: Of its rows in tables; None: as it is called by itself.
        steps: Its step counts; empty: those of the command.
    """

    model: str
    name: str | None = None
    steps: tuple[int, ...] = ()


def parse_candidate(text: str) -> Candidate:
    """Reads `[NAME=]MODEL[@STEPS]`.

    What exists as a path is that path, whatever is in its name. Else the first `=` ends a NAME if
    there is no slash before it, and the last `@` begins STEPS if there is no slash behind it: a
    path may hold both signs, as in `./a=b` or `runs/@2/mine`. To give `a` steps where a path `a@2`
    exists too, write `a/@2`.

    Args:
        text: As given.

    Raises:
        DimoError: No model, an empty name, or steps that are no whole numbers from 1.
    """
    name, model = _split_name(text)
    if name is not None and not name:
        raise DimoError(f"{text!r} has an empty name; allowed: {_FORM}")
    model, steps = _split_steps(model)
    if not model:
        raise DimoError(f"{text!r} names no model; allowed: {_FORM}")
    if steps is None:
        return Candidate(model, name)
    parts = [part.strip() for part in steps.split(",")]
    if not all(re.fullmatch(r"[1-9][0-9]{0,8}", part) for part in parts):
        raise DimoError(
            f"steps {steps!r} of {text!r} are not allowed; give whole numbers from 1: {_FORM}"
        )
    return Candidate(model, name, tuple(dict.fromkeys(map(int, parts))))


def _split_name(text: str) -> tuple[str | None, str]:
    name, sign, rest = text.partition("=")
    if not sign or "/" in name or _exists(text) or _exists(_split_steps(text)[0]):
        return None, text.strip()
    return name.strip(), rest.strip()


def _split_steps(text: str) -> tuple[str, str | None]:
    model, sign, steps = text.rpartition("@")
    if not sign or "/" in steps or _exists(text):
        return text, None
    return model.strip(), steps


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # e.g. too long for a name
        return False
