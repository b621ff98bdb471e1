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
# Training-only arguments of the official class.
_TRAINING_CONFIG = ("codebook_show_usage", "commit_loss_beta", "entropy_loss_ratio", "dropout_p")


class LlamaGenVQ(ConvTokenizer):
    """Images <-> tokens; the nearest codebook vector by angle (vectors of unit length).

    Arguments as for `vq_layers.Encoder`; `image_size` sets `num_tokens` only.
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
        shared: dict[str, Any] = {"ch": ch, "num_res_blocks": num_res_blocks, "names": _NAMES}
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
        for key in _TRAINING_CONFIG:
            arguments.pop(key, None)
        tokenizer = cls(**arguments)
        load_state_dict(tokenizer, path)
        return tokenizer.eval().requires_grad_(False)

    def _comparable(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1)
