"""GenEval 2 and DPG-Bench: a model answers questions about images -> scores -> record.

dimo does not run the models that answer; it reads the files that the benchmarks' own scripts write,
checks that no answer is missing, and sums them up as these scripts do, in float64 and on their
scale from 0 to 100. A row of `DETECTORS` with a `reader` is such a model.
"""

import csv
import io
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.images.checks import Content
from bench.images.labels import labels_sha256
from bench.metrics.base import Score
from bench.protocol import Protocol
from bench.protocol.catalog import ANY, load
from bench.protocol.networks import DETECTORS
from bench.rows.rows import image_set_method
from bench.suites.base import ImageOrigin, Measured, Suite
from bench.suites.captions import prompts_path
from dimo.util.files import sha256_bytes
from dimo.util.schema import Origin, unique_keys

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """What the files of a benchmark add up to.

    Attributes:
        scores: By metric; a contribution is that of a prompt.
        counts: Number of images behind each metric.
        sha256: Hash of the file with the answers.
    """

    scores: Mapping[str, Score]
    counts: Mapping[str, int]
    sha256: str
    notes: tuple[str, ...] = ()


class AnswersSuite(Suite):
    """Scores of images by the answers to questions about them, which another program recorded."""

    one_folder = "the file of results"
    files_take = ("prompts",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        named, detector = self.protocol.prompts, self.protocol.detector
        assert named is not None
        assert detector is not None
        self._named, self._kind = named, DETECTORS[detector.name]
        self._path = prompts_path(self.protocol, self.assets.prompts)
        origin = Origin(str(self._path), f"give the official file {named.name}")
        self._text = _read(self._path, origin)
        self._sha256 = sha256_bytes(self._text.encode())
        if named.sha256 not in (ANY, self._sha256):
            raise origin.error(
                f"has sha256 {self._sha256[:12]}..., the protocol names {named.sha256[:12]}..."
            )

    @property
    def evidence(self) -> Mapping[str, str]:
        assert self.protocol.detector is not None
        return {
            "detector": self.protocol.detector.name,
            "detector_sha256": "",
            "prompts": self._named.name,
            "prompts_sha256": self._sha256,
        }

    def measure_paths(self, paths: Sequence[Path], origin: ImageOrigin) -> Measured | None:
        """Reads the file of results; incomplete ones are refused, also off-protocol."""
        start, (path,) = time.monotonic(), paths

        def scored() -> Measured:
            prompts = Origin(str(self._path), f"give the official file {self._named.name}")
            found: Answers = load(self._kind.reader)(path, self._text, prompts, self.protocol)
            numbers = np.arange(self.protocol.images.num_classes)
            labels = labels_sha256(numbers)
            content = Content(found.sha256, labels, paths=(str(path),), notes=found.notes)
            method = image_set_method(origin.name, origin.section, origin.num_steps)
            return self._measured(found.scores, found.counts, content, method, start)

        return self.on_first(scored)


def _read(path: Path, origin: Origin) -> str:
    """The text of a file, its bytes but for a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise origin.error(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise origin.error("not a text file") from error


def _json(text: str, origin: Origin, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise origin.error(f"{where} is not valid JSON: {error}") from error


def _share(points: _Floats, questions: _Floats) -> Score:
    """100 times the points of all questions per question, from the sums of each prompt, `[N]`.

    A ratio of two sums over prompts: its contributions are those of its linearization.
    """
    value = points.sum() / questions.sum()
    each = value + (points - value * questions) / questions.mean()
    return Score(100 * float(value), 100 * each)


def _mean(values: _Floats, extra: dict[str, float]) -> Score:
    return Score(100 * float(values.mean()), 100 * values, extra=extra)


SKILLS = ("object", "attribute", "count", "position", "verb")
_ATOM_KEYS = {"prompt": str, "atom_count": int, "vqa_list": list, "skills": list}
_LARGEST = 1.01  # a probability summed over tokens in low precision may exceed 1


def read_geneval2(path: Path, text: str, origin: Origin, protocol: Protocol) -> Answers:
    """Soft-TIFA of GenEval 2 (Kamath et al., arXiv:2512.16853).

    By evaluation.py and soft_tifa_analysis.py of facebookresearch/GenEval2: for each line of
    `geneval2_data.jsonl`, in order, the results have the list of its questions' probabilities of
    the right answer. Soft-TIFA AM is the mean over prompts of the arithmetic mean of a list,
    Soft-TIFA GM that of the geometric mean, 0 if one is 0; a skill is the mean over its questions
    in all prompts. The mean GM of the prompts with so many atoms is recorded with the GM.

    Args:
        path: What `evaluation.py --method soft_tifa_gm` (or `_am`: the same file) wrote.
        text: That of `geneval2_data.jsonl`; `origin` names it.

    Raises:
        DimoError: A file of another form, another number of prompts or answers than there are, an
            answer that is no probability, or answers of the method tifa.
    """
    prompts = _geneval2_prompts(text, origin, protocol)
    ours = Origin(str(path), "give what GenEval 2's evaluation.py wrote with --method soft_tifa_gm")
    source = _read(path, ours)
    lists = _json(source, ours, "the file")
    if not isinstance(lists, list) or not all(isinstance(answers, list) for answers in lists):
        raise ours.error("must be a list with a list of numbers for each prompt")
    if len(lists) != len(prompts):
        raise ours.error(f"answers for {len(lists)} prompts; there are {len(prompts)}")
    for number, (answers, prompt) in enumerate(zip(lists, prompts, strict=True), start=1):
        if len(answers) != len(prompt["skills"]):
            raise ours.error(
                f"prompt {number} has {len(answers)} answers to {len(prompt['skills'])} questions"
            )
        wrong = [a for a in answers if type(a) not in (int, float) or not 0 <= a <= _LARGEST]
        if wrong:
            raise ours.error(
                f"prompt {number} has the answer {ascii(wrong[0])[:40]}; allowed: from 0 to 1"
            )
    if all(isinstance(a, int) for answers in lists for a in answers):
        raise ours.error("every answer is 0 or 1, as --method tifa writes them")
    values = [np.array(answers, dtype=np.float64) for answers in lists]
    means = np.array([one.mean() for one in values])
    with np.errstate(divide="ignore"):
        geometric = np.array([np.exp(np.log(one).mean()) for one in values])
    atoms = np.array([prompt["atom_count"] for prompt in prompts])
    by_atoms = {
        f"atoms_{n}": 100 * float(geometric[atoms == n].mean()) for n in np.unique(atoms).tolist()
    }
    scores = {"geneval2": _mean(geometric, by_atoms), "geneval2_am": _mean(means, {})}
    for skill in SKILLS:
        asked = [np.array(prompt["skills"]) == skill for prompt in prompts]
        points = np.array([one[which].sum() for one, which in zip(values, asked, strict=True)])
        questions = np.array([which.sum() for which in asked], dtype=np.float64)
        if not questions.any():
            raise origin.error(f"no question of the skill {skill!r}")
        scores[f"geneval2_{skill}"] = _share(points, questions)
    return Answers(scores, dict.fromkeys(scores, len(prompts)), sha256_bytes(source.encode()))


def _geneval2_prompts(text: str, origin: Origin, protocol: Protocol) -> list[dict[str, Any]]:
    lines = text.rstrip().split("\n")
    if len(lines) != protocol.images.num_classes:
        raise origin.error(f"{len(lines)} prompts; {protocol.images.num_classes} are asked for")
    prompts = []
    for number, line in enumerate(lines, start=1):
        where, prompt = f"line {number}", _json(line, origin, f"line {number}")
        if not isinstance(prompt, dict) or prompt.keys() != _ATOM_KEYS.keys():
            raise origin.error(f"{where} must have the keys {', '.join(_ATOM_KEYS)}")
        for key, kind in _ATOM_KEYS.items():
            if type(prompt[key]) is not kind:
                raise origin.error(f"{where}: {key!r} is {ascii(prompt[key])[:80]}")
        if not prompt["skills"] or len(prompt["skills"]) != len(prompt["vqa_list"]):
            raise origin.error(f"{where} must have a skill for each of its questions")
        if unknown := [skill for skill in prompt["skills"] if skill not in SKILLS]:
            raise origin.error(
                f"{where}: unknown skill {ascii(unknown[0])[:80]}; allowed: {', '.join(SKILLS)}"
            )
        prompts.append(prompt)
    return prompts


CATEGORIES = ("global", "entity", "attribute", "relation", "other")
_COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
_DETAIL = re.compile(r"(.*), (\(\d+, \d+, \d+, \d+\)), (.*)")  # path, part of the picture, the rest


@dataclass(frozen=True)
class _Question:
    words: str
    parents: tuple[int, ...]  # numbers of the questions that must be answered "yes", too; 0: none
    category: str  # such as "attribute - color"


def read_dpg_bench(path: Path, text: str, origin: Origin, protocol: Protocol) -> Answers:
    """DPG-Bench (Hu et al., "ELLA", arXiv:2403.05135).

    By dpg_bench/compute_dpg_bench.py of TencentQQGYLab/ELLA. A picture is named by its prompt's
    `item_id` and holds the prompt's images side by side. `NAME_detail.txt` has the answer to each
    question on each image, `NAME.txt` the scores of the images of each picture and their mean. An
    image scores the fraction of its questions that are answered "yes" and whose parents are, in
    the order of the questions, so that what fails takes its children with it. DPG-Bench is the
    mean over pictures. A category, the first word of a question's `tuple`, is the fraction of
    "yes" among its questions in all prompts, without regard to parents and, as the script has it,
    on each picture's last image alone; finer categories are recorded beside it.

    The script skips the first line of the table, and leaves out a picture where a question depends
    on one that is not there, as in that line's prompt (ELLA's issue 61). So does this reader, with
    a note; where that question was asked after all, it counts.

    Args:
        path: `NAME.txt`, with `NAME_detail.txt` beside it.
        text: That of `dpg_bench.csv`; `origin` names it.

    Raises:
        DimoError: A file of another form, an unknown, missing or repeated picture, image or answer,
            or scores that contradict the answers.
    """
    table = _dpg_questions(text, origin, protocol)
    advice = "give the results .txt of compute_dpg_bench.py, its _detail.txt beside it"
    ours = Origin(str(path), advice)
    beside = path.with_name(path.name.replace(".txt", "_detail.txt"))
    details = Origin(str(beside), advice)
    if beside == path:
        raise ours.error("not a .txt file")
    written, source = _read(path, ours), _read(beside, details)
    pictures = _dpg_answers(source, table, details)
    if missing := [item for item in table if item not in pictures]:
        raise details.error(f"{len(missing)} prompts have no picture, the first is {missing[0]}")
    first, questions = next(iter(table.items()))
    number, question = next(iter(questions.items()))
    lines = next(iter(pictures[first].values()))
    if not any(line.startswith(f"{question.words}, ") for line in lines):
        del questions[number]
    each = protocol.images.num_images // protocol.images.num_classes
    judged = {
        item: _dpg_picture(item, questions, pictures[item], each, details)
        for item, questions in table.items()
    }
    scored = {item: one for item, one in judged.items() if one is not None}
    left_out = [item for item in table if item not in scored]
    notes = (f"left out, as by the official script: {', '.join(left_out)}",) * bool(left_out)
    firsts = {_first_word(one.category) for item in scored for one in table[item].values()}
    if others := sorted(firsts - {*CATEGORIES}):
        notes += (f"categories without a column: {', '.join(others)}",)
    scores = {item: one.scores for item, one in scored.items()}
    _check_dpg_scores(written, scores, each, ours)
    found = {"dpg_bench": _mean(np.array([np.mean(one) for one in scores.values()]), {})}
    counts = {"dpg_bench": each * len(scored)}
    for category in CATEGORIES:
        by_name: dict[str, list[bool]] = {}
        sums = []
        for item, one in scored.items():
            names = [question.category for question in table[item].values()]
            answers = [
                (name, yes)
                for name, yes in zip(names, one.last, strict=True)
                if _first_word(name) == category
            ]
            for name, yes in answers:
                by_name.setdefault(name, []).append(yes)
            sums.append((sum(yes for _, yes in answers), len(answers)))
        if not by_name:
            raise origin.error(f"no question of the category {category!r}")
        score = _share(*np.array(sums, dtype=np.float64).T)
        score.extra.update({name: 100 * float(np.mean(by_name[name])) for name in sorted(by_name)})
        found[f"dpg_{category}"], counts[f"dpg_{category}"] = score, len(scored)
    return Answers(found, counts, sha256_bytes(source.encode()), notes)


def _dpg_questions(
    text: str, origin: Origin, protocol: Protocol
) -> dict[str, dict[int, _Question]]:
    """By prompt and number, in the order of the table."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
        raise origin.error(f"no column {', '.join(missing)}")
    table: dict[str, dict[int, _Question]] = {}
    for row in rows:
        where = f"line {rows.line_num}"
        try:
            number = int(row["proposition_id"])
            parents = tuple(int(part) for part in row["dependency"].split(","))
            category = row["tuple"].split("(")[0].strip()
            question = _Question(row["question_natural_language"], parents, category)
        except (ValueError, TypeError, AttributeError) as error:
            raise origin.error(f"{where}: {error}") from error
        table.setdefault(row["item_id"], {})[number] = question
    if len(table) != protocol.images.num_classes:
        raise origin.error(f"{len(table)} prompts; {protocol.images.num_classes} are asked for")
    return table


