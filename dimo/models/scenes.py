"""The embedded world `scenes`: its words, its tokenizer and its text-conditioned transformer."""

__all__ = ["SceneTokenizer", "SceneTransformer", "SceneWords"]

from collections.abc import Sequence
from os import PathLike
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimo.datasets.scene_prompts import BACKGROUNDS, COLORS, NUMBERS, SHAPES, SIZES, plural
from dimo.errors import DimoError, unknown_name
from dimo.models.layers import perturb
from dimo.models.maskgit import Layers
from dimo.models.text import TextFeatures
from dimo.models.vq_layers import ConvTokenizer
from dimo.weights import load_state_dict

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
    that carry nothing there are left out; an empty prompt is all padding, the null condition.
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
        """Has no weights; features are moved to where they are wanted."""
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
        found = []
        for word in text.lower().replace(".", " ").replace(",", " ").split():
            if word in _SILENT:
                continue
            if word not in _WORDS:
                shown = word if len(word) <= 40 else word[:37] + "..."
                raise unknown_name("word of a prompt of scenes", shown, (*_WORDS, *_SILENT))
            found.append(1 + _WORDS.index(word))
        if len(found) > cls.length:
            raise DimoError(
                f"prompt {text[:60]!r} has {len(found)} words beside articles and the like; the "
                f"captions of scenes have at most {cls.length}; shorten it"
            )
        return found


class SceneTransformer(nn.Module):
    """Text-conditioned masked transformer; see `dimo.models.text.TextNetwork` for the interface.

    Sequence: L visual tokens, then the words; each attends to all. The output head is the token
    embedding itself (tied) plus a bias per position and id.

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
    block_tokens = num_tokens + SceneWords.length

    def __init__(
        self,
        *,
        hidden_dim: int = 128,
        codebook_size: int = 1024,
        depth: int = 6,
        heads: int = 4,
        mlp_dim: int = 512,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.codebook_size, self.hidden_dim, self.depth = codebook_size, hidden_dim, depth
        self.tokens = nn.Embedding(codebook_size + 1, hidden_dim)
        self.positions = nn.Parameter(torch.zeros(1, self.num_tokens, hidden_dim))
        self.words = nn.Linear(SceneWords.width, hidden_dim, bias=False)
        self.word_positions = nn.Parameter(torch.zeros(1, SceneWords.length, hidden_dim))
        self.transformer = Layers(hidden_dim, depth, heads, mlp_dim, dropout)
        self.head = nn.Sequential(
            nn.LayerNorm(hidden_dim),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.LayerNorm(hidden_dim),
        )
        self.bias = nn.Parameter(torch.zeros(self.num_tokens, codebook_size + 1))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for parameter in (self.tokens.weight, self.words.weight, *self._places()):
            nn.init.trunc_normal_(parameter, std=0.05)

    @property
    def mask_token_id(self) -> int:
        return self.codebook_size

    @classmethod
    def from_official(cls, path: str | PathLike[str], **config: int | float) -> Self:
        """Builds the network and loads its weights.

        Raises:
            DimoError: Missing, truncated or foreign file, or keys or shapes that do not fit.
        """
        model = cls(**config)  # type: ignore[arg-type]
        load_state_dict(model, path)
        return model.eval()

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
        words = self.words(text.states) + self.word_positions
        x = self.transformer(torch.cat([x, words], dim=1), positions)  # last block: [B, K, D]
        x = self.head(x[:, : self.num_tokens])
        bias = self.bias if positions is None else self.bias[positions]
        return F.linear(x, self.tokens.weight) + bias


class _Encoder(nn.Sequential):
    """Images [B, 3, 32, 32] in [-1, 1] -> latents [B, 96, 8, 8]."""

    def __init__(self) -> None:
        super().__init__(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, 48, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(48, _LATENT, 2, stride=2),
            nn.GELU(),
            nn.Conv2d(_LATENT, _LATENT, 3, padding=1),
            nn.GELU(),
        )


class _Decoder(nn.Sequential):
    """Latents [B, 96, 8, 8] -> images [B, 3, 32, 32], about [-1, 1]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(_LATENT, _LATENT, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(_LATENT, _LATENT, 3, padding=1),
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

    def __init__(self, codebook_size: int = 1024) -> None:
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
    def from_file(cls, path: str | PathLike[str], *, codebook_size: int = 1024) -> Self:
        """Loads weights that `dimo train --teacher scenes` wrote."""
        tokenizer = cls(codebook_size)
        load_state_dict(tokenizer, path)
        return tokenizer.eval()
