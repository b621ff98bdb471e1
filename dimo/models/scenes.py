"""The bundled data set `scenes`: its text encoder, tokenizer and text-conditioned transformer."""

from collections.abc import Sequence
from os import PathLike
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimo.data.scenes.prompts import BACKGROUNDS, COLORS, NUMBERS, SHAPES, SIZES, plural
from dimo.errors import DimoError, unknown_name
from dimo.models import TextFeatures, TextNetwork
from dimo.models.layers import perturb
from dimo.models.maskgit import Layers
from dimo.models.vq_layers import AttentionBlock, ConvTokenizer
from dimo.weights.files import load_state_dict

_FACTOR = 4  # pixels a token side
_GRID = 8
_CODE_DIM = 16
_LATENT = 96  # channels of the latents and of the decoder's first layers

_SILENT = ("a", "an", "photo", "of", "and", "on", "background")  # say nothing that others do not
_WORDS = (
    *SHAPES,
    *(plural(shape) for shape in SHAPES),
    *NUMBERS.values(),
    *COLORS,
    *BACKGROUNDS,
    *SIZES,
    *("left", "right", "above", "below"),
)


class SceneWords:
    """The text encoder of `scenes`: one-hot words; the transformer embeds them and learns to.

    The grammar is closed: a word is one of the data set's, or an error. Articles and other words
    without information are left out; an empty prompt is all padding, the null condition.
    """

    length = 8  # words that carry something; the longest caption has six
    width = 1 + len(_WORDS)  # 0 is padding

    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        """States float32 [B, 8, W], one word each, and their mean as the pooled vector [B, W].

        Raises:
            DimoError: As `check`.
        """
        rows = [self._numbers(text) for text in texts]
        padded = [row + [0] * (self.length - len(row)) for row in rows]
        states = F.one_hot(torch.tensor(padded), self.width).float()
        return TextFeatures(states, states.mean(dim=1))

    def to(self, device: torch.device) -> Self:
        """Has no weights; features are moved to the device of the labels."""
        return self

    @classmethod
    def check(cls, text: str) -> None:
        """
        Raises:
            DimoError: A word that is none of the data set's, or too many of them.
        """
        cls._numbers(text)

    @classmethod
    def _numbers(cls, text: str) -> list[int]:
        """Of the words that carry something."""
        numbers = []
        for word in text.lower().replace(".", " ").replace(",", " ").split():
            if word in _SILENT:
                continue
            if word not in _WORDS:
                shown = word if len(word) <= 40 else word[:37] + "..."
                raise unknown_name("word of a prompt of scenes", shown, (*_WORDS, *_SILENT))
            numbers.append(1 + _WORDS.index(word))
        if len(numbers) > cls.length:
            raise DimoError(
                f"prompt {text[:60]!r} has {len(numbers)} words beside articles and the like; the "
                f"captions of scenes have at most {cls.length}; shorten it"
            )
        return numbers


