"""Evaluation of masked-diffusion image generators under fixed protocols.

    table = bench.run(["digits@1,2,4", "runs/mine"], protocol="digits")
    record = bench.evaluate("samples/", protocol="imagenet256-adm", reference="reference.npz")
    bench.compare(record, "3ed6")

Modules are imported on first use: `import bench` loads no heavy library.
"""

__all__ = [
    "Assets",
    "Protocol",
    "ResultRecord",
    "compare",
    "evaluate",
    "load_protocol",
    "load_results",
    "records_frame",
    "run",
]

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.protocol import Protocol, load_protocol
    from bench.records.compare import compare
    from bench.records.record import ResultRecord
    from bench.runner import evaluate, load_results, records_frame, run
    from bench.suites.base import Assets

_MODULES = {
    "Assets": "bench.suites.base",
    "Protocol": "bench.protocol",
    "ResultRecord": "bench.records.record",
    "compare": "bench.records.compare",
    "load_protocol": "bench.protocol",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bench' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "bench.runner")), name)


def __dir__() -> list[str]:
    return __all__
