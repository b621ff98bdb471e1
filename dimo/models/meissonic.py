"""The Meissonic transformer (arXiv 2410.08261), a text-conditioned masked model of 64 x 64 tokens.

14 joint and 28 single blocks work on a grid of half the side. They are conditioned on text states,
and on a pooled text vector, the timestep and micro-conditions (image size, crop, aesthetic score).

The timestep is 1000 times the fraction of masked tokens, as in Meissonic's training. Its pipeline
passes the number of remaining steps instead, and the official Di[M]O code always 0 (an integer
cast); published results hold with all three.
"""

import json
from dataclasses import dataclass, fields
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimo.errors import DimoError
from dimo.models import TextFeatures, TextNetwork
from dimo.models.layers import Blocks, perturb
from dimo.models.meissonic_layers import (
    ConvMlmLayer,
    Embed,
    JointBlock,
    Mlp,
    Resample,
    RMSNorm,
    SingleBlock,
    rotary_tables,
    sinusoid,
)
from dimo.util.schema import Origin

_TEXT = 77  # tokens of a prompt
_MICRO = 5  # micro-conditions: width, height, two crop offsets, aesthetic score
_WIDTH = 256  # of one number's sinusoid
_PIXELS, _AESTHETIC_SCORE = 16, 6.0  # side of a token; score that the official pipeline asks for
_TIMESTEPS = 1000.0
_ROWS = 16  # the batch of conditions is padded to a multiple
_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Keys of the official configuration without effect, and their only supported value.
_FIXED: dict[str, Any] = {"patch_size": 1, "guidance_embeds": False}


class _TimeText(nn.Module):
    def __init__(self, dim: int, pooled_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = Mlp(_WIDTH, dim)
        self.text_embedder = Mlp(pooled_dim, dim)


@dataclass(frozen=True)
class MeissonicConfig:
    """Arguments of `Meissonic`; an official configuration has all but input_size, dropout, depth.

    Raises:
        DimoError: Sizes that do not fit together, or a dropout rate.
    """

    input_size: int = 64  # side of the token grid
    num_layers: int = 14  # joint blocks
    num_single_layers: int = 28
    attention_head_dim: int = 128
    num_attention_heads: int = 8
    joint_attention_dim: int = 1024  # width of a text state
    pooled_projection_dim: int = 1024  # width of the pooled text
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)  # rotary widths: unused, row, column
    vocab_size: int = 8256  # rows of the token embedding
    codebook_size: int = 8192
    downsample: bool = True  # the blocks work on a grid of half the side
    upsample: bool = True
    dropout: float = 0.0  # the network has none
    depth: int | None = None  # builds only that many blocks, joint ones first

    @property
    def dim(self) -> int:
        """D."""
        return self.attention_head_dim * self.num_attention_heads

    def __post_init__(self) -> None:
        axes, head = self.axes_dims_rope, self.attention_head_dim
        axes_fit = len(axes) == 3 and sum(axes) == head and not any(width % 2 for width in axes)
        odd = self.downsample and self.input_size % 2
        for fits, given, allowed in (
            (self.dropout == 0, f"dropout {self.dropout:g}", "0; the network has none"),
            (self.downsample == self.upsample, "downsample without upsample", "both or none"),
            (self.input_size > 0 and not odd, f"input_size {self.input_size}", "even numbers"),
            (
                self.pooled_projection_dim == self.dim,
                f"pooled_projection_dim {self.pooled_projection_dim}",
                f"attention_head_dim x num_attention_heads = {self.dim}",
            ),
            (
                axes_fit,
                f"axes_dims_rope {list(axes)}",
                f"three even numbers that sum to attention_head_dim {head}",
            ),
            (
                self.codebook_size < self.vocab_size,
                f"vocab_size {self.vocab_size}",
                f"above {self.codebook_size}",
            ),
        ):
            if not fits:
                raise DimoError(f"Meissonic with {given} is not supported; allowed: {allowed}")


