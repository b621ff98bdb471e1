"""Options shared by several commands, and the parsing of their values."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dimo.errors import DimoError
from dimo.samplers import SAMPLERS, all_knobs, teacher_samplers
from dimo.util import terminal

if TYPE_CHECKING:
    from bench.rows.settings import Choice

STEPS = "1,2,4,8,16"


def _schedules_in_words() -> str:
    """Schedules with the samplers that accept them."""
    samplers: dict[tuple[str, ...], list[str]] = {}
    for name, sampler in SAMPLERS.items():
        if sampler.schedules:
            samplers.setdefault(sampler.schedules, []).append(name)
    return "; ".join(f"{', '.join(keys)} ({', '.join(names)})" for keys, names in samplers.items())


Teacher = Annotated[str, typer.Option(help="Name of a teacher.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Weights = Annotated[
    Path | None,
    typer.Option(help="Folder of published or converted weights; default: bundled or downloaded."),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Encoded images from `dimo encode`, for methods that train on data."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe.")
]
Results = Annotated[Path, typer.Option(help="Folder of the result records.")]
Students = Annotated[
    list[str],
    typer.Option(
        "--student",
        metavar="[NAME=]RUN[@STEPS]",
        help="Distilled model: run folder, file, digits-dimo, scenes-dimo or dimo-maskgit, with a "
        "name for its rows and its own step counts; may be repeated.",
    ),
]
Baselines = Annotated[
    list[str],
    typer.Option(
        "--baseline",
        metavar="[NAME=]RUN[@STEPS]",
        help="Distilled model to compare with, as --student, e.g. di4c=runs/di4c@2,4; may be "
        "repeated.",
    ),
]
StudentSteps = Annotated[
    str, typer.Option(help="Step counts of one-step students; others use those of --steps.")
]
_KNOBS = all_knobs()
Samplers = Annotated[
    str,
    typer.Option(
        "--sampler",
        "--samplers",
        help=f"Samplers of teachers: {', '.join(teacher_samplers())}; several make one row each. "
        "Default: each teacher's own.",
    ),
]
Schedules = Annotated[
    str,
    typer.Option(
        "--schedule",
        help="Mask schedule or unmasking rate; several make one row each. Allowed: "
        f"{_schedules_in_words()}.",
    ),
]
GuidanceScale = Annotated[float | None, typer.Option(help=_KNOBS["guidance_scale"].help)]
Temperature = Annotated[float | None, typer.Option(help=_KNOBS["temperature"].help)]
ChoiceTemperature = Annotated[float | None, typer.Option(help=_KNOBS["choice_temperature"].help)]
Theta = Annotated[float | None, typer.Option(help=_KNOBS["theta"].help)]
TopK = Annotated[int | None, typer.Option(help=_KNOBS["top_k"].help)]
TopP = Annotated[float | None, typer.Option(help=_KNOBS["top_p"].help)]
SamplerKnobs = Annotated[
    list[str],
    typer.Option(
        "--set-sampler",
        metavar="NAME=VALUE",
        help="Set any setting of a sampler; may be repeated. Without an option of their own: "
        f"{', '.join(name for name, knob in _KNOBS.items() if not knob.option)}.",
    ),
]
Precision = Annotated[str, typer.Option(help="Precision of every network: float32 or bfloat16.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts", help="Text file with one prompt per line (text-conditioned teachers)."
    ),
]
Cache = Annotated[
    str,
    typer.Option(
        envvar="DIMO_CACHE",
        help="Folder of cached features; none: no cache. Default: ~/.cache/dimo/features.",
    ),
]
ExtractorWeights = Annotated[
    Path | None,
    typer.Option(
        help="Weights of the feature extractor, of the detector, or of HPS; default: bundled or "
        "downloaded."
    ),
]
ClipWeights = Annotated[
    Path | None,
    typer.Option(help="Weights of CLIP, for a protocol with CLIP score beside an extractor."),
]
ProtocolPrompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="The protocol's prompts: GenEval's file, HPSv2's folder of anime.json and so on, or a "
        "JSON list of captions; default: bundled.",
    ),
]


def _refuse_weights(path: Path | None) -> None:
    if path is not None:
        raise DimoError(
            f"--weights {path} is not used: it is the folder of teachers and students elsewhere; "
            "give the weights of the extractor, the detector or HPS with --extractor-weights"
        )


NoWeights = Annotated[Path | None, typer.Option("--weights", hidden=True, callback=_refuse_weights)]
Reference = Annotated[
    Path | None, typer.Option(help="File or folder of the reference; default: the bundled one.")
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Allow the protocol to import a custom extractor, which runs arbitrary code.",
    ),
]


def parse_choice(
    samplers: str, schedules: str, precision: str, set_sampler: list[str], **settings: Any
) -> "Choice":
    """Sampler overrides; a setting that is None was not given.

    Raises:
        DimoError: As `bench.rows.settings.Choice`; a setting given twice, or not NAME=VALUE.
    """
    from bench.rows.settings import Choice, knob_named

    given = {name: value for name, value in settings.items() if value is not None}
    for text in set_sampler:
        name, sign, value = text.partition("=")
        if not sign or name == "mask_schedule":
            raise DimoError(
                f"--set-sampler {text!r} is not allowed; give NAME=VALUE, e.g. --set-sampler "
                "theta=0.3, and schedules with --schedule"
            )
        if name in given:
            raise DimoError(f"--set-sampler {text!r} sets {name} twice; set it once")
        given[name] = knob_named(name).parse(value)
    return Choice(_names(samplers), _names(schedules), given, precision)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def parse_names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_steps(text: str) -> list[int]:
    return _parse_integers("--steps", text, low=1, high=None) if text else []


def parse_labels(text: str, num_classes: int) -> list[int]:
    return _parse_integers("--labels", text, low=0, high=num_classes - 1)


def parse_prompts(prompts: list[str], file: Path | None) -> list[str] | None:
    """Prompts of `--prompt` or `--prompts`; None without either.

    Raises:
        DimoError: Both are given, a prompt is empty or too long, or the file holds no prompts.
    """
    from dimo.models.text import MAX_PROMPT_LENGTH, prompts_from_file

    if file is not None:
        if prompts:
            raise DimoError("--prompt and --prompts give prompts twice; leave one of them out")
        return prompts_from_file(file)
    for prompt in prompts:
        if not prompt.strip() or len(prompt) > MAX_PROMPT_LENGTH:
            raise DimoError(
                f"--prompt has {len(prompt.strip()):,} characters; allowed: 1 to "
                f"{MAX_PROMPT_LENGTH:,}; e.g. --prompt 'a photo of a red circle'"
            )
    return prompts or None


def command_line() -> str:
    """The command line of this process, for records."""
    return shlex.join(["dimo", *sys.argv[1:]])


def warn(text: str) -> None:
    """One yellow line on stderr."""
    terminal.say(text, style="yellow")


def _parse_integers(option: str, text: str, *, low: int, high: int | None) -> list[int]:
    allowed = f"whole numbers from {low}" + (f" to {high}" if high is not None else "")
    values = []
    for part in text.split(","):
        value = int(part) if part.strip().isdecimal() else None
        if value is None or value < low or (high is not None and value > high):
            raise DimoError(
                f"{option} {part.strip()!r} is not allowed; give {allowed}, e.g. {option} 1,2,4"
            )
        values.append(value)
    return values
