"""A protocol: everything a benchmark fixes, read from one TOML file and named by its hash.

What the protocol fixes, the model may not choose. Two results are comparable when, and only when,
their protocols have the same `protocol_sha256`. Each key is explained in `protocols/README.md`.
"""

__all__ = [
    "Detector",
    "Extractor",
    "Images",
    "Metric",
    "Prompts",
    "Protocol",
    "Reference",
    "Scorer",
    "Seeds",
    "Uncertainty",
    "draft_protocol",
    "list_protocols",
    "load_protocol",
    "protocol_sha256",
    "protocol_text",
    "protocol_toml",
    "validate_file",
]

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from bench.protocol.catalog import ANY, METRICS, data_dir
from bench.protocol.checks import contradictions
from bench.protocol.networks import EXTRACTORS
from bench.protocol.schema import (
    Detector,
    Extractor,
    Images,
    Metric,
    Prompts,
    Protocol,
    Reference,
    Scorer,
    Seeds,
    Uncertainty,
    protocol_sha256,
)
from dimo.errors import DimoError, unknown_name
from dimo.util.schema import Origin, decode, encode

_FORMAT = 1
_NEXT_STEP = "the keys are explained in protocols/README.md"
_SEED = 2020  # of drafted metrics that draw subsets or projections
# of drafted protocols; LPIPS, whose weights must be fetched, is added by hand
_LOSSES = ("psnr", "ssim", "codebook_usage", "codebook_perplexity")
_KEPT = 10_000  # most real images that neighbours and kernels are compared with


def load_protocol(name_or_path: str | os.PathLike[str]) -> Protocol:
    """Reads a shipped protocol by name, or any `.toml` file by its path.

    Raises: DimoError: The name is unknown, or the file is not a valid protocol.
    """
    return validate_file(_find(name_or_path))


def list_protocols() -> list[Protocol]:
    """Every shipped protocol, sorted by name."""
    return [validate_file(path) for _, path in sorted(_shipped().items())]


def protocol_text(name_or_path: str | os.PathLike[str]) -> str:
    """The text of a valid protocol's file, comments included; errors as `load_protocol`."""
    path = _find(name_or_path)
    validate_file(path)
    return path.read_text(encoding="utf-8-sig")


