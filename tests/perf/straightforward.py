"""What `dimo` is measured against: the network and sampler of MaskGIT v1.0, written plainly.

`nn.MultiheadAttention` that returns its weights, the head over all ids at all positions, both
halves of the guided batch at every step, softmax and `Categorical`.
"""

import math

import torch
from torch import nn


class _Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.mha = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=True)


class _FeedForward(nn.Module):
    def __init__(self, dim, mlp_dim):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(mlp_dim, dim),
            nn.Dropout(0.1),
        )

    def forward(self, x):
        return self.net(x)


class _PreNorm(nn.Module):
    def __init__(self, dim, fn):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x):
        return self.fn(self.norm(x))


class _Transformer(nn.Module):
    def __init__(self, dim, depth, heads, mlp_dim):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [_PreNorm(dim, _Attention(dim, heads)), _PreNorm(dim, _FeedForward(dim, mlp_dim))]
            )
            for _ in range(depth)
        )

    def forward(self, x):
        maps = []
        for attention, feed_forward in self.layers:
            y, weights = attention(x)
            maps.append(weights)
            x = x + y
            x = x + feed_forward(x)
        return x, maps


class PlainMaskGIT(nn.Module):
    """Official parameter names, so that it takes the state dict of `dimo.models.maskgit`."""

    def __init__(self, *, side=16, dim=768, codebook=1024, depth=24, heads=16, mlp_dim=3072):
        super().__init__()
        self.codebook, self.num_tokens = codebook, side * side
        vocabulary, length = codebook + 1 + 1000 + 1, side * side + 1
        self.tok_emb = nn.Embedding(vocabulary, dim)
        self.pos_emb = nn.Parameter(torch.zeros(1, length, dim))
        self.bias = nn.Parameter(torch.zeros(length, vocabulary))
        norm = {"eps": 1e-12}
        self.first_layer = nn.Sequential(
            nn.LayerNorm(dim, **norm),
            nn.Dropout(0.1),
            nn.Linear(dim, dim),
            nn.GELU(),
            nn.LayerNorm(dim, **norm),
            nn.Dropout(0.1),
            nn.Linear(dim, dim),
        )
        self.transformer = _Transformer(dim, depth, heads, mlp_dim)
        self.last_layer = nn.Sequential(
            nn.LayerNorm(dim, **norm),
            nn.Dropout(0.1),
            nn.Linear(dim, dim),
            nn.GELU(),
            nn.LayerNorm(dim, **norm),
        )

    def forward(self, tokens, labels, drop):
        classes = torch.where(drop, self.tok_emb.num_embeddings - 1, labels + self.codebook + 1)
        x = self.tok_emb(torch.cat([tokens, classes[:, None]], 1)) + self.pos_emb
        x, _ = self.transformer(self.first_layer(x))
        logits = self.last_layer(x) @ self.tok_emb.weight.T + self.bias
        return logits[:, : self.num_tokens, : self.codebook + 1]


def sample_plainly(model, labels, *, num_steps, guidance_w, choice_temperature, counts):
    """Confidence sampling with the guidance ramp w * i / (n - 1) and (1 + w) c - w u."""
    length, mask = model.num_tokens, model.codebook
    tokens = torch.full((len(labels), length), mask)
    both = torch.cat([labels, labels])
    drop = torch.arange(len(both)) >= len(labels)
    for step, count in enumerate(counts):
        w = guidance_w * step / (num_steps - 1)
        c, u = model(torch.cat([tokens, tokens]), both, drop).chunk(2)
        p = ((1 + w) * c - w * u)[..., :mask].softmax(-1)
        proposal = torch.distributions.Categorical(probs=p).sample()
        confidence = p.gather(-1, proposal[..., None])[..., 0].log()
        gumbel = -torch.log(-torch.log(torch.rand_like(confidence)))
        confidence = confidence + choice_temperature * (1 - step / (num_steps - 1)) * gumbel
        confidence = confidence.masked_fill(tokens != mask, -math.inf)
        chosen = confidence.topk(count, dim=-1).indices
        tokens = tokens.scatter(1, chosen, proposal.gather(1, chosen))
    return tokens
