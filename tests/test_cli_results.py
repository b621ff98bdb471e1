"""`dimo verify` and `dimo results`: a row run again from its record alone, and records read."""

import dataclasses
import json
import shutil
import sys

import pytest

from bench.protocol import protocol_text
from bench.records.record import load_record, protocol_of, record_to_json, seal
from bench.records.store import load_all
from bench.report.runs import number
from dimo.cli import main
from dimo.errors import DimoError
from dimo.weights.catalog import ASSETS


def run(monkeypatch, folder, *arguments):
    """Exit code of `dimo ARGUMENTS` in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["dimo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A protocol of few images, a student of one's own, a set of images, and a record of each."""
    folder = tmp_path_factory.mktemp("world")
    text = protocol_text("digits").replace('name = "digits"', 'name = "few"')
    for old, new in [
        ("num_images = 5000", "num_images = 300"),
        ("n_select = 2000", "n_select = 100"),
    ]:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "few.toml").write_text(text)
    shutil.copytree(ASSETS / "digits-dimo", folder / "runs" / "mine")
    with pytest.MonkeyPatch.context() as patch:
        common = ("--protocol", "few.toml")
        short = ("--set", "steps=3", "--set", "batch_size=4", "--set", "lr_warmup_steps=1")
        for arguments in (
            ("distill", "--recipe", "digits-sdtt", *short, "--out", "runs/few-steps"),
            ("bench", "--steps", "", "--student", "runs/few-steps@2", *common)
            + ("--no-reference-rows",),
            ("bench", "--steps", "2", "--samplers", "confidence,theta_trapezoidal", *common),
            ("bench", "--steps", "", "--student", "runs/mine", "--student-steps", "1,2", *common)
            + ("--tune", "temperature=0.5,2", "--no-reference-rows"),
            ("sample", "--model", "digits-dimo", "--count", "300", "--out", "samples.npz"),
            ("sample", "--model", "digits-dimo", "--count", "300", "--seed", "7")
            + ("--out", "others.npz"),
            ("eval", "samples.npz", *common),
        ):
            assert run(patch, folder, *arguments) == 0
    return folder


@pytest.fixture
def dimo(world, monkeypatch, capsys):
    """`dimo(..., code=0)` -> (stdout, stderr), in the world's folder."""

    def call(*arguments, code=0):
        capsys.readouterr()
        found = run(monkeypatch, world, *arguments)
        out, err = capsys.readouterr()
        assert found == code, err
        return out, err

    return call


@pytest.fixture(scope="module")
def rows(world):
    """Record by (name, steps)."""
    records, problems = load_all(world / "results")
    assert not problems
    return {(r.method.name, r.method.num_steps): r for r in records}


ROWS = {
    "real": ("Real data", None),
    "tokenizer": ("Tokenizer reconstruction", None),
    "teacher": ("MaskGIT", 2),
    "sampler": ("θ-trapezoidal", 2),
    "student": ("Di[M]O (mine)", 1),
    "two steps": ("Di[M]O (mine)", 2),
    "as its teacher": ("SDTT (few-steps)", 2),
    "images": ("samples.npz", None),
}


def test_every_kind_of_row_is_there(rows):
    assert set(rows) == set(ROWS.values())


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_is_run_again_to_the_bit(dimo, rows, world, kind):
    record = rows[ROWS[kind]]
    images = ("--images", "samples.npz") if kind == "images" else ()
    before = sorted((world / "results").rglob("*"))
    out, _ = dimo("verify", record.run_id[:12], "--protocol", "few.toml", "--json", *images)
    found = json.loads(out)
    assert found["within"] is found["equal"] is found["same_images"] is True
    assert found["metrics"].keys() == record.metrics.keys()
    assert found["metrics"]["fid"]["found"] == record.metrics["fid"].value
    assert sorted((world / "results").rglob("*")) == before


def resealed(world, record, name, **changes):
    """A record's file with changes that its hash does not betray."""
    path = world / f"{name}.json"
    path.write_text(record_to_json(seal(dataclasses.replace(record, **changes))))
    return path


