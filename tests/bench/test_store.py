"""The folder of results: append-only, whole files only, many writers, kill -9."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.record import ResultRecord, record_to_json
from bench.store import append, load_all
from dimo.errors import DimoError

RecordMaker = Callable[..., ResultRecord]
ROOT = Path(__file__).parents[2]


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


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DimoError, match=r"no results folder .*; make a first result with"):
        load_all(tmp_path / "nowhere")


WRITER = """
import dataclasses, sys, uuid
from bench.record import record_from_json, seal
from bench.store import append
template = record_from_json(open(sys.argv[1]).read(), source="template")
for _ in range(int(sys.argv[3])):
    record = seal(dataclasses.replace(template, run_id=uuid.uuid4().hex))
    print(append(record, sys.argv[2]).name, flush=True)
"""


def writer(template: Path, folder: Path, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(template), str(folder), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_writers_lose_nothing(make_record: RecordMaker, tmp_path: Path) -> None:
    template, folder = tmp_path / "template.json", tmp_path / "results"
    template.write_text(record_to_json(make_record()))
    writers = [writer(template, folder, 40) for _ in range(2)]
    names = [name for process in writers for name in process.communicate()[0].split()]
    records, problems = load_all(folder)
    assert len(set(names)) == len(records) == 80
    assert problems == []
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_a_killed_writer_leaves_no_half_record(make_record: RecordMaker, tmp_path: Path) -> None:
    template, folder = tmp_path / "template.json", tmp_path / "results"
    template.write_text(json.dumps(json.loads(record_to_json(make_record()))))
    moments, finished = random.Random(0), 0
    for _ in range(6):
        process = writer(template, folder, 100_000)
        assert process.stdout is not None
        process.stdout.readline()  # it has started writing
        finished += 1
        time.sleep(moments.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        finished += len(process.communicate()[0].splitlines())
    records, problems = load_all(folder)
    assert problems == []
    assert 0 <= len(records) - finished <= 6  # each may have published one and not said so
