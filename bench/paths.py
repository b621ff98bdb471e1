"""Where the data that travels with the code is, in a checkout and in an installed wheel."""

__all__ = ["data_dir"]

from pathlib import Path
from typing import Literal

from dimo.errors import DimoError

_PACKAGE = Path(__file__).resolve().parent
_FOLDERS = {  # in a wheel, in a checkout
    "protocols": (_PACKAGE / "_data" / "protocols", _PACKAGE.parent / "protocols"),
    "published": (_PACKAGE / "_data", _PACKAGE.parent / "results"),
}


def data_dir(kind: Literal["protocols", "published"]) -> Path:
    """The folder of the shipped protocols, or the one that holds `published.csv`.

    A wheel carries them in `bench/_data`, a checkout in `protocols/` and `results/`.

    Raises:
        DimoError: Neither is there.
    """
    for folder in _FOLDERS[kind]:
        if folder.is_dir():
            return folder
    raise DimoError(f"the {kind} data are missing beside {_PACKAGE}; reinstall dimo")
