"""From a row of the table of teachers to its network, with the prompts that it draws."""

__all__ = ["load_network", "load_prompts", "make_network", "weights_file"]

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dimo.errors import DimoError
from dimo.models.halton import HaltonMaskGIT
from dimo.models.maskgit import MaskGIT
from dimo.models.meissonic import Meissonic
from dimo.models.scenes import SceneTransformer
from dimo.models.text import Conditions, Prompts, TextConditioned, ZeroText
from dimo.official import OFFICIAL, locate
from dimo.rows import Architecture, Network, Teacher
from dimo.weights import ASSETS


def weights_file(teacher: Teacher, role: str, folder: Path | None = None) -> Path:
    """Where the weights of a row lie: a file that comes with the package, or an official one.

    Args:
        teacher: The row.
        role: A key of its `weights`.
        folder: Where to look; None: the package, or `dimo.official.default_folder()`.

    Raises:
        DimoError: No such file.
    """
    name = teacher.weights[role]
    if name in OFFICIAL:
        return locate(name, folder)
    path = (folder or ASSETS) / name
    if not path.is_file():
        train = f"train it with: dimo train --teacher {teacher.name}, and " if teacher.world else ""
        raise DimoError(
            f"teacher {teacher.name!r} needs {path}; {train}give its folder with --weights"
        )
    return path


def make_network(
    teacher: Teacher,
    conditions: Conditions | None = None,
    architecture: Architecture | None = None,
    **changes: Any,
) -> Network:
    """The row's network with fresh weights.

    Args:
        teacher: The row.
        conditions: What the labels of a text-conditioned network stand for; None: all zeros, to
            look at the network alone.
        architecture: In place of the row's.
        **changes: Constructor arguments in place of the row's.
    """
    build = architecture or teacher.architecture
    return _conditioned(teacher, build(**{**teacher.network, **changes}), conditions)


def load_network(
    teacher: Teacher,
    path: Path,
    conditions: Conditions | None = None,
    architecture: Architecture | None = None,
) -> Network:
    """The row's network with the weights of a file, in eval mode on the CPU.

    Args:
        teacher: The row.
        path: The file.
        conditions: As for `make_network`.
        architecture: In place of the row's.

    Raises:
        DimoError: The file is not one of this network.
    """
    network = (architecture or teacher.architecture).from_official(path, **teacher.network)
    return _conditioned(teacher, network, conditions).eval()


def _conditioned(
    teacher: Teacher,
    network: MaskGIT | HaltonMaskGIT | Meissonic | SceneTransformer,
    conditions: Conditions | None,
) -> Network:
    if isinstance(network, MaskGIT | HaltonMaskGIT):
        return network
    text = teacher.text
    assert text is not None, "a text-conditioned network's row says how it reads prompts"
    zero = ZeroText(text.length, text.states_dim, text.pooled_dim)
    return TextConditioned(network, zero if conditions is None else conditions)


def load_prompts(
    teacher: Teacher, prompts: Sequence[str] | None, weights: Path | None = None
) -> Prompts | None:
    """The prompts with the teacher's text encoder on the CPU; None for a class-conditional one.

    Args:
        teacher: The row.
        prompts: What it shall draw; a class-conditional teacher takes None.
        weights: Folder with the row's weight files.

    Raises:
        DimoError: Prompts that are missing, or that the teacher cannot read; a missing or foreign
            weights file.
    """
    text = teacher.text
    if text is None:
        if prompts is not None:
            raise DimoError(
                f"teacher {teacher.name!r} draws classes, not prompts; leave the prompts out"
            )
        return None
    if prompts is None:
        raise DimoError(
            f"teacher {teacher.name!r} draws prompts; give them, to a distillation as a text file, "
            "one a line: --set prompts=FILE"
        )
    if text.check is not None:
        for prompt in dict.fromkeys(prompts):
            text.check(prompt)
    needed = [weights_file(teacher, "text", weights)] if "text" in teacher.weights else []
    encoder = text.encoder(*needed)
    return Prompts(encoder, prompts, negative_prompt=text.negative_prompt)
