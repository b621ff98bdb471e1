"""What a log gets where stderr is no terminal."""

import pytest

from dimo.util import terminal


@pytest.mark.parametrize(("every", "count"), [(0.0, 3), (3600.0, 0)])
def test_a_log_gets_a_line_now_and_then_in_place_of_a_bar(every, count, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "_LOG_EVERY", every)
    with terminal.training_bar("train digits", 30, 8) as on_step:
        for step in (10, 20, 30):
            on_step(step, {"loss": 1.5})
    lines = [line for line in capsys.readouterr().err.splitlines() if "train digits:" in line]
    assert len(lines) == count
    if lines:
        assert lines[0].startswith("train digits: 10/30 steps loss 1.500 ")
        assert "images/s" in lines[0]


def test_work_is_logged_too(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "_LOG_EVERY", 0.0)
    with terminal.work_bar() as progress:
        progress("MaskGIT (4)", 500, 2000, "images")
    assert "MaskGIT (4): 500/2,000 images" in capsys.readouterr().err
