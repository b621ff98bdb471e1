"""Where two records differ, other than in metrics and speed."""

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
    """Dotted key -> its value in each record, None if missing; without metrics and speeds."""
    left, right = flat(first), flat(second)
    return {
        key: (left.get(key), right.get(key))
        for key in {**left, **right}
        if left.get(key) != right.get(key) and key.partition(".")[2] not in _MEASURED
    }


def circumstances(differing: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """The `differences` that may explain different values: code, packages, device, tokens."""
    return {key: values for key, values in differing.items() if key.startswith(_CIRCUMSTANCES)}


def flat(record: ResultRecord) -> dict[str, Any]:
    """Dotted key -> value of all fields that are compared."""
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
