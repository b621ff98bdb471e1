"""GenEval 2 and DPG-Bench: files of the official forms against plain float64 sums."""

import copy
import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch

from bench.protocol import load_protocol, protocol_text, validate_file
from bench.records.store import load_all
from bench.report import collect_report, report_markdown
from bench.suites.answers import CATEGORIES, SKILLS
from bench.suites.base import Assets, ImageOrigin, load_suite
from dimo.cli import main
from dimo.engine.distributed import Runtime
from dimo.errors import DimoError


def protocol_of(name, prompts):
    """A shipped protocol with fewer prompts."""
    full = load_protocol(name)
    each = full.prompts.images_per_prompt
    images = dataclasses.replace(full.images, num_images=each * prompts, num_classes=prompts)
    tags = dataclasses.replace(full.prompts, tags={"all": prompts})
    return dataclasses.replace(full, images=images, prompts=tags)


def measure(name, count, file, prompts):
    suite = load_suite(
        protocol_of(name, count), Runtime(torch.device("cpu")), Assets(prompts=prompts)
    )
    return suite.measure_paths([file], ImageOrigin("mine")).record


def check_intervals(metrics):
    for metric in metrics.values():
        assert metric.low <= metric.value <= metric.high
    assert any(metric.low < metric.value < metric.high for metric in metrics.values())


SKILLS_OF = [["count", "attribute", "object"], ["object", "position", "object", "verb"]] * 3


@pytest.fixture
def geneval2(tmp_path):
    """(prompts, results), as data; `write` puts them into files."""
    rng = np.random.RandomState(0)
    prompts = [
        {
            "prompt": f"picture {number}",
            "atom_count": len(skills) + number // 4,
            "vqa_list": [["Are there any?", "Yes"] for _ in skills],
            "skills": list(skills),
        }
        for number, skills in enumerate(SKILLS_OF)
    ]
    lists = [rng.beta(0.5, 0.5, len(skills)).tolist() for skills in SKILLS_OF]
    lists[1][0], lists[2][1] = 0.0, 1.0000001  # as softmax rounds
    return prompts, lists


