"""`dimo sample --count`: the images of `generate` as files, whatever happens on the way."""

import csv
import json
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from bench.protocol import load_protocol
from bench.rows.export import export_images
from bench.rows.rows import jobs_of
from bench.rows.settings import Choice, generate
from bench.suites.base import load_suite
from dimo.engine.distributed import Runtime
from dimo.errors import DimoError
from dimo.samplers import teacher_samplers
from dimo.zoo.loading import load

CPU = torch.device("cpu")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


def jobs_of_every_sampler():
    teacher, student = (load(name, device=CPU) for name in ("digits", "digits-dimo"))
    return {"one_step": jobs_of(student, [1])[0]} | {
        name: jobs_of(teacher, [2], Choice((name,)))[0] for name in teacher_samplers()
    }


@pytest.fixture(scope="module")
def jobs():
    return jobs_of_every_sampler()


def export(job, out, count=1100, batch_size=64, **settings):
    given = {"seed": 5, "device": CPU} | settings
    return export_images(job, out, count=count, batch_size=batch_size, **given)


def contents(folder):
    """Relative name -> bytes of every file below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def arrays(folder):
    """As `contents`, with the arrays of an npz for its bytes, which hold dates."""
    files = contents(folder)
    for name in files:
        if name.endswith(".npz"):
            files[name] = [array.tobytes() for array in read_npz(folder / name)]
    return files


def read_folder(folder):
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pixels = [np.asarray(Image.open(folder / row["file"])) for row in rows]
    return np.stack(pixels), np.array([int(row["label"]) for row in rows])


@pytest.mark.parametrize("sampler", [*teacher_samplers(), "one_step"])
def test_files_hold_what_generate_makes_at_any_batch_size(jobs, tmp_path, sampler):
    job, count = jobs[sampler], 107
    stream = generate(
        job.loaded,
        job.settings,
        seed=5,
        num_images=count,
        batch_size=107,
        uint8="round",
        device=CPU,
    )
    (wanted,) = list(stream)
    pixels = wanted.images.permute(0, 2, 3, 1).numpy()
    for size in (7, 64):
        export(job, tmp_path / f"{size}.npz", count, size)
        export(job, tmp_path / f"{size}", count, size)
        for found in (read_folder(tmp_path / f"{size}"), read_npz(tmp_path / f"{size}.npz")):
            assert (found[0] == pixels).all()
            assert (found[1] == np.arange(count) % 10).all()
    assert contents(tmp_path / "7") == contents(tmp_path / "64")
    assert len(np.unique(pixels.reshape(count, -1), axis=0)) > 90


def read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_1"].dtype == np.int64
        return file["arr_0"], file["arr_1"]


def test_an_npz_and_its_description(jobs, tmp_path):
    export(jobs["one_step"], tmp_path / "x.npz", 40)
    images, _ = read_npz(tmp_path / "x.npz")
    assert images.shape == (40, 8, 8, 3)
    about = json.loads((tmp_path / "x.npz.json").read_text())
    assert about["model"] == "Di[M]O (digits-dimo)"
    assert (about["seed"], about["count"], about["uint8"]) == (5, 40, "round")
    assert about["sampler"]["temperature"] == jobs["one_step"].settings.temperature
    assert len(about["weights_sha256"]) == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz", "x.npz.json"]


@pytest.mark.parametrize("name", ["x.npz", "x"])
@pytest.mark.parametrize("stop_at", [1, 8])
def test_an_interrupted_export_ends_as_an_uninterrupted_one(jobs, tmp_path, name, stop_at):
    job, calls = jobs["one_step"], []

    def interrupt(*said):
        calls.append(said)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    export(job, tmp_path / "whole" / name)
    with pytest.raises(KeyboardInterrupt):
        export(job, tmp_path / "parts" / name, progress=interrupt)
    resumed = export(job, tmp_path / "parts" / name, batch_size=50)
    assert stop_at == 1 or name == "x" or resumed.made == 1100 - stop_at // 8 * 500
    assert arrays(tmp_path / "parts") == arrays(tmp_path / "whole")
    assert export(job, tmp_path / "parts" / name).made == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), [("x", signal.SIGKILL), ("Di[M]O.npz", signal.SIGTERM)])
def test_a_stopped_process_leaves_nothing_but_work_that_is_done(
    dimo, run_stopped, tmp_path, name, how
):
    arguments = ["sample", "--steps", "2", "--seed", "5", "--count", "1500", "--out", name]
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    dimo(*arguments[:-1], f"whole/{name}")
    code, told = run_stopped(*arguments, cwd=tmp_path / "parts", file="*/*0500.*", how=how)
    assert code == (128 + how if how == signal.SIGTERM else -how)
    assert ("rerun the same command to continue" in told) == (how == signal.SIGTERM)
    assert not (tmp_path / "parts" / "Di[M]O.npz").exists()
    (work,) = (tmp_path / "parts").iterdir()
    (work / ".00000500.npy.abc.tmp").write_bytes(b"left")  # as a later kill would leave it
    if name == "Di[M]O.npz":
        (tmp_path / "parts" / f".{name}.abc.tmp").write_bytes(b"left")
    _, err = dimo(*arguments[:-1], f"parts/{name}")
    assert "made now" in err
    assert arrays(tmp_path / "parts") == arrays(tmp_path / "whole")


def test_only_missing_and_damaged_pngs_are_made(jobs, tmp_path):
    job, folder = jobs["one_step"], tmp_path / "x"
    export(job, folder, 300, 50)
    before = contents(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    gone, cut, empty = (folder / f"{i:06d}.png" for i in (0, 120, 121))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    empty.write_bytes(b"")
    assert export(job, folder, 300, 50).made == 100, "two batches of 50"
    assert contents(folder) == before
    changed = {p.name for p in folder.iterdir() if p.stat().st_mtime_ns != times[p.name]}
    assert changed == {gone.name, cut.name, empty.name}


def test_a_damaged_block_is_named(jobs, tmp_path):
    def interrupt(what, done, total, unit):
        if done > 600:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(jobs["one_step"], tmp_path / "x.npz", progress=interrupt)
    block = tmp_path / "x.npz.parts" / "00000000.npy"
    block.write_bytes(block.read_bytes()[:-1])
    with pytest.raises(DimoError, match=r"00000000\.npy.*remove it and run the same command"):
        export(jobs["one_step"], tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()
    block.unlink()
    export(jobs["one_step"], tmp_path / "x.npz")
    export(jobs["one_step"], tmp_path / "y.npz")
    found, whole = (read_npz(tmp_path / name)[0] for name in ("x.npz", "y.npz"))
    assert (found == whole).all()


@pytest.mark.parametrize("name", ["x.npz", "x"])
def test_other_settings_are_refused_and_force_starts_again(jobs, tmp_path, name):
    job, out = jobs["one_step"], tmp_path / name
    export(job, out, 30)
    before = contents(tmp_path)
    for other, settings, words in (
        (job, {"seed": 6}, "seed"),
        (job, {"count": 31}, "count"),
        (jobs["random"], {}, "model, weights_sha256, sampler, token_initialization"),
    ):
        with pytest.raises(DimoError, match=rf"\({words}\); choose another --out, or .*--force"):
            export(other, out, **({"count": 30} | settings))
    assert contents(tmp_path) == before
    if name == "x":
        (out / "notes.txt").write_text("mine")
    export(job, out, 20, force=True)
    after = arrays(tmp_path)
    if name == "x":
        assert after.pop("x/notes.txt") == b"mine"
        assert len(after) == 22
    export(job, tmp_path / "new" / name, 20)
    assert after == arrays(tmp_path / "new")


def test_what_is_no_image_forbids_no_export(jobs, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "slurm-1.out").write_text("log")
    export(jobs["one_step"], tmp_path / "x", 20)
    assert (tmp_path / "x" / "slurm-1.out").read_text() == "log"


def test_force_replaces_a_file_of_that_name(jobs, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"old")
    with pytest.raises(DimoError, match=r"x\.npz exists; replace it with --force"):
        export(jobs["one_step"], tmp_path / "x.npz", 30)
    export(jobs["one_step"], tmp_path / "x.npz", 30, force=True)
    assert len(read_npz(tmp_path / "x.npz")[1]) == 30


@pytest.mark.parametrize("name", ["x.npz", "x"])
def test_a_full_disk_is_one_error_and_leaves_nothing_half_written(jobs, tmp_path, name):
    """A limit on the size of files stands for the disk: the npz is over it, its blocks are not."""
    job, limit = jobs["one_step"], 150_000 if name == "x.npz" else 100
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if name == "x":  # the table of labels is there, the images do not fit
        export(job, tmp_path / name)
        for path in (tmp_path / name).glob("*.png"):
            path.unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(DimoError, match=r"cannot write .*File too large; free space"):
            export(job, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    wanted = ["00000000.npy", "00000500.npy", "00001000.npy", "sampling.json", "x.npz.json"]
    assert left == (wanted if name == "x.npz" else ["labels.csv", "sampling.json"])
    export(job, tmp_path / name)
    export(job, tmp_path / "new" / name)
    found = arrays(tmp_path / "new")
    assert {key: value for key, value in arrays(tmp_path).items() if key in found} == found


# --- as `dimo eval` reads them -----------------------------------------------------------------


def test_eval_finds_what_bench_finds(dimo, jobs, few_digits, tmp_path):
    protocol = load_protocol(few_digits)
    record = load_suite(protocol, Runtime(CPU)).measure(jobs["one_step"]).record
    arguments = ["sample", "--model", "digits-dimo", "--count", 300, "--seed", 1000, "--json"]
    for name in ("x.npz", "x"):
        out, err = dimo(*arguments, "--out", name)
        told = json.loads(out)
        assert (told["count"], told["made"], told["out"]) == (300, 300, name)
        assert told["images_per_second"] > 0
        assert told["peak_memory_bytes"] > 2**20
        assert f"300 images in {name}:" in err
        assert "images/s, peak memory" in err
        found = json.loads(dimo("eval", name, "--protocol", few_digits, "--json")[0])
        assert found["evidence"]["nonconforming"] == []
        values = {key: metric["value"] for key, metric in found["metrics"].items()}
        assert values == {key: metric.value for key, metric in record.metrics.items()}
        if name == "x.npz":
            assert found["evidence"]["images_sha256"] == record.evidence.images_sha256
            assert found["evidence"]["labels_sha256"] == record.evidence.labels_sha256


# --- ranks -------------------------------------------------------------------------------------

RANKS = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_export import export, jobs_of_every_sampler
from dimo.engine.distributed import ranks
with ranks() as group:
    jobs = jobs_of_every_sampler()
    for sampler in {samplers!r}:
        for name in (f"{{sampler}}.npz", sampler):
            export(jobs[sampler], Path(name), 620, 50, ranks=group)
"""


