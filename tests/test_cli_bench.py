"""`dimo bench` of official files and with every setting, and one clear line for each mistake."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest

from bench.protocol import protocol_text
from dimo.cli import main
from dimo.weights.catalog import ASSETS
from dimo.zoo.teachers import TEACHERS


@pytest.fixture
def dimo(monkeypatch, capsys, tmp_path):
    """`dimo("bench", ..., code=0)` -> (stdout, stderr), in an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["dimo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert (stop.value.code or 0) == code, err
        return out, err

    return run


def refused(dimo, *arguments):
    """The one line of a refused command, which wrote nothing."""
    out, err = dimo(*arguments, code=2)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def protocol_file(tmp_path):
    """`protocol_file(name, (old, new), ...)`: `digits` with few images and resamples."""

    def write(name, *changes):
        text = protocol_text("digits")
        few = [("num_images = 5000", "num_images = 500"), ("n_bootstrap = 200", "n_bootstrap = 10")]
        for old, new in [('name = "digits"', f'name = "{name}"'), *few, *changes]:
            assert text.count(old) == 1
            text = text.replace(old, new)
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        return path

    return write


def truncate(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:5000])


def swap(folder, name):
    (folder / name).write_bytes((folder / "last.ckpt").read_bytes())


WEIGHTS = {
    "missing transformer": (
        lambda folder: (folder / "MaskGIT_ImageNet_256.pth").unlink(),
        ["MaskGIT_ImageNet_256.pth", "--weights", "dimo weights fetch maskgit-256"],
    ),
    "missing tokenizer": (lambda folder: (folder / "last.ckpt").unlink(), ["last.ckpt"]),
    "missing configuration": (lambda folder: (folder / "model.yaml").unlink(), ["model.yaml"]),
    "truncated transformer": (
        lambda folder: truncate(folder, "MaskGIT_ImageNet_256.pth"),
        ["cannot read weights", "MaskGIT_ImageNet_256.pth"],
    ),
    "truncated tokenizer": (lambda folder: truncate(folder, "last.ckpt"), ["cannot read weights"]),
    "tokenizer as transformer": (
        lambda folder: swap(folder, "MaskGIT_ImageNet_256.pth"),
        ["look like those of a taming VQGAN, but a MaskGIT v1.0 transformer is needed"],
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_bad_weights_are_one_line(dimo, small_maskgit, protocol_file, case):
    change, words = WEIGHTS[case]
    change(small_maskgit)
    protocol = protocol_file("small", ("[8, 8]", "[64, 64]"), ("classes = 10", "classes = 5"))
    err = refused(
        dimo,
        *("bench", "--teacher", "maskgit", "--protocol", protocol, "--steps", "2"),
        *("--weights", small_maskgit),
    )
    for word in words:
        assert word in err


MISTAKES = {
    "protocol of other images": (
        ["--teacher", "maskgit", "--protocol", "digits"],
        "protocols that fit: imagenet256-adm",
    ),
    "no protocol of its own": (["--teacher", "halton-large"], "name one with --protocol"),
    "students of two teachers": (
        ["--student", "digits-dimo", "--student", "scenes-dimo"],
        "distilled from 'scenes', not from 'digits'; bench the students of one teacher at a time",
    ),
    "images of some labels": (
        ["--num-images", "1005"],
        "must be a multiple of its 10 labels; e.g. --num-images 1000",
    ),
    "images of some prompts": (
        ["--teacher", "scenes", "--num-images", "0"],
        "must be a multiple of its 240 prompts; e.g. --num-images 240",
    ),
    "too many steps": (["--steps", "17"], "takes 1 to 16 steps"),
    "too many student steps": (
        ["--student", "digits-dimo", "--student-steps", "17"],
        "takes 1 to 16 steps",
    ),
    "nothing to score": (["--steps", ""], "there is nothing to score"),
    "unknown schedule": (["--schedule", "arcos"], "did you mean 'arccos'"),
    "unknown sampler": (["--samplers", "halten"], "did you mean 'halton'"),
    "unknown precision": (["--precision", "fp16"], "allowed: bfloat16, float32"),
    "setting of no row": (["--theta", "0.4"], "it applies to theta_trapezoidal"),
    "theta": (["--samplers", "theta_trapezoidal", "--theta", "2"], "strictly between 0 and 1"),
    "bad steps of a student": (
        ["--student", "x=digits-dimo@2,"],
        "steps '2,' of 'x=digits-dimo@2,'",
    ),
    "no name": (["--baseline", "=digits-dimo"], "has an empty name"),
    "missing baseline": (["--baseline", "di4c=nowhere@4"], "run 'nowhere' does not exist"),
    "a student without steps": (
        ["--steps", "", "--student-steps", "", "--student", "digits-dimo"],
        "'digits-dimo' has no step counts; name them, e.g. digits-dimo@2,4",
    ),
    "published student elsewhere": (["--student", "dimo-maskgit"], "pytorch_model.bin"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(dimo, case, monkeypatch, tmp_path):
    monkeypatch.setenv("DIMO_WEIGHTS", str(tmp_path / "none"))
    arguments, words = MISTAKES[case]
    assert words in refused(dimo, "bench", *arguments)


def test_a_reference_that_is_not_bundled_is_asked_for(dimo, protocol_file):
    protocol = protocol_file("other", ('name = "digits-all"', 'name = "other-digits"'))
    assert "give it with --reference FILE" in refused(dimo, "bench", "--protocol", protocol)


def test_a_student_of_another_teacher_is_refused(dimo, small_maskgit):
    arguments = ("--teacher", "digits", "--student", "dimo-maskgit", "--weights", small_maskgit)
    assert "use --teacher maskgit" in refused(dimo, "bench", *arguments)


def test_a_teacher_without_recipe_or_data(dimo, monkeypatch):
    bare = dataclasses.replace(TEACHERS["maskgit"], recipe=None)
    monkeypatch.setitem(TEACHERS, "maskgit", bare)
    assert "no recipe of method 'dimo' for teacher 'maskgit'" in refused(
        dimo, "distill", "--teacher", "maskgit"
    )
    assert "is one of teacher 'digits', not 'maskgit'" in refused(
        dimo, "train", "--teacher", "maskgit", "--recipe", "digits-teacher"
    )


def test_rows_that_differ_in_the_schedule_alone_say_so(dimo, protocol_file):
    protocol = protocol_file("quick")
    arguments = ("bench", "--steps", "2", "--no-reference-rows", "--protocol", protocol)
    out, _ = dimo(*arguments, "--schedule", "arccos,arccos-v1")
    rows = ["| MaskGIT (schedule arccos: 5 + 11 tokens)", "| (schedule arccos-v1: 1 + 15 tokens)"]
    assert "arccos-v1:" in out
    report, _ = dimo("report", "-f", "markdown", "--protocol", protocol)
    assert all(row in report for row in rows)


def test_students_at_several_steps_and_other_settings(dimo, protocol_file):
    protocol = protocol_file("quick")
    out, _ = dimo(
        *("bench", "--student", "digits-dimo", "--student-steps", "1,4", "--steps", "2"),
        *("--samplers", "theta_trapezoidal", "--theta", "0.4", "--top-k", "20"),
        *("--precision", "bfloat16", "--no-reference-rows", "--json"),
        *("--protocol", protocol),
    )
    methods = [record["method"] for record in json.loads(out)]
    theta, one, four = methods
    assert (theta["section"], theta["theta"]) == ("Sampler", 0.4)
    assert (one["sampler"], one["num_steps"], one["top_k"]) == ("one_step", 1, 20)
    assert (four["sampler"], four["num_steps"], four["nfe"]) == ("few_step", 4, 4)
    assert all(method["network_precision"] == "bfloat16" for method in methods)
    assert "theta" not in one  # what a sampler does not have is not in its record
    report, _ = dimo("report", "-f", "markdown", "--settings", "--protocol", protocol)
    header = report[report.index("### Settings") :].splitlines()[2]
    for column in ("Theta", "Top-k", "Network in", "Schedule"):
        assert f" {column} " in header
    for column in ("Top-p", "Final temp.", "Random start", "Choice temp."):
        assert f" {column} " not in header


def test_a_quick_look_is_off_protocol(dimo, protocol_file):
    protocol = ("--protocol", protocol_file("quick"))

    def bench(*arguments):
        out, err = dimo("bench", "--steps", "2", "--json", *protocol, *arguments)
        return json.loads(out), err

    (few,), err = bench("--num-images", "50")  # no rows for real data and tokenizer
    assert "off-protocol, in a table of their own: 50 images; the protocol asks for 500" in err
    full, err = bench("--num-images", "500")
    assert [record["evidence"]["nonconforming"] for record in full] == [[]] * 3
    assert "off-protocol" not in err
    assert few["format"] == 2
    assert few["protocol"] == full[-1]["protocol"]
    assert {metric["n"] for metric in few["metrics"].values()} == {50}
    first, all_ = (
        np.load(f"results/contributions/{record['run_id']}.npz")["class_accuracy"]
        for record in (few, full[-1])
    )
    assert np.array_equal(first, all_[:50])  # the same images
    assert "have 50 and 500 images" in refused(
        dimo, "compare", few["run_id"], full[-1]["run_id"], *protocol
    )
    out, _ = dimo("verify", few["run_id"], *protocol)
    assert "Verified, every value equal to the bit" in out


def test_a_student_brings_its_teacher_and_protocol(dimo):
    out, _ = dimo(*("bench", "--student", "scenes-dimo", "--steps", "1", "--json"),
                  *("--num-images", "240"))  # fmt: skip
    teacher, student = json.loads(out)
    assert [r["method"]["name"] for r in (teacher, student)] == [
        "MaskGIT-scenes",
        "Di[M]O-FD (scenes-dimo)",
    ]
    assert student["protocol"]["name"] == "scenes-geneval"
    assert student["metrics"]["geneval"]["n"] == student["metrics"]["fid"]["n"] == 240
    assert student["metrics"]["geneval_colors"]["n"] == 40
    assert student["evidence"]["nonconforming"] == ["240 images; the protocol asks for 960"]


def make_run(folder, **changes):
    """A run folder of another method, with the shipped student's weights."""
    shutil.copytree(ASSETS / "digits-dimo", folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_distilled_model_is_a_row_at_its_own_steps(dimo, protocol_file, tmp_path):
    slow = make_run(tmp_path / "slow", method="sdtt", seed=3, images_seen=1_234_000)
    other = make_run(tmp_path / "a=b@2", method="sdtt", training_seconds=None)
    protocol = protocol_file("quick")
    out, _ = dimo(
        *("bench", "--teacher", "digits", "--steps", "2,4", "--student", "mine=digits-dimo"),
        *("--baseline", f"sdtt={slow}", "--baseline", f"{other}@3"),
        *("--no-reference-rows", "--json", "--protocol", protocol),
    )
    methods = [record["method"] for record in json.loads(out)]
    rows = [(method["section"], method["name"], method["num_steps"]) for method in methods]
    assert rows[:5] == [
        ("Teacher", "MaskGIT", 2),
        ("Teacher", "MaskGIT", 4),
        ("Distill.", "mine", 1),
        ("Distill.", "sdtt", 2),
        ("Distill.", "sdtt", 4),
    ]
    section, name, steps = rows[5]
    assert (section, steps, len(rows)) == ("Distill.", 3, 6)
    assert "a=b@2" in name
    assert [method["training"].get("method") for method in methods] == [
        None,
        None,
        "dimo",
        "sdtt",
        "sdtt",
        "sdtt",
    ]
    assert methods[3]["training"]["images_seen"] == 1_234_000
    report, _ = dimo("report", "--protocol", protocol)
    for row in ("mine", "sdtt"):
        assert f"\n| {row}" in report


def test_a_picture_of_named_models_at_their_own_steps(dimo, tmp_path):
    run = make_run(tmp_path / "slow", method="sdtt")
    arguments = ("sample", "--model", "digits@2", "--model", f"x={run}@2,3", "--labels", "3")
    dimo(*arguments, "--out", "x.png")
    assert "these are 2, 3; name one" in refused(
        dimo, "sample", "--model", f"{run}@2,3", "--count", "3", "--out", "n"
    )
    out, _ = dimo("sample", "--model", f"{run}@3", "--count", "3", "--out", "n.npz", "--json")
    assert json.loads(out)["made"] == 3


def test_sample_checks_labels_before_it_loads_a_network(dimo, small_maskgit):
    (small_maskgit / "MaskGIT_ImageNet_256.pth").write_bytes(b"no network")
    arguments = ("sample", "--model", "maskgit", "--weights", small_maskgit, "--out", "x.png")
    assert "give whole numbers from 0 to 4" in refused(dimo, *arguments, "--labels", "5")
    assert "cannot read weights" in refused(dimo, *arguments, "--labels", "4")


def test_network_weights_are_not_an_extractors(dimo):
    """`--weights` is the folder of teachers and students; eval and reference have none."""
    for command in (
        ("eval", "x", "--protocol", "digits"),
        ("reference", "x", "--protocol", "digits"),
    ):
        more = ("-o", "y.npz") if command[0] == "reference" else ()
        err = refused(dimo, *command, *more, "--weights", "inception.pth")
        assert "--weights inception.pth is not used" in err
        assert "with --extractor-weights" in err


def test_law_scores_targets_of_a_distillation_on_the_selection_seed(dimo, protocol_file):
    def law(name, *changes, extra=()):
        path = protocol_file(name, *changes)
        grid = ("--guidance", "1,2", "--temperature", "0.6", "--rule", "constant,adaptive")
        return dimo("law", "--protocol", path, *grid, "--steps", 2, "--num-images", 100, *extra)

    out, err = law("mine", ("report = 1000", "report = 3000"))
    scored = json.loads(law("other", extra=["--json"])[0])
    assert (
        json.loads(law("mine", ("\nselect = 2000", "\nselect = 2001"), extra=["--json"])[0])
        != scored
    )
    laws = [{k: law[k] for k in law if k != "metrics"} for law in scored["laws"]]
    assert len(laws) == 3  # without guidance there is one rule
    fids = [law["metrics"]["fid"]["value"] for law in scored["laws"]]
    best = laws[fids.index(min(fids))]
    assert scored["best"] == best
    keys = [f"{key} = {json.dumps(value)}" for key, value in best.items()]
    assert out.splitlines()[-3:] == keys  # the reporting seed changes nothing
    assert out.count("(best)") == 1
    assert err.count("dimo distill --teacher digits --set teacher_temperature=") == 1
    moving = json.loads(law("mine", extra=["--json", "--final-temperature", "0.4,0.6"])[0])["laws"]
    held = [entry.pop("teacher_final_temperature") == 0.6 for entry in moving]
    assert sum(held) == len(laws)
    assert len(moving) == 2 * len(laws)
    assert [entry for entry, same in zip(moving, held, strict=True) if same] == scored["laws"]
    assert refused(dimo, "law", "--rule", "rising").startswith(
        "error: unknown guidance rule 'rising'; "
    )
    for options, message in [
        (("--temperature", "0,1"), "--temperature 0,1: 0 must be above 0 and at most 1e6"),
        (("--guidance", "1;2"), "--guidance 1;2 is not a list of numbers"),
        (("--final-temperature", "-1"), "--final-temperature -1: -1 must be above 0"),
        (("--steps", "17"), "a grid of 16 tokens takes 1 to 16 steps"),
        (("--num-images", "7"), "must be a multiple of its 10 labels"),
        (("--teacher", "maskgit", "--protocol", "imagenet256-cmmd"), "laws are compared by one of"),
    ]:
        assert message in refused(dimo, "law", *options)
