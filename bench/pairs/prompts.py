"""Prompts of scorers: HPSv2's folder of four files, or a file of captions; named by their hash."""

__all__ = ["check_prompts", "read_captions", "texts_sha256"]

import json
from collections.abc import Iterable
from pathlib import Path

from bench.catalog import ANY
from bench.protocol import Prompts
from dimo.files import sha256_bytes
from dimo.strict import Origin

_NEXT_STEP = "give a JSON file with a list of texts, one for each image in the order of the images"


def texts_sha256(texts: Iterable[str]) -> str:
    """Hash of a list of texts: of one JSON text a line, as `json.dumps` writes it."""
    return sha256_bytes("".join(json.dumps(text) + "\n" for text in texts).encode())


def read_captions(path: Path, wanted: Prompts) -> tuple[str, ...]:
    """Reads a list of texts.

    Args:
        path: JSON, `["a cat on a mat", ...]`.
        wanted: How many there must be, and their hash.

    Raises:
        DimoError: It cannot be read, is no list of so many texts, or another list.
    """
    origin = Origin(str(path), _NEXT_STEP)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise origin.error(f"cannot read prompts: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise origin.error(f"not valid JSON: {error}") from error
    if not isinstance(content, list) or not all(
        isinstance(text, str) and text.strip() for text in content
    ):
        raise origin.error("not a list of texts")
    count = sum(wanted.tags.values())
    if len(content) != count:
        raise origin.error(f"{len(content):,} prompts instead of {count:,}")
    check_prompts(content, wanted, path)
    return tuple(content)


def check_prompts(texts: Iterable[str], wanted: Prompts, path: Path) -> str:
    """The hash of the prompts.

    Raises:
        DimoError: It is not that of the protocol.
    """
    found = texts_sha256(texts)
    if wanted.sha256 not in (ANY, found):
        raise Origin(str(path), f"give the prompts {wanted.name}").error(
            f"these prompts have sha256 {found[:12]}..., the protocol names {wanted.sha256[:12]}..."
        )
    return found
