"""The Meissonic transformer (arXiv 2410.08261), a text-conditioned masked model of 64 x 64 tokens.

14 joint and 28 single blocks work on a grid of half the side; text enters as a sequence of states
and as one pooled vector, with the image's size, its crop and an aesthetic score (micro-conditions)
and the timestep beside it. `dimo.models.text.TextConditioned` makes a `MaskedModel` of it.

The timestep is 1000 times the share of masked tokens, which the network reads off its input. So
Meissonic was trained. Its own pipeline passes the number of steps left instead, and the official
Di[M]O code always 0, by a cast to integers; published results survive all three.
"""

import json
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
from dimo.weights.files import load_state_dict

_TEXT = 77  # tokens of a prompt
_MICRO = 5  # micro-conditions: width, height, two crop offsets, aesthetic score
_WIDTH = 256  # of one number's sinusoid
_PIXELS, _AESTHETIC_SCORE = 16, 6.0  # a token's side; the score that its pipeline asks for
_TIMESTEPS = 1000.0
_ROWS = 16  # the batch of conditions is padded to a multiple of this
_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Keys of the official configuration that build nothing, and the one value that is supported.
_FIXED: dict[str, Any] = {"patch_size": 1, "guidance_embeds": False}
_UNUSED = ("in_channels",)


