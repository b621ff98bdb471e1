"""`dimo export`, `dimo import`: students as official files, and back."""

__all__ = ["export", "import_"]

from pathlib import Path
from typing import Annotated

import typer

from dimo import terminal
from dimo.cli.app import app
from dimo.cli.options import Weights


@app.command(
    epilog="Examples: `dimo export runs/mine -o pytorch_model.bin` · "
    "`dimo export digits-dimo -o student.safetensors`"
)
def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Run folder, or digits-dimo, scenes-dimo or dimo-maskgit."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help=".bin: official layout, a bare state dict; or .safetensors."
        ),
    ],
    weights: Weights = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
) -> None:
    """Write a student as one file that the official Di[M]O code loads."""
    from dimo.export import export_student

    config = export_student(run, out, weights=weights, force=force)
    terminal.say(
        f"{out}: one-step student of {config.teacher}; sample it with mask ratio "
        f"{config.init_mask_ratio:g}, embedding noise {config.embedding_noise:g}, "
        f"temperature {config.temperature:g}"
    )


@app.command(
    "import",
    epilog="Example: `dimo import pytorch_model.bin --teacher maskgit -o runs/official`",
)
def import_(
    file: Annotated[Path, typer.Argument(help="Weights of a student, official or exported.")],
    teacher: Annotated[str, typer.Option(help="Name of its teacher.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to make.")],
    init_mask_ratio: Annotated[
        float, typer.Option(help="Share of masked tokens in its input.")
    ] = 0.6,
    embedding_noise: Annotated[
        float, typer.Option(help="Perturbation of its input's embeddings.")
    ] = 0.1,
    temperature: Annotated[float, typer.Option(help="Divides its logits when sampled.")] = 7.0,
) -> None:
    """Make a run folder of a student's official file. Defaults are those of the published one."""
    from dimo.export import import_student

    import_student(
        file,
        out,
        teacher=teacher,
        init_mask_ratio=init_mask_ratio,
        embedding_noise=embedding_noise,
        temperature=temperature,
    )
    terminal.say(f"student: {out}; draw with it: dimo sample --model {out}")
