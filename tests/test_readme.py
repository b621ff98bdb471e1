"""The README: its numbers are those of the records and of published.csv; its links work."""

import csv
import json
import re
import shlex
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from typer.main import get_command

import dimo
from dimo.cli import app

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "results/README.md", "results/ablation.md"]
PAGES += [
    "dimo/recipes/README.md",
    "bench/README.md",
    "dimo/README.md",
    "dimo/zoo/README.md",
    "protocols/README.md",
]
METRICS = ("fid", "precision", "recall", "density", "coverage")
# the runs of each measured row, in order: several are training seeds
RUNS = ["6c12bb68", "3f00046c", "410494cb", "475f03a5", "50ef63fe", "074e2a5a", "b1d49479"]
RUNS += ["9960f796 df1387cb", "379f51b1", "e1488114 9ce8cd47"]


def table(heading):
    """Cells of the first table after a line of the README that holds `heading`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text[text.index(heading) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
    return rows


def record_of(run):
    """The record in `results/` whose run id begins so."""
    (path,) = (ROOT / "results").glob(f"*{run}.json")
    return json.loads(path.read_text())


def test_measured_rows_are_records():
    rows = table("## Results")
    assert len(rows) == len(RUNS)
    for cells, runs in zip(rows, RUNS, strict=True):
        records = [record_of(run) for run in runs.split()]
        values = [[record["metrics"][name]["value"] for record in records] for name in METRICS]
        for record in records:
            steps = [str(record["method"][key]) for key in ("num_steps", "nfe")]
            assert record["protocol"]["name"] == "digits"
        assert cells[1:] == steps + [f"{fmean(of_seeds):.3f}" for of_seeds in values]


def test_the_spread_of_seeds_is_that_of_records():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for runs in (["e1488114", "9ce8cd47"], ["9960f796", "df1387cb"]):
        first, second = (record_of(run)["metrics"]["fid"]["value"] for run in runs)
        assert f"± {abs(first - second) / 2:.3f}" in text


def test_the_output_of_the_demo_is_that_of_records():
    """Its speeds are of that run; those of its own student are in the record."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^(.{24}) +(\d+) +\d+ +([\d.]+)±[\d.]+(.*)$", block, re.MULTILINE)
    assert len(rows) == 7
    others = ("kid", "mind", "inception_score", "precision", "recall", "density", "coverage")
    others = (*others, "class_accuracy")
    runs = ["111a03bc", "86d31d08", "dd537cfd", "0f634138", "aec94465", "aff46b1f", "e1488114"]
    for (_, steps, fid, values), run in zip(rows, runs, strict=True):
        record = record_of(run)
        metrics = {name: metric["value"] for name, metric in record["metrics"].items()}
        assert (int(steps), fid) == (record["method"]["num_steps"], f"{metrics['fid']:.3f}")
        shown = [f"{metrics[name]:.{2 if name == others[2] else 3}f}" for name in others]
        assert re.findall(r"-?[\d.]+", values) == shown
    fids = [record_of(run)["metrics"]["fid"]["value"] for run in ("aff46b1f", "aec94465")]
    assert "({:.3f} against {:.3f})".format(*fids) in block


def test_quoted_rows_are_published():
    with (ROOT / "results/published.csv").open(encoding="utf-8") as file:
        published = {
            (row["method"], row["steps"], row["metric"]): row["value"]
            for row in csv.DictReader(file)
            if row["benchmark"] == "imagenet256-c2i" and row["source"] == "arXiv:2503.15457"
        }
    names = {"MaskGIT (teacher)": "MaskGit", "": "MaskGit"}
    for name, steps, *values in table("**quoted**"):
        for metric, value in zip(
            ("fid", "inception_score", "precision", "recall"), values, strict=True
        ):
            assert published.get((names.get(name, name), steps, metric), "") == value


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def commands(page):
    """The arguments of every `dimo` command in the code blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r" && ", line.partition("  #")[0]):
                words = shlex.split(part)
                if "dimo" in words and words[0] in ("dimo", "torchrun", "srun"):
                    yield words[words.index("dimo") + 1 :]


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_they_use(page):
    for words in commands(page):
        command = get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context("dimo", words)  # raises what the command line would


def test_pages_have_commands():
    counts = {page: len(list(commands(page))) for page in PAGES}
    assert counts["README.md"] > 15
    assert counts["bench/README.md"] > 5
    assert counts["dimo/README.md"] > 10


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 200
    assert len(text.encode()) <= 14 * 1024


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    """As it stands, but for what would take minutes: a long run, and the row of 16 steps."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    for written, quick in {
        'out="runs/mine")': 'out="runs/mine", settings=["steps=2", "batch_size=16"])',
        "digits@1,16": "digits@1",
    }.items():
        assert written in code
        code = code.replace(written, quick)
    monkeypatch.chdir(tmp_path)
    labels = torch.arange(5000) % 10
    images = dimo.load("digits-dimo").sample(labels=labels, batch_size=500)
    np.savez("samples.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    names = {}
    exec(code, names)
    assert names["images"].shape == (3, 3, 8, 8)
    assert names["own"].student.images_seen == 32
    assert list(names["table"]["num_steps"].dropna()) == [1, 1]
    assert names["record"].metrics["fid"].value < 1
    assert len(list((tmp_path / "results").glob("*.json"))) == len(names["table"]) + 1
