"""Loading teachers and distilled students."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dimo.data.tokens import TokenData, read_tokens, token_data
from dimo.engine.distributed import choose_device
from dimo.errors import DimoError, unknown_name
from dimo.methods import METHODS
from dimo.models import MaskedModel, MaskedNetwork, TextNetwork, Tokenizer
from dimo.models.cpu import prepare_for_inference
from dimo.models.text import Conditions, Prompts, TextConditioned, ZeroText
from dimo.util.files import sha256_file
from dimo.weights.catalog import ASSETS, OFFICIAL, locate
from dimo.weights.download import recorded_sha256
from dimo.zoo.bundled import EncodedImages
from dimo.zoo.generator import Generator, check_prompts
from dimo.zoo.students import FoundStudent, StudentConfig, find_student
from dimo.zoo.teachers import Teacher, find_tokenizer, get_teacher, is_teacher


def weights_file(teacher: Teacher, role: str, folder: Path | None = None) -> Path:
    """The weights file of a role, a key of the row's `weights`; a `DimoError` if it is missing.

    `folder` is searched; None: the package, or `dimo.weights.catalog.default_folder()`.
    """
    name = teacher.weights[role]
    if name in OFFICIAL:
        return locate(name, folder)
    path = (folder or ASSETS) / name
    if not path.is_file():
        train = f"train it with: dimo train --teacher {teacher.name}, and " * teacher.is_bundled
        if role == "transformer" and teacher.data is not None:
            raise DimoError(
                f"teacher {teacher.name!r} is not trained, it lacks {path.name}; finish it with "
                "dimo train --data, as it was begun"
            )
        raise DimoError(
            f"teacher {teacher.name!r} needs {path}; {train}give its folder with --weights"
        )
    return path


def load_tokenizer(name: str, image_size: int, weights: Path | None = None) -> Tokenizer:
    """A tokenizer by its name in `TOKENIZERS` or its file, on the CPU, for square images.

    Args:
        image_size: Side of the images in pixels.
        weights: Folder of official files; None: where `dimo weights fetch` puts them.

    Raises:
        DimoError: Unknown name, or a missing or foreign file.
    """
    file, build = find_tokenizer(name)
    path = locate(file, weights) if file in OFFICIAL else Path(file)
    return build(path, image_size=image_size)


def make_network(
    teacher: Teacher,
    conditions: Conditions | None = None,
    architecture: type[MaskedNetwork] | None = None,
    **changes: Any,
) -> MaskedModel:
    """The row's network with fresh weights; `changes` replace its constructor arguments.

    Args:
        conditions: What the labels of a text-conditioned network stand for; None: zeros, to
            inspect the network alone.
        architecture: Replaces the row's.
    """
    build = architecture or teacher.architecture
    return _conditioned(teacher, build(**{**teacher.network, **changes}), conditions)


def load_network(
    teacher: Teacher,
    path: Path,
    conditions: Conditions | None = None,
    architecture: type[MaskedNetwork] | None = None,
) -> MaskedModel:
    """As `make_network`, with the weights of a file, which must fit; in eval mode on the CPU."""
    network = (architecture or teacher.architecture).from_official(path, **teacher.network)
    return _conditioned(teacher, network, conditions).eval()


def _conditioned(
    teacher: Teacher, network: MaskedNetwork, conditions: Conditions | None
) -> MaskedModel:
    if isinstance(network, MaskedModel):
        return network
    text = teacher.text
    if text is None or not isinstance(network, TextNetwork):
        raise TypeError(
            f"{type(network).__name__} of teacher {teacher.name!r} must be a MaskedModel, or a "
            "TextNetwork whose row sets `text`"
        )
    zero = ZeroText(text.length, text.states_dim, text.pooled_dim)
    return TextConditioned(network, zero if conditions is None else conditions)


def load_prompts(
    teacher: Teacher, prompts: Sequence[str] | None, weights: Path | None = None
) -> Prompts | None:
    """The prompts with the teacher's text encoder on the CPU; None if its condition is a class.

    Raises:
        DimoError: Prompts that are missing or that the teacher cannot read, or prompts for a
            class-conditional teacher; a missing or foreign weights file in the folder `weights`.
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
            f"teacher {teacher.name!r} draws prompts; give them, to a distillation as a text file "
            "with one per line: --set prompts=FILE"
        )
    check_prompts(text, prompts)
    files = [weights_file(teacher, "text", weights)] if "text" in teacher.weights else []
    return Prompts(text.encoder(*files), prompts, negative_prompt=text.negative_prompt)