def _dpg_answers(
    text: str, known: Mapping[str, Any], origin: Origin
) -> dict[str, dict[str, list[str]]]:
    """Prompt -> part of the picture -> "question, answer", in order."""
    pictures: dict[str, dict[str, list[str]]] = {}
    names: dict[str, str] = {}
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        if (found := _DETAIL.fullmatch(line)) is None:
            raise origin.error(f"line {number} is no answer: {ascii(line)[:80]}")
        picture, part, rest = found.groups()
        item = re.split(r"[\\/]", picture)[-1].split(".")[0]
        if item not in known:
            raise origin.error(f"line {number}: unknown prompt {ascii(item)[:80]}")
        if names.setdefault(item, picture) != picture:
            raise origin.error(f"two pictures of {item}: {names[item]} and {picture}")
        pictures.setdefault(item, {}).setdefault(part, []).append(rest)
    return pictures


@dataclass(frozen=True)
class _Picture:
    scores: list[float]  # of each image
    last: list[bool]  # whether each question is answered "yes" on the last image


def _dpg_picture(
    item: str,
    questions: Mapping[int, _Question],
    parts: Mapping[str, Sequence[str]],
    each: int,
    origin: Origin,
) -> _Picture | None:
    """The images of one prompt; None if a question depends on one that is not there."""
    scores, answers = list[float](), list[bool]()
    for part, lines in parts.items():
        if len(lines) != len(questions):
            raise origin.error(
                f"{item} has {len(lines)} answers to {len(questions)} questions on {part}"
            )
        for line, question in zip(lines, questions.values(), strict=True):
            if not line.startswith(f"{question.words}, "):
                raise origin.error(f"{item} has no question {ascii(line)[:80]} at this place")
        words = [question.words for question in questions.values()]
        answers = [line[len(q) + 2 :] == "yes" for line, q in zip(lines, words, strict=True)]
        holds = dict(zip(questions, answers, strict=True))
        try:
            for number, question in questions.items():
                holds[number] &= all(holds[parent] for parent in question.parents if parent)
        except KeyError:
            return None
        scores.append(sum(holds.values()) / len(holds))
    if len(parts) != each:
        raise origin.error(f"{item} has {len(parts)} images; allowed: {each}")
    return _Picture(scores, answers)