def validate_file(path: str | os.PathLike[str]) -> Protocol:
    """Reads one file strictly.

    Raises: DimoError: Unreadable file, no TOML, an unknown, missing or ill-typed key, or values
        that contradict one another. The message names the file and the key.
    """
    origin = Origin(str(path), _NEXT_STEP)
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DimoError(
            f"cannot read {path}: {error.strerror}; list the protocols with: dimo protocols list"
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise origin.error(f"not valid TOML: {error}") from error
    version = data.get("format", _FORMAT)
    if isinstance(version, bool) or version != _FORMAT:
        raise origin.error(f"'format' must be {_FORMAT}, the one this dimo reads, not {version!r}")
    if isinstance(data.get("metrics"), list):
        data["metrics"] = [
            _gather_params(table, f"metrics[{index}]", origin)
            for index, table in enumerate(data["metrics"])
        ]
    protocol = decode(Protocol, data, origin)
    problem = next(contradictions(protocol, Path(path).stem), None)
    if problem is not None:
        raise origin.error(problem)
    object.__setattr__(protocol, "folder", Path(path).parent)
    return protocol


def draft_protocol(
    name: str,
    *,
    resolution: tuple[int, int],
    num_classes: int,
    num_real: int,
    extractor: str,
    num_images: int | None = None,
) -> Protocol:
    """A protocol for a custom data set that names no hashes of weights and reference file yet.

    It has every metric that the extractor and the reference `NAME.npz` suffice for, k = 3 nearest
    neighbours, the same number of images for each class, and for the row of the tokenizer what it
    loses, as supplementary metrics.

    Args:
        num_real: Number of real images.
        extractor: A key of `bench.protocol.networks.EXTRACTORS`.
        num_images: Number of images per row, rounded up to a multiple of `num_classes`; None:
            50,000, or 5,000 if there are fewer real images.

    Raises: DimoError: Unknown extractor, or values that contradict one another.
    """
    if extractor not in EXTRACTORS:
        raise unknown_name("extractor", extractor, EXTRACTORS)
    kind, kept = EXTRACTORS[extractor], min(num_real, _KEPT)
    wanted = num_images or (50_000 if num_real >= 50_000 else 5_000)
    count, selected = (-(-n // num_classes) * num_classes for n in (wanted, min(wanted, 2000)))
    params: dict[str, dict[str, int]] = {"fid": {}}
    if "logits" in kind.outputs:
        params["inception_score"] = {"splits": 10, "seed": _SEED}
    params |= {metric: {"k": 3} for metric in ("precision", "recall", "density", "coverage")}
    params["kid"] = {"subsets": 100, "subset_size": min(1000, kept, count), "seed": _SEED}
    params["mind"] = {"projections": 1000, "seed": _SEED}
    params |= {m: {} for m in _LOSSES if METRICS[m].least_side <= min(resolution)}
    protocol = Protocol(
        format=_FORMAT,
        name=name,
        version=1,
        title=f"{name}, {resolution[0]} x {resolution[1]}",
        paper="",
        images=Images(resolution, 3, count, "balanced", num_classes, "round"),
        seeds=Seeds(report=1000, select=2000, n_select=selected),
        metrics=tuple(
            Metric(metric, METRICS[metric].higher_is_better, values, metric in _LOSSES)
            for metric, values in params.items()
        ),
        uncertainty=Uncertainty(n_bootstrap=200, seed=0, level=0.95),
        extractor=Extractor(extractor, ANY, next(iter(kind.resizes), "")),
        reference=Reference(f"{name}.npz", ANY, kept, num_real if num_real > kept else None),
    )
    problem = next(contradictions(protocol, name), None)
    if problem is not None:
        raise DimoError(f"no protocol {name!r} can be made of these images: {problem}")
    return protocol


def protocol_toml(protocol: Protocol) -> str:
    """The text of a protocol's file."""
    content: dict[str, Any] = encode(protocol)
    metrics = content.pop("metrics")
    tables = {key: part for key, part in content.items() if isinstance(part, dict)}
    lines = ["# Keys: protocols/README.md"]
    lines += _toml({key: value for key, value in content.items() if key not in tables})
    for key, part in tables.items():
        lines += ["", f"[{key}]", *_toml(part)]
    for metric in metrics:
        params, supplementary = metric.pop("params"), metric.pop("supplementary") or None
        lines += ["", "[[metrics]]", *_toml({**metric, "supplementary": supplementary, **params})]
    return "\n".join(lines) + "\n"


def _toml(values: dict[str, Any]) -> list[str]:
    """Lines of scalars and lists, which JSON and TOML write alike; without empty optional ones."""
    return [
        f"{key} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in values.items()
        if value not in (None, "") or key == "paper"
    ]


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in data_dir("protocols").glob("*.toml")}


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    text = os.fspath(name_or_path)
    if not isinstance(name_or_path, str) or text.endswith(".toml") or os.sep in text:
        return Path(text)
    shipped = _shipped()
    if text not in shipped:
        advice = "or give the path of a .toml file; list them with: dimo protocols list"
        raise unknown_name("protocol", text, shipped, advice)
    return shipped[text]


def _gather_params(table: Any, path: str, origin: Origin) -> Any:
    """A `[[metrics]]` table -> the fields of `Metric`; anything ill-typed is left to `decode`."""
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        return table
    if table["name"] not in METRICS:
        raise origin.error(str(unknown_name(f"'{path}.name'", table["name"], METRICS)))
    kind = METRICS[table["name"]]
    fields = ("name", "higher_is_better", "supplementary")
    all_given = any(param.optional and key in table for key, param in kind.params.items())
    params = [key for key, param in kind.params.items() if all_given or not param.optional]
    for key in table:
        if key not in (*fields, *params):
            raise origin.unknown_key(path, key, [*fields, *kind.params])
    for key in params:
        if key not in table:
            raise origin.error(f"missing key '{path}.{key}' of the metric {table['name']!r}")
        if isinstance(table[key], bool) or not isinstance(table[key], int):
            raise origin.error(f"'{path}.{key}' must be an integer, not {table[key]!r}")
    gathered = {key: table[key] for key in fields if key in table}
    return gathered | {"params": {key: table[key] for key in params}}