def student_architecture(teacher: Teacher, method: str) -> type[MaskedNetwork]:
    """The class of a student's network, which takes the constructor arguments of its teacher's.

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
) -> Generator:
    """Loads a teacher and its tokenizer.

    Args:
        weights: Folder with the row's weight files; None: the bundled or the fetched ones.
        precision: A key of `dimo.models.cpu.PRECISIONS`; None leaves the network fit for training.
        prompts: What the labels of a text-conditioned teacher stand for.

    Raises:
        DimoError: Unknown teacher or precision; unfit weights file; as `load_prompts`.
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
) -> Generator:
    """Loads a distilled student and its tokenizer; arguments as of `load_teacher`.

    Args:
        run: As in `find_student`, or what that returned.
        teacher_unconditional: Also load the teacher's network, for the unconditional half of
            guidance (the official `--lfg` of di4c); None: as in the student's settings.

    Raises:
        DimoError: As `find_student` and `load_teacher`; a one-step student with
            `teacher_unconditional`.
    """
    student = run if isinstance(run, FoundStudent) else find_student(run, weights=weights)
    config, teacher = student.config, get_teacher(student.config.teacher)
    if teacher_unconditional is not None:
        config = dataclasses.replace(config, teacher_unconditional=teacher_unconditional)
    if config.teacher_unconditional and METHODS[config.method].is_one_step:
        raise DimoError(
            f"student {student.title} is sampled without guidance and has no unconditional branch; "
            "leave teacher_unconditional out"
        )
    loaded = _load(
        teacher, student.path, student.title, device, weights, precision, config, prompts
    )
    if not config.teacher_unconditional:
        return loaded
    path = weights_file(teacher, "transformer", weights)
    beside = _ready(load_network(teacher, path), device, precision)
    return dataclasses.replace(loaded, unconditional=beside)


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "auto",
    weights: str | Path | None = None,
    precision: str | None = "float32",
    prompts: Sequence[str] | None = None,
) -> Generator:
    """Loads a teacher or a student by its name, a run folder, a file, or from Hugging Face.

    Other arguments are those of `load_teacher`; `Generator.sample` takes other prompts as well.

    Args:
        name_or_path: As of `dimo.zoo.teachers.get_teacher`, or of `find_student`, e.g.
            `hf://OWNER/REPO`.
        device: "auto" takes a GPU if there is one.

    Raises:
        DimoError: As `load_teacher` and `load_student`; an unknown device.
    """
    folder = None if weights is None else Path(weights)
    name, student = str(name_or_path), None
    if not is_teacher(name):
        student = find_student(name_or_path, weights=folder)
    text = get_teacher(student.config.teacher if student else name).text
    if prompts is None and text is not None:
        prompts = [text.negative_prompt]
    given: dict[str, Any] = {"weights": folder, "precision": precision, "prompts": prompts}
    given["device"] = choose_device(str(device))
    return load_student(student, **given) if student else load_teacher(name, **given)


def load_tokens(path: Path | None, *, teacher: str, weights: Path | None = None) -> TokenData:
    """Reads what `dimo encode` wrote to `path`; None: the data that the teacher was trained with.

    Raises:
        DimoError: No data, a missing tokenizer, or as `dimo.data.tokens.read_tokens`.
    """
    row = get_teacher(teacher)
    path = path or row.data
    if path is None and (row.bundled is None or row.text is not None):
        raise DimoError(
            f"teacher {teacher!r} comes without data; encode a folder or WebDataset of images: "
            f"dimo encode PATH --teacher {teacher} -o tokens.safetensors"
        )
    tokenizer = row.tokenizer(weights_file(row, "tokenizer", weights))
    if path is not None:
        return read_tokens(path, row, tokenizer)
    assert row.bundled is not None
    data = row.bundled.training_data(tokenizer)
    assert isinstance(data, EncodedImages), "bundled classes are a fixed set of images"
    return token_data(data.tokens, data.labels)


def _load(
    teacher: Teacher,
    path: Path,
    title: str,
    device: torch.device,
    weights: Path | None,
    precision: str | None,
    student: StudentConfig | None = None,
    prompts: Sequence[str] | None = None,
) -> Generator:
    digest = sha256_file(path)
    if recorded_sha256(path) not in ("", digest):
        raise DimoError(
            f"weights {path} have sha256 {digest}, but {recorded_sha256(path)} is recorded beside "
            "them; they are damaged or were changed: fetch or export them again"
        )
    # the tokenizer first, so that a missing file is reported before the larger one is read
    tokenizer = teacher.tokenizer(weights_file(teacher, "tokenizer", weights)).to(device)
    conditions = load_prompts(teacher, prompts, weights)
    if conditions is not None:
        conditions.to(device)
    architecture = student_architecture(teacher, student.method) if student else None
    model = _ready(load_network(teacher, path, conditions, architecture), device, precision)
    return Generator(teacher, model, tokenizer, digest, title, student, precision or "float32")


def _ready(network: MaskedModel, device: torch.device, precision: str | None) -> MaskedModel:
    network = network.to(device)
    return network if precision is None else prepare_for_inference(network, precision)
