"""A report format registered from outside the package is one that `dimo report` writes."""

from pathlib import Path

import pytest

from bench.report import FORMATS, Report
from dimo.cli.app import app

RESULTS = Path(__file__).parents[2] / "results"


def names_only(report: Report) -> str:
    return "".join(f"{name}\n" for part in report.protocols for name in part.frame["method"])


def test_a_new_format_is_one_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FORMATS, "names", names_only)
    arguments = ["report", "-f", "names", "--protocol", "digits", "--results", str(RESULTS)]
    app(arguments, standalone_mode=False)
    names = capsys.readouterr().out.splitlines()
    assert {"MaskGIT", "Di[M]O"} <= {name.partition(" (")[0] for name in names}
