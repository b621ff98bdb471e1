"""The VQ tokenizers of MaskGIT v1.0 and Halton-MaskGIT.

The former is the VQGAN of CompVis/taming-transformers (f16, 1024 vectors), the latter the VQ-16 of
FoundationVision/LlamaGen (16384 vectors).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from dimo.errors import DimoError
from dimo.models.vq_layers import ConvTokenizer, Decoder, Encoder, Names
from dimo.util.schema import Origin, decode, encode
from dimo.weights.files import load_metadata, load_state_dict

_NAMES = Names("down", "up", "block", ("block_1", "attn_1", "block_2"), up_reversed=True)
# Training-only parts of `model.yaml` and `last.ckpt`.
_TRAINING_CONFIG = (
    "lossconfig",
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "colorize_nlabels",
    "monitor",
    "sane_index_shape",  # of what `encode` returns there
)
TRAINING_KEYS = ("loss.", "model_ema.", "colorize")  # discriminator and LPIPS; averages; buffer


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
    dropout: float = 0.0  # training only
    resamp_with_conv: bool = True
    give_pre_end: bool = False


@dataclass(frozen=True)
class _Config:
    embed_dim: int = 256
    n_embed: int = 1024
    ddconfig: _Networks = _Networks()
    image_size: int | None = None
    remap: str | None = None


# Keys with the only value that the network here has.
_FIXED = {"double_z": False, "resamp_with_conv": True, "give_pre_end": False, "remap": None}


@dataclass(frozen=True)
class _Model:
    params: dict[str, Any]
    target: str = "taming.models.vqgan.VQModel"
    base_learning_rate: Any = None


@dataclass(frozen=True)
class _File:
    model: _Model


class VQGAN(ConvTokenizer):
    """Images <-> tokens; the nearest codebook vector by Euclidean distance.

    `config` has keys of the official `model.yaml` (`embed_dim`, `n_embed`, `ddconfig`), by default
    those of the 72 M network of ImageNet-256, and `image_size` if it is not `ddconfig.resolution`.

    Raises:
        DimoError: An unknown key or a value of another type.
    """

    def __init__(self, **config: Any) -> None:
        origin = Origin("VQGAN configuration", "give the `params` of the model.yaml beside it")
        parsed = _parse(config, origin)
        networks = parsed.ddconfig
        levels = range(len(networks.ch_mult))
        attention = [i for i in levels if networks.resolution >> i in networks.attn_resolutions]
        shared: dict[str, Any] = {"ch": networks.ch, "ch_mult": networks.ch_mult, "names": _NAMES}
        shared |= {"num_res_blocks": networks.num_res_blocks, "attention": attention}
        shared["z_channels"] = networks.z_channels
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
        """Loads a Lightning `last.ckpt`, or a `.safetensors` with its keys, strictly.

        Training-only weights (`TRAINING_KEYS`) are ignored. `config` is the content of the official
        `model.yaml`, or its `params` alone.

        Raises:
            DimoError: Missing, damaged or foreign file, an unknown configuration key, or keys or
                shapes that do not fit.
        """
        params = config.get("model", config)
        tokenizer = cls(**_without_training(params.get("params", params)))
        load_state_dict(tokenizer, path, ignore=TRAINING_KEYS)
        return tokenizer.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | PathLike[str], *, image_size: int | None = None) -> Self:
        """Loads a `last.ckpt` with its `model.yaml` beside it, or a converted checkpoint.

        Raises:
            DimoError: As `read_config` and `from_official`.
        """
        return cls.from_official(path, **read_config(path), image_size=image_size)


def read_config(path: str | PathLike[str], config: Path | None = None) -> dict[str, Any]:
    """The constructor arguments of the network in a checkpoint.

    They come from `config`, from the checkpoint if it is converted, or else from the `model.yaml`
    beside it.

    Raises:
        DimoError: No configuration; no YAML, a wrong type or an unknown key in it, or the
            configuration of another kind of network.
    """
    path = Path(path)
    if config is None and path.suffix == ".safetensors":
        stored = load_metadata(path).get("config")
        if stored is not None:
            return _arguments(stored, Origin(str(path), "convert the official file again"))
    source = config or path.with_name("model.yaml")
    if not source.is_file():
        raise DimoError(
            f"{path} needs its configuration, and there is no {source}; put the model.yaml of "
            "its training there, or fetch the official one: dimo weights fetch maskgit-vqgan-config"
        )
    origin = Origin(str(source), "give the model.yaml of the checkpoint")
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise origin.error(f"cannot be read as YAML: {' '.join(str(error).split())}") from error
    if isinstance(content, dict) and "model" in content:
        content = {"model": content["model"]}  # `data` and `lightning` are of its training
    model = decode(_File, content, origin).model
    if model.target.rpartition(".")[2] != "VQModel":
        raise origin.error(f"model.target is {model.target!r}, but a VQModel is needed")
    return _arguments(_without_training(model.params), origin)


def _arguments(params: dict[str, Any], origin: Origin) -> dict[str, Any]:
    arguments: dict[str, Any] = encode(_parse(params, origin))
    del arguments["image_size"]  # not a property of the network
    return arguments


def _parse(params: object, origin: Origin) -> _Config:
    config = decode(_Config, params, origin)
    for key, value in {**vars(config), **vars(config.ddconfig)}.items():
        if value != _FIXED.get(key, value):
            needed = json.dumps(_FIXED[key])
            raise origin.error(f"{key} must be {needed} for the vector-quantized network of dimo")
    return config


def _without_training(params: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key not in _TRAINING_CONFIG}


class LlamaGenVQ(ConvTokenizer):
    """Images <-> tokens; the nearest codebook vector by angle (vectors of unit length).

    Arguments as for `dimo.models.vq_layers.Encoder`; `image_size` sets `num_tokens` only.
    """

    def __init__(
        self,
        *,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        encoder_ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        z_channels: int = 256,
        ch: int = 128,
        num_res_blocks: int = 2,
        image_size: int = 256,
    ) -> None:
        names = Names("conv_blocks", "conv_blocks", "res", ("0", "1", "2"), up_reversed=False)
        shared: dict[str, Any] = {"ch": ch, "num_res_blocks": num_res_blocks, "names": names}
        shared["z_channels"] = z_channels
        last = len(encoder_ch_mult) - 1, len(decoder_ch_mult) - 1  # the only level with attention
        super().__init__(
            Encoder(in_channels=3, ch_mult=encoder_ch_mult, attention=[last[0]], **shared),
            Decoder(out_ch=3, ch_mult=decoder_ch_mult, attention=[last[1]], **shared),
            factor=2 ** last[0],
            image_size=image_size,
            codebook_size=codebook_size,
            code_dim=codebook_embed_dim,
            z_channels=z_channels,
        )
        # Records use in training; kept so that state dicts are official.
        self.quantize.register_buffer("codebook_used", torch.zeros(65536))

    @classmethod
    def from_official(cls, path: str | PathLike[str], **config: Any) -> Self:
        """As `MaskedNetwork.from_official`, with `vq_ds16_c2i.pt` and its official configuration.

        Training-only arguments are ignored.
        """
        arguments = {key.split(" ")[0]: value for key, value in config.items()}  # "ch (note)"
        if not arguments.pop("codebook_l2_norm", True):
            raise DimoError("codebook_l2_norm false is not supported; the published network has it")
        for key in ("codebook_show_usage", "commit_loss_beta", "entropy_loss_ratio", "dropout_p"):
            arguments.pop(key, None)
        tokenizer = cls(**arguments)
        load_state_dict(tokenizer, path)
        return tokenizer.eval().requires_grad_(False)

    def _comparable(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1)
