"""The README: its numbers are those of the records and of published.csv; its links work."""

import csv
import json
import re
from pathlib import Path

import pytest

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
# the run of each measured row, in order
RUNS = ["6c12bb68", "3f00046c", "410494cb", "475f03a5", "50ef63fe"]
RUNS += ["074e2a5a", "b1d49479", "9960f796", "379f51b1", "c472bdec"]


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


def test_measured_rows_are_records():
    rows = table("## Results")
    assert len(rows) == len(RUNS)
    for cells, run in zip(rows, RUNS, strict=True):
        (path,) = (ROOT / "results").glob(f"*{run}.json")
        record = json.loads(path.read_text())
        steps = [str(record["method"][key]) for key in ("num_steps", "nfe")]
        values = [f"{record['metrics'][name]['value']:.3f}" for name in METRICS]
        assert cells[1:] == steps + values
        assert record["protocol"]["name"] == "digits"


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


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 200
    assert len(text.encode()) <= 14 * 1024


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    """As it stands, but for the steps of the row that would take half a minute."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("digits@1,16", "digits@1"), names)
    assert names["images"].shape == (3, 3, 8, 8)
    assert list(names["table"]["num_steps"].dropna()) == [1, 1]
    assert len(list((tmp_path / "results").glob("*.json"))) == len(names["table"])
