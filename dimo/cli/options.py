"""Options shared by several commands, and the parsing of their values."""

import difflib
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dimo.errors import DimoError
from dimo.samplers import SAMPLERS, all_knobs, teacher_samplers

if TYPE_CHECKING:
    from bench.rows.settings import Choice
    from dimo.zoo import teachers

STEPS = "1,2,4,8,16"
# sections of `--help`, in the order in which a command's options name them
SAMPLER = "Sampler settings"
FILES = "Weights and references"
TRACKING = "Pictures, scores and logs"
OUTPUT = "Output"
ADVANCED = "Advanced"

Teacher = Annotated[str, typer.Option(metavar="NAME", help="Name of a teacher.")]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", rich_help_panel=ADVANCED, help="auto, cpu, cuda or cuda:N.")
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        rich_help_panel=FILES,
        help="Folder of network weights; default: bundled or downloaded.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=FILES,
        help="Encoded images from dimo encode, for methods that train on data.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue the run in --out, also with more --set steps=N."),
]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe.")
]
Results = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the result records.")]
Students = Annotated[
    list[str],
    typer.Option(
        "--student",
        metavar="[NAME=]RUN[@STEPS]",
        help="Distilled model: run folder, file, hf://OWNER/REPO, digits-dimo, scenes-dimo or "
        "dimo-maskgit; may be repeated.",
    ),
]
Checkpoint = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        rich_help_panel=FILES,
        help="Take the student from its run's checkpoint after N steps; default: the finished one.",
    ),
]
Baselines = Annotated[
    list[str],
    typer.Option(
        "--baseline",
        metavar="[NAME=]RUN[@STEPS]",
        help="Distilled model to compare with, e.g. di4c=runs/di4c@2,4; may be repeated.",
    ),
]
StudentSteps = Annotated[
    str,
    typer.Option(
        metavar="N,N", help="Step counts of one-step students; others use those of --steps."
    ),
]
_KNOBS = all_knobs()
Samplers = Annotated[
    str,
    typer.Option(
        "--sampler",
        "--samplers",
        metavar="NAME",
        rich_help_panel=SAMPLER,
        help=f"{', '.join(teacher_samplers())}; several, with commas, make one row each. Default: "
        "the teacher's own.",
    ),
]
Schedules = Annotated[
    str,
    typer.Option(
        "--schedule",
        metavar="NAME",
        rich_help_panel=SAMPLER,
        help="Mask schedule or unmasking rate: "
        f"{', '.join(dict.fromkeys(n for s in SAMPLERS.values() for n in s.schedules))}; several "
        "make one row each.",
    ),
]


def _knob(name: str, metavar: str = "X") -> Any:
    """The option of a sampler's knob."""
    return typer.Option(metavar=metavar, rich_help_panel=SAMPLER, help=_KNOBS[name].help)


GuidanceScale = Annotated[float | None, _knob("guidance_scale")]
Temperature = Annotated[float | None, _knob("temperature")]
ChoiceTemperature = Annotated[float | None, _knob("choice_temperature")]
Theta = Annotated[float | None, _knob("theta")]
TopK = Annotated[int | None, _knob("top_k", "N")]
TopP = Annotated[float | None, _knob("top_p")]
SamplerKnobs = Annotated[
    list[str],
    typer.Option(
        "--set-sampler",
        metavar="NAME=VALUE",
        rich_help_panel=SAMPLER,
        help="Set any setting of a sampler, also those without an option: "
        f"{', '.join(name for name, knob in _KNOBS.items() if not knob.option)}; may be repeated.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        rich_help_panel=SAMPLER,
        help="Precision of every network: float32 or bfloat16.",
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Text file with one prompt per line (text-conditioned teachers).",
    ),
]
Cache = Annotated[
    str,
    typer.Option(
        envvar="DIMO_CACHE",
        metavar="DIR",
        rich_help_panel=ADVANCED,
        help="Folder of cached features, or none. Default: ~/.cache/dimo/features.",
    ),
]
ExtractorWeights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=FILES,
        help="Weights of the feature extractor, the detector or a preference scorer; default: "
        "bundled or downloaded.",
    ),
]
ClipWeights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=FILES,
        help="Weights of CLIP, for a protocol with CLIP score beside an extractor.",
    ),
]
ProtocolPrompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="PATH",
        rich_help_panel=FILES,
        help="The protocol's prompts: the file of GenEval, GenEval 2 or DPG-Bench, HPSv2's "
        "folder, or captions (.json, .txt, .csv); default: bundled.",
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
    Path | None,
    typer.Option(
        metavar="PATH",
        rich_help_panel=FILES,
        help="File or folder of the reference; default: the bundled one.",
    ),
]
ReferenceImages = Annotated[
    list[Path],
    typer.Option(
        "--reference-images",
        metavar="PATH",
        rich_help_panel=FILES,
        help="Real images that the reference was made of (folder, .zip, .tar or .npz), for the "
        "rows of real data and tokenizer; may be repeated. Default: bundled ones, or no such rows.",
    ),
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        rich_help_panel=ADVANCED,
        help="Allow the protocol to import a custom extractor, which runs arbitrary code.",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", rich_help_panel=OUTPUT, help="Replace --out if it exists.")
]
AsJson = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print JSON on stdout.")
]


