"""`dimo demo`: the main job in minutes, offline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import dimo.cli.options as opt
from dimo.cli.app import app, examples
from dimo.cli.distill import run_distill
from dimo.cli.report import measured_table
from dimo.util import terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from bench.protocol import Protocol
    from bench.records.record import ResultRecord

_TEACHER, _SHIPPED, _YOURS = "digits", "digits-dimo", "Di[M]O (demo)"


@app.command(epilog=examples("dimo demo --out runs/demo"))
def demo(
    out: Annotated[Path, typer.Option(help="Folder for run, records, report and picture.")] = Path(
        "runs/demo"
    ),
    recipe: Annotated[str, typer.Option(help="Distillation recipe.")] = "digits",
    device: opt.Device = "auto",
) -> None:
    """The main job in minutes, offline: look, distil, benchmark, report - on real handwriting.

    First scores the student that comes with the package beside its teacher, then distils a new
    one. Interrupted, the same command resumes.
    """
    student, results, page = out / "student", out / "results", out / "report.html"
    from bench.protocol import load_protocol
    from bench.report import read_report, report_html
    from dimo.engine.distributed import choose_device
    from dimo.engine.runs import find_recipe
    from dimo.util.files import write_atomic
    from dimo.zoo.students import check_unused

    if not (out / "shipped.png").is_file():  # the first that a demo writes
        check_unused(out, ("student", "results", "samples.png", "report.html"))
    place, protocol = choose_device(device), load_protocol(_TEACHER)
    terminal.say(
        f"1/3 what comes with the package: teacher {_TEACHER}, one-step student {_SHIPPED}"
    )
    picture, steps = out / "shipped.png", [1, 4, 16]
    _draw([_SHIPPED], steps, picture, place)
    print(f"picture: {picture}", flush=True)
    print(
        measured_table(_scored([_SHIPPED], steps, protocol, results, place), protocol), flush=True
    )

    terminal.say("2/3 distil the same teacher into a one-step student of your own")
    if not (student / "config.json").is_file():
        run_distill(*find_recipe(_TEACHER, recipe=recipe), student, device=device)

    terminal.say("3/3 benchmark it beside the teacher")
    picture, steps = out / "samples.png", [1, 2, 4, 8, 16]
    models = [_SHIPPED, f"{_YOURS}={student}"]
    records = _scored(models, steps, protocol, results, place)
    _draw(models, steps, picture, place)
    with terminal.work_bar() as progress:
        text = report_html(read_report(results, _TEACHER), runs=out, progress=progress)
    write_atomic(page, text)
    print(measured_table(records, protocol))
    print(_ratios(records))
    print(f"picture: {picture}\npage: {page}\nrecords: {results}")
    terminal.say(f"to distil again, remove {out} or choose another --out")


def _draw(models: "Sequence[str]", steps: "list[int]", out: Path, device: "torch.device") -> None:
    """Draws the same labels by the teacher at these steps and by each student in one."""
    from bench.rows.grid import draw_samples
    from bench.rows.rows import load_planned, plan_jobs

    jobs = load_planned(plan_jobs(_TEACHER, models, steps), device=device)
    draw_samples(jobs, [], seed=0, out=out, device=device)


def _scored(
    models: "Sequence[str]",
    steps: "list[int]",
    protocol: "Protocol",
    results: Path,
    device: "torch.device",
) -> "list[ResultRecord]":
    """Records of real data, teacher and students, after scoring those that `results` lacks."""
    from bench.features.extraction import cache_folder
    from bench.rows.rows import plan_jobs
    from bench.runner import plan_work
    from bench.suites.base import Assets
    from dimo.engine.distributed import Runtime

    with terminal.work_bar() as progress:
        return plan_work(
            plan_jobs(_TEACHER, models, steps),
            protocol,
            Runtime(device, progress=progress),
            Assets(cache=cache_folder()),
            results=results,
            command=opt.command_line(),
        ).run()


def _ratios(records: "list[ResultRecord]") -> str:
    teacher = {r.method.num_steps: r for r in records if r.method.section == "Teacher"}
    (student,) = (r for r in records if r.method.name == _YOURS)
    fast, slow = (r.speed.images_per_second for r in (student, teacher[16]))
    assert fast is not None
    assert slow is not None
    fid, teacher_fid = student.metrics["fid"].value, teacher[1].metrics["fid"].value
    return (
        f"one-step student : 16-step teacher = {fast / slow:.1f} : 1 in images/s "
        f"({fast:,.0f} against {slow:,.0f})\n"
        f"one-step student : one-step teacher = {fid / teacher_fid:.3f} : 1 in FID "
        f"({fid:.3f} against {teacher_fid:.3f})"
    )
