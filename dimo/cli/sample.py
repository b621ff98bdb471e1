"""`dimo sample`: images of a model, as a picture or as files to score.

`dimo encode`: images -> the token cache that training reads.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import dimo.cli.options as opt
from dimo.cli.app import app, examples
from dimo.errors import DimoError
from dimo.util import terminal

if TYPE_CHECKING:
    import torch

    from bench.rows.export import Exported
    from bench.rows.rows import Job, Planned
    from dimo.data.encode import EncodingRun


@app.command(
    epilog=examples(
        "dimo sample --model digits --model digits-dimo --steps 1,4,16 --labels 3,3,7",
        "dimo sample --model scenes --prompt 'a photo of a red circle' --out grid.png",
        "dimo sample --image 3.png --mask half.png --labels 3,3,8 --out edits.png",
        "dimo sample --model digits --steps 4 --count 5000 --seed 1000 --out set.npz",
        "torchrun --nproc_per_node=8 -m dimo sample --steps 4 --count 5000 --out set",
    )
)
def sample(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="[NAME=]MODEL[@STEPS]",
            help="Teacher, bundled student, run folder, file or hf://OWNER/REPO; may be repeated "
            "for a picture.",
        ),
    ] = ["digits"],  # noqa: B006
    checkpoint: opt.Checkpoint = None,
    steps: Annotated[
        str,
        typer.Option(
            metavar="N,N",
            help="Step counts; one-step students among teachers stay at 1. Default for a picture: "
            f"{opt.STEPS}.",
        ),
    ] = "",
    labels: Annotated[
        str,
        typer.Option(
            metavar="N,N",
            help="Picture: one column per label: number, range (0-9) or name; default: each class "
            "twice, or 10 of many classes.",
        ),
    ] = "",
    prompt: Annotated[
        list[str],
        typer.Option(metavar="TEXT", help="Prompt of a text-conditioned teacher; may be repeated."),
    ] = [],  # noqa: B006
    prompts_file: opt.PromptsFile = None,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Edit this image, of the model's size: with --mask, what it leaves black is kept, "
            "token by token, and the rest sampled.",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Image of the same size, white (not 0) where --image is painted again; a token is "
            "if any pixel of its patch is. Steps beyond the number of these tokens are left out.",
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Write this number of images as files; rerun the same command to continue after "
            "an interruption.",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Image i depends on seed and i alone; bundled protocols report with seed 1000.",
        ),
    ] = 0,
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH", help="Picture: a .png; with --count a folder of PNGs or an .npz."
        ),
    ] = Path("samples.png"),
    samplers: opt.Samplers = "",
    schedules: opt.Schedules = "",
    guidance_scale: opt.GuidanceScale = None,
    temperature: opt.Temperature = None,
    choice_temperature: opt.ChoiceTemperature = None,
    theta: opt.Theta = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    set_sampler: opt.SamplerKnobs = [],  # noqa: B006
    precision: opt.Precision = "float32",
    weights: opt.Weights = None,
    force: opt.Force = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            rich_help_panel=opt.OUTPUT,
            help="With --count: a summary as JSON on stdout.",
        ),
    ] = False,
    batch_size: opt.BatchSize = 50,
    device: opt.Device = "auto",
) -> None:
    """Draw a grid with one row per model and step count, or write --count images to score.

    With --image and --mask all of them are edits of one image (inpainting).
    """
    _check_out(out, count, force=force)
    choice = opt.parse_choice(context.params)
    if count is None and as_json:
        raise DimoError("--json summarizes written images; add --count, or leave it out")
    if count is not None and labels:
        raise DimoError(
            "--labels chooses columns of a picture; with --count image i has label i modulo the "
            "classes; leave one of them out"
        )
    from bench.rows.rows import at_checkpoint, load_planned, parse_candidate, plan_models
    from dimo.zoo.teachers import is_teacher

    models = [at_checkpoint(text, checkpoint) for text in models]
    counts = opt.parse_steps(steps)
    # one-step students stay at one step beside teachers, and without --steps
    any_teacher = any(is_teacher(parse_candidate(text).model) for text in models)
    planned = plan_models(
        models,
        counts or opt.parse_steps(opt.STEPS),
        weights=weights,
        choice=choice,
        student_steps=counts if counts and not any_teacher else [1],
    )
    prompts = _conditions(planned, prompt, prompts_file, labels)
    edit = _edit(planned, image, mask)

    def load(place: "torch.device") -> "list[Job]":
        jobs = load_planned(planned, device=place, weights=weights, prompts=prompts)
        if edit is None:
            return jobs
        networks = {id(job.loaded): job.loaded for job in jobs}  # its rows share one
        edited = {key: loaded.editing(*edit) for key, loaded in networks.items()}
        return [dataclasses.replace(job, loaded=edited[id(job.loaded)]) for job in jobs]

    if count is None:
        from bench.rows.grid import shared_classes

        shared_classes(entry.teacher for entry in planned)
        columns = list(range(len(prompts or ())))
        if labels:
            columns = opt.parse_labels(labels, planned[0].teacher)
        _draw(load, columns, seed=seed, out=out, batch_size=batch_size, device=device)
        return
    _check_one(planned, count)
    from bench.rows.export import export_images
    from dimo.engine.distributed import choose_device, ranks

    with ranks() as group, terminal.work_bar() as progress:
        place = choose_device(device)
        (job,) = group.synchronized(lambda: load(place))
        done = export_images(
            job,
            out,
            seed=seed,
            count=count,
            batch_size=batch_size,
            device=place,
            force=force,
            ranks=group,
            progress=progress if group.is_first else terminal.quiet,
        )
    if group.is_first:
        _report(done, count, out, as_json=as_json)


def _conditions(
    planned: "list[Planned]", prompt: list[str], file: Path | None, labels: str
) -> list[str] | None:
    """Prompts for text-conditioned models; None for models of classes."""
    prompts = opt.parse_prompts(prompt, file)
    draws_prompts = [entry.teacher.text is not None for entry in planned]
    names = ", ".join(dict.fromkeys(entry.teacher.name for entry in planned))
    if not any(draws_prompts):
        if prompts is not None:
            raise DimoError(f"--prompt is for models that draw prompts, and {names} draws classes")
        return None
    if not all(draws_prompts):
        raise DimoError(f"models of prompts and of classes share no picture ({names}); draw two")
    if labels:
        raise DimoError(f"--labels is for models of classes, and {names} draws prompts: --prompt")
    if prompts is None:
        raise DimoError(
            f"{names} draws prompts; give one or more with --prompt TEXT, or a file with --prompts"
        )
    return prompts


def _edit(
    planned: "list[Planned]", image: Path | None, mask: Path | None
) -> "tuple[torch.Tensor, torch.Tensor] | None":
    """The image uint8 [3, H, W] and the mask bool [H, W]; None without them."""
    if image is None and mask is None:
        return None
    if image is None or mask is None:
        given, missing = ("--mask", "--image") if image is None else ("--image", "--mask")
        raise DimoError(f"{given} needs {missing} FILE: an edit takes an image and a mask")
    import torch

    from bench.images.codec import read_image
    from dimo.samplers.inpainting import check_edit

    pixels, painted = (torch.from_numpy(read_image(path)[1].copy()) for path in (image, mask))
    edit = pixels.permute(2, 0, 1), painted.bool().any(-1)
    for entry in planned:
        check_edit(*edit, entry.teacher.image_size)
    return edit


def _draw(
    load: "Callable[[torch.device], list[Job]]",
    labels: list[int],
    *,
    seed: int,
    out: Path,
    batch_size: int,
    device: str,
) -> None:
    from bench.rows.grid import draw_samples
    from dimo.engine.distributed import choose_device, peak_memory_bytes

    place = choose_device(device)
    jobs = load(place)
    start = time.monotonic()
    with terminal.work_bar() as progress:
        draw_samples(
            jobs, labels, seed=seed, out=out, device=place, batch_size=batch_size, progress=progress
        )
    seconds, peak = time.monotonic() - start, peak_memory_bytes(place) / 2**20
    terminal.say(f"picture: {out} ({seconds:,.1f} s, peak memory {peak:,.0f} MiB)")


def _check_out(out: Path, count: int | None, *, force: bool) -> None:
    """A picture is a new .png; a folder has no suffix, a numeric one, or exists."""
    suffix = out.suffix.lower()
    if count is None:
        if suffix != ".png":
            raise DimoError(
                f"--out {out} is not a .png; give one for a picture, or --count for images as files"
            )
        if out.exists() and not force:
            raise DimoError(f"output {out} exists; replace it with --force or choose another --out")
    elif not (suffix in ("", ".npz") or suffix[1:].isdigit() or out.is_dir()):
        raise DimoError(f"--out {out} cannot hold --count images; allowed: a folder or an .npz")


def _check_one(planned: "list[Planned]", count: int) -> None:
    """`--count` needs one model, step count, sampler and schedule."""
    if count < 1:
        raise DimoError(f"--count {count} is not allowed; give a whole number from 1, e.g. 50000")
    if len(planned) > 1:
        raise DimoError(
            f"--count writes the images of one model, and --model names {len(planned)}; give one"
        )
    rows = planned[0].rows
    counts = dict.fromkeys(str(row.num_steps) for row in rows)
    if len(counts) > 1:
        raise DimoError(
            f"--count writes the images of one step count, and these are {', '.join(counts)}; "
            "name one, e.g. --steps 8"
        )
    if len(rows) > 1:
        raise DimoError(
            f"--count writes one set of images, and these options make {len(rows)}; "
            "name one sampler and one schedule"
        )


def _report(done: "Exported", count: int, out: Path, *, as_json: bool) -> None:
    """Prints a summary on stderr, and with `as_json` also on stdout."""
    speed = done.made / done.seconds if done.made else None
    if as_json:
        summary = {
            "count": count,
            "out": str(out),
            "made": done.made,
            "seconds": round(done.seconds, 3),
            "images_per_second": speed and round(speed, 3),
            "peak_memory_bytes": done.peak_memory_bytes,
        }
        print(json.dumps(summary, indent=2))
    if speed is None:
        terminal.say(f"{count:,} images in {out}: nothing to do, all exist")
    else:
        new = "" if done.made == count else f" ({done.made:,} made now)"
        terminal.say(
            f"{count:,} images in {out}{new}: {done.seconds:,.1f} s, {speed:,.1f} images/s, peak "
            f"memory {done.peak_memory_bytes / 2**20:,.0f} MiB"
        )


@app.command(
    epilog=examples(
        "dimo encode imagenet/train --teacher maskgit --centre-crop -o im.safetensors",
        "dimo encode shards/*.tar --teacher maskgit -o im.safetensors",
    )
)
def encode(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH",
            help="Folder (with subfolders), .zip, .tar (WebDataset) or .npz of images; several "
            "are shards of one set.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The .safetensors file to write.")
    ],
    teacher: opt.Teacher = "digits",
    labels: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="Where labels come from: folder (one per class, sorted by name), filename "
            "(000123_207.png), cyclic:1000, or a .csv or .json file; default: labels of the set, "
            "else its folders.",
        ),
    ] = "",
    centre_crop: Annotated[
        bool,
        typer.Option(
            "--centre-crop",
            help="Fit images of any size by ADM's rule: halve by box averages, resize the shorter "
            "side bicubically, crop the center.",
        ),
    ] = False,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Also encode the mirror image of each image.")
    ] = False,
    weights: opt.Weights = None,
    force: Annotated[
        bool,
        typer.Option("--force", rich_help_panel=opt.OUTPUT, help="Start over and replace --out."),
    ] = False,
    as_json: opt.AsJson = False,
    batch_size: opt.BatchSize = 64,
    device: opt.Device = "auto",
) -> None:
    """Encode images with a teacher's tokenizer; rerun the same command after an interruption."""
    if out.suffix != ".safetensors":
        raise DimoError(f"--out {out} is not a .safetensors file; e.g. -o tokens.safetensors")
    import torch

    from bench.images import class_folders, open_images
    from dimo.data.encode import encode_images
    from dimo.engine.distributed import choose_device
    from dimo.zoo.loading import weights_file
    from dimo.zoo.teachers import get_teacher

    row, place = get_teacher(teacher), choose_device(device)
    images = open_images(paths, recursive=True, labels=labels)
    by_folder = labels == "folder" or images.labels is None
    classes = class_folders(images.names) if images.labels is None else images.labels
    if by_folder and (count := int(classes.max()) + 1) != row.num_classes:
        raise DimoError(
            f"{paths[0]} has {count:,} folders; allowed as classes of teacher {teacher!r}: "
            f"{row.num_classes:,}; or give labels with --labels FILE"
        )
    side = row.image_size if centre_crop else None
    tokenizer = row.tokenizer(weights_file(row, "tokenizer", weights)).to(place)
    start = time.monotonic()
    with terminal.work_bar() as progress:
        run = encode_images(
            lambda first: images.batches(range(first, len(images)), batch_size, side=side),
            torch.from_numpy(classes),
            out,
            names=images.names,
            target=row,
            tokenizer=tokenizer,
            crop="adm" if centre_crop else "none",
            mirrored=mirror,
            force=force,
            progress=lambda done: progress("encode", done, len(images), "images"),
        )
    _report_encoded(run, out, time.monotonic() - start, as_json=as_json)


def _report_encoded(run: "EncodingRun", out: Path, seconds: float, *, as_json: bool) -> None:
    """Prints a summary on stderr, and with `as_json` also on stdout."""
    from dimo.util.files import sha256_file
    from dimo.util.schema import encode as plain

    if as_json:
        summary = {"out": str(out), "sha256": sha256_file(out), "made": run.made}
        print(json.dumps({**summary, "seconds": round(seconds, 3), **plain(run.info)}, indent=2))
    if not run.made:
        terminal.say(f"{out}: {run.info.images:,} images, already encoded")
        return
    now = "" if run.made == run.info.images else f" ({run.made:,} encoded now)"
    terminal.say(
        f"{out}: {run.info.images:,} images{now}, {seconds:,.1f} s, "
        f"{run.made / seconds:,.1f} images/s"
    )
