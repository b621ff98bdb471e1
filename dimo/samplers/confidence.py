"""Confidence-ordered parallel decoding of MaskGIT (Chang et al., arXiv 2202.04200, sec. 3.2)."""

__all__ = ["sample_confidence"]

from collections.abc import Callable

import torch
from torch import Tensor

from dimo import rng
from dimo.guidance import guided_logits
from dimo.masking import tokens_per_step
from dimo.models import MaskedModel
from dimo.samplers.types import Samples


def sample_confidence(
    model: MaskedModel,
    labels: Tensor,
    *,
    seed: int,
    index: Tensor,
    num_steps: int,
    mask_schedule: str = "arccos",
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Samples:
    """Samples every masked token, keeps the most confident, masks the rest again, and repeats.

    Confidence is log p plus Gumbel noise scaled by `choice_temperature`, which falls linearly to
    zero at the last step. Guidance rises linearly from off at the first step to `guidance_scale`
    at the last. The single step of `num_steps` = 1 is both: it takes the last step's values.

    Args:
        model: Masked model in eval mode.
        labels: [B] int64.
        seed: The run's seed.
        index: [B] image indices; image i is the same in any batch.
        num_steps: 1..L.
        mask_schedule: "arccos" or "cosine": how many tokens each step reveals.
        guidance_scale: s at the last step; 1 = off.
        temperature: Divides the logits; 1 = as trained.
        choice_temperature: Of the confidence noise.
        callback: Called after each step with its number (from 0) and the tokens [B, L].

    Raises:
        DimoError: Steps out of range, unknown schedule.
    """
    length, vocabulary = model.num_tokens, model.codebook_size
    counts = tokens_per_step(mask_schedule, num_steps, length)
    tokens = torch.full((len(labels), length), model.mask_token_id, device=labels.device)
    nfe = 0
    for step, count in enumerate(counts):
        progress = step / (num_steps - 1) if num_steps > 1 else 1.0
        scale = 1 + (guidance_scale - 1) * progress
        logits = guided_logits(model, tokens, labels, scale)[..., :vocabulary].double()
        nfe += 1 if scale == 1 else 2
        noise = rng.gumbel(seed, index, f"sample/tokens/{step}", (length, vocabulary))
        log_p = (logits / temperature).log_softmax(-1)
        proposal = (log_p + noise).argmax(-1)  # [B, L]
        choice_noise = rng.gumbel(seed, index, f"sample/choice/{step}", (length,))
        confidence = log_p.gather(-1, proposal[..., None])[..., 0]
        confidence += choice_temperature * (1 - progress) * choice_noise
        confidence.masked_fill_(tokens != model.mask_token_id, -torch.inf)
        chosen = confidence.topk(count, dim=-1).indices
        tokens = tokens.scatter(-1, chosen, proposal.gather(-1, chosen))
        if callback is not None:
            callback(step, tokens)
    return Samples(tokens=tokens, nfe=nfe, token_counts=counts)
