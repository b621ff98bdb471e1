"""From a row of the table of teachers to its network, with the prompts that it draws.

How a teacher or a distilled student is loaded.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dimo.errors import DimoError, unknown_name
from dimo.methods import METHODS
from dimo.models import MaskedModel, Tokenizer
from dimo.models.cpu import in_precision
from dimo.models.halton import HaltonMaskGIT
from dimo.models.maskgit import MaskGIT
from dimo.models.meissonic import Meissonic
from dimo.models.scenes import SceneTransformer
from dimo.models.text import Conditions, Prompts, TextConditioned, ZeroText
from dimo.util.files import sha256_file
from dimo.weights.catalog import ASSETS, OFFICIAL, locate
from dimo.zoo.students import FoundStudent, StudentConfig, find_student
from dimo.zoo.teachers import (
    TEACHERS,
    Architecture,
    Network,
    Teacher,
    get_teacher,
)


def weights_file(teacher: Teacher, role: str, folder: Path | None = None) -> Path:
    """Where the weights of a row lie: a file that comes with the package, or an official one.

    Args:
        teacher: The row.
        role: A key of its `weights`.
        folder: Where to look; None: the package, or `dimo.weights.catalog.default_folder()`.

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


@dataclass(frozen=True)
class Loaded:
    """A network ready to sample, with its tokenizer and the hash of its weights file.

    Attributes:
        teacher: Its row, or that of its teacher.
        model: The network in eval mode.
        tokenizer: Of the same row.
        weights_sha256: Of the network's weights file.
        name: Name in tables.
        student: None for a teacher.
        precision: What the network computes in, see `dimo.models.cpu`.
        unconditional: Predicts without the condition in guided sampling; None: the network itself.
    """

    teacher: Teacher
    model: MaskedModel
    tokenizer: Tokenizer
    weights_sha256: str
    name: str
    student: StudentConfig | None = None
    precision: str = "float32"
    unconditional: MaskedModel | None = None

    @property
    def num_conditions(self) -> int:
        """Classes, or prompts that were given."""
        return self.model.num_classes

    @property
    def condition_names(self) -> Sequence[str]:
        """One name a class, or the prompts."""
        if isinstance(self.model, TextConditioned):
            return self.model.conditions.prompts
        return self.teacher.class_names


def student_architecture(teacher: Teacher, method: str) -> Architecture:
    """The class of a student's network, which takes the constructor arguments of its teacher's.

    Args:
        teacher: The row.
        method: A key of `dimo.methods.METHODS`.

    Raises:
        DimoError: Unknown method, or one that this teacher's network cannot have.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    architecture = METHODS[method].distillation.network(teacher.architecture)
    if architecture is None:
        raise DimoError(
            f"method {method!r} has no student network for teacher {teacher.name!r} "
            f"({teacher.architecture.__name__}); use another --method, or e.g. --teacher digits"
        )
    return architecture


def load_teacher(
    name: str,
    *,
    device: torch.device,
    weights: Path | None = None,
    precision: str | None = None,
    prompts: Sequence[str] | None = None,
) -> Loaded:
    """Loads a teacher and its tokenizer in eval mode.

    Args:
        name: A key of `TEACHERS`.
        device: Where to put both.
        weights: Folder with the row's weight files; None: those shipped, or those fetched.
        precision: Makes the network ready for sampling in it, see `dimo.models.cpu`; None:
            leaves it as it is, to be trained too.
        prompts: What the labels stand for, if the teacher draws prompts; else None.

    Raises:
        DimoError: Unknown teacher or precision; a missing or foreign weights file; as
            `load_prompts`.
    """
    teacher = get_teacher(name)
    path = weights_file(teacher, "transformer", weights)
    return _load(teacher, path, teacher.title, device, weights, precision, prompts=prompts)


def load_student(
    run: str | Path | FoundStudent,
    *,
    device: torch.device,
    weights: Path | None = None,
    precision: str | None = None,
    prompts: Sequence[str] | None = None,
    teacher_unconditional: bool | None = None,
) -> Loaded:
    """Loads a distilled student, found or to be found by `find_student`, with its tokenizer.

    Args:
        run: As in `find_student`.
        device: Where to put the networks.
        weights: Folder of the weights; None: those shipped, or those fetched.
        precision: As in `load_teacher`.
        teacher_unconditional: Loads the teacher's network too, for the unconditional branch of
            guided sampling (the official `--lfg` of di4c); None: as the student's settings say.

    Raises:
        DimoError: As `find_student` and `load_prompts`; weights that do not fit; unknown precision;
            a one-step student with a teacher beside it.
    """
    found = run if isinstance(run, FoundStudent) else find_student(run, weights=weights)
    config, teacher = found.config, get_teacher(found.config.teacher)
    if teacher_unconditional is not None:
        config = dataclasses.replace(config, teacher_unconditional=teacher_unconditional)
    if config.teacher_unconditional and METHODS[config.method].is_one_step:
        raise DimoError(
            f"student {found.title} is sampled without guidance and has no unconditional branch; "
            "leave teacher_unconditional out"
        )
    loaded = _load(teacher, found.path, found.title, device, weights, precision, config, prompts)
    if not config.teacher_unconditional:
        return loaded
    path = weights_file(teacher, "transformer", weights)
    beside = _ready(load_network(teacher, path), device, precision)
    return dataclasses.replace(loaded, unconditional=beside)


def load_model(
    name: str,
    *,
    device: torch.device,
    weights: Path | None = None,
    precision: str | None = None,
    prompts: Sequence[str] | None = None,
) -> Loaded:
    """The teacher of that name, else the student of that name or in that folder."""
    load = load_teacher if name in TEACHERS else load_student
    return load(name, device=device, weights=weights, precision=precision, prompts=prompts)


def _load(
    teacher: Teacher,
    path: Path,
    title: str,
    device: torch.device,
    weights: Path | None,
    precision: str | None,
    student: StudentConfig | None = None,
    prompts: Sequence[str] | None = None,
) -> Loaded:
    # the tokenizer first: what is missing or foreign shows before the larger file is read
    tokenizer = teacher.tokenizer(weights_file(teacher, "tokenizer", weights)).to(device)
    conditions = load_prompts(teacher, prompts, weights)
    if conditions is not None:
        conditions.to(device)
    method = student.method if student else None
    architecture = student_architecture(teacher, method) if method else teacher.architecture
    model = _ready(load_network(teacher, path, conditions, architecture), device, precision)
    digest = sha256_file(path)
    return Loaded(teacher, model, tokenizer, digest, title, student, precision or "float32")


def _ready(network: Network, device: torch.device, precision: str | None) -> Network:
    """The network on the device, ready for sampling in a precision."""
    network = network.to(device)
    return network if precision is None else in_precision(network, precision)
