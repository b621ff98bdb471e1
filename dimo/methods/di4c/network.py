"""The di4c student (sony/di4c): the MaskGIT v1.0 network with a latent token.

It predicts a mixture, p(x0 | xt) = E_z prod_d p(x0_d | xt, z) with z uniform in [0, 1), so a few
steps suffice. State dict: the teacher's keys and `latent_projection`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dimo.models.layers import perturb
from dimo.models.maskgit import MaskGIT

_LATENT_DIM, _LATENT_HIDDEN = 128, 512  # fixed in the official network
_MAX_PERIOD, _Z_SCALE = 10_000, 1_000


class Di4CStudent(MaskGIT):
    """`MaskGIT` whose `forward` takes a latent; constructor arguments are those of `MaskGIT`."""

    takes_latent = True

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.latent_projection = nn.Sequential(
            nn.Linear(_LATENT_DIM, _LATENT_HIDDEN),
            nn.GELU(),
            nn.Linear(_LATENT_HIDDEN, self.hidden_dim),
        )

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        drop: Tensor | None = None,
        embedding_noise: float = 0.0,
        noise: Tensor | None = None,
        positions: Tensor | None = None,
        z: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, L, V + 1]; arguments as for `MaskGIT.forward`, and the latent.

        z is [B] or [B, 1] in [0, 1), the same in both forwards of a guided step; None = no token.
        """
        x = perturb(self.tok_emb(tokens), embedding_noise, noise)
        x = self._sequence(x, labels, drop)
        if z is not None:
            latent = self.latent_projection(latent_features(z))
            x = torch.cat([x, latent[:, None]], dim=1)  # last, without a position
        return self._predict(x, positions)


def latent_features(z: Tensor) -> Tensor:
    """z [B] or [B, 1] in [0, 1) -> [B, 128]: sines, then cosines, of 1000 z at 64 frequencies."""
    half = _LATENT_DIM // 2
    index = torch.arange(half, device=z.device, dtype=torch.float32)
    frequency = torch.exp(index * (-math.log(_MAX_PERIOD) / (half - 1)))
    angle = z.reshape(-1, 1).float() * _Z_SCALE * frequency  # [B, 64]
    return torch.cat([angle.sin(), angle.cos()], dim=1)
