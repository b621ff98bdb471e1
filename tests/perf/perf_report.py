"""Seconds of one core that `dimo report` takes on two thousand records, start to end."""

import dataclasses
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from bench.records.record import load_record, record_to_json, seal

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "results" / "20261121T034207Z-digits-maskgit-8-d6036e6c.json"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two thousand records of one protocol, each with settings of its own."""
    folder = tmp_path_factory.mktemp("results")
    record = load_record(RECORD)
    for number in range(2000):
        method = dataclasses.replace(record.method, guidance_scale=1 + number / 1000)
        identity = f"{number:08x}{record.run_id[8:]}"
        made = seal(dataclasses.replace(record, run_id=identity, method=method))
        (folder / f"{number}.json").write_text(record_to_json(made))
    return folder


@pytest.mark.parametrize(
    ("name", "aim"), [("markdown", 3.0), ("latex", 3.0), ("csv", 3.0), ("json", 5.0)]
)
def test_two_thousand_records(results, tmp_path, name, aim):
    command = [sys.executable, "-m", "dimo", "report", "--results", results, "-f", name]
    seconds = []
    for _ in range(3):
        start = _seconds_of_children()
        subprocess.run([*command, "-o", tmp_path / name], cwd=ROOT, check=True, capture_output=True)
        seconds.append(_seconds_of_children() - start)
    size = (tmp_path / name).stat().st_size / 1e6
    print(f"\n{name}: {min(seconds):.2f} s, {size:.1f} MB (aim: {aim:g} s)")
    assert min(seconds) <= aim


def _seconds_of_children():
    """What finished child processes computed: the wait on an idle machine, whatever else runs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
