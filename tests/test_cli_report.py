"""`dimo report` as a user meets it: formats, files left out, ablations, a page kept up to date."""

import json
from pathlib import Path

import pytest
import torch

from bench.rows.rows import Job, method_info
from bench.rows.settings import SamplerSettings
from dimo.util import terminal
from dimo.zoo.loading import load_student

ROOT = Path(__file__).parent.parent
TINY = ["--set", "steps=2", "--set", "batch_size=4", "--set", "checkpoint_every=2"]


@pytest.fixture
def world(tmp_path):
    """A folder with the shipped records of digits, all readable."""
    folder = tmp_path / "results"
    folder.mkdir()
    for path in (ROOT / "results").glob("*-digits-*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("README.md", "<!-- dimo report --protocol digits -->"),
        ("ablation.md", "<!-- dimo report --protocol digits --ablation -->"),
    ],
)
def test_the_tables_on_the_pages_are_those_of_the_records(run, tmp_path, name, mark):
    """Stale? `dimo report --update results/README.md` makes them again from `results/`."""
    text = (ROOT / "results" / name).read_text(encoding="utf-8")
    page = tmp_path / name
    page.write_text(text, encoding="utf-8")
    run("report", "--update", page, "--results", ROOT / "results", cwd=tmp_path)
    fresh = page.read_text(encoding="utf-8")
    assert mark in fresh
    assert fresh == text, f"stale: run `dimo report --update results/{name}`"


def test_every_format_of_the_same_results(run, world):
    shown = run("report", "-f", "text", cwd=world)
    assert shown.stdout.startswith("Handwritten digits, 8 x 8")
    assert "Settings of each row" not in shown.stdout
    assert shown.stderr.endswith("code of each row: dimo report --settings\n")
    asked = run("report", "--protocol", "digits", "-f", "text", "--settings", cwd=world)
    assert asked.stdout.startswith(shown.stdout[: shown.stdout.index("Quoted results")])
    assert "Settings of each row" in asked.stdout
    assert asked.stderr == ""
    run("report", "-o", "report.md", cwd=world)
    markdown = (world / "report.md").read_text()
    assert markdown.startswith("## Handwritten digits, 8 x 8")
    assert run("report", "-f", "markdown", cwd=world).stdout == markdown
    assert run("report", cwd=world).stdout == markdown, "a pipe gets what a file does"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "is_terminal", lambda: True)
        assert run("report", cwd=world).stdout == shown.stdout
    latex = run("report", "-f", "latex", cwd=world).stdout
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 4
    assert "0.286" in latex
    content = json.loads(run("report", "-f", "json", cwd=world).stdout)
    rows = sum(len(part["rows"]) for part in content["protocols"])
    assert rows >= 21
    assert run("report", "-f", "csv", cwd=world).stdout.count("\n") == 1 + rows
    assert [part["protocol"]["name"] for part in content["protocols"]] == ["digits"]
    run("report", "-f", "latex", "-o", "table.tex", cwd=world)
    assert (world / "table.tex").read_text() == latex


def test_the_bundled_results_fit_100_columns_of_a_terminal(run, tmp_path):
    shown = run("report", "--results", ROOT / "results", "-f", "text", cwd=tmp_path).stdout
    assert shown.count("-- Teacher --") > 4
    assert shown.count("images") > 2  # no column was left out
    assert max(map(len, shown.splitlines())) <= 100
    for name in ("digits-full", "digits-di4c-d", "scenes"):  # each a mean of two seeds
        assert shown.count(f"({name})") == 1


def test_without_results_it_quotes_and_says_how_to_begin(run, tmp_path):
    shown = run("report", "-f", "text", cwd=tmp_path).stdout
    assert "\n- `dimo bench --teacher digits --student digits-dimo --steps 1,4,16`\n" in shown
    table = shown[shown.index("Quoted: ImageNet 256 x 256, class-conditional\n") :]
    assert "Di[M]O                1  6.91   214.0" in table
    assert list(tmp_path.iterdir()) == []


def test_strict_exits_with_1_and_still_reports(run, world):
    assert run("report", "--strict", cwd=world).returncode == 0
    copied = min((world / "results").glob("*maskgit-8*"))
    text = copied.read_text()
    broken = {
        "half.json": text[: len(text) // 2],
        "edited.json": text.replace('"seed": 1000', '"seed": 1001'),
        "newer.json": text.replace('"format": 1', '"format": 3'),
        "foreign.json": '{"name": "package", "version": "1.0"}',
        "binary.json": "\udcff\udcfe",
    }
    for name, content in broken.items():
        (world / "results" / name).write_text(content, errors="surrogateescape")
    (world / "results" / "copy.json").write_text(text)
    done = run("report", "--strict", cwd=world, code=1)
    reasons = {
        "half.json": "not valid JSON",
        "edited.json": "was edited or damaged",
        "newer.json": "'format' is 3, and this dimo reads 1",
        "foreign.json": "unknown key 'name'",
        "binary.json": "not a text file",
        "copy.json": f"the same run as {copied.name}",
    }
    lines = done.stderr.splitlines()
    assert len(lines) == len(reasons) + 2
    for name, reason in reasons.items():
        assert [line for line in lines if name in line and reason in line], (name, lines)
        assert name in done.stdout.split("Files left out\n")[1]
    assert "6 files left out (--strict)" in lines[-1]
    assert "\n| MaskGIT" in done.stdout
    assert run("report", cwd=world).stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--format", "pdf"],
            "unknown format 'pdf'; allowed: csv, html, json, latex, markdown, text",
        ),
        (["--protocol", "adm"], "unknown protocol 'adm'"),
        (["--results", "nowhere"], "no results folder nowhere"),
        (["--update", "nowhere.md"], "cannot read nowhere.md"),
        (["--update", "results/README.md", "--ablation"], "--update allows only --results"),
        (["--update", "page.md"], "0 whole tables between"),
    ],
)
def test_mistakes_are_one_line(run, world, arguments, words):
    (world / "page.md").write_text("nothing here\n")
    done = run("report", *arguments, cwd=world, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_an_ablation_is_noted_from_distillation_to_record(run, tmp_path):
    unwatched = ("--sample-every", "0", "--score-every", "0")
    chosen = ("--set", "beta=0.3", "--ablation", "beta,init_mask_ratio")
    run("distill", *TINY, *unwatched, *chosen, "--out", "varied", cwd=tmp_path)
    run("distill", *TINY, *unwatched, "--out", "plain", cwd=tmp_path)
    config, training = {}, {}
    for name in ("varied", "plain"):
        config[name] = json.loads((tmp_path / name / "config.json").read_text())
        student = load_student(str(tmp_path / name), device=torch.device("cpu"))
        job = Job(name, "Distill.", student, SamplerSettings("one_step"))
        training[name] = method_info(job, None).training
    assert training["varied"]["ablation"] == config["varied"]["ablation"]
    assert config["varied"]["ablation"] == {"beta": 0.3, "init_mask_ratio": 0.6}
    assert "ablation" not in training["plain"]
    assert "ablation" not in config["plain"]


def test_an_unknown_key_to_ablate_is_said_before_training(run, tmp_path):
    done = run("distill", *TINY, "--ablation", "bta", "--out", "x", cwd=tmp_path, code=2)
    assert "unknown key of the recipe to ablate 'bta'" in done.stderr
    assert "did you mean 'beta'" in done.stderr
    assert not (tmp_path / "x").exists()
