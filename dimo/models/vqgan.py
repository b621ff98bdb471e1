"""The taming VQGAN tokenizer of MaskGIT v1.0 (CompVis/taming-transformers, f16, 1024 vectors)."""

__all__ = ["VQGAN"]

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

from dimo.errors import DimoError
from dimo.models.vq_layers import ConvTokenizer, Decoder, Encoder, Names
from dimo.strict import Origin, decode
from dimo.weights import load_state_dict

_NAMES = Names("down", "up", "block", ("block_1", "attn_1", "block_2"), up_reversed=True)
# Of the training: present in `model.yaml` and in `last.ckpt`, of no use to a frozen tokenizer.
_TRAINING_CONFIG = (
    "lossconfig",
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "colorize_nlabels",
    "monitor",
)
_TRAINING_KEYS = ("loss.", "model_ema.", "colorize")  # discriminator and LPIPS; averages; buffer


@dataclass(frozen=True)
class _Networks:
    """`ddconfig` of the official configuration; the defaults are f16 on 256 x 256."""

    double_z: bool = False
    z_channels: int = 256
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0  # of the training; a tokenizer is frozen


@dataclass(frozen=True)
class _Config:
    embed_dim: int = 256
    n_embed: int = 1024
    ddconfig: _Networks = _Networks()
    image_size: int | None = None


class VQGAN(ConvTokenizer):
    """Images <-> tokens; the nearest codebook vector by Euclidean distance.

    Args:
        **config: `embed_dim`, `n_embed` and `ddconfig` as in the official `model.yaml`, whole or in
            part; the defaults are the 72 M network of ImageNet-256. `image_size`: side of the
            images it is used for when it is not `ddconfig.resolution` (512 with `maskgit-512`).

    Raises:
        DimoError: An unknown key or a value of another type.
    """

    def __init__(self, **config: Any) -> None:
        origin = Origin("VQGAN configuration", "give the `params` of the model.yaml beside it")
        parsed = decode(_Config, config, origin)
        networks = parsed.ddconfig
        if networks.double_z:
            raise origin.error("double_z must be false for a vector-quantized network")
        levels = range(len(networks.ch_mult))
        attention = [i for i in levels if networks.resolution >> i in networks.attn_resolutions]
        shared: dict[str, Any] = {
            "ch": networks.ch,
            "ch_mult": networks.ch_mult,
            "num_res_blocks": networks.num_res_blocks,
            "attention": attention,
            "z_channels": networks.z_channels,
            "names": _NAMES,
        }
        super().__init__(
            Encoder(in_channels=networks.in_channels, **shared),
            Decoder(out_ch=networks.out_ch, **shared),
            factor=2 ** levels[-1],
            image_size=parsed.image_size or networks.resolution,
            codebook_size=parsed.n_embed,
            code_dim=parsed.embed_dim,
            z_channels=networks.z_channels,
        )

    @classmethod
    def from_official(cls, path: str | PathLike[str], **config: Any) -> Self:
        """Builds the network and loads an official checkpoint, every key accounted for.

        Ignored on purpose: the loss (discriminator and perceptual network), weight averages and
        the colorization buffer, all of the training.

        Args:
            path: A Lightning `last.ckpt`, or a `.safetensors` with the official key names.
            **config: The content of the official `model.yaml`, or its `params` alone.

        Raises:
            DimoError: Missing, truncated or foreign file, an unknown configuration key, or keys
                or shapes that do not fit.
        """
        params = config.get("model", config)
        params = dict(params.get("params", params))
        for key in _TRAINING_CONFIG:
            params.pop(key, None)
        tokenizer = cls(**params)
        load_state_dict(tokenizer, path, ignore=_TRAINING_KEYS)
        return tokenizer.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | PathLike[str], *, image_size: int | None = None) -> Self:
        """Loads an official checkpoint with the `model.yaml` beside it."""
        import yaml  # type: ignore[import-untyped]

        config_path = Path(path).with_name("model.yaml")
        if not config_path.is_file():
            raise DimoError(f"no {config_path}; it comes with the checkpoint, put it beside it")
        params = dict(yaml.safe_load(config_path.read_text())["model"]["params"])
        if image_size is not None:
            params["image_size"] = image_size
        return cls.from_official(path, **params)