@pytest.mark.parametrize(
    "samplers",
    [["one_step"], pytest.param([*teacher_samplers()], marks=pytest.mark.slow)],
    ids=["one step", "teacher"],
)
def test_two_ranks_write_the_same_images(jobs, run_ranks, samplers, tmp_path, request):
    (tmp_path / "two").mkdir()
    program = RANKS.format(here=str(request.path.parent), samplers=samplers)
    run_ranks(program, cwd=tmp_path / "two")
    for sampler in samplers:
        for name in (f"{sampler}.npz", sampler):
            export(jobs[sampler], tmp_path / "one" / name, 620, 64)
    assert arrays(tmp_path / "one") == arrays(tmp_path / "two")


def test_ranks_of_the_command_share_what_is_missing(dimo, run_two_ranks, tmp_path):
    arguments = ["sample", "--model", "digits-dimo", "--count", "300", "--seed", "5", "--out", "x"]
    dimo(*arguments[:-1], "one")
    dimo(*arguments)
    for i in (3, 160, 290):
        (tmp_path / "x" / f"{i:06d}.png").unlink()
    (tmp_path / "x" / "000290.png").mkdir()  # in the way of the second rank
    failed = run_two_ranks(*arguments, "--json", cwd=tmp_path, code=2)
    assert failed.stdout == ""
    assert failed.stderr.count("error: cannot write x/000290.png") == 1
    (tmp_path / "x" / "000290.png").rmdir()
    done = run_two_ranks(*arguments, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["made"] in (50, 100, 150), "whole batches"
    assert done.stderr.count("300 images in x") == 1
    assert contents(tmp_path / "x") == contents(tmp_path / "one")


@pytest.mark.slow
def test_torchrun_starts_the_command(dimo, tmp_path):
    """What the other tests of ranks do without it."""
    arguments = ["sample", "--model", "digits-dimo", "--count", "300", "--out", "two"]
    done = subprocess.run(
        [*TORCHRUN, "-m", "dimo", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("300 images in two") == 1
    dimo(*arguments[:-1], "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# --- mistakes ----------------------------------------------------------------------------------

MISTAKES = {
    "labels with count": (["--labels", "3", "--count", "5", "--out", "n"], "--labels chooses"),
    "several models": (
        ["--model", "digits", "--model", "digits-dimo", "--count", "5", "--out", "n"],
        "images of one model, and --model names 2",
    ),
    "several steps": (
        ["--steps", "1,4", "--count", "5", "--out", "n"],
        "step count, and these are 1, 4; name one",
    ),
    "no steps": (
        ["--count", "5", "--out", "n"],
        "these are 1, 2, 4, 8, 16; name one, e.g. --steps 8",
    ),
    "sampler of a student": (
        ["--model", "digits-dimo", "--sampler", "halton", "--out", "n.png"],
        "--sampler halton is for teachers",
    ),
    "count 0": (["--steps", "1", "--count", "0", "--out", "n"], "--count 0 is not allowed"),
    "picture exists": (["--out", "here.png"], "here.png exists; replace it with --force"),
    "npz exists": (
        ["--steps", "1", "--count", "5", "--out", "here.npz"],
        "here.npz exists; replace it with --force",
    ),
    "folder of others": (
        ["--steps", "1", "--count", "5", "--out", "folder", "--force"],
        "folder holds 000000.png and no sampling.json",
    ),
    "file as folder": (["--steps", "1", "--count", "5", "--out", "file"], "file is a file"),
    "unknown model": (
        ["--model", "digts", "--out", "n.png"],
        "digts is no teacher (digits",
    ),
    "steps 17": (["--steps", "17", "--count", "5", "--out", "n"], "takes 1 to 16 steps"),
    "picture as jpg": (["--out", "n.jpg"], "--out n.jpg is not a .png"),
    "count as png": (["--steps", "1", "--count", "5"], "--out samples.png cannot hold"),
    "json of a picture": (["--json", "--out", "n.png"], "--json summarizes written images"),
    "description of others": (
        ["--steps", "1", "--count", "5", "--out", "labelled.npz", "--force"],
        "cannot read labelled.npz.json: it does not describe an export",
    ),
    "damaged description": (
        ["--steps", "1", "--count", "5", "--out", "torn"],
        "cannot read torn/sampling.json",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(dimo, tmp_path, mistake):
    arguments, words = MISTAKES[mistake]
    for folder in ("folder", "torn"):
        (tmp_path / folder).mkdir()
    for name in ("here.png", "here.npz", "file", "folder/000000.png", "torn/sampling.json") + (
        "labelled.npz",
        "labelled.npz.json",
    ):
        (tmp_path / name).write_bytes(b"[]")
    before = contents(tmp_path)
    out, err = dimo("sample", *arguments, code=2)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert words in err
    assert contents(tmp_path) == before
    assert not (tmp_path / "n").exists()
