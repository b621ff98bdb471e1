"""`dimo demo`: the main job in minutes, offline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import dimo.cli.options as opt
from dimo.cli.app import app, examples
from dimo.cli.report import measured_table, report_text
from dimo.cli.train import run_distill
from dimo.errors import DimoError
from dimo.util import terminal

if TYPE_CHECKING:
    from bench.records.record import ResultRecord


@app.command(epilog=examples("dimo demo --out runs/demo"))
def demo(
    out: Annotated[Path, typer.Option(help="Folder for run, records, report and picture.")] = Path(
        "runs/demo"
    ),
    recipe: Annotated[str, typer.Option(help="Distillation recipe.")] = "digits",
    device: opt.Device = "auto",
) -> None:
    """The main job in minutes, offline: distil, benchmark, report, draw - on real handwriting."""
    if out.exists() and any(out.iterdir()):
        raise DimoError(f"output {out} exists and is not empty; choose another --out, or remove it")
    from bench.protocol import load_protocol
    from bench.rows.grid import draw_samples
    from bench.rows.rows import plan_jobs
    from bench.runner import run_rows
    from bench.suites.base import Assets
    from dimo.engine.distributed import Runtime, choose_device
    from dimo.engine.runs import find_recipe
    from dimo.util.files import write_atomic

    place, protocol, results = choose_device(device), load_protocol("digits"), out / "results"
    terminal.say("1/3 distil the bundled teacher into a one-step student")
    student = out / "student"
    run_distill(*find_recipe("digits", recipe=recipe), student, device=device)
    terminal.say("2/3 benchmark: real data, teacher at 1, 2, 4, 8, 16 steps, student at 1 step")
    planned = plan_jobs("digits", [str(student)], opt.parse_steps(opt.STEPS))
    with terminal.work_bar() as progress:
        runtime = Runtime(place, progress=progress, warn=opt.warn)
        scored = run_rows(
            planned, protocol, runtime, Assets(), results=results, command=opt.command_line()
        )
    records = [row.record for row in scored]
    terminal.say("3/3 report and picture")
    picture, table = out / "samples.png", out / "report.md"
    jobs = [row.row for row in scored if row.row.settings is not None]
    draw_samples(jobs, [], seed=0, out=picture, device=place)
    write_atomic(table, report_text("digits", results))
    print(measured_table(records, protocol))
    print(_demo_summary(records))
    print(f"pictures: {picture}\nreport: {table}\nrecords: {results}")


def _demo_summary(records: "list[ResultRecord]") -> str:
    rows = {(r.method.section, r.method.num_steps): r for r in records}
    student = rows["Distill.", 1]
    fast, slow = (r.speed.images_per_second for r in (student, rows["Teacher", 16]))
    assert fast is not None
    assert slow is not None
    fid, teacher_fid = student.metrics["fid"].value, rows["Teacher", 1].metrics["fid"].value
    return (
        f"one-step student : 16-step teacher = {fast / slow:.1f} : 1 in images/s "
        f"({fast:,.0f} against {slow:,.0f})\n"
        f"one-step student : one-step teacher = {fid / teacher_fid:.3f} : 1 in FID "
        f"({fid:.3f} against {teacher_fid:.3f})"
    )
