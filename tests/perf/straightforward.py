"""What `dimo` is measured against: the network and sampler of MaskGIT v1.0, written plainly.

`nn.MultiheadAttention` that returns its weights, the head over all ids at all positions, both
halves of the guided batch at every step, softmax and `Categorical`.
"""

import math

import torch
from torch import nn


class _Attention(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.mha = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=True)


class _FeedForward(nn.Module):
    def __init__(self, dim, mlp_dim, dropout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, dim),
            nn.Dropout(dropout),
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
    def __init__(self, dim, depth, heads, mlp_dim, dropout):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _PreNorm(dim, _Attention(dim, heads, dropout)),
                    _PreNorm(dim, _FeedForward(dim, mlp_dim, dropout)),
                ]
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

    def __init__(
        self,
        *,
        side=16,
        dim=768,
        codebook=1024,
        depth=24,
        heads=16,
        mlp_dim=3072,
        classes=1000,
        dropout=0.1,
    ):
        super().__init__()
        self.codebook, self.num_tokens, self.classes = codebook, side * side, classes
        vocabulary, length = codebook + 1 + classes + 1, side * side + 1
        self.tok_emb = nn.Embedding(vocabulary, dim)
        self.pos_emb = nn.Parameter(torch.zeros(1, length, dim))
        self.bias = nn.Parameter(torch.zeros(length, vocabulary))
        norm = {"eps": 1e-12}
        self.first_layer = nn.Sequential(
            nn.LayerNorm(dim, **norm),
            nn.Dropout(dropout),
            nn.Linear(dim, dim),
            nn.GELU(),
            nn.LayerNorm(dim, **norm),
            nn.Dropout(dropout),
            nn.Linear(dim, dim),
        )
        self.transformer = _Transformer(dim, depth, heads, mlp_dim, dropout)
        self.last_layer = nn.Sequential(
            nn.LayerNorm(dim, **norm),
            nn.Dropout(dropout),
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


class PlainDistillation:
    """One Di[M]O step with the structure of the official code, in float32 or naive autocast.

    Logits over all ids at all positions, an MSE surrogate, a second student forward for the
    auxiliary model, Adam for both.
    """

    def __init__(self, build, state, *, autocast):
        self.teacher, self.student, self.auxiliary = (build() for _ in range(3))
        for network in (self.teacher, self.student, self.auxiliary):
            network.load_state_dict(state)
        self.teacher.eval().requires_grad_(False)
        self.autocast = autocast
        self.optimizers = [
            torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-5)
            for network in (_frozen_embeddings(self.student), _frozen_embeddings(self.auxiliary))
        ]

    def step(self, batch_size):
        student_optimizer, auxiliary_optimizer = self.optimizers
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits, tokens, labels, nobody = self._generate(batch_size)
            state, mask = self._mask_again(tokens.detach())
            with torch.no_grad():
                c, u = self.teacher(
                    torch.cat([state, state]),
                    torch.cat([labels, labels]),
                    torch.cat([nobody, ~nobody]),
                ).chunk(2)
                p = (u + 2 * (c - u)).softmax(-1)
                q = self.auxiliary(state, labels, nobody).softmax(-1)
                gradient = torch.where(mask[..., None], q - p, 0.0)
        logits = logits.float()
        target = (logits - gradient).detach()
        loss = 0.5 * nn.functional.mse_loss(logits, target, reduction="sum") / batch_size
        self._update(student_optimizer, loss)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                _, tokens, labels, nobody = self._generate(batch_size)
            state, mask = self._mask_again(tokens)
            target = tokens.masked_fill(~mask, -1)
            loss = nn.functional.cross_entropy(
                self.auxiliary(state, labels, nobody).flatten(0, 1),
                target.flatten(),
                ignore_index=-1,
                label_smoothing=0.1,
            )
        self._update(auxiliary_optimizer, loss)

    def _generate(self, batch_size):
        student = self.student
        labels = torch.randint(0, student.classes, (batch_size,))
        tokens = torch.randint(0, student.codebook, (batch_size, student.num_tokens))
        hidden = torch.rand(tokens.shape).argsort(1) < round(0.6 * student.num_tokens)
        nobody = torch.zeros(batch_size, dtype=torch.bool)
        logits = student(tokens.masked_fill(hidden, student.codebook), labels, nobody)
        drawn = torch.distributions.Categorical(logits=logits.float()).sample()
        return logits, drawn, labels, nobody

    def _mask_again(self, tokens):
        ratio = torch.rand(len(tokens), 1).arccos() / (math.pi / 2)
        count = (ratio * tokens.shape[1]).round().clamp(min=1)
        mask = torch.rand(tokens.shape).argsort(1) < count
        return tokens.masked_fill(mask, self.student.codebook), mask

    def _update(self, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            p.grad.norm().item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def _frozen_embeddings(network):
    for parameter in (network.tok_emb.weight, network.pos_emb, network.bias):
        parameter.requires_grad_(False)
    return network.train()
