"""Token-level divergences between teacher p and auxiliary q, and their gradient in q's logits.

Both live on the last axis (the vocabulary). The gradient is what Di[M]O pushes into the student's
logits (arXiv 2503.15457, Eq. 4); `divergence` is its antiderivative, for tests and logging.
"""

__all__ = ["DIVERGENCES", "divergence", "logit_gradient"]

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
    log_p, log_q = _log_softmax(teacher_logits), _log_softmax(auxiliary_logits)
    q = log_q.exp()
    gradient = forward * (q - log_p.exp()) if forward else 0
    if reverse:
        log_ratio = log_q - log_p
        gradient = gradient + reverse * q * (log_ratio - (q * log_ratio).sum(-1, keepdim=True))
    assert isinstance(gradient, Tensor)
    return gradient


def _log_softmax(logits: Tensor) -> Tensor:
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    return wide.log_softmax(-1)
