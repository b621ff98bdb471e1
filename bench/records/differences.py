"""Where two records differ: in what was measured, and in what they were measured with."""

from typing import Any

from bench.records.record import ResultRecord, plain_content

# names of a run, not of its circumstances; metrics have tables of their own
_LEFT_OUT = ("format", "run_id", "created", "content_sha256", "seconds", "metrics")
_MEASURED = ("images_per_second", "seconds_per_batch", "peak_memory_bytes")
_CIRCUMSTANCES = (
    "revision.",
    "packages.",
    "speed.device",
    "speed.batch_size",
    "method.nfe",
    "method.token_counts",
)


def differences(first: ResultRecord, second: ResultRecord) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> its value in both, None where it has none; metrics and speeds are left out."""
    left, right = flat(first), flat(second)
    return {
        key: (left.get(key), right.get(key))
        for key in {**left, **right}
        if left.get(key) != right.get(key) and key.partition(".")[2] not in _MEASURED
    }


def circumstances(found: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Of `differences`, those that may explain another value: code, packages, device, tokens."""
    return {key: values for key, values in found.items() if key.startswith(_CIRCUMSTANCES)}


def flat(record: ResultRecord) -> dict[str, Any]:
    """Dotted key -> value of everything that a record says of its circumstances."""
    return _flat(plain_content(record), "")


def _flat(content: dict[str, Any], path: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        where = f"{path}{key}"
        if where in _LEFT_OUT:
            continue
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{where}.")
        else:
            flat[where] = value
    return flat