def write_geneval2(folder, prompts, lists):
    (folder / "data.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (folder / "scores.json").write_text(json.dumps(lists))
    return folder / "scores.json", folder / "data.jsonl"


def test_geneval2_equals_plain_sums(geneval2, tmp_path):
    prompts, lists = geneval2
    record = measure("geneval2", 6, *write_geneval2(tmp_path, *geneval2))
    found = record.metrics
    assert list(found) == ["geneval2", "geneval2_am", *(f"geneval2_{skill}" for skill in SKILLS)]
    geometric = [0 if 0 in x else math.exp(math.fsum(map(math.log, x)) / len(x)) for x in lists]
    assert found["geneval2"].value == pytest.approx(100 * math.fsum(geometric) / 6, abs=1e-9)
    means = [math.fsum(x) / len(x) for x in lists]
    assert found["geneval2_am"].value == pytest.approx(100 * math.fsum(means) / 6, abs=1e-9)
    for skill in SKILLS:
        points = [
            point
            for x, prompt in zip(lists, prompts, strict=True)
            for point, name in zip(x, prompt["skills"], strict=True)
            if name == skill
        ]
        value = 100 * math.fsum(points) / len(points)
        assert found[f"geneval2_{skill}"].value == pytest.approx(value, abs=1e-9)
    atoms = [prompt["atom_count"] for prompt in prompts]
    pairs = list(zip(geometric, atoms, strict=True))
    assert found["geneval2"].extra == {
        f"atoms_{n}": pytest.approx(100 * np.mean([g for g, a in pairs if a == n]))
        for n in set(atoms)
    }
    check_intervals(found)
    evidence = record.evidence
    assert (evidence.detector, evidence.prompts) == ("qwen3-vl-8b", "geneval2_data.jsonl")
    assert len(evidence.prompts_sha256) == 64
    assert not record.off_protocol
    assert {metric.n for metric in found.values()} == {6}


def test_the_interval_of_a_skill_is_that_of_a_ratio(geneval2, tmp_path):
    """Against resampling prompts and dividing the sums each time; both kinds of prompts differ."""
    prompts, lists = (copy.deepcopy(part) * 40 for part in geneval2)
    rng = np.random.RandomState(1)
    lists = [rng.uniform(size=len(x)).tolist() for x in lists]
    found = measure("geneval2", 240, *write_geneval2(tmp_path, prompts, lists))
    metric = found.metrics["geneval2_object"]
    asked = [np.array(prompt["skills"]) == "object" for prompt in prompts]
    sums = np.array([(np.array(x)[a].sum(), a.sum()) for x, a in zip(lists, asked, strict=True)])
    draws = [sums[rng.randint(240, size=240)].sum(axis=0) for _ in range(2000)]
    low, high = np.quantile([100 * a / b for a, b in draws], [0.025, 0.975])
    assert metric.high - metric.low == pytest.approx(high - low, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, x: x.pop(), "answers for 5 prompts; there are 6"),
        (lambda p, x: x[2].pop(), "prompt 3 has 2 answers to 3 questions"),
        (lambda p, x: x[1].__setitem__(0, 1.2), "prompt 2 has the answer 1.2; allowed: from 0"),
        (lambda p, x: x[1].__setitem__(0, float("nan")), "prompt 2 has the answer nan"),
        (lambda p, x: x[1].__setitem__(0, None), "prompt 2 has the answer None"),
        (lambda p, x: x.__setitem__(slice(None), [[1] * len(y) for y in x]), "--method tifa"),
        (lambda p, x: x.__setitem__(0, 0.5), "must be a list with a list of numbers"),
        (lambda p, x: p.pop(), "data.jsonl: 5 prompts; 6 are asked for"),
        (lambda p, x: p[3]["skills"].pop(), "line 4 must have a skill for each of its questions"),
        (lambda p, x: p[0]["skills"].__setitem__(0, "taste"), "line 1: unknown skill 'taste'"),
        (lambda p, x: p[0].update(more=1), "line 1 must have the keys prompt, atom_count"),
    ],
)
def test_what_is_wrong_with_files_of_geneval2(geneval2, tmp_path, change, message):
    change(*geneval2)
    with pytest.raises(DimoError, match=message) as caught:
        measure("geneval2", 6, *write_geneval2(tmp_path, *geneval2))
    assert "\n" not in str(caught.value)


# prompt -> (number, parents, tuple); the first line is the one that the official script skips
TABLE = {
    "partiprompts97": [(1, "0", "entity - whole (cat)"), (2, "0", "global - style (oil)")],
    "7": [
        (1, "0", "entity - whole (dog)"),
        (2, "1", "attribute - color (dog, red)"),
        (3, "1, 2", "relation - spatial (dog, cat, left)"),
        (4, "0", "other - text (dog, 'hi')"),
    ],
    "coco8": [(2, "3", "attribute - size (x)"), (3, "0", "entity - part (x)")],
}
PARTS = ("(0, 0, 512, 512)", "(512, 0, 1024, 512)", "(0, 512, 512, 1024)", "(512, 512, 1024, 1024)")


