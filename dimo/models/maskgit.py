"""The MaskGIT v1.0 transformer (Maskgit-pytorch; the teacher of Di[M]O, arXiv 2503.15457).

Sequence: L visual tokens, then the class token. The output head is the tied token embedding plus a
bias per position and id. Parameter names are those of the official checkpoints.
"""

from collections.abc import Collection, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimo.errors import DimoError
from dimo.models import MaskedModel
from dimo.models.cpu import Convert, Convertible
from dimo.models.layers import Blocks, Dropout, attend, gather_positions, perturb

_PATCH = 16  # pixels per token along a side

# For training on a custom data set; "base" is the published network.
SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"hidden_dim": 128, "depth": 3, "heads": 4, "mlp_dim": 512},
    "small": {"hidden_dim": 384, "depth": 8, "heads": 6, "mlp_dim": 1536},
    "base": {"hidden_dim": 768, "depth": 24, "heads": 16, "mlp_dim": 3072},
}


class _Attention(Convertible):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj: nn.Module = nn.Linear(dim, dim)
        self.in_proj: nn.Module | None = None  # replaces the two in `convert_products`
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """x [B, L, D] -> [B, L, D], or [B, K, D] at positions [B, K]."""
        batch, _, dim = x.shape
        if self.in_proj is None:
            qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        else:
            qkv = self.in_proj(x)
        q, k, v = qkv.chunk(3, dim=-1)
        q = gather_positions(q, positions)
        shape = (batch, -1, self.heads, dim // self.heads)
        heads = (t.reshape(shape).transpose(1, 2) for t in (q, k, v))
        y = attend(*heads, dropout=self.dropout if self.training else 0.0)  # [B, heads, K, d]
        out: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        return out

    def convert_products(self, convert: Convert) -> None:
        self.in_proj = convert(self.in_proj_weight, self.in_proj_bias)
        del self.in_proj_weight, self.in_proj_bias
        self.out_proj = convert(self.out_proj.weight, self.out_proj.bias)


class _AttentionBranch(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = nn.ModuleDict({"mha": _Attention(dim, heads, dropout)})

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        y: Tensor = self.fn["mha"](self.norm(x), positions)
        return y


class _FeedForwardBranch(Convertible):
    def __init__(self, dim: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        net = nn.Sequential(
            nn.Linear(dim, mlp_dim),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(mlp_dim, dim),
            Dropout(dropout),
        )
        self.fn = nn.ModuleDict({"net": net})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fn["net"](self.norm(x))
        return y

    def convert_products(self, convert: Convert) -> None:
        net = self.fn["net"]
        assert isinstance(net, nn.Sequential)
        net[0] = convert(net[0].weight, net[0].bias, gelu=True)
        net[1] = nn.Identity()
        net[3] = convert(net[3].weight, net[3].bias)


class Layers(Blocks):
    """Pre-norm transformer blocks."""

    def __init__(self, dim: int, depth: int, heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [_AttentionBranch(dim, heads, dropout), _FeedForwardBranch(dim, mlp_dim, dropout)]
            )
            for _ in range(depth)
        )

    def forward(
        self, x: Tensor, positions: Tensor | None, before: nn.ModuleList | None = None
    ) -> Tensor:
        """x [B, L, D] -> [B, L, D], or [B, K, D] at positions [B, K] (in the last layer only).

        `before` holds a module per layer that is applied ahead of it.
        """
        (last,) = self.states(x, [len(self.layers)], before, positions)
        return last

    def states(
        self,
        x: Tensor,
        blocks: Collection[int],
        before: nn.ModuleList | None = None,
        positions: Tensor | None = None,
    ) -> list[Tensor]:
        """As `forward`, but x after each of `blocks`, counted from 1."""
        states = []
        for number, layer in enumerate(self.layers, start=1):
            x = x if before is None else before[number - 1](x)
            at = positions if number == len(self.layers) else None
            x = self.run(partial(_block, layer), x, at)
            states += [x] if number in blocks else []
        return states


def block_matrices(network: nn.Module) -> list[Tensor]:
    """The weight matrices of all `Layers` in a network."""
    stacks = (module for module in network.modules() if isinstance(module, Layers))
    return [p for layers in stacks for p in layers.parameters() if p.ndim == 2]


def _block(layer: nn.Module, x: Tensor, positions: Tensor | None) -> Tensor:
    assert isinstance(layer, nn.ModuleList)
    attention, feed_forward = layer
    x = gather_positions(x, positions) + attention(x, positions)
    out: Tensor = x + feed_forward(x)
    return out


class MaskGIT(MaskedModel):
    """Class-conditional masked transformer.

    Ids: codebook 0..V-1, mask V, classes V+1..V+nclass, null class V+1+nclass. L is
    (img_size / 16)^2 for images of `img_size` pixels.

    Raises:
        DimoError: `img_size` is no multiple of 16, or `heads` does not divide `hidden_dim`.
    """

    takes_positions = True
    gives_states = True

    def __init__(
        self,
        *,
        img_size: int = 256,
        hidden_dim: int = 768,
        codebook_size: int = 1024,
        depth: int = 24,
        heads: int = 16,
        mlp_dim: int = 3072,
        dropout: float = 0.1,
        nclass: int = 1000,
    ) -> None:
        super().__init__()
        if img_size < _PATCH or img_size % _PATCH:
            raise DimoError(
                f"img_size {img_size} is not a multiple of {_PATCH}; use e.g. 64 or 256"
            )
        if hidden_dim % heads:
            raise DimoError(f"heads {heads} does not divide hidden_dim {hidden_dim}; change either")
        self.num_tokens = (img_size // _PATCH) ** 2
        self.codebook_size, self.num_classes, self.hidden_dim = codebook_size, nclass, hidden_dim
        self.depth = depth
        vocabulary = codebook_size + 1 + nclass + 1
        length = self.num_tokens + 1
        self.tok_emb = nn.Embedding(vocabulary, hidden_dim)
        self.pos_emb = nn.Parameter(torch.zeros(1, length, hidden_dim))
        self.bias = nn.Parameter(torch.zeros(length, vocabulary))
        self.first_layer = nn.Sequential(
            nn.LayerNorm(hidden_dim, eps=1e-12),
            Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.LayerNorm(hidden_dim, eps=1e-12),
            Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
        )
        self.transformer = Layers(hidden_dim, depth, heads, mlp_dim, dropout)
        self.last_layer = nn.Sequential(
            nn.LayerNorm(hidden_dim, eps=1e-12),
            Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.LayerNorm(hidden_dim, eps=1e-12),
        )
        self.apply(_initialize)
        nn.init.trunc_normal_(self.pos_emb, std=0.02)

    @property
    def token_embeddings(self) -> Tensor:
        return self.tok_emb.weight[: self.codebook_size + 1]

    def embedding_parameters(self) -> list[Tensor]:
        return [self.tok_emb.weight, self.pos_emb, self.bias]

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        drop: Tensor | None = None,
        embedding_noise: float = 0.0,
        noise: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """As `MaskedModel`; logits [B, L, V + 1], the last of which is the mask token's."""
        x = perturb(self.tok_emb(tokens), embedding_noise, noise)  # [B, L, D]
        return self._predict(self._sequence(x, labels, drop), positions)

    def block_states(
        self, embedded: Tensor, labels: Tensor, blocks: Collection[int]
    ) -> list[Tensor]:
        """As `MaskedModel`; the class token's state comes last."""
        x = self.first_layer(self._sequence(embedded, labels))
        return self.transformer.states(x, blocks)

    def _sequence(self, embedded: Tensor, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """The input sequence [B, L + 1, D]: visual tokens, then the class token."""
        class_ids = labels + self.codebook_size + 1
        if drop is not None:
            class_ids = class_ids.masked_fill(drop, self.tok_emb.num_embeddings - 1)
        return torch.cat([embedded, self.tok_emb(class_ids)[:, None]], dim=1) + self.pos_emb

    def _predict(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Logits [B, L or K, V + 1] of the first L tokens of x [B, >= L, D], the visual ones."""
        x = self.transformer(self.first_layer(x), positions)
        x = self.last_layer(x[:, : self.num_tokens])
        outputs = self.codebook_size + 1
        bias = self.bias[: self.num_tokens, :outputs]
        if positions is not None:
            bias = bias[positions]  # [B, K, V + 1]
        return F.linear(x, self.tok_emb.weight[:outputs]) + bias


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
