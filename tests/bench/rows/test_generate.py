"""Rows are the same on any number of ranks, at any batch size, and after any interruption."""

import dataclasses
import json
import os
import random
import signal
import socket

import numpy as np
import pytest
import torch

from bench.features import FORWARD_BATCH
from bench.images.codec import encode_png
from bench.protocol import load_protocol
from bench.records.store import load_all
from bench.rows import generate
from bench.rows.generate import SampledImages, Shelf, _missing, _shards
from bench.rows.rows import jobs_of
from bench.suites.base import Assets, load_suite
from dimo.engine.distributed import Runtime
from dimo.errors import DimoError
from dimo.util.terminal import Stopped
from dimo.zoo.loading import load

CPU = torch.device("cpu")
BENCH = ["bench", "--teacher", "digits", "--student", "digits-dimo", "--steps", "1,2"]


def values_of(folder):
    """What must be equal of each record, by the row's name and steps."""
    records, problems = load_all(folder)
    assert problems == []
    found = {
        (record.method.name, record.method.num_steps): (
            record.metrics,
            record.evidence.images_sha256,
            record.evidence.contributions_sha256,
        )
        for record in records
    }
    assert len(found) == len(records), "a row has two records"
    return found


@pytest.mark.parametrize("count", [1, 31, 32, 33, 960, 5000, 50_000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 64, 500])
def test_shards_cover_what_is_missing_and_are_shared_evenly(count, ranks, size):
    done = [range(64, 128), range(320, 352)] if count > 900 else []
    shards = _shards(_missing(done, count), size, ranks)
    rows = sorted(row for shard in (*shards, *done) for row in shard)
    assert rows == list(range(count))
    assert all(shard.start % FORWARD_BATCH == 0 for shard in shards)
    assert max(map(len, shards)) <= max(size, FORWARD_BATCH)
    if not done and count >= ranks * FORWARD_BATCH:
        work = [sum(map(len, shards[rank::ranks])) for rank in range(ranks)]
        rounds = -(-len(shards) // ranks)
        assert max(work) - min(work) <= rounds * FORWARD_BATCH


@pytest.fixture(scope="module")
def job():
    return jobs_of(load("digits-dimo", device=CPU), [1])[0]


@pytest.fixture
def make_suite(few_digits, tmp_path):
    def make(**runtime):
        assets = Assets(cache=tmp_path / "cache")
        return load_suite(load_protocol(few_digits), Runtime(CPU, **runtime), assets, batch_size=64)

    return make


@pytest.fixture
def reads(monkeypatch):
    """The rows that were sampled."""
    rows, read = [], SampledImages.read
    monkeypatch.setattr(SampledImages, "read", lambda s, r: rows.append(r) or read(s, r))
    return rows


def test_an_interrupted_row_goes_on_where_it_was(job, make_suite, reads, tmp_path):
    whole = make_suite().measure(job).record
    done = len(reads)

    def interrupt(what, finished, total, unit):
        if unit == "images" and finished > 100:
            raise KeyboardInterrupt

    suite = make_suite()
    suite.forget()
    for path in (tmp_path / "cache").rglob("*.npz"):
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        make_suite(progress=interrupt).measure(job)
    reads.clear()
    resumed = suite.measure(job).record
    assert 0 < len(reads) < done
    assert resumed.metrics == whole.metrics
    assert resumed.evidence == whole.evidence
    assert resumed.speed.images_per_second > 0
    suite.forget()
    assert list((tmp_path / "cache" / "rows").iterdir()) == []


def test_nothing_is_taken_from_another_row(job, make_suite, reads):
    make_suite().measure(job)
    done = len(reads)
    for change in ({"seed": 7}, {"temperature": 0.9}):
        reads.clear()
        seed, settings = change.pop("seed", None), job.settings.changed(**change)
        make_suite().measure(dataclasses.replace(job, settings=settings), seed=seed)
        assert len(reads) == done
    reads.clear()
    make_suite().measure(job)
    assert reads == []


def test_damaged_shards_are_made_again(job, make_suite, reads, tmp_path):
    whole, said = make_suite().measure(job).record, []
    paths = sorted((tmp_path / "cache").rglob("*.npz"))
    paths[0].write_bytes(paths[0].read_bytes()[:-30])
    paths[1].rename(paths[1].with_name("00000010-00000400.npz"))
    reads.clear()
    assert make_suite(warn=said.append).measure(job).record.metrics == whole.metrics
    assert len(reads) == 2
    assert len(said) == 2
    assert all("is damaged and left out; its images are made again" in line for line in said)


def test_a_full_disk_costs_the_resumption_only(job, make_suite, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    said = []
    assert make_suite(warn=said.append).measure(job).record.num_images == 300
    assert len(said) == 1
    assert "an interruption will begin this row again: cannot write" in said[0]


def test_a_batch_takes_four_fifths_of_the_free_memory(job, monkeypatch):
    """On a GPU that is made up: 8 images take 80 bytes, and 4,000 and 100 unused ones are free."""
    images = SampledImages(
        job, seed=0, count=9999, batch_size=0, uint8="round", runtime=Runtime(CPU)
    )
    assert images.batch_size == 500
    for name, value in (
        ("reset_peak_memory_stats", None),
        ("memory_allocated", 100),
        ("max_memory_allocated", 180),
        ("memory_reserved", 200),
        ("mem_get_info", (4000, 9999)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    images.runtime = Runtime(torch.device("cuda"))
    monkeypatch.setattr(images, "_warm_up", lambda: images.samples)
    assert images._fitting_batch() == 0.8 * 4100 / 10


def test_batches_are_halved_where_memory_runs_out(job, make_suite, monkeypatch):
    whole, said, real = make_suite().measure(job).record, [], generate.sample_images

    def limited(*arguments, index, **named):
        if len(index) > 20:
            raise torch.OutOfMemoryError("no memory")
        return real(*arguments, index=index, **named)

    monkeypatch.setattr(generate, "sample_images", limited)
    other = dataclasses.replace(job, name="other")
    suite = make_suite(warn=said.append)
    suite.assets = Assets()
    record = suite.measure(other).record
    assert record.metrics == whole.metrics
    assert record.speed.batch_size == 16
    assert [line.rpartition(" ")[2] for line in said] == ["32", "16"]
    monkeypatch.setattr(generate, "sample_images", lambda *_, **__: limited(index=range(99)))
    with pytest.raises(DimoError, match="not enough memory on cpu for one image"):
        suite.measure(other)


def test_a_signal_ends_a_batch_before_its_next_forward(make_suite, monkeypatch):
    teacher = jobs_of(load("digits", device=CPU), [16])[0]
    suite, forwards = make_suite(), []
    images = suite.images_of(teacher, 0, 300)
    hook = teacher.loaded.model.register_forward_hook(lambda *_: forwards.append(1))
    monkeypatch.setattr(generate, "stop_if_asked", lambda note: _stop() if forwards else None)
    try:
        with pytest.raises(Stopped):
            images.read(range(300))
    finally:
        hook.remove()
    assert len(forwards) == 1


def _stop():
    raise Stopped(signal.SIGTERM)


def test_forgotten_shards_are_removed(tmp_path):
    old, new = tmp_path / "rows" / "old", tmp_path / "rows" / "new"
    for folder in (old, new):
        Shelf(folder, pytest.fail).save(range(1), {"x": np.zeros(1)})
    os.utime(old, (0, 0))
    assert list(Shelf(tmp_path / "rows" / "mine", pytest.fail).load(1)) == []
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["new"]


# --- the command -------------------------------------------------------------------------------


def test_two_ranks_record_what_one_does(dimo, run_two_ranks, few_digits, tmp_path):
    command = [*BENCH, "--protocol", few_digits, "--tune", "temperature=0.5,1", "--json"]
    dimo(*command, "--results", "one", "--cache", "none")
    done = run_two_ranks(*command, "--results", "two", cwd=tmp_path)
    assert values_of(tmp_path / "two") == values_of(tmp_path / "one")
    for record in json.loads(done.stdout):
        assert record["speed"].get("ranks", {"count": 2})["count"] == 2
    made = [r for r in load_all(tmp_path / "two")[0] if r.method.sampler]
    assert all(len(r.speed.ranks.peak_memory_bytes) == 2 for r in made)
    assert all(r.speed.ranks.images_per_second > 0 for r in made)
    again = run_two_ranks(*command, "--results", "two", cwd=tmp_path)
    assert again.stderr.count("5 of 5 rows are on record") == 1
    assert json.loads(again.stdout) == json.loads(done.stdout)


@pytest.mark.slow
def test_two_ranks_judge_what_one_does(dimo, run_two_ranks, tmp_path):
    """GenEval: a quick look at made images, and pictures in files."""
    command = ["bench", "--teacher", "scenes", "--steps", "1", "--num-images", "240"]
    dimo(*command, "--results", "one", "--cache", "none")
    run_two_ranks(*command, "--results", "two", cwd=tmp_path)
    assert values_of(tmp_path / "two") == values_of(tmp_path / "one")
    names = [path.name for path in sorted((tmp_path / "one" / "verdicts").iterdir())]
    assert len(names) == 1
    (one,), (two,) = ((tmp_path / name / "verdicts").iterdir() for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    lines = [json.loads(line) for line in one.read_text().splitlines()]
    images = SampledImages(
        jobs_of(load("scenes", device=CPU, prompts=[line["prompt"] for line in lines]), [1])[0],
        seed=1000,
        count=240,
        batch_size=64,
        uint8="round",
        runtime=Runtime(CPU),
    )
    pixels = images.read(range(240))[0].permute(0, 2, 3, 1).contiguous().numpy()
    for number, (line, image) in enumerate(zip(lines, pixels, strict=True)):
        folder = tmp_path / "set" / f"{number:05d}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(line["metadata"])
        (folder / "samples" / "0000.png").write_bytes(encode_png(image))
    judge = ["eval", "set", "--protocol", "scenes-geneval", "--nonconforming"]
    dimo(*judge, "--results", "one")
    run_two_ranks(*judge, "--results", "two", cwd=tmp_path)
    found = [values_of(tmp_path / name) for name in ("one", "two")]
    assert found[0] == found[1]
    sets = found[0]["set", None][0]
    assert sets["geneval"].value == next(iter(found[0].values()))[0]["geneval"].value


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bench_killed_at_random_moments_ends_as_a_whole_one(
    dimo, forks, few_digits, tmp_path, ranks
):
    """SIGKILL and SIGTERM by turns, at least ten, until a run comes to its end."""
    command = [*BENCH, "--steps", "1,2,4,8", "--protocol", str(few_digits), "--batch-size", "32"]
    dimo(*command, "--results", "whole", "--cache", "none")
    script, chance = tmp_path / "script.py", random.Random(ranks)
    codes, starts = [], 0
    while codes != [0] * ranks:
        starts += 1
        assert starts < 100, "it never ends"
        how = int((signal.SIGKILL, signal.SIGTERM)[starts % 2])
        after = chance.uniform(1, 6) if starts <= 10 else 600
        arguments = [*command, "--cache", "kept"]
        script.write_text(STOPPED.format(after=after, how=how, arguments=arguments))
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        environs = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
        codes, _, told = forks([script], tmp_path, environs)
        assert set(codes) <= {0, -how, 128 + how, 2}, told
        assert "Traceback" not in told
        assert codes != [2] * ranks
    assert values_of(tmp_path / "results") == values_of(tmp_path / "whole")
    assert list((tmp_path / "kept" / "rows").iterdir()) == []


STOPPED = """
import os, sys, threading
from dimo.cli import main

threading.Timer({after}, os.kill, (os.getpid(), {how})).start()
sys.argv = ["dimo", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    os._exit(stop.code or 0)
"""


def test_rows_on_record_are_measured_again_when_asked(dimo, few_digits, tmp_path):
    command = [*BENCH, "--protocol", few_digits, "--no-reference-rows"]
    dimo(*command)
    plan = [*command, "--dry-run", "--steps", "1,4", "--tune", "theta=0.3", "--json"]
    assert "--tune theta has no effect" in dimo(*plan, code=2)[1]
    rows = json.loads(dimo(*plan[:-3], "--json")[0])
    assert [(row["num_steps"], row["nfe"], row["on_record"]) for row in rows] == [
        (1, 1, True),
        (4, 4, False),
        (1, 1, True),
    ]
    assert [row["images"] for row in rows] == [300] * 3
    assert [row["seconds"] > 0 for row in rows] == [False, True, False]
    first = values_of(tmp_path / "results")
    _, err = dimo(*command, "--json")
    assert "3 of 3 rows are on record in results and are not measured again; see --again" in err
    _, err = dimo(*command, "--steps", "4", "--tune", "temperature=0.5,1")
    assert "on record" not in err, "none of these rows was tuned"
    assert len(load_all(tmp_path / "results")[0]) == 5
    dimo(*command, "--again")
    records = load_all(tmp_path / "results")[0]
    assert len(records) == 8
    for record in records[-3:]:
        assert record.metrics == first[record.method.name, record.method.num_steps][0]


def test_a_row_that_cannot_be_recorded_is_not_lost(dimo, few_digits, reads, tmp_path):
    command = ["bench", "--student", "digits-dimo", "--steps", "", "--protocol", few_digits]
    command += ["--no-reference-rows", "--cache", "kept"]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "contributions").write_text("in the way of a folder")
    _, err = dimo(*command, code=2)
    assert err.count("error: cannot write results/contributions") == 1
    assert load_all(tmp_path / "results") == ([], [])
    (tmp_path / "results" / "contributions").unlink()
    made = len(reads)
    dimo(*command)
    assert len(reads) == made > 0
    assert len(load_all(tmp_path / "results")[0]) == 1


@pytest.mark.parametrize(
    "how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_stopped_bench_goes_on(dimo, run_stopped, few_digits, tmp_path, how):
    command = [*BENCH, "--protocol", few_digits, "--batch-size", "32"]
    dimo(*command, "--results", "whole", "--cache", "none")
    code, told = run_stopped(
        *command, "--cache", "kept", cwd=tmp_path, file="kept/rows/*/00000064-*.npz", how=how
    )
    assert code == (128 + how if how == signal.SIGTERM else -how)
    assert ("run the same command again to continue" in told) == (how == signal.SIGTERM)
    finished = values_of(tmp_path / "results")
    dimo(*command, "--cache", "kept")
    found = values_of(tmp_path / "results")
    assert found == values_of(tmp_path / "whole")
    assert finished.items() <= found.items()
    assert list((tmp_path / "kept" / "rows").iterdir()) == []