class DPG:
    """The files of one run, with random answers, as the official script writes them."""

    def __init__(self, folder, table=TABLE, first_is_asked=False):
        self.folder, self.table = folder, copy.deepcopy(table)
        rng, first = np.random.RandomState(2), next(iter(table))
        self.pictures, self.details, self.lines, self.left_out = {}, [], [], []
        for item, questions in table.items():
            asked = questions[0 if first_is_asked or item != first else 1 :]
            numbers = [number for number, _, _ in asked]
            parents = {n: [int(p) for p in text.split(",")] for n, text, _ in asked}
            images = []
            path = f"sets/a, b/{item}.png"
            for part in PARTS:
                yes = {n: bool(rng.uniform() < 0.7) for n in numbers}
                for n in numbers:
                    words = f"Is {item}, as asked in {n}, there?"
                    self.details.append(f"{path}, {part}, {words}, {'yes' if yes[n] else 'no'}")
                if any(p and p not in numbers for n in numbers for p in parents[n]):
                    self.left_out.append(item)
                    break
                images.append((yes, parents))
            else:
                self.pictures[item] = images
                scores = [self.score(*image) for image in images]
                shown = ", ".join(map(str, [*scores, sum(scores) / len(scores)]))
                self.lines.append(f"{path}, {shown}")

    @staticmethod
    def score(yes, parents):
        """By the graph: a question counts if it and all that it rests on is answered "yes"."""

        def holds(n):
            return yes[n] and all(holds(p) for p in parents[n] if p)

        return sum(map(holds, yes)) / len(yes)

    def write(self):
        text = io.StringIO()
        keys = ("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad")
        keys += ("category_detailed", "tuple", "question_natural_language")
        rows = csv.writer(text)
        rows.writerow(keys)
        for item, questions in self.table.items():
            for n, parents, what in questions:
                words = f"Is {item}, as asked in {n}, there?"
                rows.writerow([item, "a, b", "", n, parents, "x", "y", what, words])
        (self.folder / "dpg_bench.csv").write_text(text.getvalue())
        end = "Model: a\nL1 category scores:\n\tentity: 1.0\nDPG-Bench score: 1.0\n"
        (self.folder / "run.txt").write_text("".join(f"{line}\n" for line in self.lines) + end)
        lines = "".join(f"{line}\n" for line in self.details)
        (self.folder / "run_detail.txt").write_text(lines)
        return self.folder / "run.txt", self.folder / "dpg_bench.csv"


def ratio(values):
    return pytest.approx(100 * math.fsum(values) / len(values), abs=1e-9)


@pytest.mark.parametrize("first_is_asked", [False, True])
def test_dpg_bench_equals_plain_sums(tmp_path, first_is_asked):
    run = DPG(tmp_path, first_is_asked=first_is_asked)
    record = measure("dpg-bench", 3, *run.write())
    found = record.metrics
    assert list(found) == ["dpg_bench", *(f"dpg_{category}" for category in CATEGORIES)]
    means = [math.fsum(run.score(*i) for i in images) / 4 for images in run.pictures.values()]
    assert found["dpg_bench"].value == ratio(means)
    assert found["dpg_bench"].n == 12
    points = {}
    for item, images in run.pictures.items():
        yes, _ = images[-1]
        for number, _, what in TABLE[item]:
            if number in yes:
                points.setdefault(what.partition(" (")[0], []).append(yes[number])
    for category in CATEGORIES:
        fine = {name: values for name, values in points.items() if name.startswith(category)}
        assert found[f"dpg_{category}"].value == ratio([v for some in fine.values() for v in some])
        assert found[f"dpg_{category}"].extra == {name: ratio(v) for name, v in fine.items()}
    check_intervals(found)
    assert record.evidence.notes == ()
    assert (record.evidence.detector, record.off_protocol) == ("mplug-vqa-large", ())


def test_dpg_leaves_out_what_the_official_script_does(tmp_path):
    table = {**TABLE, "partiprompts97": [(1, "0", "entity - whole (cat)"), (2, "1", "other - x (")]}
    table["coco8"] = [*table["coco8"], (4, "0", "global - style (x)"), (5, "0", "smell (x)")]
    run = DPG(tmp_path, table)
    assert run.left_out == ["partiprompts97"]
    record = measure("dpg-bench", 3, *run.write())
    assert record.evidence.notes == (
        "left out, as by the official script: partiprompts97",
        "categories without a column: smell",
    )
    assert record.metrics["dpg_bench"].n == 8
    kept = [run.pictures[item] for item in ("7", "coco8")]
    means = [math.fsum(run.score(*image) for image in images) / 4 for images in kept]
    assert record.metrics["dpg_bench"].value == ratio(means)