def test_a_value_outside_its_interval_is_named(dimo, rows, world):
    record = rows[ROWS["student"]]
    fid = record.metrics["fid"]
    moved = dataclasses.replace(fid, value=fid.value + 9, low=fid.low + 9, high=fid.high + 9)
    packages = {**record.packages, "numpy": "1.0", "gone": "3"}
    path = resealed(
        world,
        record,
        "moved",
        metrics={**record.metrics, "fid": moved},
        packages=packages,
        speed=dataclasses.replace(record.speed, device="Abacus"),
        revision=dataclasses.replace(record.revision, commit="f" * 40),
    )
    out, _ = dimo("verify", path, "--protocol", "few.toml", code=1)
    assert "NOT verified, outside the interval: fid" in out
    assert "| **no** | -9.0e+00 |" in out
    assert "Images: the same, to the bit." in out
    for key, then in [
        ("packages.numpy", "1.0"),
        ("packages.gone", "3"),
        ("speed.device", "Abacus"),
    ]:
        assert any(key in line and f" {then} " in line for line in out.splitlines())
    assert "f" * 40 in out


def test_a_value_of_another_machine_is_within_but_not_equal(dimo, rows, world):
    record = rows[ROWS["tokenizer"]]
    fid = record.metrics["fid"]
    near = dataclasses.replace(fid, value=(fid.value + fid.high) / 2)
    bare = dataclasses.replace(record.metrics["precision"], low=None, high=None)
    metrics = {**record.metrics, "fid": near, "precision": bare}
    path = resealed(world, record, "near", metrics=metrics)
    out, _ = dimo("verify", path, "--protocol", "few.toml")
    assert "Verified, every value within its interval" in out
    far = dataclasses.replace(bare, value=bare.value + 0.001)
    path = resealed(world, record, "bare", metrics={**record.metrics, "precision": far})
    out, _ = dimo("verify", path, "--protocol", "few.toml", code=1)
    assert "outside the interval: precision" in out  # where there is none, the value itself


def test_a_student_that_moved(dimo, rows, world):
    record = rows[ROWS["student"]]
    method = dataclasses.replace(record.method, student="runs/gone")
    path = resealed(world, record, "moved-student", method=method)
    common = ("verify", path, "--protocol", "few.toml")
    _, err = dimo(*common, code=2)
    assert "'runs/gone' does not exist" in err
    assert "equal to the bit" in dimo(*common, "--student", "runs/mine")[0]
    old = dataclasses.replace(method, student=None)  # as in records from before it was kept
    path = resealed(world, record, "old-student", method=old)
    assert "equal to the bit" in dimo("verify", path, "--protocol", "few.toml")[0]
    foreign = dataclasses.replace(old, weights_sha256="0" * 64)
    path = resealed(world, record, "foreign-student", method=foreign)
    _, err = dimo("verify", path, "--protocol", "few.toml", code=2)
    assert "give its run folder with --student" in err


def test_what_is_not_as_recorded_is_refused(dimo, rows, world):
    def refused(path, *arguments, protocol=("--protocol", "few.toml")):
        out, err = dimo("verify", path, *protocol, *arguments, code=2)
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    teacher, images = rows[ROWS["teacher"]], rows[ROWS["images"]]
    run_id, set_id = teacher.run_id[:12], images.run_id[:12]
    assert "no protocol 'few' of sha256" in refused(run_id, protocol=())
    shipped = ("--protocol", world / "digits.toml")
    (world / "digits.toml").write_text(protocol_text("digits"))
    assert "'digits' is now 95932125e4f0" in refused(run_id, protocol=shipped)
    weights = dataclasses.replace(teacher.method, weights_sha256="0" * 64)
    assert "other weights than were measured" in refused(
        resealed(world, teacher, "weights", method=weights)
    )
    assert "is not a row of a student" in refused(run_id, "--student", "runs/mine")
    assert "is not a set of images" in refused(run_id, "--images", "samples.npz")
    assert "name it with --images" in refused(set_id)
    others = ("verify", set_id, "--protocol", "few.toml", "--images", "others.npz")
    assert "not what was measured" in dimo(*others, code=2)[1]
    for name in ("extractor", "reference"):
        evidence = dataclasses.replace(teacher.evidence, **{f"{name}_sha256": "0" * 64})
        path = resealed(world, teacher, name, evidence=evidence)
        assert f"{name} has sha256" in refused(path)
    assert "it is not of dimo bench" in refused(resealed(world, teacher, "seed", seed=7))
    unknown = dataclasses.replace(teacher.method, teacher="digit")
    assert "did you mean 'digits'" in refused(resealed(world, teacher, "name", method=unknown))
    real = rows[ROWS["real"]]
    renamed = dataclasses.replace(real.method, name="Unreal data")
    assert "no reference row 'Unreal data'" in refused(
        resealed(world, real, "unreal", method=renamed)
    )
    assert "0 records in" in refused("ffff")


