"""`[NAME=]MODEL[@STEPS]`: what is a name, what is a path, what are steps."""

import pytest

from bench.rows.rows import Candidate, parse_candidate
from dimo.errors import DimoError

READ = {
    "runs/mine": Candidate("runs/mine"),
    "di4c=runs/mine": Candidate("runs/mine", "di4c"),
    "runs/mine@2,4": Candidate("runs/mine", None, (2, 4)),
    "di4c-d=runs/mine@4": Candidate("runs/mine", "di4c-d", (4,)),
    "Di[M]O, ours = runs/mine@1": Candidate("runs/mine", "Di[M]O, ours", (1,)),
    "mine@ 2, 4,2": Candidate("mine", None, (2, 4)),
    "a=b=c": Candidate("b=c", "a"),
    "a@b@4": Candidate("a@b", None, (4,)),
    "./a=b": Candidate("./a=b"),
    "x=./a=b@4": Candidate("./a=b", "x", (4,)),
    "user@host/run": Candidate("user@host/run"),
    "user@host/run@16": Candidate("user@host/run", None, (16,)),
    "maskgit-di4c-d.pth@4": Candidate("maskgit-di4c-d.pth", None, (4,)),
}
THERE = {
    "here@2": Candidate("here@2"),
    "here@2@4": Candidate("here@2", None, (4,)),
    "here/@2": Candidate("here/", None, (2,)),
    "x=here@2": Candidate("here@2", "x"),
    "k=v": Candidate("k=v"),
    "k=v@2": Candidate("k=v", None, (2,)),
    "x=k=v@2": Candidate("k=v", "x", (2,)),
    "k=here": Candidate("here", "k"),
}
BAD = {
    "": "'' names no model",
    "@4": "names no model",
    "x=": "names no model",
    "x=@4": "names no model",
    "=run": "has an empty name",
    "run@": "steps '' of 'run@' are not allowed",
    "run@0": "steps '0' of 'run@0' are not allowed",
    "run@2,": "steps '2,' of",
    "run@2;4": "give whole numbers from 1",
    "run@-1": "are not allowed",
    "run@²": "are not allowed",
    "x=run@four": "steps 'four' of 'x=run@four'",
}


@pytest.mark.parametrize("text", READ)
def test_what_is_read(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_candidate(text) == READ[text]


@pytest.mark.parametrize("text", THERE)
def test_a_path_that_exists_is_that_path(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("here", "here@2", "k=v"):
        (tmp_path / name).mkdir()
    assert parse_candidate(text) == THERE[text]


@pytest.mark.parametrize("text", BAD)
def test_what_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DimoError) as error:
        parse_candidate(text)
    assert BAD[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_that_no_file_can_have_is_no_crash():
    assert parse_candidate("x" * 5000) == Candidate("x" * 5000)