def _append(text):
    return lambda run: run.details.append(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.details.pop(), r"coco8 has 1 answers to 2 questions on \(512, 512"),
        (lambda run: run.details.__delitem__(slice(-2, None)), "coco8 has 3 images; allowed: 4"),
        (lambda run: run.details.__delitem__(slice(-8, None)), "1 prompts have no picture, the fi"),
        (_append("a/9.png, (0, 0, 512, 512), Is it?, yes"), "line 29: unknown prompt '9'"),
        (_append("b/7.png, (0, 0, 512, 512), Is it?, yes"), "two pictures of 7: sets/a, b/7.png"),
        (_append("a/7.png, yes"), "line 29 is no answer: 'a/7.png, yes'"),
        (lambda run: run.details.reverse(), "has no question 'Is .*' at this place"),
        (lambda run: run.lines.pop(), "1 prompts have no score, the first is coco8"),
        (lambda run: run.lines.append(run.lines[0]), "prompt 'partiprompts97' is there twice"),
        (lambda run: run.lines.append(run.lines[0].replace("parti", "x")), "no scores by its an"),
        (
            lambda run: run.lines.__setitem__(0, run.lines[0].rpartition(", ")[0] + ", 0.123"),
            "line 1: the scores of partiprompts97 are not those of its answers",
        ),
        (lambda run: run.table.pop("7"), "dpg_bench.csv: 2 prompts; 3 are asked for"),
        (lambda run: run.table["7"].append((9, "x", "other - x (")), "line 8: invalid literal"),
    ],
)
def test_what_is_wrong_with_files_of_dpg_bench(tmp_path, change, message):
    run = DPG(tmp_path)
    change(run)
    with pytest.raises(DimoError, match=message) as caught:
        measure("dpg-bench", 3, *run.write())
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    results, table = DPG(tmp_path).write()
    (tmp_path / "run_detail.txt").unlink()
    with pytest.raises(DimoError, match=r"run_detail\.txt: cannot be read: No such file"):
        measure("dpg-bench", 3, results, table)
    with pytest.raises(DimoError, match=r"needs the prompts of the images \(dpg_bench\.csv\)"):
        measure("dpg-bench", 3, results, None)
    with pytest.raises(DimoError, match=r"dpg_bench\.csv: not a \.txt file|not a .txt file"):
        measure("dpg-bench", 3, table, table)


def test_a_detector_decides_its_own_metrics(tmp_path):
    path = tmp_path / "geneval2.toml"
    path.write_text(protocol_text("geneval2").replace('"geneval2_verb"', '"dpg_other"'))
    with pytest.raises(DimoError, match="the detector 'qwen3-vl-8b' decides geneval2, geneval2_am"):
        validate_file(path)


def test_the_command(geneval2, tmp_path, monkeypatch, capsys):
    results, prompts = write_geneval2(tmp_path, *geneval2)
    text = protocol_text("geneval2").replace("800", "6")
    (tmp_path / "geneval2.toml").write_text(text)
    words = ["eval", results, "--protocol", tmp_path / "geneval2.toml", "--prompts", prompts]
    words += ["--results", tmp_path / "results", "--name", "mine", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["dimo", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert not stop.value.code, said.err
    assert "Soft-TIFA GM" in said.out
    (record,), _ = load_all(tmp_path / "results")
    protocol = validate_file(tmp_path / "geneval2.toml")
    page = report_markdown(collect_report([record], [], [], protocols=[protocol], folder=tmp_path))
    header = next(line for line in page.splitlines() if line.startswith("| Method"))
    names = ["Soft-TIFA GM", "Soft-TIFA AM", "Object", "Attribute", "Count", "Position", "Verb"]
    assert [name for name in names if f"{name} (↑)" in header] == names
    assert "answers of `qwen3-vl-8b`" in page
    assert "resamples of the prompts" in page
