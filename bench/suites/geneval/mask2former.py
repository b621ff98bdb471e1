"""Mask2Former Swin-S of `transformers` as GenEval's detector, with mmdet's way of reading it.

Architecture and training recipe are those of the official detector, the weights are Meta's own
training run, so scores differ slightly: a protocol with it never shares a table with mmdet's. What
`transformers` makes of the network's output (384 x 384 masks, another threshold) is not used.

GenEval's colour classifier is CLIP ViT-L/14 on the object alone, before grey, against ten colours.
open_clip 2.20, which GenEval pins, took QuickGELU for OpenAI's weights by itself; later versions
do so only under the name that ends in `-quickgelu`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.features import read_weights
from bench.features.resize import pil_central_square
from bench.metrics.geneval import COLORS, Detected
from dimo.data.scenes import boxes_of
from dimo.errors import DimoError
from dimo.models.snapshot import transformers_for
from dimo.util.files import sha256_file
from dimo.weights.files import load_state_dict

_ARCHITECTURE = "ViT-L-14-quickgelu"
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's archive
_BATCH = 32

_Pixels: TypeAlias = npt.NDArray[np.uint8]
_Floats: TypeAlias = npt.NDArray[np.floating]


class ClipEncoder:
    """Images and texts -> embeddings, not normalised; `side` is that of the network's images."""

    def __init__(self, network: open_clip.CLIP, side: int, device: torch.device) -> None:
        self.network, self.side, self.device = network.to(device).eval(), side, device
        self._mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=device).view(3, 1, 1)
        self._std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=device).view(3, 1, 1)
        self._tokenize = open_clip.get_tokenizer(_ARCHITECTURE)

    @torch.inference_mode()
    def images(self, images: Sequence[_Pixels]) -> npt.NDArray[np.float32]:
        """uint8 images [h, w, 3] of any size -> float32 [N, D]."""
        rows: list[Tensor] = []
        for start in range(0, len(images), _BATCH):
            squares = [pil_central_square(i, self.side) for i in images[start : start + _BATCH]]
            levels = torch.from_numpy(np.stack(squares)).to(self.device).permute(0, 3, 1, 2)
            rows.append(self.network.encode_image((levels / 255 - self._mean) / self._std))
        return torch.cat(rows).float().cpu().numpy()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Texts -> float32 [N, D]."""
        tokens = self._tokenize(list(texts)).to(self.device)
        embeddings: Tensor = self.network.encode_text(tokens)
        return embeddings.float().cpu().numpy()


def load_clip_encoder(
    weights: Path, device: torch.device, config: dict[str, Any] | None = None
) -> ClipEncoder:
    """The network of OpenAI's `ViT-L-14.pt`, or of a checkpoint with open_clip's keys.

    `config` is as `open_clip.get_model_config` gives it; None: of ViT-L/14 with QuickGELU.

    Raises:
        DimoError: Unreadable file, or weights of another network.
    """
    state = read_weights(weights)
    state = {key: value.float() for key, value in state.items() if key not in _NOT_WEIGHTS}
    config = config or open_clip.get_model_config(_ARCHITECTURE)
    assert config is not None
    network = open_clip.CLIP(**config)
    load_state_dict(network, state, name=str(weights))
    return ClipEncoder(network, int(config["vision_cfg"]["image_size"]), device)


_GREY = 0x99  # of what is not the object, on all three channels
_TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


class ClipColors:
    """The colour of an object: the nearest text in CLIP's space.

    A colour is the mean of the normalised embeddings of three texts, normalised again.

    Args:
        encode_images: uint8 images [h, w, 3] of any size -> embeddings [N, D].
        encode_texts: Texts -> embeddings [N, D].
    """

    def __init__(
        self,
        encode_images: Callable[[Sequence[_Pixels]], _Floats],
        encode_texts: Callable[[Sequence[str]], _Floats],
    ) -> None:
        self._encode_images, self._encode_texts = encode_images, encode_texts
        self._known: dict[str, _Floats] = {}

    def __call__(self, image: _Pixels, name: str, objects: Detected) -> list[str]:
        """The colour of each object of class `name` on an image, uint8 [H, W, 3]."""
        masks = objects.masks if objects.masks is not None else [None] * len(objects.boxes)
        pairs = zip(objects.boxes, masks, strict=True)
        crops = [object_crop(image, box, mask) for box, mask in pairs]
        cosines = _normalized(self._encode_images(crops)) @ self._texts(name).T  # [N, 10]
        return [COLORS[i] for i in cosines.argmax(axis=1)]

    def _texts(self, name: str) -> _Floats:
        if name not in self._known:
            texts = [[text.format(color=c, name=name) for text in _TEMPLATES] for c in COLORS]
            rows = [_normalized(self._encode_texts(each)).mean(axis=0) for each in texts]
            self._known[name] = _normalized(np.stack(rows))
        return self._known[name]


def object_crop(
    image: _Pixels, box: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_] | None
) -> _Pixels:
    """The part of an image in a box, uint8 [h, w, 3], grey where the mask is not; never empty."""
    alone = image if mask is None else np.where(mask[:, :, None], image, np.uint8(_GREY))
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (round(float(value)) for value in box[:4])
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    return alone[y1 : max(min(y2, height), y1 + 1), x1 : max(min(x2, width), x1 + 1)]


def _normalized(rows: _Floats) -> _Floats:
    scaled: _Floats = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return scaled


_SHORT, _LONG = 800, 1333  # pixels: as large as fits, sides kept in proportion
_MULTIPLE = 32  # of which padded sides are
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, of 255
_INSTANCES = 100  # kept of an image
_FILES = ("config.json", "model.safetensors", "ViT-L-14.pt")

# COCO's 80 classes in the order of every detector, under the names of GenEval's prompts
_COCO = """person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant
stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack
umbrella handbag tie suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove
skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon bowl banana apple sandwich
orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed dining_table toilet tv
laptop computer_mouse tv_remote computer_keyboard cell_phone microwave oven toaster sink
refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"""
_OTHER_NAMES = {  # of the same classes
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
}


def coco_names() -> tuple[str, ...]:
    """The 80 class names in order."""
    return tuple(name.replace("_", " ") for name in _COCO.split())


def prepared(image: _Pixels) -> tuple[Tensor, tuple[int, int]]:
    """An image uint8 [H, W, 3] as float32 [1, 3, H', W'], padded, and its size before padding."""
    height, width = image.shape[:2]
    scale = min(_SHORT / min(height, width), _LONG / max(height, width))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    levels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    levels = F.interpolate(levels, size=size, mode="bilinear", align_corners=False).round()
    levels = (levels - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
    padding = [math.ceil(side / _MULTIPLE) * _MULTIPLE - side for side in size]
    return F.pad(levels, (0, padding[1], 0, padding[0])), size


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
    most: int = _INSTANCES,
) -> tuple[Tensor, Tensor, Tensor]:
    """The objects of one image, as mmdet's fusion head makes them; sizes are (height, width).

    Args:
        class_logits: [Q, C + 1], the last for "nothing".
        mask_logits: [Q, h, w] of the padded image.
        resized: Size of the image in the upper left corner of the padded one.
        most: Largest number of objects; a query may appear under several classes.

    Returns:
        Classes int64 [n], boxes float32 [n, 5] (x1, y1, x2, y2, score; zeros where the mask is
        empty), masks bool [n, H, W].
    """
    logits = _resized(mask_logits, padded)[:, : resized[0], : resized[1]]
    logits = _resized(logits, original)
    scores = class_logits.softmax(dim=1)[:, :-1]
    classes = scores.shape[1]
    best, place = scores.flatten().topk(min(most, scores.numel()))
    chosen = logits[place // classes]
    masks = chosen > 0
    inside = (chosen.sigmoid() * masks).flatten(1).sum(dim=1)
    mean = inside / (masks.flatten(1).sum(dim=1) + 1e-6)
    boxes = torch.cat([boxes_of(masks), (best * mean)[:, None]], dim=1)
    return place % classes, boxes, masks


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]


class HFMask2Former:
    """A `Mask2FormerForUniversalSegmentation`, its classes in order, and a colour classifier."""

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        colors: ClipColors,
        *,
        device: torch.device,
        sha256: str = "",
        colors_sha256: str = "",
    ) -> None:
        self.network, self.names, self.device = network.to(device).eval(), tuple(names), device
        self.sha256, self.colors_sha256, self.colors = sha256, colors_sha256, colors

    @torch.inference_mode()
    def detect(self, images: Sequence[_Pixels]) -> list[dict[str, Detected]]:
        """What is on each image; one at a time, since sizes differ."""
        return [self._detect(image) for image in images]

    def _detect(self, image: _Pixels) -> dict[str, Detected]:
        pixels, resized = prepared(image)
        output = self.network(pixel_values=pixels.to(self.device))
        classes, boxes, masks = instances(
            output.class_queries_logits[0].float(),
            output.masks_queries_logits[0].float(),
            padded=(pixels.shape[2], pixels.shape[3]),
            resized=resized,
            original=(image.shape[0], image.shape[1]),
        )
        by_class = {name: classes == number for number, name in enumerate(self.names)}
        return {
            name: Detected(boxes[rows].cpu().numpy(), masks[rows].cpu().numpy())
            for name, rows in by_class.items()
            if rows.any()
        }


def load_hf_detector(weights: Path, device: torch.device) -> HFMask2Former:
    """Loads both networks from a folder, without the internet.

    The folder is facebook/mask2former-swin-small-coco-instance with OpenAI's `ViT-L-14.pt` in it.

    Raises:
        DimoError: A file or the package is missing, or the classes are not COCO's.
    """
    missing = [name for name in _FILES if not (weights / name).is_file()]
    if missing:
        raise DimoError(
            f"no {', '.join(missing)} in {weights}; the folder needs config.json and "
            "model.safetensors of facebook/mask2former-swin-small-coco-instance, and OpenAI's "
            "ViT-L-14.pt; fetch them and give the folder with --weights"
        )
    network = load_mask2former(weights)
    check_names(network.config.id2label, str(weights))
    clip = load_clip_encoder(weights / _FILES[2], device)
    return HFMask2Former(
        network,
        coco_names(),
        ClipColors(clip.images, clip.texts),
        device=device,
        sha256=sha256_file(weights / _FILES[1]),
        colors_sha256=sha256_file(weights / _FILES[2]),
    )


def load_mask2former(folder: Path) -> Any:
    """The network of a folder of `transformers`; a DimoError if package or weights are missing."""
    transformers = transformers_for("Mask2Former")
    try:
        network, report = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # damaged files and foreign configurations raise many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DimoError(
            f"cannot load Mask2Former from {folder}: {reason}; fetch the folder again"
        ) from error
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise DimoError(
            f"weights in {folder} are not Mask2Former's: {len(lacking)} keys are missing, such as "
            f"{lacking[0]}; give facebook/mask2former-swin-small-coco-instance"
        )
    return network


def check_names(id2label: Mapping[int, str], source: str) -> None:
    """Raises a DimoError for a network whose classes are not COCO's 80 in order."""
    names = coco_names()
    given = [_OTHER_NAMES.get(label, label) for _, label in sorted(id2label.items())]
    for number, (ours, theirs) in enumerate(zip(names, given, strict=False)):
        if ours != theirs:
            raise DimoError(
                f"class {number} of the network in {source} is {theirs!r}; allowed: COCO's 80 "
                f"classes in order, here {ours!r}; give the weights that were trained on COCO"
            )
    if len(given) != len(names):
        raise DimoError(f"the network in {source} has {len(given)} classes; allowed: COCO's 80")
