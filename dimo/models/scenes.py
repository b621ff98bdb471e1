"""The bundled data set `scenes`: its text encoder, tokenizer and text-conditioned transformer."""

from collections.abc import Collection, Sequence
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

_FACTOR = 4  # pixels per token along a side
_GRID = 8
_CODE_DIM = 16
_LATENT = 96  # channels of the latents and of the decoder's first layers

_SILENT = ("a", "an", "photo", "of", "and", "on", "background")  # words without information
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
    """The text encoder of `scenes`: one-hot words, which the transformer embeds.

    The vocabulary is closed. Words without information are dropped; an empty prompt is all
    padding, the null condition.
    """

    length = 8  # words with information; the longest caption has six
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
        return self  # has no weights

    @classmethod
    def check(cls, text: str) -> None:
        """Raises a `DimoError` for an unknown word or too many of them."""
        cls._numbers(text)

    @classmethod
    def _numbers(cls, text: str) -> list[int]:
        words = text.lower().replace(".", " ").replace(",", " ").split()
        words = [word for word in words if word not in _SILENT]
        for word in words:
            if word not in _WORDS:
                shown = word if len(word) <= 40 else word[:37] + "..."
                raise unknown_name("word of a prompt of scenes", shown, (*_WORDS, *_SILENT))
        if len(words) > cls.length:
            raise DimoError(
                f"prompt {text[:60]!r} has {len(words)} words beside articles and the like; the "
                f"captions of scenes have at most {cls.length}; shorten it"
            )
        return [1 + _WORDS.index(word) for word in words]


class SceneTransformer(TextNetwork):
    """Text-conditioned masked transformer; arguments as for `dimo.models.maskgit.MaskGIT`.

    Sequence: L visual tokens, then the words, each with its neighbours. A depthwise convolution
    over the grid precedes each block. The output has a bias per position and id.
    """

    takes_positions = True
    gives_states = True
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
        """Linear layers preserve the scale, the residual branches together add about one.

        Much smaller embeddings would learn late.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                is_last = name.endswith(("mha.out_proj", "net.3"))  # of a residual branch
                scale = (2 * self.depth) ** -0.5 if is_last else 1.0
                nn.init.trunc_normal_(module.weight, std=scale * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in self.embedding_parameters()[:-1]:  # the last is the output bias
            nn.init.trunc_normal_(parameter, std=0.5)
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.trunc_normal_(last.weight, std=0.02)

    @property
    def block_tokens(self) -> int:
        return self.num_tokens + SceneWords.length

    def embedding_parameters(self) -> list[Tensor]:
        places = (self.positions, self.word_positions)
        return [self.tokens.weight, self.words.weight, *places, self.bias]

    @property
    def token_embeddings(self) -> Tensor:
        return self.tokens.weight

    def block_states(
        self, embedded: Tensor, text: TextFeatures, blocks: Collection[int]
    ) -> list[Tensor]:
        """As `MaskedModel`; the words' states come last."""
        return self.transformer.states(self._sequence(embedded, text), blocks, self.near)

    def forward(
        self,
        tokens: Tensor,
        text: TextFeatures,
        *,
        embedding_noise: float = 0.0,
        noise: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """As `TextNetwork`; logits [B, L, V + 1], the last of which is the mask token's."""
        x = self._sequence(perturb(self.tokens(tokens), embedding_noise, noise), text)
        x = self.transformer(x, positions, before=self.near)
        logits: Tensor = self.head(x[:, : self.num_tokens])
        return logits + (self.bias if positions is None else self.bias[positions])

    def _sequence(self, embedded: Tensor, text: TextFeatures) -> Tensor:
        """The input sequence [B, L + T, D]: visual tokens, then the words."""
        padded = F.pad(text.states, (0, 0, 1, 1))  # [B, T + 2, W]
        with_neighbours = torch.cat([padded[:, :-2], text.states, padded[:, 2:]], dim=-1)
        words = self.words(with_neighbours) + self.word_positions
        return torch.cat([embedded + self.positions, words], dim=1)


class _Neighbours(nn.Module):
    """Adds a depthwise 3 x 3 convolution to the visual tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 3, 3))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Visual tokens and words x [B, L + T, D] -> the same, words unchanged."""
        count = _GRID * _GRID
        grid = x[:, :count].reshape(len(x), _GRID, _GRID, -1).permute(0, 3, 1, 2)
        # Channels last in memory: in another layout a CPU's result depends on the batch.
        around = F.conv2d(grid, self.weight[:, None], self.bias, padding=1, groups=len(self.bias))
        grid = grid + around
        return torch.cat([grid.permute(0, 2, 3, 1).flatten(1, 2), x[:, count:]], dim=1)


class _Residual(nn.Module):
    """Residual 3 x 3 and 1 x 1 convolutions; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.out(F.gelu(self.conv(x)))
        return out


def _encoder() -> nn.Sequential:
    """Images [B, 3, 32, 32] in [-1, 1] -> latents [B, 96, 8, 8]."""
    return nn.Sequential(
        nn.PixelUnshuffle(2),
        nn.Conv2d(12, 48, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(48, _LATENT, 2, stride=2),
        nn.GELU(),
        _Residual(_LATENT),
        _Residual(_LATENT),
        nn.GELU(),
    )


def _decoder() -> nn.Sequential:
    """Latents [B, 96, 8, 8] -> images [B, 3, 32, 32], about [-1, 1].

    Its attention sees the whole picture and can correct single wrong tokens.
    """
    return nn.Sequential(
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
    """32 x 32 pictures <-> an 8 x 8 grid of tokens; see `dimo.models.Tokenizer`."""

    def __init__(self, codebook_size: int = 256) -> None:
        super().__init__(
            _encoder(),
            _decoder(),
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