class _TimeText(nn.Module):
    def __init__(self, dim: int, pooled_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = Mlp(_WIDTH, dim)
        self.text_embedder = Mlp(pooled_dim, dim)


class Meissonic(TextNetwork, Blocks):
    """Text-conditioned masked transformer; logits of the codebook alone, without a mask class.

    Ids: codebook 0..codebook_size-1, mask `vocab_size` - 1; those between are not used.

    Args:
        input_size: Tokens a side.
        num_layers: Joint blocks.
        num_single_layers: Single blocks.
        attention_head_dim: Width of a head.
        num_attention_heads: Heads; their joint width is D.
        joint_attention_dim: Width of a text state.
        pooled_projection_dim: Width of the pooled text; equals D.
        axes_dims_rope: Rotary widths of the axes (unused, row, column); sum to a head's width.
        vocab_size: Rows of the token embedding.
        codebook_size: V.
        downsample: The blocks work on a grid of half the side.
        upsample: And its result is brought back; goes with `downsample`.
        dropout: 0; the network has none.
        depth: Builds the first so many blocks only, joint ones first; None: all.

    Raises:
        DimoError: Sizes that do not fit together, or a dropout rate.
    """

    takes_positions = True

    def __init__(
        self,
        *,
        input_size: int = 64,
        num_layers: int = 14,
        num_single_layers: int = 28,
        attention_head_dim: int = 128,
        num_attention_heads: int = 8,
        joint_attention_dim: int = 1024,
        pooled_projection_dim: int = 1024,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
        vocab_size: int = 8256,
        codebook_size: int = 8192,
        downsample: bool = True,
        upsample: bool = True,
        dropout: float = 0.0,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        dim = attention_head_dim * num_attention_heads
        side = input_size // 2 if downsample else input_size
        _fits(dropout == 0, f"dropout {dropout:g}", "0; the network has none")
        _fits(downsample == upsample, "downsample without upsample", "both or none")
        _fits(side * (1 + downsample) == input_size > 0, f"input_size {input_size}", "even numbers")
        _fits(
            pooled_projection_dim == dim,
            f"pooled_projection_dim {pooled_projection_dim}",
            f"attention_head_dim x num_attention_heads = {dim}",
        )
        _fits(
            len(axes_dims_rope) == 3
            and sum(axes_dims_rope) == attention_head_dim
            and not any(width % 2 for width in axes_dims_rope),
            f"axes_dims_rope {list(axes_dims_rope)}",
            f"three even numbers that sum to attention_head_dim {attention_head_dim}",
        )
        _fits(codebook_size < vocab_size, f"vocab_size {vocab_size}", f"above {codebook_size}")
        self.side, self.num_tokens = side, input_size**2
        self.codebook_size, self.hidden_dim, self.axes = codebook_size, dim, tuple(axes_dims_rope)
        self.time_text_embed = _TimeText(dim, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        if depth is not None:
            num_layers, num_single_layers = min(depth, num_layers), max(0, depth - num_layers)
        self.depth = num_layers + num_single_layers
        heads = num_attention_heads
        self.transformer_blocks = nn.ModuleList(JointBlock(dim, heads) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(dim, heads) for _ in range(num_single_layers)
        )
        self.embed = Embed(vocab_size, dim)
        self.mlm_layer = ConvMlmLayer(dim, codebook_size)
        self.cond_embed = Mlp(_MICRO * _WIDTH + pooled_projection_dim, dim, bias=False)
        self.encoder_proj_layer_norm = RMSNorm(dim)
        self.project_to_hidden_norm = RMSNorm(dim)
        self.project_to_hidden = nn.Linear(dim, dim, bias=False)
        self.project_from_hidden_norm = RMSNorm(dim)
        self.project_from_hidden = nn.Linear(dim, dim, bias=False)
        down = {"downsample": Resample(dim, is_up=False)} if downsample else {}
        up = {"upsample": Resample(dim, is_up=True)} if upsample else {}
        self.down_block, self.up_block = nn.ModuleDict(down), nn.ModuleDict(up)

    @property
    def mask_token_id(self) -> int:
        return self.embed.embeddings.num_embeddings - 1

    @property
    def block_tokens(self) -> int:
        return self.side**2 + _TEXT

    @classmethod
    def from_official(cls, path: str | PathLike[str], **config: Any) -> Self:
        """Builds the network and loads an official checkpoint, every key accounted for.

        Args:
            path: The folder `transformer` (`config.json` and `diffusion_pytorch_model.safetensors`)
                or the weights file in it; or a file of another name with the official key names.
            **config: The constructor's arguments; those in `config.json` must agree.

        Raises:
            DimoError: Missing, truncated or foreign file, a configuration that is not supported or
                not the one asked for, or keys or shapes that do not fit.
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
            config = _agreed(_official_config(config_file), config, config_file)
        model = cls(**config)
        load_state_dict(model, weights)
        return model.eval()

    def embedding_parameters(self) -> list[Tensor]:
        """What distillation keeps frozen: all of the token embedding and of the head."""
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
        """Logits [B, L, V].

        Args:
            tokens: [B, L] int64, ids of the codebook or `mask_token_id`.
            text: Of each image.
            embedding_noise: sigma of `dimo.models.layers.perturb`, on the output of `embed`.
            noise: [B, L, hidden_dim] standard normal.
            positions: [B, K] int64, computes the logits only there: the result is [B, K, V].
            timestep: [B]; None: 1000 times the share of masked tokens, as in the training.
            micro_conditions: [B, 5] width, height, two crop offsets, aesthetic score; None: the
                whole of an image of this size, score 6, as the official pipeline asks.
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
        zeros = torch.zeros_like(place)
        rows = place.div(self.side, rounding_mode="floor")
        image = torch.stack([zeros, rows, place % self.side], dim=1)
        return F.pad(image, (0, 0, text_length, 0))

    def _condition(self, pooled: Tensor, timestep: Tensor, micro: Tensor) -> Tensor:
        """What scales and shifts the blocks, [>= B, D]."""
        # A matrix product of few rows gives other last bits for another number of rows.
        more = (0, 0, 0, -len(pooled) % _ROWS)
        pooled = torch.cat([pooled.float(), sinusoid(micro).flatten(1)], dim=1)
        pooled = self.cond_embed(F.pad(pooled, more))
        timestep = timestep.expand(micro.shape[:1])
        time = self.time_text_embed.timestep_embedder(
            F.pad(sinusoid(timestep.float() * _TIMESTEPS), more)
        )
        out: Tensor = time + self.time_text_embed.text_embedder(pooled)
        return out


def _fits(ok: bool, given: str, allowed: str) -> None:
    if not ok:
        raise DimoError(f"Meissonic with {given} is not supported; allowed: {allowed}")


def _official_config(path: Path) -> dict[str, Any]:
    """The constructor's arguments in an official `config.json`."""
    origin = Origin(str(path), "give the transformer of a Meissonic snapshot, or fetch it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise origin.error(f"not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("_class_name") != "Transformer2DModel":
        raise origin.error("_class_name is not 'Transformer2DModel'")
    config = {key: value for key, value in content.items() if not key.startswith("_")}
    for key, only in _FIXED.items():
        if config.pop(key, only) != only:
            raise origin.error(f"{key} is {content[key]!r}, supported is {only!r}")
    for key in _UNUSED:
        config.pop(key, None)
    known = set(Meissonic.__init__.__kwdefaults__ or ()) - {"input_size", "dropout", "depth"}
    for key in config:
        if key not in known:
            raise origin.unknown_key("", key, sorted(known))
    if isinstance(config.get("axes_dims_rope"), list):
        config["axes_dims_rope"] = tuple(config["axes_dims_rope"])
    return config


def _agreed(official: dict[str, Any], requested: dict[str, Any], path: Path) -> dict[str, Any]:
    for key in official.keys() & requested.keys():
        if official[key] != requested[key]:
            raise DimoError(
                f"{path}: {key} is {official[key]!r}, but {requested[key]!r} is needed; "
                "give the weights of that network"
            )
    return {**requested, **official}
