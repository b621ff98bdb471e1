"""Records that are the same on every machine and at any time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.protocol import Protocol, protocol_sha256, validate_file
from bench.records.provenance import Revision
from bench.records.record import MethodInfo, MetricValue, ProtocolInfo, ResultRecord, Speed, seal

RecordMaker = Callable[..., ResultRecord]


@pytest.fixture(scope="session")
def protocol() -> Protocol:
    """Like `digits`, but its own file, so that expected texts do not move with the shipped one."""
    return validate_file(Path(__file__).parent / "report" / "handwriting.toml")


@pytest.fixture
def make_record(protocol: Protocol) -> RecordMaker:
    """`make_record(name, section=..., fid=..., ...)` -> a sealed record of `protocol`.

    Keywords are fields of the record, its method, its speed or its revision, or `metrics`:
    value, or (value, low, high), by name.
    """

    def make(name: str = "MaskGIT", **changes: Any) -> ResultRecord:
        metrics = changes.pop("metrics", {"fid": (0.5, 0.45, 0.55)})
        number = changes.pop("number", 1)
        n = changes.pop("n", 5000)
        parts: dict[str, Any] = {
            "method": MethodInfo(
                name=name,
                section="Teacher",
                teacher="digits",
                sampler="confidence",
                num_steps=4,
                nfe=8,
                mask_schedule="arccos",
                token_counts=(1, 2, 4, 9),
                guidance_scale=2.0,
                temperature=1.0,
                choice_temperature=4.5,
                selected_by="lowest FID on seed 2000",
                weights_sha256="ab" * 32,
                training={},
            ),
            "speed": Speed(1234.5, 0.05, 64, None, "CPU, 2 cores"),
            "revision": Revision("0123456789abcdef0123456789abcdef01234567", False),
        }
        record = ResultRecord(
            format=1,
            run_id=f"{number:08x}" + "0" * 24,
            created=f"2026-01-02T03:04:{number % 60:02d}.000000Z",
            protocol=ProtocolInfo(protocol.name, protocol.version, protocol_sha256(protocol)),
            metrics={key: _metric(key, value, n) for key, value in metrics.items()},
            seed=1000,
            packages={"python": "3.11.0"},
            command="dimo bench --teacher digits",
            seconds=12.5,
            content_sha256="",
            **parts,
        )
        for part, whole in parts.items():
            names = {field.name for field in dataclasses.fields(whole)} & changes.keys()
            given = {field: changes.pop(field) for field in names}
            record = dataclasses.replace(record, **{part: dataclasses.replace(whole, **given)})
        return seal(dataclasses.replace(record, **changes))

    return make


def _metric(name: str, value: Any, n: int) -> MetricValue:
    point, low, high = value if isinstance(value, tuple) else (value, None, None)
    extra = {"ceiling": 0.98171} if name == "coverage" else {}
    return MetricValue(point, low, high, n, extra)
