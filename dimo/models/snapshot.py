"""The text encoder and the VQ tokenizer of a diffusers snapshot, used by Meissonic."""

import json
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dimo.errors import DimoError
from dimo.models import TextFeatures
from dimo.util.schema import Origin
from dimo.weights.files import load_state_dict

_LENGTH = 77  # tokens; shorter texts are padded without an attention mask, as in Meissonic


class CLIPText:
    """CLIP's texts -> states of the last layer but one [B, 77, D], projected last token [B, P]."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.device = tokenizer, torch.device("cpu")

    @classmethod
    def from_official(cls, path: str | PathLike[str]) -> Self:
        """Loads the weights file `path` of a diffusers snapshot's folder `text_encoder`, offline.

        Raises:
            DimoError: No transformers, a missing or damaged file, keys or shapes that do not fit.
        """
        transformers = transformers_for("text-to-image")
        folder = Path(path).parent
        tokenizer_folder = folder.parent / "tokenizer"
        for needed in (
            folder / "config.json",
            Path(path),
            *(tokenizer_folder / name for name in ("vocab.json", "merges.txt")),
        ):
            if not needed.is_file():
                raise DimoError(
                    f"no {needed.name} in {needed.parent}; give a whole snapshot of the model, "
                    "with its folders text_encoder and tokenizer"
                )
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            tokenizer = transformers.CLIPTokenizer.from_pretrained(
                tokenizer_folder, local_files_only=True
            )
            model, info = transformers.CLIPTextModelWithProjection.from_pretrained(
                folder,
                local_files_only=True,
                output_loading_info=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # reported below, with the other keys
            )
        except Exception as error:  # a damaged file can raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DimoError(
                f"cannot read text encoder {folder}: {reason}; fetch it again"
            ) from error
        finally:
            transformers.logging.set_verbosity(verbosity)
        wrong = [
            f"{len(info[kind])} {kind} ({min(map(str, info[kind]))})"
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[kind]
        ]
        if wrong:
            raise DimoError(
                f"text encoder {folder} does not fit its config.json: {', '.join(wrong)}; "
                "fetch it again"
            )
        return cls(model, tokenizer)

    def to(self, device: torch.device) -> Self:
        """Moves the weights; returns the encoder."""
        self.model, self.device = self.model.to(device), device
        return self

    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        ids = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=_LENGTH,
            return_tensors="pt",
        ).input_ids
        out = self.model(ids.to(self.device), output_hidden_states=True)
        return TextFeatures(out.hidden_states[-2], out.text_embeds)


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
            raise _missing_package(error, "diffusers", "text-to-image") from None
        config = Path(path).parent / "config.json"
        origin = Origin(str(config), "give a whole snapshot of the model, or fetch it again")
        try:
            content = json.loads(config.read_text(encoding="utf-8-sig"))
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


def transformers_for(user: str) -> Any:
    """The package transformers, of the extra `t2i`; `user` is who needs it, for the error.

    Raises: DimoError: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise _missing_package(error, "transformers", user) from None
    return transformers


def _missing_package(error: ImportError, package: str, user: str) -> DimoError:
    return DimoError(
        f"{user} needs the package {error.name or package}; install it with: "
        "pip install 'dimo[t2i]'"
    )
