"""What a log gets where stderr is no terminal."""

import os
import re
import signal

import pytest

from dimo.errors import DimoError
from dimo.util import terminal
from dimo.util.terminal import Stopped, asked_to_stop, signals_wait, stopped_by_signals


@pytest.mark.parametrize(("every", "count"), [(0.0, 3), (3600.0, 0)])
def test_a_log_gets_a_line_now_and_then_in_place_of_a_bar(every, count, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "_LOG_EVERY", every)
    with terminal.training_bar("train digits", 30, 8) as on_step:
        for step in (10, 20, 30):
            on_step(step, {"loss": 1.5})
    lines = [line for line in capsys.readouterr().err.splitlines() if "train digits:" in line]
    assert len(lines) == count
    if lines:
        assert lines[0].startswith("train digits: 10/30 steps ")
        assert " images/s loss 1.500" in lines[0]


def test_work_is_logged_too(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "_LOG_EVERY", 0.0)
    with terminal.work_bar() as progress:
        progress("MaskGIT (4)", 500, 2000, "images")
    assert "MaskGIT (4): 500/2,000 images" in capsys.readouterr().err


def test_the_last_line_of_a_log_keeps_the_count(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with terminal.training_bar("distil digits", 12_000, 128) as on_step:
        on_step(12_000, {"gradient": 0.94, "grad_norm": 19.963, "auxiliary_loss": 2.186})
    lines = [line for line in capsys.readouterr().err.splitlines() if "distil digits" in line]
    assert "12000/12000 steps" in lines[-1]


@pytest.mark.parametrize("width", [80, 160])
def test_a_bar_shows_rate_and_time_left_at_any_width(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with terminal.training_bar("distil digits", 250, 128) as on_step:
        for step in (100, 250):
            on_step(step, {"gradient": 0.94, "grad_norm": 19.963, "auxiliary_loss": 2.186})
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    last = [line for line in re.split(r"[\r\n]+", plain) if "distil digits" in line][-1]
    assert re.search(r"^distil digits ━+ 250/250 steps [\d,]+ images/s .*left \d:\d\d:\d\d", last)
    assert ("auxiliary_loss 2.186" in last) == (width == 160)


def _lost(other):
    """A signal that lands in an import or a finalizer becomes another exception."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except Stopped:
        raise other from None


@pytest.mark.parametrize("other", [RuntimeError, DimoError, KeyboardInterrupt, SystemExit])
def test_a_signal_ends_as_itself_whatever_its_exception_was_made_into(other):
    with pytest.raises(Stopped) as stopped, stopped_by_signals():
        _lost(other)
    assert stopped.value.code == 143
    assert asked_to_stop() == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_loop_that_saves_is_not_interrupted_and_a_later_signal_ends_it(monkeypatch, capfd):
    ended, clock = [], iter([0.0, 0.5, 2.0])
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with stopped_by_signals(), signals_wait():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            assert ended == []
            os.kill(os.getpid(), number)
        assert asked_to_stop() == signal.SIGTERM
        assert ended == [128 + signal.SIGUSR1]
    assert "saving, then stopping" in capfd.readouterr().err


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