def _first_word(category: str) -> str:
    """`attribute` of `attribute - color`."""
    return category.split("-")[0].strip()


def _check_dpg_scores(
    text: str, scores: Mapping[str, Sequence[float]], each: int, origin: Origin
) -> None:
    """The lines of pictures, before the summary, must be those that the answers give."""
    seen: set[str] = set()
    pictures = re.split("^Model: ", text, maxsplit=1, flags=re.MULTILINE)[0]
    for number, line in enumerate(pictures.rstrip("\n").split("\n"), start=1):
        picture, *numbers = line.rsplit(", ", each + 1)
        item = re.split(r"[\\/]", picture)[-1].split(".")[0]
        if item not in scores or item in seen:
            state = "is there twice" if item in seen else "has no scores by its answers"
            raise origin.error(f"line {number}: prompt {ascii(item)[:80]} {state}")
        seen.add(item)
        try:
            written = [float(value) for value in numbers]
        except ValueError:
            written = []
        wanted = [*scores[item], float(np.mean(scores[item]))]
        if len(written) != len(wanted) or not np.allclose(written, wanted, rtol=0, atol=1e-9):
            raise origin.error(f"line {number}: the scores of {item} are not those of its answers")
    if missing := [item for item in scores if item not in seen]:
        raise origin.error(f"{len(missing)} prompts have no score, the first is {missing[0]}")
