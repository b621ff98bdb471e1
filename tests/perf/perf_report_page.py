"""`dimo report --format html` on 2,000 records: seconds of the whole command, all on one core, and
bytes. `make perf`.
"""

import dataclasses
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.records.record import ResultRecord, load_record, record_to_json, seal

RESULTS = Path(__file__).parents[2] / "results"
COUNT, MOST_SECONDS, MOST_BYTES = 2000, 10.0, 5e6


def many(count: int) -> list[ResultRecord]:
    """The shipped rows over and over, each time under another name, with other settings."""
    shipped = [load_record(path) for path in sorted(RESULTS.glob("*.json"))]
    shipped = [record for record in shipped if "ablation" not in record.method.training]
    made = []
    for number in range(count):
        record = shipped[number % len(shipped)]
        method = dataclasses.replace(
            record.method, name=f"{record.method.name} {number // 40}", temperature=number / 1000
        )
        changes = {"run_id": f"{number:08x}" + "0" * 24, "method": method}
        made.append(seal(dataclasses.replace(record, **changes)))
    return made


@pytest.mark.slow
def test_two_thousand_records_make_a_page_in_seconds(tmp_path: Path) -> None:
    for record in many(COUNT):
        (tmp_path / f"{record.run_id}.json").write_text(record_to_json(record))
    page = tmp_path / "report.html"
    command = [sys.executable, "-m", "dimo", "report", "--format", "html"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, "--results", str(tmp_path), "--out", str(page)], check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = page.stat().st_size
    print(
        f"\n{COUNT:,} records: {seconds:.1f} s of a core (at most {MOST_SECONDS:g}), {wall:.1f} s "
        f"on the clock, {size / 1e6:.2f} MB (at most {MOST_BYTES / 1e6:g})"
    )
    assert page.read_text().count('<tbody class="r">') == COUNT
    assert seconds <= MOST_SECONDS
    assert size <= MOST_BYTES
