"""Token-level divergences between teacher p and auxiliary q, and their gradient in q's logits.

Both live on the last axis (the vocabulary). The gradient is what Di[M]O pushes into the student's
logits (arXiv 2503.15457, Eq. 4); `divergence` is its antiderivative, for tests and logging.
"""

__all__ = ["DIVERGENCES", "divergence", "logit_gradient"]

import torch
from torch import Tensor

from dimo.errors import unknown_name

# name -> (weight of the forward KL, weight of the reverse KL) for a given beta
DIVERGENCES = ("forward_kl", "reverse_kl", "jeffreys")


def _weights(name: str, beta: float) -> tuple[float, float]:
    if name not in DIVERGENCES:
        raise unknown_name("divergence", name, DIVERGENCES)
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(name, beta)
    return 1 - beta, beta


def divergence(
    name: str, *, teacher_logits: Tensor, auxiliary_logits: Tensor, beta: float = 0.0
) -> Tensor:
    """D(p, q) for each token, float32 or better [..., L].

    forward_kl is KL(p || q), reverse_kl is KL(q || p), jeffreys is (1 - beta) of the first plus
    beta of the second (the generalized Jeffrey divergence; beta may be negative).

    Args:
        name: One of `DIVERGENCES`.
        teacher_logits: [..., L, V], the teacher at the intermediate state.
        auxiliary_logits: [..., L, V], the auxiliary model there.
        beta: Used by jeffreys only.

    Raises:
        DimoError: Unknown name.
    """
    forward, reverse = _weights(name, beta)
    log_p, log_q = _log_softmax(teacher_logits), _log_softmax(auxiliary_logits)
    log_ratio = log_p - log_q
    return (log_ratio * (forward * log_p.exp() - reverse * log_q.exp())).sum(-1)


def logit_gradient(
    name: str, *, teacher_logits: Tensor, auxiliary_logits: Tensor, beta: float = 0.0
) -> Tensor:
    """dD/dz_q [..., L, V] for q = softmax(z_q): Eq. 4.

    forward_kl: q - p.  reverse_kl: q (log q - log p - KL(q || p)).
    Arguments and errors as `divergence`.
    """
    forward, reverse = _weights(name, beta)
    z_p, z_q = _wide(teacher_logits), _wide(auxiliary_logits)
    q = z_q.softmax(-1)
    gradient = torch.zeros_like(q)
    if forward:
        gradient += forward * (q - z_p.softmax(-1))
    if reverse:
        # log q - log p up to a constant, which the mean takes out; zero at the likeliest token,
        # so that a peaked q loses no digits
        difference = z_q - z_p
        difference = difference - difference.gather(-1, q.argmax(-1, keepdim=True))
        gradient += reverse * q * (difference - (q * difference).sum(-1, keepdim=True))
    return gradient


def _log_softmax(logits: Tensor) -> Tensor:
    return _wide(logits).log_softmax(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype.itemsize >= 4 else logits.float()
