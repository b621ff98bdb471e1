"""`dimo encode`: images -> the token cache that a training reads."""

__all__ = ["encode"]

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dimo import terminal
from dimo.cli.app import app
from dimo.cli.options import Device, Teacher, Weights
from dimo.errors import DimoError

if TYPE_CHECKING:
    from dimo.datasets.encoding import EncodingRun


@app.command(
    epilog="Examples: `dimo encode imagenet/train --teacher maskgit --centre-crop "
    "-o tokens.safetensors` · `dimo encode shards/*.tar --teacher maskgit -o tokens.safetensors`"
)
def encode(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Folder, .zip, .tar (WebDataset) or .npz of images, with all below it; several "
            "are shards of one set."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to make.")],
    teacher: Teacher = "digits",
    weights: Weights = None,
    labels: Annotated[
        str,
        typer.Option(
            help="Where labels come from: folder (one a class, sorted by name), filename "
            "(000123_207.png), cyclic:1000, or a .csv or .json file; default: what comes with the "
            "set, else its folders."
        ),
    ] = "",
    centre_crop: Annotated[
        bool,
        typer.Option(
            "--centre-crop",
            help="Make images of any size and 8-bit colours fit by ADM's rule: halve by box "
            "averages, resize the shorter side bicubically, crop the middle.",
        ),
    ] = False,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Also encode the mirror image of each, behind it.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images at a time; changes speed and memory only.")
    ] = 64,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Start anew, whatever is there.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="What was done, as JSON on stdout.")
    ] = False,
) -> None:
    """Encode images by a teacher's tokenizer, once; interrupted, the same command goes on."""
    if out.suffix != ".safetensors":
        raise DimoError(f"--out {out} is no .safetensors; e.g. -o tokens.safetensors")
    import torch

    from bench.inputs import class_folders, open_images
    from dimo.datasets.encoding import encode_images
    from dimo.launch import choose_device
    from dimo.teachers import get_teacher, weights_file

    row, place = get_teacher(teacher), choose_device(device)
    images = open_images(paths, recursive=True, labels=labels)
    by_folder = labels == "folder" or images.labels is None
    found = class_folders(images.names) if images.labels is None else images.labels
    if by_folder and (count := int(found.max()) + 1) != row.num_classes:
        raise DimoError(
            f"{paths[0]} has {count:,} folders; allowed as classes of teacher {teacher!r}: "
            f"{row.num_classes:,}; or give labels with --labels FILE"
        )
    side = row.image_size if centre_crop else None
    tokenizer = row.tokenizer(weights_file(row, "tokenizer", weights)).to(place)
    start = time.monotonic()
    try:
        with terminal.work_bar() as progress:
            run = encode_images(
                lambda first: images.batches(range(first, len(images)), batch_size, side=side),
                torch.from_numpy(found),
                out,
                names=images.names,
                teacher=row,
                tokenizer=tokenizer,
                crop="adm" if centre_crop else "none",
                mirrored=mirror,
                force=force,
                progress=lambda done: progress("encode", done, len(images), "images"),
            )
    except KeyboardInterrupt:
        terminal.say("interrupted; the same command goes on from here", style="yellow")
        raise typer.Exit(130) from None
    _report(run, out, time.monotonic() - start, as_json=as_json)


def _report(run: "EncodingRun", out: Path, seconds: float, *, as_json: bool) -> None:
    """The closing line on stderr, and with `as_json` what the cache is on stdout."""
    from dimo.files import sha256_file
    from dimo.strict import encode as plain

    if as_json:
        told = {"out": str(out), "sha256": sha256_file(out), "made": run.made}
        print(json.dumps({**told, "seconds": round(seconds, 3), **plain(run.info)}, indent=2))
    if not run.made:
        terminal.say(f"{out}: {run.info.images:,} images, all there already")
        return
    now = "" if run.made == run.info.images else f" ({run.made:,} encoded now)"
    terminal.say(
        f"{out}: {run.info.images:,} images{now}, {seconds:,.1f} s, "
        f"{run.made / seconds:,.1f} images/s"
    )