BatchSize = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        rich_help_panel=ADVANCED,
        help="Images at a time; changes speed and memory only.",
    ),
]


def parse_choice(options: Mapping[str, Any]) -> "Choice":
    """Sampler overrides, from the options of a command; a setting that is None was not given.

    Raises:
        DimoError: As `bench.rows.settings.Choice`; a setting given twice, or not NAME=VALUE.
    """
    from bench.rows.settings import Choice, knob_named

    given = {name: options[name] for name in _KNOBS if options.get(name) is not None}
    for text in options["set_sampler"]:
        name, sign, value = text.partition("=")
        if not sign or name == "mask_schedule":
            raise DimoError(
                f"--set-sampler {text!r} is not allowed; give NAME=VALUE, e.g. --set-sampler "
                "theta=0.3, and schedules with --schedule"
            )
        if name in given:
            raise DimoError(f"--set-sampler {text!r} sets {name} twice; set it once")
        given[name] = knob_named(name).parse(value)
    samplers, schedules = parse_names(options["samplers"]), parse_names(options["schedules"])
    return Choice(samplers, schedules, given, options["precision"])


def parse_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_steps(text: str) -> list[int]:
    parts = text.split(",") if text else []
    for part in parts:
        if not part.strip().isdecimal() or int(part) < 1:
            raise DimoError(
                f"--steps {part.strip()!r} is not allowed; give whole numbers from 1, e.g. "
                "--steps 1,2,4"
            )
    return [int(part) for part in parts]


def parse_batch_size(text: str) -> int:
    """A number of images; 0 for auto."""
    if text != "auto" and (not text.isdecimal() or int(text) < 1):
        raise DimoError(
            f"--batch-size {text!r} is not allowed; give a whole number from 1, or auto"
        )
    return 0 if text == "auto" else int(text)


def parse_labels(text: str, teacher: "teachers.Teacher") -> list[int]:
    """Classes of a teacher: numbers, ranges such as 0-9, and names, with commas between them."""
    labels: list[int] = []
    for part in map(str.strip, text.split(",")):
        if found := re.fullmatch(r"(\d+)\s*-\s*(\d+)", part):
            low, high = sorted(_label(end, teacher) for end in found.groups())
            labels += range(low, high + 1)
        else:
            labels.append(_label(part, teacher))
    return labels


def _label(text: str, teacher: "teachers.Teacher") -> int:
    """The class of that number or name."""
    if text.isdecimal() and int(text) < teacher.num_classes:
        return int(text)
    names = [] if text.isdecimal() else [name.casefold() for name in teacher.class_names]
    wanted = text.casefold().replace("_", " ")
    found = [label for label, name in enumerate(names) if name == wanted]
    if len(found) == 1:
        return found[0]
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if found:
        hint = f", as classes {' and '.join(map(str, found))} have that name"
    raise DimoError(
        f"--labels {text!r} is not allowed{hint}; give whole numbers from 0 to "
        f"{teacher.num_classes - 1}, ranges or names of classes, e.g. --labels 1,2,4-6"
    )


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
