"""HPSv3 (arXiv:2508.03789): Qwen2-VL-7B reads an image, an instruction and the prompt.

The state of the added token `<|Reward|>` gives, by three linear layers with ReLU between them, mean
and log deviation of a Gaussian; the score is the mean. The authors' code calls the language model
without positions, so that they count tokens: Qwen2-VL's own positions in three dimensions give
other scores. The instruction is read from their file and known by its hash.
"""

import ast
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bench.features.resize import clip_normalized, pil_bicubic_to
from dimo.errors import DimoError
from dimo.models.snapshot import transformers_for
from dimo.weights.files import check_state, load_state_dict, read_state_dict

_REWARD, _PAD = "<|Reward|>", "<|image_pad|>"
_TOKENIZER, _TEMPLATE = "tokenizer.json", "data_collator_qwen.py"
_TEXTS = ("INSTRUCTION", "prompt_with_special_token")  # constants of that file
_TEXTS_SHA256 = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
_BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
_PATCH, _MERGED = 14, 2  # pixels of a patch's side, patches of a token's side
_PIXELS = 256 * (_PATCH * _MERGED) ** 2  # of an image, as nearly as whole tokens allow
_LONGEST = 200  # times the shorter side


@dataclass(frozen=True)
class Sizes:
    """Width, depth and heads of both networks; those of Qwen2-VL-7B are the defaults."""

    text: tuple[int, int, int] = (3584, 28, 28)
    key_value_heads: int = 4
    text_hidden: int = 18944
    vision: tuple[int, int, int] = (1280, 32, 16)
    vision_ratio: int = 4  # width inside the vision network's layers, of its width


class HPSv3(nn.Module):
    """Scores of images for their prompts, one pair at a time, so that the batch changes nothing.

    Args:
        network: `Qwen2VLModel` of transformers.
        tokenizer: Its tokenizer, with `<|Reward|>` added.
        texts: What is said before and after the prompt: the first has a place `{text_prompt}`.
    """

    def __init__(self, network: Any, tokenizer: Any, texts: tuple[str, str]) -> None:
        super().__init__()
        self.network, self.tokenizer, self.texts = network, tokenizer, texts
        widths = ((network.config.text_config.hidden_size, 1024), (1024, 16), (16, 2))
        # ReLU and dropout have numbers in the official keys
        self.head = nn.ModuleDict(
            {key: nn.Linear(*w) for key, w in zip("035", widths, strict=True)}
        )
        self._reward = tokenizer.convert_tokens_to_ids(_REWARD)

    def tokens(self, prompt: str, patches: int) -> Tensor:
        """The numbers [L] of all that the network reads, with an image of so many patches.

        Raises: DimoError: The prompt has special tokens.
        """
        image = f"<|vision_start|>{_PAD * (patches // _MERGED**2)}<|vision_end|>"
        said = self.texts[0].format(text_prompt=prompt) + self.texts[1]
        ids = torch.tensor(self.tokenizer(_BEFORE + image + said + _AFTER)["input_ids"])
        pads = self.tokenizer.convert_tokens_to_ids(_PAD)
        if int((ids == self._reward).sum()) != 1 or int((ids == pads).sum()) * 4 != patches:
            raise DimoError(
                f"prompt {prompt[:60]!r} has {_REWARD} or {_PAD}, which mean something to HPSv3; "
                "remove them"
            )
        return ids

    def forward(self, patches: Tensor, grid: tuple[int, int], prompt: str) -> Tensor:
        """An image from `patches_of` and its prompt -> mean and log deviation, [2]."""
        ids = self.tokens(prompt, len(patches))[None].to(patches.device)
        weight = next(self.network.parameters())
        states = self.network(
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1),
            pixel_values=patches.to(weight.dtype),
            image_grid_thw=torch.tensor([[1, *grid]], device=ids.device),
            use_cache=False,
        ).last_hidden_state
        values: Tensor = states[ids == self._reward][0].to(self.head["0"].weight.dtype)
        for key, layer in self.head.items():
            values = layer(values if key == "0" else values.relu())
        return values

    @torch.inference_mode()
    def score(
        self, images: Sequence[npt.NDArray[np.uint8]], prompts: Sequence[str]
    ) -> npt.NDArray[np.float64]:
        """One score per image uint8 [H, W, 3] and its own prompt, float64 [N]."""
        device, found = next(self.parameters()).device, list[float]()
        for pixels, prompt in zip(images, prompts, strict=True):
            patches, grid = patches_of(pixels)
            found.append(float(self.forward(patches.to(device), grid, prompt)[0]))
        return np.array(found, dtype=np.float64)


def size_of(height: int, width: int) -> tuple[int, int]:
    """Height and width of what the network sees of an image: whole tokens, near 448 x 448 in area.

    Raises: DimoError: One side is more than 200 times the other.
    """
    unit = _PATCH * _MERGED
    if max(height, width) > _LONGEST * min(height, width):
        raise DimoError(
            f"image of {height} x {width} pixels; allowed: sides of at most 1 to {_LONGEST}; "
            "crop it"
        )
    near = tuple(max(unit, round(n / unit) * unit) for n in (height, width))
    if near[0] * near[1] > _PIXELS:
        factor = math.sqrt(height * width / _PIXELS)
        return math.floor(height / factor / unit) * unit, math.floor(width / factor / unit) * unit
    if near[0] * near[1] < _PIXELS:  # a square becomes 448 or 476, as rounding has it
        factor = math.sqrt(_PIXELS / (height * width))
        return math.ceil(height * factor / unit) * unit, math.ceil(width * factor / unit) * unit
    return near[0], near[1]


