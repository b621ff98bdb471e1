"""ReMDM sampling: revealed tokens are masked again at random, so that mistakes can be corrected.

Of Wang et al., Remasking Discrete Diffusion Models with Inference-Time Scaling, arXiv 2503.00307.
Time runs from t = 1 (all masked) to t = 0. A step t -> s leaves 1 - alpha_s of the tokens masked,
as in ancestral sampling, whatever the probability sigma_t:

    a revealed token is masked again with probability sigma_t,
    a masked token is revealed with probability (alpha_s - (1 - sigma_t) alpha_t) / (1 - alpha_t),
    0 <= sigma_t <= sigma_max = min(1, (1 - alpha_s) / alpha_t).

With sigma_t = 0 this is ancestral sampling. Other arguments and errors are those of
`dimo.samplers.base.SamplerFunction`.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dimo.errors import DimoError, unknown_name
from dimo.masking import mask_probability
from dimo.models import MaskedModel
from dimo.rng import ImageNoise
from dimo.samplers.base import Callback, Predictor, Samples, masked_positions, progress_of
from dimo.samplers.leaping import check_predictions, leap, leap_law

# sigma_t of a strength eta and sigma_max
STRATEGIES: dict[str, Callable[[float, float], float]] = {
    "capped": min,
    "rescaled": lambda eta, sigma_max: eta * sigma_max,
    "confidence": lambda eta, sigma_max: eta * sigma_max,  # shared among the revealed tokens
    "loop": min,
}


def sample_remdm(
    model: MaskedModel,
    condition: Tensor,
    noise: ImageNoise,
    *,
    num_steps: int,
    mask_schedule: str = "log-linear",
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    remask: str = "capped",
    eta: float = 0.02,
    callback: Callback | None = None,
    **loop: float,
) -> Samples:
    """Reveals and masks tokens on the grid t = 1, 1 - 1/n, ..., 1/n, 0; nothing is masked at 0.

    Guidance is that of `sample_tau_leaping`.

    Args:
        num_steps: n, at least 1; may exceed L.
        mask_schedule: A key of `MASK_PROBABILITIES`, alpha_t.
        remask: A key of `STRATEGIES`. "capped": sigma_t = min(eta, sigma_max).
            "rescaled": sigma_t = eta sigma_max. "confidence": as "rescaled", times the softmax,
            over the revealed tokens of the image, of minus the probability with which each was
            drawn; about sigma_t tokens of an image are masked again, and more are masked at s than
            1 - alpha_s. "loop": as "capped", see `looped`, and no remasking outside the loop.
        eta: Strength of remasking, 0 to 1; 0 = ancestral sampling.
        **loop: Arguments of `looped`; other strategies refuse them.

    Raises:
        DimoError: Also for an unknown strategy, or arguments of another one.
    """
    check_predictions(num_steps)
    steps = remasking_steps(num_steps, mask_schedule, remask, eta, **loop)
    predict = Predictor(model, condition, noise)
    tokens = predict.all_masked()
    drawn_with = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)  # [B, L]
    for step, (reveal, sigma) in enumerate(steps):
        scale = 1 + (guidance_scale - 1) * progress_of(step, num_steps)
        masked = tokens == model.mask_token_id
        positions = masked_positions(masked)  # [B, K]
        log_p = predict(tokens, step, positions, guidance_scale=scale, temperature=temperature)
        law = leap_law(-math.log1p(-reveal) * log_p.exp()) if reveal < 1 else log_p
        after = leap(tokens, law, positions, model, noise, step)
        u = noise.uniform(f"sample/remask/{step}", (model.num_tokens,))
        again = u < sigma  # [B, L]
        if remask == "confidence":
            share = (-drawn_with).masked_fill(masked, -torch.inf).softmax(1)  # NaN if all masked
            again = u < sigma * share
            token = after.gather(1, positions).clamp_max(model.codebook_size - 1)
            p = log_p.gather(-1, token[..., None])[..., 0].exp()
            drawn_with = torch.where(masked, drawn_with.scatter(1, positions, p), drawn_with)
        tokens = after.masked_fill(again & ~masked, model.mask_token_id)
        if callback is not None:
            callback(step, tokens)
    counts = expected_counts(steps, model.num_tokens, shared=remask == "confidence")
    return Samples(tokens=tokens, nfe=predict.nfe, token_counts=counts)


def remasking_steps(
    num_steps: int, mask_schedule: str, remask: str, eta: float, **loop: float
) -> list[tuple[float, float]]:
    """Each step's probability of revealing a masked token, and its sigma_t."""
    if remask not in STRATEGIES:
        raise unknown_name("remasking strategy", remask, STRATEGIES)
    if not 0 <= eta <= 1:
        raise DimoError(f"eta {eta:g} is out of range; it is 0 (no remasking) to 1")
    masked, looping = mask_probability(mask_schedule), (0.0, 1.0)
    if remask == "loop":
        masked, looping = looped(masked, **loop)
    elif loop:
        raise DimoError(f"{', '.join(loop)} applies to remask=loop only, not to {remask}")
    steps = []
    for t, s in pairwise(1 - step / num_steps for step in range(num_steps + 1)):
        alpha_t, alpha_s = 1 - masked(t), 1 - masked(s)
        sigma_max = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
        sigma = STRATEGIES[remask](eta, sigma_max) if looping[0] < t <= looping[1] else 0.0
        own = 0.0 if remask == "confidence" else sigma  # of a masked token
        reveal = (alpha_s - (1 - own) * alpha_t) / (1 - alpha_t)
        steps.append((min(max(reveal, 0.0), 1.0), sigma))
    return steps


def looped(
    masked: Callable[[float], float],
    *,
    t_on: float = 0.55,
    t_off: float = 0.05,
    alpha_on: float = 0.9,
) -> tuple[Callable[[float], float], tuple[float, float]]:
    """1 - alpha_t that stands still in a loop, and the loop's times (t_off, t_on].

    alpha_t rises from 0 to `alpha_on` for t from 1 to `t_on`, stays there to `t_off`, and rises to
    1 at t = 0; both rises have the form of 1 - `masked`. The defaults are the authors' for text.
    """
    if not 0 < t_off <= t_on < 1:
        raise DimoError(f"t_off {t_off:g} and t_on {t_on:g} must be 0 < t_off <= t_on < 1")
    if not 0 < alpha_on < 1:
        raise DimoError(f"alpha_on {alpha_on:g} is out of range; it is between 0 and 1")

    def with_loop(t: float) -> float:
        if t > t_on:
            return 1 - alpha_on * (1 - masked((t - t_on) / (1 - t_on)))
        return (1 - alpha_on) * masked(min(t / t_off, 1.0))

    return with_loop, (t_off, t_on)


def expected_counts(
    steps: Sequence[tuple[float, float]], num_tokens: int, *, shared: bool
) -> list[int]:
    """Expected tokens revealed at each step, rounded so that their sum is; it may exceed L.

    `shared`: sigma_t is the expected number of tokens that are masked again.
    """
    masked, revealed = float(num_tokens), []
    for reveal, sigma in steps:
        again = sigma * (min(1.0, num_tokens - masked) if shared else num_tokens - masked)
        revealed.append(masked * reveal)
        masked += again - revealed[-1]
    totals = [round(total) for total in accumulate(revealed, initial=0.0)]
    return [after - before for before, after in pairwise(totals)]