def test_weights_that_changed_on_disk(dimo, rows, world):
    run_folder = world / "runs" / "changed"
    shutil.copytree(world / "runs" / "mine", run_folder)
    weights = run_folder / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    student = rows[ROWS["student"]].run_id[:12]
    _, err = dimo("verify", student, "--protocol", "few.toml", "--student", run_folder, code=2)
    assert "other weights than were measured" in err


def test_a_record_of_this_repository_holds(dimo):
    results = ASSETS.parents[1] / "results"
    if not results.is_dir():
        pytest.skip("not a checkout: there are no records of this repository")
    out, _ = dimo("verify", "16e15cc0", "--results", results)
    assert "Verified" in out


def test_list(dimo, rows):
    out, _ = dimo("results", "list")
    lines = out.splitlines()
    assert len(lines) == 2 + len(rows)
    for record in rows.values():
        assert sum(record.run_id[:8] in line for line in lines) == 1
    found = json.loads(dimo("results", "list", "--json", "--protocol", "few")[0])
    assert [row["run_id"] for row in found] == [record.run_id for record in rows.values()]
    assert found[0]["metric"] == "fid"
    out, err = dimo("results", "list", "--protocol", "digits")
    assert out == ""
    assert "protocols with records: few" in err


def test_show(dimo, rows, world):
    record = rows[ROWS["student"]]
    path = next((world / "results").glob(f"*-{record.run_id[:8]}.json"))
    assert dimo("results", "show", record.run_id[:12], "--json")[0] == path.read_text()
    out, _ = dimo("results", "show", path)
    for text in ("FID (↓)", "runs/mine", record.content_sha256, "FID on seed 2000, 100 images"):
        assert text in out
    best = number(min(trial.fid for trial in record.method.tuning.trials))
    assert f" **{best}** |" in out
    _, err = dimo("results", "show", world / "nowhere.json", code=2)
    assert "cannot be read" in err


def test_hostile_text_is_harmless(dimo, rows, world):
    record = rows[ROWS["teacher"]]
    training = {"a|b\n<script>": "x" * 10_000 + "|", "rtl": "\u202eabc"}
    method = dataclasses.replace(record.method, name="<b>|\n" + "y" * 500, training=training)
    metrics = {**record.metrics, "of|tomorrow": record.metrics["fid"]}
    path = resealed(world, record, "hostile", method=method, metrics=metrics)
    out = dimo("results", "show", path)[0] + dimo("results", "diff", path, record.run_id[:12])[0]
    assert "<script>" not in out
    assert "\u202e" not in out
    assert max(map(len, out.splitlines())) < 700
    tables = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(tables) > 40
    assert load_record(path).method.training == training


def test_diff(dimo, rows):
    one, two = rows[ROWS["student"]], rows[ROWS["two steps"]]
    names = (one.run_id[:12], two.run_id[:12])
    out, err = dimo("results", "diff", *names)
    assert "method.sampler" in out
    assert "few_step" in out
    assert "packages." not in out
    assert f"dimo compare {names[0]} {names[1]}" in err
    found = json.loads(dimo("results", "diff", *names, "--json")[0])
    assert found["different"]["method.num_steps"] == [1, 2]
    assert found["metrics"]["fid"] == [one.metrics["fid"].value, two.metrics["fid"].value]
    same, _ = dimo("results", "diff", names[0], names[0])
    assert "Nothing else is different." in same


def test_a_protocol_is_found_by_its_hash(rows, world):
    record = rows[ROWS["teacher"]]
    assert protocol_of(record, world / "few.toml").name == "few"
    with pytest.raises(DimoError, match="give the file of that hash with --protocol"):
        protocol_of(record)
