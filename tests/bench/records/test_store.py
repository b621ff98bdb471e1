"""The folder of results: append-only, whole files only, many writers, kill -9."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.records.record import ResultRecord, record_to_json
from bench.records.store import append, load_all, load_contributions
from dimo.errors import DimoError

RecordMaker = Callable[..., ResultRecord]
Forks = Callable[..., tuple[list[int], str, str]]
ROOT = Path(__file__).parents[3]


def test_file_names_say_what_is_inside(make_record: RecordMaker, tmp_path: Path) -> None:
    path = append(make_record("Di[M]O (r = 0.6)", num_steps=1, number=0xABC), tmp_path / "new")
    assert path == tmp_path / "new" / "20260102T030448Z-handwriting-dimo-r-0-6-1-00000abc.json"
    assert load_all(tmp_path / "new")[0][0].method.name == "Di[M]O (r = 0.6)"
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["../../up", "a/b\\c", "\u96ea\n", "x" * 10_000, "-", ".json"])
def test_no_name_leaves_the_folder(make_record: RecordMaker, tmp_path: Path, name: str) -> None:
    path = append(make_record(name, num_steps=None), tmp_path)
    assert path.parent == tmp_path
    assert len(path.name) < 120
    assert load_all(tmp_path)[0][0].method.name == name


def test_nothing_is_overwritten(make_record: RecordMaker, tmp_path: Path) -> None:
    path = append(make_record(), tmp_path)
    text = path.read_text()
    with pytest.raises(DimoError, match="exists already; results are append-only"):
        append(make_record(), tmp_path)
    assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # and no temporary file is left


def test_without_hard_links(
    make_record: RecordMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    path = append(make_record(), tmp_path)
    with pytest.raises(DimoError, match="exists already"):
        append(make_record(), tmp_path)
    assert path.read_text() == record_to_json(make_record())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written(make_record: RecordMaker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DimoError, match=r"cannot write .*; free space or choose another folder"):
        append(make_record(), tmp_path / "file" / "results")


def test_records_come_oldest_first(make_record: RecordMaker, tmp_path: Path) -> None:
    for number in (30, 10, 20):
        append(make_record(f"z{60 - number}", number=number), tmp_path)
    records, problems = load_all(tmp_path)
    assert [record.created[17:19] for record in records] == ["10", "20", "30"]
    assert problems == []


def test_bad_files_are_named_and_left_out(make_record: RecordMaker, tmp_path: Path) -> None:
    good = append(make_record(number=1), tmp_path)
    (tmp_path / "a-half.json").write_text(good.read_text()[:200])
    (tmp_path / "b-empty.json").write_text("")
    (tmp_path / "c-foreign.json").write_text('{"accuracy": 1}')
    (tmp_path / "d-newer.json").write_text(good.read_text().replace('"format": 1', '"format": 9'))
    (tmp_path / "e-edited.json").write_text(good.read_text().replace("0.45", "0.15"))
    (tmp_path / "f-folder.json").mkdir()
    (tmp_path / "g\nline.json").write_text("[]")
    (tmp_path / "z-copy.json").write_text(good.read_text())
    (tmp_path / ".hidden.json").write_text("")
    (tmp_path / "README.md").write_text("")
    records, problems = load_all(tmp_path)
    assert [record.run_id for record in records] == [make_record(number=1).run_id]
    expected = [
        ("a-half.json", "not valid JSON"),
        ("b-empty.json", "not valid JSON"),
        ("c-foreign.json", "unknown key 'accuracy'"),
        ("d-newer.json", "'format' is 9"),
        ("e-edited.json", "edited or damaged"),
        ("f-folder.json", "cannot be read: Is a directory"),
        ("g\\nline.json", "must be a table"),
        ("z-copy.json", f"the same run as {good.name}"),
    ]
    assert len(problems) == len(expected)
    for problem, (name, said) in zip(problems, expected, strict=True):
        assert name in problem
        assert said in problem
        assert "\n" not in problem


def test_more_bad_files(make_record: RecordMaker, tmp_path: Path) -> None:
    good = append(make_record(number=1), tmp_path)
    (tmp_path / "a-latin.json").write_bytes(good.read_bytes().replace(b"MaskGIT", b"M\xe4sk"))
    (tmp_path / "b-loop.json").symlink_to("c-loop.json")
    (tmp_path / "c-loop.json").symlink_to("b-loop.json")
    (tmp_path / "d-dangling.json").symlink_to("nowhere.json")
    (tmp_path / "e-huge.json").write_text("[" * 5_000_000)
    with (tmp_path / "f-sparse.json").open("wb") as file:
        file.truncate(40 * 2**30)
    os.mkfifo(tmp_path / "g-pipe.json")  # whoever opens it waits for ever
    (tmp_path / "h-nan.json").write_text(good.read_text().replace("0.45", "NaN"))
    (tmp_path / "i-twice.json").write_text(good.read_text().replace("{", '{"format": 1,', 1))
    records, problems = load_all(tmp_path)
    assert len(records) == 1
    expected = [
        ("a-latin.json", "not a text file"),
        ("b-loop.json", "cannot be read: Too many levels of symbolic links"),
        ("c-loop.json", "cannot be read: Too many levels of symbolic links"),
        ("d-dangling.json", "cannot be read: No such file"),
        ("e-huge.json", "not valid JSON"),
        ("f-sparse.json", "42,949,672,960 bytes"),
        ("g-pipe.json", "not a regular file"),
        ("h-nan.json", "must be a finite number"),
        ("i-twice.json", "key 'format' is written twice"),
    ]
    for problem, (name, said) in zip(problems, expected, strict=True):
        assert name in problem
        assert said in problem
        assert "\n" not in problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(make_record: RecordMaker, tmp_path: Path) -> None:
    append(make_record(number=1), tmp_path).chmod(0)
    records, problems = load_all(tmp_path)
    assert records == []
    assert "Permission denied" in problems[0]


def test_what_killed_writers_left_is_removed_when_no_writer_can_be_at_it(
    make_record: RecordMaker, tmp_path: Path
) -> None:
    kept = append(make_record(number=1), tmp_path, b"npz")
    left = [tmp_path / f".{kept.name}.a1.tmp", tmp_path / "contributions" / ".ab.npz.x_.tmp"]
    own = [tmp_path / ".notes.tmp", tmp_path / "contributions" / "ab.npz.tmp"]
    for path in left + own:
        path.write_text("half")
    append(make_record(number=2), tmp_path)
    assert all(path.exists() for path in left + own)  # somebody may be writing them now
    for path in left + own:
        os.utime(path, (time.time() - 4000,) * 2)
    assert load_all(tmp_path)[1] == []
    append(make_record(number=3), tmp_path)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in own)
    assert len(load_all(tmp_path)[0]) == 3


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DimoError, match=r"no results folder .*; make a first result with"):
        load_all(tmp_path / "nowhere")


# a real writer in a process of its own: says each record that it has finished
WRITER = """
import dataclasses, sys, uuid
from bench.records.record import record_from_json, seal
from bench.records.store import append
from dimo.util.files import sha256_bytes
template = record_from_json(open(sys.argv[1]).read(), source="template")
for number in range(int(sys.argv[3])):
    run_id = uuid.uuid4().hex
    npz = run_id.encode() * 2000
    evidence = dataclasses.replace(template.evidence, contributions_sha256=sha256_bytes(npz))
    record = seal(dataclasses.replace(template, run_id=run_id, evidence=evidence))
    print(append(record, sys.argv[2], npz).name, run_id, flush=True)
