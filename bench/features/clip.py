"""CLIP with open_clip's networks: features of CMMD (arXiv:2401.09603), and pairs of image and text.

CMMD uses ViT-L/14 at 336 pixels. OpenAI's weights were trained with QuickGELU; plain GELU loads
them too and is wrong. PickScore (arXiv:2305.01569) is a ViT-H/14 in the layout of `transformers`.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from torch import Tensor, nn

from bench.features import read_weights
from bench.features.extraction import embed
from bench.features.resize import (
    central_square,
    pil_bicubic_bytes,
    pil_central_square,
    torch_bicubic,
)
from bench.protocol.networks import PREPROCESSINGS
from dimo.errors import DimoError, unknown_name
from dimo.weights.files import load_state_dict, read_state_dict

_ARCHITECTURE = "ViT-L-14-336-quickgelu"
_RESIZERS = {"pil-bicubic": pil_bicubic_bytes, "torch-bicubic": torch_bicubic}
_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")  # tensors in its archive
_TOWER = "visual."  # what the keys of the image tower begin with


class CLIPImages(nn.Module):
    """uint8 images [B, 3, H, W] -> features [B, D]: image embeddings, not normalised.

    The largest central square is taken first, as CMMD's code does, and resized to `side` by
    "pil-bicubic", antialiased on bytes as CMMD's code, or "torch-bicubic".
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, side: int, resize: str) -> None:
        super().__init__()
        self.tower, self.side, self.resize = tower, side, resize
        self.register_buffer("mean", torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        height, width = images.shape[2:]
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        square = images[:, :, top : top + short, left : left + short]
        levels = _RESIZERS[self.resize](square, self.side)
        return {"features": self.tower((levels / 255 - self.mean) / self.std)}


def load_clip(weights: Path, resize: str) -> CLIPImages:
    """The image tower of OpenAI's ViT-L/14 at 336 pixels.

    `weights` are OpenAI's archive or a state dict with open_clip's keys.

    Raises: DimoError: Unreadable file, or weights of another network.
    """
    config = open_clip.get_model_config(_ARCHITECTURE)
    assert config is not None
    return make_clip(read_weights(weights), resize, config, name=str(weights))


def make_clip(
    state: dict[str, Tensor], resize: str, config: dict[str, Any], *, name: str
) -> CLIPImages:
    """The image tower of a state dict with the keys of OpenAI's archive or open_clip's checkpoints.

    `config` is from `open_clip.get_model_config`; `name` names the weights in errors.
    """
    state = {k.removeprefix(_TOWER): v for k, v in state.items() if k.startswith(_TOWER)}
    if not state:
        raise DimoError(
            f"weights {name} have no keys that begin with {_TOWER!r}; give OpenAI's "
            "ViT-L-14-336px.pt, or a checkpoint of open_clip"
        )
    with torch.device("meta"):  # nothing is drawn that is overwritten anyway
        tower = open_clip.CLIP(**config).visual
    tower = tower.to_empty(device="cpu")
    load_state_dict(tower, state, name=name)
    return CLIPImages(tower, int(config["vision_cfg"]["image_size"]), resize)


class CLIPPairs(nn.Module):
    """Both towers of CLIP in float32: embeddings of images and of texts, to be compared.

    Args:
        network: open_clip's.
        preprocessing: How images reach its size, see `bench.features.resize.central_square`.
        side: Height and width of its images.
        context_length: Tokens of a text; longer ones are truncated.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, preprocessing: str, *, side: int, context_length: int
    ) -> None:
        super().__init__()
        if preprocessing not in PREPROCESSINGS:
            raise unknown_name("preprocessing", preprocessing, PREPROCESSINGS)
        self.network: Any = network
        self.preprocessing, self.side = preprocessing, side
        self.tokenizer = open_clip.SimpleTokenizer(context_length=context_length)
        self.register_buffer("mean", torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1))

    def preprocess(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """uint8 [H, W, 3] -> what the image tower takes, float32 [3, S, S]."""
        square = central_square(pixels, self.side, self.preprocessing)
        return (square - self.mean.cpu()) / self.std.cpu()

    @torch.inference_mode()
    def images(self, images: Iterable[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Images uint8 [H, W, 3] of any sizes -> embeddings of length one, float32 [N, D]."""

        def forward(part: list[npt.NDArray[np.uint8]]) -> Any:
            batch = torch.stack([self.preprocess(image) for image in part])
            return self.network.encode_image(batch.to(self.mean.device), normalize=True)

        return embed(images, forward)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Texts -> embeddings of length one, float32 [N, D]."""

        def forward(part: list[str]) -> Any:
            tokens = self.tokenizer(part).to(self.mean.device)
            return self.network.encode_text(tokens, normalize=True)

        return embed(texts, forward)


def load_pairs(weights: Path, architecture: str, preprocessing: str) -> CLIPPairs:
    """Both towers of a checkpoint: open_clip's (keys alone or under "state_dict"), or OpenAI's.

    `architecture` is open_clip's name, e.g. "ViT-H-14"; `preprocessing` as for `CLIPPairs`.

    Raises: DimoError: Unknown architecture or preprocessing, unreadable file, or other weights.
    """
    config = open_clip.get_model_config(architecture)
    if config is None or config.keys() - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}:
        raise DimoError(
            f"architecture {architecture!r} is no plain CLIP of open_clip; allowed are e.g. "
            "'ViT-B-32', 'ViT-L-14-quickgelu', 'ViT-H-14', 'ViT-g-14'"
        )
    return make_pairs(read_weights(weights), preprocessing, config, name=str(weights))


def make_pairs(
    state: dict[str, Tensor], preprocessing: str, config: dict[str, Any], *, name: str
) -> CLIPPairs:
    """Both towers of a state dict, in float32; arguments as for `make_clip` and `CLIPPairs`.

    Raises: DimoError: Keys or shapes that do not fit; unknown preprocessing.
    """
    with torch.device("meta"):  # nothing is drawn that is overwritten anyway
        network = open_clip.CLIP(**config)
    network = network.to_empty(device="cpu")
    load_state_dict(network, state, name=name, ignore=_OPENAI_SIZES)
    length = network.context_length
    network.attn_mask = torch.full((length, length), -torch.inf).triu(1)  # is in no state dict
    side = int(config["vision_cfg"]["image_size"])
    pairs = CLIPPairs(network.eval(), preprocessing, side=side, context_length=length)
    return pairs.requires_grad_(False)


class PickScore(CLIPPairs):
    """PickScore (arXiv:2305.01569): the cosine of image and prompt times CLIP's own scale.

    Images and texts are prepared as by the `CLIPProcessor` that its authors use: a centre whose
    margin is odd begins one pixel earlier than torchvision's, and texts are not repaired.
    """

    def preprocess(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        square = np.array(pil_central_square(pixels, self.side, floor=True))
        levels = torch.from_numpy(square).permute(2, 0, 1).float() / 255
        return (levels - self.mean.cpu()) / self.std.cpu()

    def score(
        self, images: Sequence[npt.NDArray[np.uint8]], prompts: Sequence[str]
    ) -> npt.NDArray[np.float64]:
        """One score per image uint8 [H, W, 3] and its own prompt, float64 [N]."""
        first, second = (
            rows.astype(np.float64) for rows in (self.images(images), self.texts(prompts))
        )
        scores: npt.NDArray[np.float64] = (first * second).sum(axis=1)
        return float(self.network.logit_scale.double().exp()) * scores


def load_pickscore(weights: Path) -> PickScore:
    """The network of `yuvalkirstain/PickScore_v1`, its `model.safetensors`.

    Raises: DimoError: Unreadable file, or weights of another network.
    """
    config = open_clip.get_model_config("ViT-H-14")
    assert config is not None
    return make_pickscore(read_state_dict(weights), config, name=str(weights))


def make_pickscore(state: dict[str, Tensor], config: dict[str, Any], *, name: str) -> PickScore:
    """The network of a state dict of transformers' `CLIPModel`; arguments as for `make_pairs`."""
    pairs = make_pairs(from_transformers(state, name), "pil", config, name=name)
    scorer = PickScore(
        pairs.network, "pil", side=pairs.side, context_length=pairs.network.context_length
    )
    scorer.tokenizer.clean_fn = _as_transformers
    return scorer.requires_grad_(False)


def _as_transformers(text: str) -> str:
    """Its normalisation of texts; open_clip also undoes HTML entities and wrong encodings."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).lower()


_TRANSFORMERS = {  # parts of the keys of transformers' CLIPModel -> of open_clip's; order matters
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",  # as it is spelt there
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
_PROJECTIONS = ("text_projection", "visual.proj")  # matrices here, linear layers there


def from_transformers(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state dict of transformers' `CLIPModel` with open_clip's keys; others stay as they are.

    Raises: DimoError: It has no such keys, or parts of an attention are missing.
    """
    if "vision_model.embeddings.class_embedding" not in state:
        raise DimoError(
            f"weights {name} are not in the layout of transformers' CLIPModel (no key "
            "vision_model.embeddings.class_embedding); give model.safetensors of "
            "yuvalkirstain/PickScore_v1"
        )
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".embeddings.position_ids"):  # of older versions; not trained
            continue
        for theirs, ours in _TRANSFORMERS.items():
            key = key.replace(theirs, ours)
        found[key] = value.T if key in _PROJECTIONS else value
    for key in [key for key in found if ".self_attn.q_proj." in key]:
        parts = [key.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in found for part in parts):
            joined = key.replace(".self_attn.q_proj.", ".attn.in_proj_")
            found[joined] = torch.cat([found.pop(part) for part in parts])
    return found
