"""The reference images of a protocol: the table of embedded sets, checked by hash."""

__all__ = ["load_reference", "reference_sha256"]

from collections.abc import Callable

import torch
from torch import Tensor

from bench.protocol import Protocol
from dimo.datasets import digits
from dimo.errors import DimoError, unknown_name
from dimo.files import sha256_bytes

_REFERENCES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"digits-all": digits.load}


def reference_sha256(images: Tensor) -> str:
    """Hash of uint8 images [N, 3, H, W]: of their shape and bytes."""
    images = images.cpu().contiguous()
    assert images.dtype == torch.uint8
    return sha256_bytes(repr(tuple(images.shape)).encode() + images.numpy().tobytes())


def load_reference(protocol: Protocol) -> tuple[Tensor, Tensor]:
    """The protocol's reference: images uint8 [N, 3, H, W] and labels int64 [N].

    Raises:
        DimoError: Unknown reference, or one whose hash or count is not the protocol's.
    """
    wanted = protocol.reference
    if wanted.name not in _REFERENCES:
        raise unknown_name("reference", wanted.name, _REFERENCES)
    images, labels = _REFERENCES[wanted.name]()
    found = reference_sha256(images)
    if (found, len(images)) != (wanted.sha256, wanted.count):
        raise DimoError(
            f"reference {wanted.name!r} has sha256 {found[:12]}... and {len(images)} images, the "
            f"protocol names {wanted.sha256[:12]}... and {wanted.count}; install the scikit-learn "
            "of constraints.txt, or use the protocol's version that fits"
        )
    return images, labels