"""


@pytest.fixture
def template() -> Path:
    """A real record of this repository, with evidence."""
    return next((ROOT / "results").glob("*-16e15cc0.json"))


def writer(template: Path, folder: Path, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(template), str(folder), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_writers_lose_nothing(template: Path, tmp_path: Path) -> None:
    writers = [writer(template, tmp_path, 40) for _ in range(2)]
    said = [line.split() for process in writers for line in process.communicate()[0].splitlines()]
    records, problems = load_all(tmp_path)
    assert len(records) == len(said) == 80
    assert problems == []
    assert {record.run_id for record in records} == {run_id for _, run_id in said}
    for record in records:
        assert load_contributions(record, tmp_path) == record.run_id.encode() * 2000
    names = {path.name for path in tmp_path.iterdir()} - {"contributions"}
    assert names == {name for name, _ in said}  # and no temporary file
    assert len(list((tmp_path / "contributions").iterdir())) == 80


def test_a_killed_writer_leaves_no_half_record(template: Path, tmp_path: Path) -> None:
    """SIGKILL at 20 random moments, two writers at once; what was finished is there, and whole."""
    moments, finished, kills = random.Random(0), set(), 0
    while kills < 20:
        pair = [writer(template, tmp_path, 100_000) for _ in range(2)]
        for process in pair:
            assert process.stdout is not None
            finished.add(process.stdout.readline().split()[1])  # it has started writing
        for process in pair:
            time.sleep(moments.uniform(0, 0.05))
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        for process in pair:
            lines = process.communicate()[0].splitlines()
            finished |= {line.split()[1] for line in lines if len(line.split()) == 2}
    records, problems = load_all(tmp_path)
    assert problems == []
    found = {record.run_id for record in records}
    assert finished <= found
    assert len(found - finished) <= kills  # each may have published one and not said so
    for record in records:
        assert load_contributions(record, tmp_path) == record.run_id.encode() * 2000


@pytest.mark.slow
def test_two_benchmarks_at_once(forks: Forks, few_digits: Path, tmp_path: Path) -> None:
    dimo = Path(sys.executable).with_name("dimo")
    command = [dimo, "bench", "--protocol", few_digits, "--steps", "1"]
    command += ["--results", tmp_path / "results"]
    codes, _, err = forks(command, ROOT, [dict(os.environ)] * 2)
    assert codes == [0, 0], err
    records, problems = load_all(tmp_path / "results")
    assert problems == []
    assert len(records) == 6  # real data, tokenizer, teacher
    for record in records:
        load_contributions(record, tmp_path / "results")
    by_name: dict[str, list[ResultRecord]] = {}
    for record in records:
        by_name.setdefault(record.method.name, []).append(record)
    for first, second in by_name.values():
        assert first.metrics == second.metrics  # to the bit
