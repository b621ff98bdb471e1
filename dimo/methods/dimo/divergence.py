"""Token-level divergences between teacher p and auxiliary q, and their gradient in q's logits.

Both are over the last axis (the vocabulary). The gradient is what Di[M]O pushes into the student's
logits (arXiv 2503.15457, Eq. 4); `divergence` is its antiderivative, for tests.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dimo.errors import unknown_name

_KULLBACK_LEIBLER = ("forward_kl", "reverse_kl", "jeffreys")


@dataclass(frozen=True)
class FDivergence:
    """D_f(p || q) = sum_v q f(p / q), f convex with f(1) = 0, as two functions of (log p, log q).

    With t = p / q, dD_f/dq = f(t) - t f'(t). Let h = q (f(t) - t f'(t)); through the softmax the
    gradient is dD_f/dz = h - q sum_v h, from which any multiple of q in h cancels. Both functions
    are written in log p and log q, because t itself overflows where q is peaked.
    """

    integrand: Callable[[Tensor, Tensor], Tensor]  # q f(p / q), [..., V]
    slope: Callable[[Tensor, Tensor], Tensor]  # h up to a multiple of q, [..., V]


def _log_mean(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log of (p + q) / 2."""
    return torch.logaddexp(log_p, log_q) - math.log(2)


def _js_integrand(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = _log_mean(log_p, log_q)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)) / 2


# To add a divergence, add a row; tests check every row's slope against its integrand.
F_DIVERGENCES: dict[str, FDivergence] = {
    # f(t) = (t log t - (1 + t) log((1 + t) / 2)) / 2; the gradient is bounded
    "js": FDivergence(
        integrand=_js_integrand,
        slope=lambda log_p, log_q: log_q.exp() * (log_q - _log_mean(log_p, log_q)) / 2,
    ),
    # f(t) = (1 - sqrt(t))^2 / 2, the squared Hellinger distance; the gradient is bounded
    "hellinger": FDivergence(
        integrand=lambda log_p, log_q: ((log_p / 2).exp() - (log_q / 2).exp()).square() / 2,
        slope=lambda log_p, log_q: -((log_p + log_q) / 2).exp() / 2,
    ),
    # f(t) = (t - 1)^2; the gradient grows like p^2 / q where q misses what p has
    "pearson": FDivergence(
        integrand=lambda log_p, log_q: (2 * log_p - log_q).exp() - 2 * log_p.exp() + log_q.exp(),
        slope=lambda log_p, log_q: -(2 * log_p - log_q).exp(),
    ),
}

DIVERGENCES = (*_KULLBACK_LEIBLER, *F_DIVERGENCES)

REDUCTIONS = ("sum", "mean")  # over classes (and tokens)
WEIGHTINGS = ("constant", "dmd")  # see `gradient_divisor`
_SMALLEST_DIVISOR = 1e-5


def _weights(name: str, beta: float) -> tuple[float, float]:
    """Weights of the forward and of the reverse KL."""
    if name not in _KULLBACK_LEIBLER:
        raise unknown_name("divergence", name, DIVERGENCES)
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(name, beta)
    return 1 - beta, beta


def divergence(
    name: str, teacher_logits: Tensor, auxiliary_logits: Tensor, beta: float = 0.0
) -> Tensor:
    """D(p, q) of logits [..., L, V] at one intermediate state, float32 or better [..., L].

    forward_kl is KL(p || q), reverse_kl is KL(q || p), jeffreys is (1 - beta) of the first plus
    beta of the second (the generalized Jeffrey divergence; beta may be negative). The others are
    the rows of `F_DIVERGENCES`.

    Raises:
        DimoError: Unknown name.
    """
    log_p, log_q = (_wide(z).log_softmax(-1) for z in (teacher_logits, auxiliary_logits))
    if name in F_DIVERGENCES:
        return F_DIVERGENCES[name].integrand(log_p, log_q).sum(-1)
    forward, reverse = _weights(name, beta)
    log_ratio = log_p - log_q
    return (log_ratio * (forward * log_p.exp() - reverse * log_q.exp())).sum(-1)


def logit_gradient(
    name: str, teacher_logits: Tensor, auxiliary_logits: Tensor, beta: float = 0.0
) -> Tensor:
    """dD/dz_q [..., L, V] for q = softmax(z_q): Eq. 4. Arguments and errors as for `divergence`.

    forward_kl: q - p.  reverse_kl: q (log q - log p - KL(q || p)).  Others: see `FDivergence`.
    """
    z_p, z_q = _wide(teacher_logits), _wide(auxiliary_logits)
    if name in F_DIVERGENCES:
        log_q = z_q.log_softmax(-1)
        slope = F_DIVERGENCES[name].slope(z_p.log_softmax(-1), log_q)
        return slope - log_q.exp() * slope.sum(-1, keepdim=True)
    forward, reverse = _weights(name, beta)
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


def gradient_divisor(
    weighting: str, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor
) -> Tensor:
    """The divisor of each image's gradient, float32 or better [B, 1, 1].

    "constant" is 1, the paper's choice. "dmd" is the normalization of distribution matching
    distillation (arXiv 2311.18828) carried over to probabilities: the mean of |p_theta - p_phi|
    over an image's re-masked tokens (`mask` [B, K]) and classes, and at least 1e-5, where p_theta
    is the student's distribution of its one step and p_phi the teacher's at the intermediate state
    (logits [B, K, V]). An image far from its teacher then weighs no more than a near one.

    Raises:
        DimoError: Unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise unknown_name("weighting", weighting, WEIGHTINGS)
    if weighting == "constant":
        return student_logits.new_ones(len(mask), 1, 1)
    distance = (_wide(student_logits).softmax(-1) - _wide(teacher_logits).softmax(-1)).abs()
    by_token = distance.mean(-1).masked_fill(~mask, 0.0)  # [B, K]
    by_image = by_token.sum(1) / mask.sum(1).clamp_min(1)
    return by_image.clamp_min(_SMALLEST_DIVISOR)[:, None, None]


def soft_target_loss(
    student_logits: Tensor, auxiliary_logits: Tensor, temperature: float, reduction: str
) -> Tensor:
    """T^2 KL(student || auxiliary) at temperature T of logits [N, V]: mean over tokens, scalar.

    `reduction`, one of `REDUCTIONS`, is over the classes.
    """
    log_p, log_q = (
        tempered(z, temperature).log_softmax(-1) for z in (student_logits, auxiliary_logits)
    )
    by_class = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    by_token = by_class.sum(-1) if reduction == "sum" else by_class.mean(-1)
    return by_token.mean() * temperature**2


def certainty(student_logits: Tensor, temperature: float) -> dict[str, Tensor]:
    """What x_init leaves open in the student's tokens: scalars, means over logits [..., V].

    `token_entropy` is H(x_i | x_init) in nats, `top_1` the probability of the likeliest token. An
    entropy near 0 early in a run is a collapse; one that stays high, a student that does not decide
    by x_init yet.
    """
    log_p = tempered(student_logits.detach().float(), temperature).log_softmax(-1)
    p = log_p.exp()
    return {"token_entropy": -(p * log_p).sum(-1).mean(), "top_1": p.amax(-1).mean()}


def tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits [..., V] divided by a temperature that can be broadcast to them."""
    if not isinstance(temperature, Tensor) and temperature == 1:
        return logits
    return logits / temperature


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype.itemsize >= 4 else logits.float()
