"""Any text as one harmless line, before a format escapes it in its own way."""

__all__ = ["LONGEST_NAME", "LONGEST_NOTE", "one_line"]

import unicodedata

LONGEST_NAME = 90  # of a row, with the settings that tell it from another one
LONGEST_NOTE = 400


def one_line(value: str, longest: int) -> str:
    """Cut to `longest` characters, line ends as spaces, invisible characters shown.

    Controls, direction marks, lone surrogates and unassigned characters become U+FFFD, so nothing
    can hide, reorder or break what stands beside it.
    """
    value = value if len(value) <= longest else value[: longest - 1] + "…"
    value = " ".join(value.split())
    if value.isprintable():
        return value
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in value)