class SceneTransformer(TextNetwork):
    """Text-conditioned masked transformer.

    Sequence: L visual tokens, then the words, each with its neighbours; each attends to all. Ahead
    of each block a visual token takes in the eight around it. The output has a bias per position
    and id.

    Args:
        hidden_dim: Width.
        codebook_size: V.
        depth: Number of blocks.
        heads: Attention heads; divides `hidden_dim`.
        mlp_dim: Width of the feed-forward layer.
        dropout: Dropout rate, active in train mode only.
    """

    takes_positions = True
    num_tokens = _GRID * _GRID

    def __init__(
        self,
        *,
        hidden_dim: int = 160,
        codebook_size: int = 256,
        depth: int = 6,
        heads: int = 4,
        mlp_dim: int = 320,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.codebook_size, self.hidden_dim, self.depth = codebook_size, hidden_dim, depth
        self.tokens = nn.Embedding(codebook_size + 1, hidden_dim)
        self.positions = nn.Parameter(torch.zeros(1, self.num_tokens, hidden_dim))
        self.words = nn.Linear(3 * SceneWords.width, hidden_dim, bias=False)
        self.word_positions = nn.Parameter(torch.zeros(1, SceneWords.length, hidden_dim))
        self.near = nn.ModuleList(_Neighbours(hidden_dim) for _ in range(depth))
        self.transformer = Layers(hidden_dim, depth, heads, mlp_dim, dropout)
        self.head = nn.Sequential(
            nn.LayerNorm(hidden_dim),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.LayerNorm(hidden_dim),
            nn.Linear(hidden_dim, codebook_size + 1, bias=False),
        )
        self.bias = nn.Parameter(torch.zeros(self.num_tokens, codebook_size + 1))
        self._initialize()

    def _initialize(self) -> None:
        """Layers keep the size of what passes; a block adds little, and all of them together one.

        Embeddings are as large as that: much smaller ones are learned from late.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                adds = name.endswith(("mha.out_proj", "net.3"))
                share = (2 * self.depth) ** -0.5 if adds else 1.0
                nn.init.trunc_normal_(module.weight, std=share * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.tokens.weight, self.words.weight, *self._places()):
            nn.init.trunc_normal_(parameter, std=0.5)
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.trunc_normal_(last.weight, std=0.02)

    @property
    def block_tokens(self) -> int:
        return self.num_tokens + SceneWords.length

    def _places(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.positions, self.word_positions

    def embedding_parameters(self) -> list[Tensor]:
        """What distillation keeps frozen: embeddings of tokens, words and places, output bias."""
        return [self.tokens.weight, self.words.weight, *self._places(), self.bias]

    def forward(
        self,
        tokens: Tensor,
        text: TextFeatures,
        *,
        embedding_noise: float = 0.0,
        noise: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, L, V + 1], or [B, K, V + 1] at positions [B, K]; the last is the mask token.

        Args:
            tokens: [B, L] int64 in 0..V (V = masked).
            text: One-hot words of `SceneWords`.
            embedding_noise: sigma of the perturbation of visual tokens, see `perturb`.
            noise: [B, L, hidden_dim] standard normal.
            positions: [B, K] int64.
        """
        x = perturb(self.tokens(tokens), embedding_noise, noise) + self.positions
        words = self.words(_with_neighbours(text.states)) + self.word_positions
        x = self.transformer(torch.cat([x, words], dim=1), positions, before=self.near)
        logits: Tensor = self.head(x[:, : self.num_tokens])  # the last block gave [B, K, D]
        return logits + (self.bias if positions is None else self.bias[positions])


def _with_neighbours(states: Tensor) -> Tensor:
    """Each word [B, T, W] after the one before it and ahead of the next: [B, T, 3 W]."""
    before, after = F.pad(states, (0, 0, 1, 0))[:, :-1], F.pad(states, (0, 0, 0, 1))[:, 1:]
    return torch.cat([before, states, after], dim=-1)


class _Neighbours(nn.Module):
    """Adds to each visual token a weighted sum of those around it, channel by channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 3, 3))  # a depthwise convolution
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L + T, D] of visual tokens and words, of which the words stay as they are."""
        count = _GRID * _GRID
        grid = x[:, :count].reshape(len(x), _GRID, _GRID, -1).permute(0, 3, 1, 2)
        # Channels lie innermost here: laid out otherwise, a CPU's result depends on the batch.
        around = F.conv2d(grid, self.weight[:, None], self.bias, padding=1, groups=len(self.bias))
        grid = grid + around
        return torch.cat([grid.permute(0, 2, 3, 1).flatten(1, 2), x[:, count:]], dim=1)


class _Residual(nn.Module):
    """Adds what a 3 x 3 convolution and a layer at each place find; begins as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.out(F.gelu(self.conv(x)))
        return y


class _Encoder(nn.Sequential):
    """Images [B, 3, 32, 32] in [-1, 1] -> latents [B, 96, 8, 8]."""

    def __init__(self) -> None:
        super().__init__(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, 48, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(48, _LATENT, 2, stride=2),
            nn.GELU(),
            _Residual(_LATENT),
            _Residual(_LATENT),
            nn.GELU(),
        )


class _Decoder(nn.Sequential):
    """Latents [B, 96, 8, 8] -> images [B, 3, 32, 32], about [-1, 1].

    Sees the whole picture, so that it can mend what single tokens have wrong.
    """

    def __init__(self) -> None:
        super().__init__(
            _Residual(_LATENT),
            _Residual(_LATENT),
            AttentionBlock(_LATENT),
            _Residual(_LATENT),
            _Residual(_LATENT),
            nn.GELU(),
            nn.Conv2d(_LATENT, 4 * 48, 1),
            nn.PixelShuffle(2),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(48, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )


class SceneTokenizer(ConvTokenizer):
    """32 x 32 pictures <-> an 8 x 8 grid of tokens; see `dimo.models.Tokenizer`.

    Args:
        codebook_size: V.
    """

    def __init__(self, codebook_size: int = 256) -> None:
        super().__init__(
            _Encoder(),
            _Decoder(),
            factor=_FACTOR,
            image_size=_FACTOR * _GRID,
            codebook_size=codebook_size,
            code_dim=_CODE_DIM,
            z_channels=_LATENT,
        )

    @classmethod
    def from_file(cls, path: str | PathLike[str], *, codebook_size: int = 256) -> Self:
        """Loads weights that `dimo train --teacher scenes` wrote."""
        tokenizer = cls(codebook_size)
        load_state_dict(tokenizer, path)
        return tokenizer.eval()
