"""CLIP's text encoder with its projection, loaded by transformers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch

from dimo.errors import DimoError
from dimo.models import TextFeatures

_LENGTH = 77  # tokens; shorter texts are padded without an attention mask, as in Meissonic


class CLIPText:
    """Texts -> states of the last layer but one [B, 77, D], and the projected last token [B, P]."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.device = tokenizer, torch.device("cpu")

    @classmethod
    def from_official(cls, path: str | os.PathLike[str]) -> Self:
        """Loads the weights file `path` of a diffusers snapshot's folder `text_encoder`, offline.

        Raises:
            DimoError: No transformers, a missing or damaged file, keys or shapes that do not fit.
        """
        try:
            import transformers
        except ImportError as error:
            raise DimoError(
                f"text-to-image needs the package {error.name or 'transformers'}; install it with: "
                "pip install 'dimo[t2i]'"
            ) from None
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