class Meissonic(TextNetwork, Blocks):
    """Text-conditioned masked transformer; its arguments are those of `MeissonicConfig`.

    Ids: codebook 0..codebook_size-1, mask `vocab_size` - 1, none between. Logits are of the
    codebook alone.
    """

    takes_positions = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        config = MeissonicConfig(**arguments)
        dim, heads = config.dim, config.num_attention_heads
        self.side = config.input_size // 2 if config.downsample else config.input_size
        self.num_tokens, self.codebook_size = config.input_size**2, config.codebook_size
        self.hidden_dim, self.axes = dim, tuple(config.axes_dims_rope)
        self.time_text_embed = _TimeText(dim, dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, dim)
        joint, single = config.num_layers, config.num_single_layers
        if config.depth is not None:
            joint, single = min(config.depth, joint), max(0, config.depth - joint)
        self.depth = joint + single
        self.transformer_blocks = nn.ModuleList(JointBlock(dim, heads) for _ in range(joint))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(dim, heads) for _ in range(single)
        )
        self.embed = Embed(config.vocab_size, dim)
        self.mlm_layer = ConvMlmLayer(dim, config.codebook_size)
        self.cond_embed = Mlp(_MICRO * _WIDTH + dim, dim, bias=False)
        self.encoder_proj_layer_norm = RMSNorm(dim)
        self.project_to_hidden_norm = RMSNorm(dim)
        self.project_to_hidden = nn.Linear(dim, dim, bias=False)
        self.project_from_hidden_norm = RMSNorm(dim)
        self.project_from_hidden = nn.Linear(dim, dim, bias=False)
        self.down_block, self.up_block = nn.ModuleDict(), nn.ModuleDict()
        if config.downsample:
            self.down_block["downsample"] = Resample(dim, is_up=False)
            self.up_block["upsample"] = Resample(dim, is_up=True)

    @property
    def mask_token_id(self) -> int:
        return self.embed.embeddings.num_embeddings - 1

    @property
    def block_tokens(self) -> int:
        return self.side**2 + _TEXT

    @classmethod
    def from_official(cls, path: str | PathLike[str], **config: Any) -> Self:
        """Loads an official checkpoint, strictly, in eval mode.

        Args:
            path: The folder `transformer` (`config.json` and `diffusion_pytorch_model.safetensors`)
                or the weights file in it; or a file of another name with the official key names.
            **config: Arguments of the constructor; those in `config.json` must agree.

        Raises:
            DimoError: Missing, damaged or foreign file, a configuration that is not supported or
                not the requested one, or keys or shapes that do not fit.
        """
        path = Path(path)
        folder, weights = (path, path / _WEIGHTS) if path.is_dir() else (path.parent, path)
        config_file = folder / "config.json"
        if weights.name == _WEIGHTS:
            if not config_file.is_file():
                raise DimoError(
                    f"no config.json in {folder}; give the folder `transformer` of a whole "
                    "Meissonic snapshot"
                )
            official = _official_config(config_file)
            for key in official.keys() & config.keys():
                if official[key] != config[key]:
                    raise DimoError(
                        f"{config_file}: {key} is {official[key]!r}, but {config[key]!r} is "
                        "needed; give the weights of that network"
                    )
            config |= official
        return super().from_official(weights, **config)

    def embedding_parameters(self) -> list[Tensor]:
        return [*self.embed.parameters(), *self.mlm_layer.parameters()]

    def forward(
        self,
        tokens: Tensor,
        text: TextFeatures,
        *,
        embedding_noise: float = 0.0,
        noise: Tensor | None = None,
        positions: Tensor | None = None,
        timestep: Tensor | None = None,
        micro_conditions: Tensor | None = None,
    ) -> Tensor:
        """As `TextNetwork`; logits [B, L, V].

        `timestep` [B] is 1000 times the fraction of masked tokens by default. `micro_conditions`
        [B, 5] are width, height, two crop offsets and aesthetic score; the default is an uncropped
        image of the network's size with score 6, as in the official pipeline.
        """
        if timestep is None:
            timestep = (tokens == self.mask_token_id).float().mean(1) * _TIMESTEPS
        if micro_conditions is None:
            side = float(_PIXELS * round(self.num_tokens**0.5))
            numbers = (side, side, 0.0, 0.0, _AESTHETIC_SCORE)
            micro_conditions = torch.tensor(numbers, device=tokens.device).expand(len(tokens), -1)
        condition = self._condition(text.pooled, timestep, micro_conditions)
        states = self.encoder_proj_layer_norm(self.context_embedder(text.states))  # [B, T, D]
        embedded = perturb(self.embed(tokens), embedding_noise, noise)  # [B, L, D]
        for resample in self.down_block.values():
            embedded = resample(embedded, 2 * self.side)  # [B, N, D]
        image = self.project_to_hidden(self.project_to_hidden_norm(embedded))
        x = torch.cat([states, image], dim=1)  # [B, T + N, D]
        length = states.shape[1]
        rotary = rotary_tables(self.position_ids(length, tokens.device), self.axes)
        for block in self.transformer_blocks:
            x = self.run(partial(block, length), x, condition, *rotary)
        for block in self.single_transformer_blocks:
            x = self.run(block, x, condition, *rotary)
        x = self.project_from_hidden(self.project_from_hidden_norm(x[:, length:]))
        for resample in self.up_block.values():
            x = resample(x, self.side)  # [B, L, D]
        logits: Tensor = self.mlm_layer(x, positions)
        return logits

    def position_ids(self, text_length: int, device: torch.device) -> Tensor:
        """Rotary positions [T + N, 3]: zeros for text; 0, row and column of the inner grid."""
        place = torch.arange(self.side**2, device=device)
        columns = [torch.zeros_like(place), place // self.side, place % self.side]
        return F.pad(torch.stack(columns, dim=1), (0, 0, text_length, 0))

    def _condition(self, pooled: Tensor, timestep: Tensor, micro: Tensor) -> Tensor:
        """What scales and shifts the blocks, [>= B, D]."""
        # The last bits of a matrix product with few rows depend on their number.
        more = (0, 0, 0, -len(pooled) % _ROWS)
        pooled = torch.cat([pooled.float(), sinusoid(micro).flatten(1)], dim=1)
        pooled = self.cond_embed(F.pad(pooled, more))
        timestep = sinusoid(timestep.expand(micro.shape[:1]).float() * _TIMESTEPS)
        time = self.time_text_embed.timestep_embedder(F.pad(timestep, more))
        out: Tensor = time + self.time_text_embed.text_embedder(pooled)
        return out


def _official_config(path: Path) -> dict[str, Any]:
    """The constructor's arguments in an official `config.json`."""
    origin = Origin(str(path), "give the transformer of a Meissonic snapshot, or fetch it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise origin.error(f"not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("_class_name") != "Transformer2DModel":
        raise origin.error("_class_name is not 'Transformer2DModel'")
    config = {key: value for key, value in content.items() if not key.startswith("_")}
    for key, only in _FIXED.items():
        if config.pop(key, only) != only:
            raise origin.error(f"{key} is {content[key]!r}, supported is {only!r}")
    config.pop("in_channels", None)
    known = {f.name for f in fields(MeissonicConfig)} - {"input_size", "dropout", "depth"}
    for key in config:
        if key not in known:
            raise origin.unknown_key("", key, sorted(known))
    if isinstance(config.get("axes_dims_rope"), list):
        config["axes_dims_rope"] = tuple(config["axes_dims_rope"])
    return config
