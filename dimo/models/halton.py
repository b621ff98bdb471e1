"""The Halton-MaskGIT transformer (valeoai/Halton-MaskGIT): the class enters by adaLN-zero only.

Sequence: L visual tokens, then the register tokens. Parameter names are those of the official
checkpoints.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimo.errors import DimoError
from dimo.models import MaskedModel
from dimo.models.cpu import Convertible
from dimo.models.layers import Blocks, Dropout, attend, gather_positions, perturb

_EPS = 1e-5
_MULTIPLE = 256  # the feed-forward width is rounded up to a multiple
_ROWS = 16  # the batch of conditions is padded to a multiple

# The published sizes, each for 256 (`input_size=16`) and 384 pixels (24).
SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"hidden_dim": 384, "depth": 6, "heads": 6, "mlp_dim": 1536},
    "small": {"hidden_dim": 512, "depth": 12, "heads": 6, "mlp_dim": 2048},
    "base": {"hidden_dim": 768, "depth": 12, "heads": 12, "mlp_dim": 3072},
    "large": {"hidden_dim": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096},
}


class _Attention(Convertible):
    """Self-attention with RMS-normalised queries and keys, normalised over all heads at once."""

    products = ("wq", "wk", "wv", "wo")

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.width = dim // heads * heads  # below `dim` where heads do not divide it ("small")
        self.wq = nn.Linear(dim, self.width, bias=False)
        self.wk = nn.Linear(dim, self.width, bias=False)
        self.wv = nn.Linear(dim, self.width, bias=False)
        self.wo = nn.Linear(self.width, dim, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        q = F.rms_norm(self.wq(gather_positions(x, positions)), (self.width,), eps=_EPS)
        k = F.rms_norm(self.wk(x), (self.width,), eps=_EPS)
        heads = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, self.wv(x)))
        y = attend(*heads, dropout=self.dropout.p if self.training else 0.0)  # [B, heads, K, d]
        out: Tensor = self.dropout(self.wo(y.transpose(1, 2).flatten(2)))
        return out


class _FeedForward(Convertible):
    """SwiGLU of about 2/3 `mlp_dim`."""

    products = ("w1", "w2", "w3")

    def __init__(self, dim: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        hidden = -(-int(2 * mlp_dim / 3) // _MULTIPLE) * _MULTIPLE
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(self.dropout(F.silu(self.w1(x)) * self.w3(x)))
        return out


class _Block(nn.Module):
    """x + gate * branch(scale and shift of norm(x)), for attention and for the feed-forward."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.ln1 = nn.RMSNorm(dim, eps=_EPS)
        self.attn = _Attention(dim, heads, dropout)
        self.ln2 = nn.RMSNorm(dim, eps=_EPS)
        self.ff = _FeedForward(dim, mlp_dim, dropout)

    def forward(self, x: Tensor, condition: Tensor, positions: Tensor | None) -> Tensor:
        shift, scale, gate, *feed_forward = _modulation(self.mlp, condition, x, parts=6)
        y = self.attn(torch.addcmul(shift, self.ln1(x), 1 + scale), positions)
        x = gather_positions(x, positions) + gate * y
        shift, scale, gate = feed_forward
        out: Tensor = x + gate * self.ff(torch.addcmul(shift, self.ln2(x), 1 + scale))
        return out


class _Layers(Blocks):
    def __init__(self, dim: int, depth: int, heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(dim, heads, mlp_dim, dropout) for _ in range(depth))

    def forward(self, x: Tensor, condition: Tensor, positions: Tensor | None) -> Tensor:
        """x [B, L, D] -> [B, L, D], or [B, K, D] at positions [B, K] (in the last layer only)."""
        for number, layer in enumerate(self.layers, start=1):
            x = self.run(layer, x, condition, positions if number == len(self.layers) else None)
        return x


class _BiasedRMSNorm(nn.RMSNorm):
    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=_EPS)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class _LastNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_final = _BiasedRMSNorm(dim)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = _modulation(self.mlp, condition, x, parts=2)
        return torch.addcmul(shift, self.norm_final(x), 1 + scale)


class HaltonMaskGIT(MaskedModel):
    """Class-conditional masked transformer.

    Ids: codebook 0..V-1, mask V. Separate class embeddings: 0..nclass-1, null class nclass.

    Args as in the official configuration: `input_size` is the side of the token grid, `register`
    the number of register tokens, and `proj` the number of tokens merged along each side, 1 in all
    published networks. Heads have width floor(hidden_dim / heads).

    Raises:
        DimoError: `proj` is not 1.
    """

    takes_positions = True

    def __init__(
        self,
        *,
        input_size: int = 16,
        hidden_dim: int = 768,
        codebook_size: int = 16384,
        depth: int = 12,
        heads: int = 12,
        mlp_dim: int = 3072,
        dropout: float = 0.1,
        nclass: int = 1000,
        register: int = 1,
        proj: int = 1,
    ) -> None:
        super().__init__()
        if proj != 1:
            raise DimoError(f"proj {proj} is not supported; the published networks have proj 1")
        self.num_tokens = input_size**2
        self.codebook_size, self.num_classes, self.hidden_dim = codebook_size, nclass, hidden_dim
        self.depth = depth
        self.cls_emb = nn.Embedding(nclass + 1, hidden_dim)
        self.tok_emb = nn.Embedding(codebook_size + 1, hidden_dim)
        self.pos_emb = nn.Embedding(self.num_tokens, hidden_dim)
        self.transformer = _Layers(hidden_dim, depth, heads, mlp_dim, dropout)
        self.last_norm = _LastNorm(hidden_dim)
        self.head = nn.Linear(hidden_dim, codebook_size + 1)
        self.head.weight = self.tok_emb.weight
        self.reg_tokens = nn.Embedding(register, hidden_dim) if register else None
        self.apply(_initialize)
        for name, module in self.transformer.named_modules():
            if name.endswith(".mlp.1") and isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)  # adaLN-zero: every block starts as the identity

    def embedding_parameters(self) -> list[Tensor]:
        return [self.tok_emb.weight, self.pos_emb.weight, self.head.bias]

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
        if drop is not None:
            labels = labels.masked_fill(drop, self.num_classes)
        # The last bits of a matrix product with few rows depend on their number.
        condition = self.cls_emb(F.pad(labels, (0, -len(labels) % _ROWS)))  # [>= B, D]
        x = perturb(self.tok_emb(tokens), embedding_noise, noise) + self.pos_emb.weight
        if self.reg_tokens is not None:
            registers = self.reg_tokens.weight.expand(len(x), -1, -1)
            x = torch.cat([x, registers.to(x.dtype)], dim=1)
        x = self.transformer(x, condition, positions)[:, : self.num_tokens]
        logits: Tensor = self.head(self.last_norm(x, condition))
        return logits


def _modulation(mlp: nn.Module, condition: Tensor, x: Tensor, *, parts: int) -> list[Tensor]:
    """`parts` tensors [B, 1, D] that scale, shift and gate x [B, L, D]."""
    return list(mlp(condition)[: len(x), None].chunk(parts, dim=-1))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
