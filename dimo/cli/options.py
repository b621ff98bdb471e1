"""Options that several commands share, and how their texts are read."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dimo.errors import DimoError
from dimo.util import terminal

if TYPE_CHECKING:
    from bench.rows.settings import Choice

STEPS = "1,2,4,8,16"
Teacher = Annotated[str, typer.Option(help="Name of a teacher.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the weights, as published or converted; default: shipped or fetched."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Encoded images, made by dimo encode, for a method that needs data."),
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
        "name for its rows and step counts of its own; may be repeated.",
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
    str, typer.Option(help="Step counts of one-step students; others have those of --steps.")
]
Samplers = Annotated[
    str,
    typer.Option(
        "--sampler",
        "--samplers",
        help="How teachers are sampled: confidence, random, halton, tau_leaping, "
        "theta_trapezoidal; several: a row for each. Default: as published.",
    ),
]
Schedules = Annotated[
    str,
    typer.Option(
        "--schedule",
        help="Tokens of each step: arccos, cosine, arccos-halton, arccos-v1, cosine-v1; rates of "
        "tau_leaping and theta_trapezoidal: log-linear, cosine, arccos. Several: a row for each.",
    ),
]
GuidanceScale = Annotated[float | None, typer.Option(help="s = 1 + w of a teacher; 1 is off.")]
Temperature = Annotated[
    float | None, typer.Option(help="Divides logits; the same at every step, in every row.")
]
ChoiceTemperature = Annotated[
    float | None, typer.Option(help="Noise on confidences of the sampler confidence; 0 is none.")
]
Theta = Annotated[float | None, typer.Option(help="Of theta_trapezoidal, between 0 and 1.")]
TopK = Annotated[int | None, typer.Option(help="Students draw among the k likeliest tokens.")]
TopP = Annotated[
    float | None, typer.Option(help="Students draw among the likeliest tokens of total p.")
]
Precision = Annotated[str, typer.Option(help="float32 or bfloat16, of every network.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="Text file with a prompt a line, for teachers of prompts."),
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
    Path | None, typer.Option(help="File or folder of the reference; default: the embedded one.")
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Let the protocol name an extractor of your own code."),
]


def parse_choice(samplers: str, schedules: str, precision: str, **settings: Any) -> "Choice":
    """What was asked of the rows; a setting that is None was not given.

    Raises:
        DimoError: As `bench.rows.settings.Choice`.
    """
    from bench.rows.settings import Choice

    given = {name: value for name, value in settings.items() if value is not None}
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
    """What `--prompt` and `--prompts` give; None where neither does.

    Raises:
        DimoError: Both, an empty or too long prompt, or the file is none of prompts.
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
    """The command that this process runs, as it is noted in records."""
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
