"""`dimo weights`: list, fetch, convert and check official files. `dimo export`, `dimo import`."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dimo import __version__
from dimo.cli.app import app, examples, weights_app
from dimo.cli.options import OUTPUT, AsJson, Checkpoint, Results, Weights
from dimo.errors import DimoError, unknown_name
from dimo.util import terminal
from dimo.util.files import sha256_file

if TYPE_CHECKING:
    from dimo.weights.convert import Finding
    from dimo.zoo.students import StudentConfig

Ema = Annotated[
    bool,
    typer.Option(
        "--ema/--no-ema",
        help="Take the averaged weights, or those of the last step, of a file with both.",
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of the files; default: $DIMO_WEIGHTS or ~/.cache/dimo/weights, then the cache "
        "of Hugging Face.",
    ),
]


@weights_app.command("list", epilog=examples("dimo weights list --folder weights"))
def weights_list(folder: Folder = None, as_json: AsJson = False) -> None:
    """List the official files: contents, source, licence, size, hash, and local path."""
    from dimo.weights.catalog import OFFICIAL, default_folder, find

    place = folder or default_folder()
    rows = {name: (file, find(name, folder)) for name, file in OFFICIAL.items()}
    if as_json:
        content = [
            {
                "name": name,
                "contents": file.contents,
                "url": file.url,
                "licence": file.licence or None,
                "size": file.size,
                "sha256": file.sha256 or None,
                "present": None if path is None else str(path),
            }
            for name, (file, path) in rows.items()
        ]
        print(json.dumps(content, indent=2))
        return
    for name, (file, path) in rows.items():
        size = "unknown" if file.size is None else _shown(file.size)
        here = "not here"
        if path is not None:
            here = f"here: {path.relative_to(place) if path.is_relative_to(place) else path}"
        print(f"{name:21}  {file.contents}; {here}")
        print(f"{'':21}  size {size}, licence {file.licence or 'unknown'}, {file.url}")
        print(f"{'':21}  sha256 {file.sha256 or 'unknown'}")
    terminal.say(f"folder: {place}; fetch with: dimo weights fetch NAME")


def _shown(size: int) -> str:
    """Bytes in MB, below 1 MB in KB."""
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} KB"


@weights_app.command(
    "fetch", epilog=examples("dimo weights fetch maskgit-256 maskgit-vqgan --folder weights")
)
def weights_fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="See dimo weights list.")],
    folder: Folder = None,
) -> None:
    """Download official files; an interrupted download is resumed, and checksums are compared."""
    from dimo.weights.catalog import find
    from dimo.weights.download import fetch

    present = [name for name in names if find(name, folder)]
    with terminal.download_bar() as progress:
        fetched = {name: fetch(name, folder, progress) for name in names}
    for name, paths in fetched.items():
        note = " (already present; check it with: dimo weights verify)" if name in present else ""
        terminal.say(f"{name}: {', '.join(map(str, paths))}{note}")


@weights_app.command(
    "convert", epilog=examples("dimo weights convert last.ckpt -o weights --config model.yaml")
)
def weights_convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Official checkpoint, or a folder of its shards.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the result.")],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="model.yaml of a VQGAN; default: the one beside the checkpoint."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing result.")] = False,
    ema: Ema = True,
    as_json: AsJson = False,
) -> None:
    """Convert an official pickle, or shards, to one safetensors file: the same bits and names."""
    from dimo.weights.convert import convert

    result, metadata = convert(file, out, config=config, force=force, ema=ema)
    if as_json:
        print(json.dumps({"file": str(result), **metadata}, indent=2))
        return
    dropped = metadata["dropped"]
    left_out = f", without {dropped} tensors used only in training" if dropped else ""
    part = f", the {metadata['part']!r} of {file.name}" if metadata["part"] else ""
    terminal.say(f"{result}: {metadata['kind']}{part}{left_out}")


@weights_app.command(
    "verify", epilog=examples("dimo weights verify", "dimo weights verify maskgit-256 my.pth")
)
def weights_verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME_OR_FILE", help="Default: all in the folder."),
    ] = None,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Check size, hash, keys and shapes of weights files; exit code 1 if anything is wrong."""
    from dimo.weights.convert import check

    findings = check(names or [], folder)
    if as_json:
        found = [
            {**vars(f), "path": f.path and str(f.path), "ok": not f.problems} for f in findings
        ]
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(map(_as_text, findings)))
    if any(finding.problems for finding in findings):
        raise typer.Exit(1)


def _as_text(finding: "Finding") -> str:
    lines = [f"{'WRONG' if finding.problems else 'ok'}  {finding.name}"]
    if finding.path is not None:
        lines[0] += f": {finding.path}, {finding.size:,} bytes"
        lines.append(f"sha256 {finding.origin}: {finding.sha256}")
        lines.append(finding.structure)
    lines += [f"wrong: {problem}" for problem in finding.problems]
    return "\n    ".join(line for line in lines if line)


_FORMATS = ("safetensors", "diffusers", "official")


