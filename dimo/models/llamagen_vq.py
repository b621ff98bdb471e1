"""The LlamaGen VQ-16 tokenizer (FoundationVision/LlamaGen), which Halton-MaskGIT uses."""

from collections.abc import Sequence
from os import PathLike
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dimo.errors import DimoError
from dimo.models.vq_layers import ConvTokenizer, Decoder, Encoder, Names
from dimo.weights.files import load_state_dict

_NAMES = Names("conv_blocks", "conv_blocks", "res", ("0", "1", "2"), up_reversed=False)
_USAGE_LENGTH = 65536  # entries of the usage record in the official layout
# Of the training: arguments of the official class that a frozen tokenizer has no use for.
_TRAINING_CONFIG = ("codebook_show_usage", "commit_loss_beta", "entropy_loss_ratio", "dropout_p")


class LlamaGenVQ(ConvTokenizer):
    """Images <-> tokens; the nearest codebook vector by angle (vectors of unit length).

    Args:
        codebook_size: V.
        codebook_embed_dim: Width of a codebook vector.
        encoder_ch_mult: Width of each encoder level over `ch`, from the finest.
        decoder_ch_mult: The same for the decoder.
        z_channels: Width of the latents.
        ch: Base width.
        num_res_blocks: Residual blocks a level.
        image_size: Side of the images it is used for; sets `num_tokens` only.
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
        shared: dict[str, Any] = {
            "ch": ch,
            "num_res_blocks": num_res_blocks,
            "z_channels": z_channels,
            "names": _NAMES,
        }
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
        # Which vectors the last training batches used; here only so that state dicts are official.
        self.quantize.register_buffer("codebook_used", torch.zeros(_USAGE_LENGTH))

    @classmethod
    def from_official(cls, path: str | PathLike[str], **config: Any) -> Self:
        """Builds the network and loads an official checkpoint, every key accounted for.

        Args:
            path: `vq_ds16_c2i.pt`, or a `.safetensors` with the official key names.
            **config: The constructor's arguments; what the official configuration has beside
                them for the training is left out.

        Raises:
            DimoError: Missing, truncated or foreign file, or keys or shapes that do not fit.
        """
        arguments = {key.split(" ")[0]: value for key, value in config.items()}  # "ch (note)"
        if not arguments.pop("codebook_l2_norm", True):
            raise DimoError("codebook_l2_norm false is not supported; the published network has it")
        for key in _TRAINING_CONFIG:
            arguments.pop(key, None)
        tokenizer = cls(**arguments)
        load_state_dict(tokenizer, path)
        return tokenizer.eval().requires_grad_(False)

    def _comparable(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1)
