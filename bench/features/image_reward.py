"""ImageReward v1.0 (arXiv:2304.05977): BLIP on an image and its prompt, then a reward.

BLIP (arXiv:2201.12086) is a ViT-L/16 at 224 pixels, here timm's, whose tokens a BERT with
cross-attention reads beside the prompt, here that of `transformers`. The reward comes from the
state of the first token, [CLS], by five linear layers without nonlinearities between them, and is
standardised by two published constants.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bench.features.extraction import embed
from bench.features.resize import central_square, clip_normalized
from dimo.errors import DimoError
from dimo.models.snapshot import transformers_for
from dimo.weights.files import load_state_dict, read_state_dict

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the rewards, from the authors' code
_LENGTH = 35  # tokens of a prompt; longer ones are truncated
_ADDED = ("[DEC]", "[ENC]")  # BLIP's, behind BERT's vocabulary
_VOCABULARY = "vocab.txt"
_PARTS = {"image": "blip.visual_encoder.", "text": "blip.text_encoder.", "reward": "mlp.layers."}
_UNUSED = ("blip.", "text.embeddings.position_ids")  # of BLIP's pretraining; not trained


@dataclass(frozen=True)
class Sizes:
    """Widths, depths and heads of both encoders; those of v1.0 are the defaults."""

    side: int = 224
    image: tuple[int, int, int] = (1024, 24, 16)
    text: tuple[int, int, int] = (768, 12, 12)
    text_hidden: int = 3072
    positions: int = 512


class ImageReward(nn.Module):
    """Rewards of images for their prompts, in float32.

    Args:
        vocabulary: The words of BERT's tokenizer, in the order of their numbers.
        sizes: Of the encoders.
    """

    def __init__(self, vocabulary: Sequence[str], sizes: Sizes) -> None:
        super().__init__()
        transformers = transformers_for("ImageReward")
        width, depth, heads = sizes.image
        self.side = sizes.side
        with torch.device("meta"):  # nothing is drawn that is overwritten anyway
            image = VisionTransformer(
                img_size=sizes.side, patch_size=16, embed_dim=width, depth=depth, num_heads=heads,
                num_classes=0, global_pool="",
            )  # fmt: skip
        self.image = image.to_empty(device="cpu")
        hidden, layers, heads = sizes.text
        config = transformers.BlipTextConfig(
            vocab_size=len(vocabulary) + len(_ADDED),
            hidden_size=hidden,
            encoder_hidden_size=width,
            intermediate_size=sizes.text_hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=sizes.positions,
            layer_norm_eps=1e-12,
            bos_token_id=None,
            sep_token_id=None,
        )
        self.text: Any = transformers.BlipTextModel(config, add_pooling_layer=False)
        widths = (hidden, 1024, 128, 64, 16, 1)
        linear = [nn.Linear(*pair) for pair in pairwise(widths)]
        # dropout, which does nothing here, has numbers in the official keys
        self.reward = nn.ModuleDict(dict(zip(("0", "2", "4", "6", "7"), linear, strict=True)))
        self.tokenizer = transformers.BertTokenizer(
            vocab={word: number for number, word in enumerate(vocabulary)},
            additional_special_tokens=list(_ADDED),
        )

    def preprocess(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """uint8 [H, W, 3] -> what the image encoder takes, float32 [3, S, S]."""
        return clip_normalized(central_square(pixels, self.side, "pil"))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Prepared images [B, 3, S, S] and their prompts -> rewards [B]."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_LENGTH,
            return_tensors="pt",
        ).to(images.device)  # fmt: skip
        states = self.text(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=self.image(images),
        ).last_hidden_state[:, 0]
        for layer in self.reward.values():
            states = layer(states)
        rewards: Tensor = (states[:, 0] - MEAN) / STD
        return rewards

    @torch.inference_mode()
    def score(
        self, images: Sequence[npt.NDArray[np.uint8]], prompts: Sequence[str]
    ) -> npt.NDArray[np.float64]:
        """One reward per image uint8 [H, W, 3] and its own prompt, float64 [N]."""
        device = next(self.parameters()).device

        def rewards(part: list[tuple[npt.NDArray[np.uint8], str]]) -> Tensor:
            pixels = torch.stack([self.preprocess(image) for image, _ in part])
            return self.forward(pixels.to(device), [prompt for _, prompt in part])

        return embed(zip(images, prompts, strict=True), rewards).astype(np.float64)


def load_image_reward(weights: Path) -> ImageReward:
    """The network of `ImageReward.pt`, with `vocab.txt` of bert-base-uncased beside it.

    Raises:
        DimoError: No transformers, no vocabulary, unreadable file, or weights of another network.
    """
    path = weights.parent / _VOCABULARY
    try:
        vocabulary = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text"
        raise DimoError(
            f"cannot read {path}: {reason}; put {_VOCABULARY} of "
            "google-bert/bert-base-uncased beside ImageReward.pt"
        ) from error
    return make_image_reward(read_state_dict(weights), vocabulary, Sizes(), name=str(weights))


def make_image_reward(
    state: dict[str, Tensor], vocabulary: Sequence[str], sizes: Sizes, *, name: str
) -> ImageReward:
    """The network of a state dict with the official keys; `name` names the weights in errors.

    Raises:
        DimoError: No transformers; keys or shapes that do not fit, or a vocabulary of another size.
    """
    words = state.get("blip.text_encoder.embeddings.word_embeddings.weight")
    if words is None:
        raise DimoError(
            f"weights {name} have no text encoder of BLIP; give ImageReward.pt of THUDM/ImageReward"
        )
    if len(words) != len(vocabulary) + len(_ADDED):
        raise DimoError(
            f"{_VOCABULARY} has {len(vocabulary):,} words; the weights {name} need "
            f"{len(words) - len(_ADDED):,}; give that of google-bert/bert-base-uncased"
        )
    ours = {}
    for key, value in state.items():
        for part, prefix in _PARTS.items():
            key = re.sub(f"^{re.escape(prefix)}", f"{part}.", key)
        ours[key] = value
    network = ImageReward(vocabulary, sizes)
    load_state_dict(network, ours, name=name, ignore=_UNUSED)
    return network.eval().requires_grad_(False)
