"""Help of every command at 80 columns: nothing is cut, and every example runs as it stands."""

import re
import shlex
import subprocess
import sys

import pytest
from typer.main import get_command

from dimo.cli import app
from dimo.samplers import SAMPLERS, teacher_samplers

ROOT = get_command(app)


def _commands(command, path=()):
    """Every command by the words that call it, groups included."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*path, name))


COMMANDS = dict(_commands(ROOT))


@pytest.fixture
def help_of(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")

    def call(*path):
        app([*path, "--help"], standalone_mode=False)
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_no_option_is_cut_and_every_example_parses(help_of, path):
    command, text = COMMANDS[path], help_of(*path)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for param in command.params:
        if param.param_type_name == "option" and not param.hidden:
            assert {*param.opts, *param.secondary_opts} <= set(re.split(r"[\s,]+", text))
    if path in {(), ("protocols",), ("results",), ("weights",)}:
        return
    lines = re.search(r"^Examples?:\n((?:  .+\n?)+)", text, re.MULTILINE)[1].splitlines()
    for line in lines:
        words = shlex.split(line)
        assert words[0] in ("dimo", "torchrun"), line
        arguments = words[words.index("dimo") + 1 :]
        assert tuple(arguments[: len(path)]) == path, line
        command.make_context("dimo", arguments[len(path) :])  # raises what the command line would


def test_what_one_needs_comes_first(help_of):
    names = re.findall(r"^  ([a-z]+) ", help_of().partition("Commands:")[2], re.MULTILINE)
    assert names[:7] == ["demo", "sample", "bench", "report", "law", "distill", "eval"]
    assert sorted(names) == sorted(ROOT.commands)
    text = help_of("bench")
    sections = re.findall(r"^([A-Z][a-z ]+):$", text, re.MULTILINE)
    assert sections == ["Options", "Sampler settings", "Weights and references", "Output"] + [
        "Advanced",
        "Examples",
    ]
    first = re.findall(r"^  --([a-z-]+)", text.partition("Sampler settings:")[0], re.MULTILINE)
    assert first == ["teacher", "student", "baseline", "steps", "student-steps", "protocol"] + [
        "num-images",
        "results",
        "dry-run",
    ]


@pytest.mark.parametrize("command", ["bench", "sample"])
def test_every_sampler_and_schedule_is_named(help_of, command):
    words = set(re.split(r"[\s,;.]+", help_of(command)))
    assert words >= {*teacher_samplers()}
    assert words >= {name for sampler in SAMPLERS.values() for name in sampler.schedules}


def test_help_imports_nothing_heavy():
    """So `dimo --help` takes 0.1 s: rich alone takes 0.2 s, torch a second and more."""
    code = (
        "import sys; from dimo.cli import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "assert 'rich' not in sys.modules\n"
        "from typer.main import get_command\n"
        "for name in get_command(app).commands: app([name, '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'pandas', 'rich'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