@app.command(
    epilog=examples(
        "dimo export runs/mine --format official",
        "dimo export digits-dimo -o student.safetensors",
        "dimo export runs/mine --push OWNER/REPO",
        "dimo export runs/mine --format diffusers",
    )
)
def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Run folder, digits-dimo, scenes-dimo, dimo-maskgit or hf://OWNER/REPO.",
        ),
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="safetensors: a folder with settings and model card, to upload and load again; "
            "diffusers: that folder as a pipeline of diffusers, too; official: one file for the "
            "method's own code. Default: as --out says.",
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="A folder; or one file, .bin in the official layout or .safetensors with the "
            "settings. Default: a folder of RUN's name, or pytorch_model.bin.",
        ),
    ] = None,
    repository: Annotated[
        str,
        typer.Option(
            "--push",
            metavar="OWNER/REPO",
            help="Upload the folder to Hugging Face in one commit, with the token of hf auth login "
            "or HF_TOKEN.",
        ),
    ] = "",
    private: Annotated[
        bool, typer.Option("--private", help="Make a repository that --push creates private.")
    ] = False,
    results: Results = Path("results"),
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Protocol of the results in the model card: name or file; default: every bundled "
            "one.",
        ),
    ] = "",
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", rich_help_panel=OUTPUT, help="Replace what is in --out and the repository."
        ),
    ] = False,
) -> None:
    """Write a student as one file, or as a folder with its model card, and upload that folder.

    The card shows the results in --results that were measured with these very weights.
    """
    from bench.report import model_card, read_report
    from dimo.weights.download import HUB, push
    from dimo.weights.exchange import export_folder, export_student
    from dimo.zoo.students import checkpoint_of, find_student
    from dimo.zoo.teachers import TEACHERS

    if form and form not in _FORMATS:
        raise unknown_name("--format", form, _FORMATS)
    if checkpoint is not None:
        run = checkpoint_of(run, checkpoint)
    if form == "official" and out is None:
        out = Path("pytorch_model.bin")
    is_file = out is not None and out.suffix in (".bin", ".safetensors", ".pt", ".pth")
    diffusers = form == "diffusers"
    is_misfit = out is not None and (form == "official") != (out.suffix == ".bin")
    if form and (is_misfit or (diffusers and is_file)):
        raise DimoError(
            f"--format {form} does not fit -o {out}: a .bin is official, and diffusers takes a "
            "folder; leave one of them out"
        )
    if is_file and repository:
        raise DimoError(
            f"--push uploads a folder, and {out} is one file; leave -o and --format out"
        )
    student = find_student(run, weights=weights)
    if out is not None and is_file:
        export_student(run, out, weights=weights, force=force)
        terminal.say(f"{out}: {_sampled_with(student.config)}")
        return
    if repository and student.config.teacher not in TEACHERS:
        raise DimoError(
            f"--push: the teacher of {run} is the local folder {student.config.teacher}, and the "
            "student would not load elsewhere; export it to a folder with -o, and share both"
        )
    report = read_report(results, protocol, weights_sha256=sha256_file(student.path))
    for problem in report.problems:
        terminal.warn(problem)
    address = HUB + (repository.removeprefix(HUB) or "OWNER/REPO")
    card = model_card(student, report, address=address, diffusers=diffusers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary if repository else Path(run).name)
        files = export_folder(student, folder, card, diffusers=diffusers, force=force)
        said = f"{folder}: {_sampled_with(student.config)}"
        if repository:
            message = f"{student.title}, exported by dimo {__version__}"
            commit = push(files, repository, message=message, private=private, force=force)
            said = f"{commit}; sample it with: dimo sample --model {address}"
    terminal.say(said)


def _sampled_with(config: "StudentConfig") -> str:
    from dimo.methods import METHODS

    method, knobs = METHODS[config.method], f"temperature {config.temperature:g}"
    if method.is_one_step:
        knobs = (
            f"mask ratio {config.init_mask_ratio:g}, embedding noise {config.embedding_noise:g}, "
            + knobs
        )
    return f"{method.title} student of {config.teacher}; sample it with {knobs}"


@app.command(
    "import", epilog=examples("dimo import pytorch_model.bin --teacher maskgit -o runs/official")
)
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Weights of a student, official or exported; or their folder."
        ),
    ],
    teacher: Annotated[str, typer.Option(metavar="NAME", help="Name of its teacher.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Run folder to create.")],
    init_mask_ratio: Annotated[
        float | None, typer.Option(metavar="X", help="Fraction of masked tokens in its input.")
    ] = None,
    embedding_noise: Annotated[
        float | None, typer.Option(metavar="X", help="Noise on the embeddings of its input.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="Divides its logits when it is sampled.")
    ] = None,
    ema: Ema = True,
) -> None:
    """Make a run folder from a student's file.

    Defaults are the settings in the file, or else those of the teacher's recipe.
    """
    from dimo.methods import METHODS
    from dimo.weights.exchange import import_student

    config = import_student(
        file,
        out,
        teacher=teacher,
        init_mask_ratio=init_mask_ratio,
        embedding_noise=embedding_noise,
        temperature=temperature,
        ema=ema,
    )
    terminal.say(
        f"student: {out}, {METHODS[config.method].title}, temperature {config.temperature:g}, "
        f"{config.recipe}; sample it with: dimo sample --model {out}"
    )
