"""diffusers' VQ tokenizer, used by Meissonic."""

import json
import math
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dimo.errors import DimoError
from dimo.util.schema import Origin
from dimo.weights.files import load_state_dict


class DiffusersVQ(nn.Module):
    """Images <-> tokens by diffusers' `VQModel`; see `dimo.models.Tokenizer` for the interface.

    One image at a time, so that 1024 x 1024 pixels fit and the batch changes nothing.
    """

    def __init__(self, network: Any, *, image_size: int) -> None:
        super().__init__()
        self.network = network
        config = network.config
        self.side = image_size // 2 ** (len(config.block_out_channels) - 1)
        self.code_dim: int = config.vq_embed_dim or config.latent_channels
        self.codebook_size: int = config.num_vq_embeddings
        self.num_tokens = self.side**2
        self.image_size = image_size

    @classmethod
    def from_official(cls, path: str | PathLike[str], *, image_size: int = 1024) -> Self:
        """Loads the weights file `path` of a diffusers snapshot's folder `vqvae`, strictly.

        Raises:
            DimoError: No diffusers, a missing or damaged file, or keys or shapes that do not fit.
        """
        try:
            from diffusers import VQModel
        except ImportError as error:
            raise DimoError(
                f"text-to-image needs the package {error.name or 'diffusers'}; install it with: "
                "pip install 'dimo[t2i]'"
            ) from None
        config = Path(path).parent / "config.json"
        origin = Origin(str(config), "give a whole snapshot of the model, or fetch it again")
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
            if content.get("_class_name") != "VQModel":
                raise ValueError("_class_name is not 'VQModel'")
            network = VQModel(**{k: v for k, v in content.items() if not k.startswith("_")})
        except OSError as error:
            raise origin.error(f"{error.strerror}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise origin.error(f"no configuration of a VQModel: {error}") from error
        load_state_dict(network, path)
        return cls(network.eval().requires_grad_(False), image_size=image_size)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        shape = (3, self.image_size, self.image_size)
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            raise DimoError(
                f"images are {images.dtype} {list(images.shape)}; allowed: uint8 "
                f"[B, {', '.join(map(str, shape))}]; resize them first"
            )
        tokens = []
        for image in images.to(self._device)[:, None]:
            latents = self.network.encode(image.float() / 255).latents
            tokens.append(self.network.quantize(latents)[2][2].view(1, self.num_tokens))
        return torch.cat(tokens)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        shape = (1, side, side, self.code_dim)
        network, images = self.network, []
        for one in tokens.to(self._device)[:, None]:
            code = network.quantize.get_codebook_entry(one, shape)
            spatial = code if network.config.norm_type == "spatial" else None
            images.append(network.decoder(network.post_quant_conv(code), spatial))
        return torch.cat(images).clamp(0, 1) * 2 - 1

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device