def patches_of(pixels: npt.NDArray[np.uint8]) -> tuple[Tensor, tuple[int, int]]:
    """uint8 [H, W, 3] -> patches float32 [P, 1176], and the numbers of their rows and columns.

    Patches are in squares of four; each is colour, time (twice the same), height, width.
    """
    height, width = size_of(pixels.shape[0], pixels.shape[1])
    levels = torch.tensor(pil_bicubic_to(pixels, height, width)).permute(2, 0, 1) / 255
    rows, columns = height // _PATCH, width // _PATCH
    split = clip_normalized(levels).view(
        3, rows // _MERGED, _MERGED, _PATCH, columns // _MERGED, _MERGED, _PATCH
    )
    patches = split.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3, 1, _PATCH**2)
    return patches.expand(-1, -1, 2, -1).reshape(rows * columns, -1), (rows, columns)


def load_hpsv3(weights: Path) -> HPSv3:
    """The network of `HPSv3.safetensors`, as its authors use it: in bfloat16, its head in float32.

    `tokenizer.json` of Qwen/Qwen2-VL-7B-Instruct and `data_collator_qwen.py` of the package hpsv3
    lie beside it; the latter is read as text and never run.

    Raises:
        DimoError: No transformers, a missing file, another instruction, or other weights.
    """
    texts = read_texts(weights.with_name(_TEMPLATE))
    tokenizer = weights.with_name(_TOKENIZER)
    if not tokenizer.is_file():
        raise DimoError(
            f"no {tokenizer}; put {_TOKENIZER} of Qwen/Qwen2-VL-7B-Instruct beside {weights.name}"
        )
    state = read_state_dict(weights)
    return make_hpsv3(state, tokenizer, texts, Sizes(), torch.bfloat16, name=str(weights))


def read_texts(path: Path) -> tuple[str, str]:
    """The authors' instruction and what they say after the prompt, from the constants of a file.

    Raises: DimoError: It cannot be read, or says something else than that of hpsv3 1.0.0.
    """
    next_step = f"put {_TEMPLATE} of the package hpsv3 1.0.0 on PyPI beside the weights"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or "not Python"
        raise DimoError(f"cannot read {path}: {reason}; {next_step}") from error
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    before, after = (str(constants.get(name, "")) for name in _TEXTS)
    if hashlib.sha256((before + after).encode()).hexdigest() != _TEXTS_SHA256:
        raise DimoError(f"{path} has another instruction than HPSv3 was trained with; {next_step}")
    return before, after


def make_hpsv3(
    state: dict[str, Tensor],
    tokenizer: Path,
    texts: tuple[str, str],
    sizes: Sizes,
    dtype: torch.dtype,
    *,
    name: str,
) -> HPSv3:
    """The network of a state dict with the official keys; `name` names the weights in errors.

    Raises: DimoError: No transformers; keys or shapes that do not fit, or another tokenizer.
    """
    transformers = transformers_for("HPSv3")
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    words.add_tokens(_REWARD, special_tokens=True)
    rows = state.get("model.embed_tokens.weight")
    if rows is None or len(rows) != len(words):
        found = "no embeddings of words" if rows is None else f"{len(rows):,} words"
        raise DimoError(
            f"weights {name} have {found}, {tokenizer.name} with {_REWARD} has {len(words):,}; "
            f"give HPSv3.safetensors of MizzenAI/HPSv3 and {_TOKENIZER} of "
            "Qwen/Qwen2-VL-7B-Instruct"
        )
    parts: dict[str, dict[str, Tensor]] = {"rm_head.": {}, "": {}}
    for key, value in state.items():
        if key.startswith("rm_head."):
            parts["rm_head."][key.removeprefix("rm_head.")] = value.float()
        elif key != "lm_head.weight":  # which writes words
            text = key.startswith("model.")
            parts[""][f"language_{key}" if text else key] = value
    config = transformers.Qwen2VLConfig(
        **_config(sizes, len(words)), image_token_id=words.convert_tokens_to_ids(_PAD)
    )
    with torch.device("meta"):
        checked = check_state(transformers.Qwen2VLModel(config), parts[""], name=name)
    transformers.logging.disable_progress_bar()
    network = transformers.Qwen2VLModel.from_pretrained(
        None, config=config, state_dict=checked, dtype=dtype
    )
    scorer = HPSv3(network, words, texts)
    load_state_dict(scorer.head, parts["rm_head."], name=name)
    return scorer.eval().requires_grad_(False)


def _config(sizes: Sizes, vocabulary: int) -> dict[str, Any]:
    width, depth, heads = sizes.text
    inner, blocks, inner_heads = sizes.vision
    third = width // heads // 2 // 3  # positions are the same in all three dimensions
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": sizes.text_hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": sizes.key_value_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [width // heads // 2 - 2 * third, third, third],
        },
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "embed_dim": inner,
        "depth": blocks,
        "num_heads": inner_heads,
        "hidden_size": width,
        "mlp_ratio": sizes.vision_ratio,
        "patch_size": _PATCH,
        "spatial_merge_size": _MERGED,
    }
    return {"text_config": text, "vision_config": vision}
