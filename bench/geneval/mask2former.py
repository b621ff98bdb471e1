"""Mask2Former Swin-S of `transformers` as GenEval's detector, with mmdet's way of reading it.

Architecture and training recipe are those of the official detector, the weights are Meta's own
training run, so scores differ slightly: a protocol with it never shares a table with mmdet's. What
`transformers` makes of the network's output (384 x 384 masks, another threshold) is not used.
"""

__all__ = ["HFMask2Former", "coco_names", "instances", "load_hf_detector", "prepared"]

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.geneval.clip_encoder import load_clip_encoder
from bench.geneval.colors import ClipColors
from bench.metrics.geneval import Detected
from dimo.errors import DimoError
from dimo.files import sha256_file

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


def prepared(image: npt.NDArray[np.uint8]) -> tuple[Tensor, tuple[int, int]]:
    """An image as the network takes it: float32 [1, 3, H, W], padded, and its size before that.

    Args:
        image: uint8 [H, W, 3].
    """
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
    """The objects of one image, as mmdet's fusion head makes them.

    Args:
        class_logits: [Q, C + 1], the last for "nothing".
        mask_logits: [Q, h, w] of the padded image.
        padded: Height and width of the network's input.
        resized: Of the image in its upper left corner.
        original: Of the image itself.
        most: How many are returned at most; a query may be there under several classes.

    Returns:
        Classes int64 [n], boxes float32 [n, 5] (x1, y1, x2, y2, score; zeros where the mask is
        empty), masks bool [n, H, W].
    """
    logits = _resized(mask_logits, padded)[:, : resized[0], : resized[1]]
    logits = _resized(logits, original)
    scores = class_logits.softmax(dim=1)[:, :-1]
    classes = scores.shape[1]
    best, place = scores.flatten().topk(min(most, scores.numel()))
    query = place // classes
    chosen = logits[query]
    masks = chosen > 0
    inside = (chosen.sigmoid() * masks).flatten(1).sum(dim=1)
    mean = inside / (masks.flatten(1).sum(dim=1) + 1e-6)
    ends = []
    for along in (1, 2):
        present = masks.any(dim=along).to(torch.uint8)
        some = present.any(dim=1)
        last = present.shape[1] - present.flip(1).argmax(dim=1)
        ends.append((present.argmax(dim=1) * some, last * some))
    (x1, x2), (y1, y2) = ends
    boxes = torch.stack([x1, y1, x2, y2], dim=1).float()
    return place % classes, torch.cat([boxes, (best * mean)[:, None]], dim=1), masks


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]


class HFMask2Former:
    """The detector with its colour classifier.

    Args:
        network: `Mask2FormerForUniversalSegmentation`.
        names: Of the classes, in order.
        colors: Tells colours apart.
        device: Where the network is.
        sha256: Of its weights.
        colors_sha256: Of the weights of the colour classifier.
    """

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
        self.sha256, self.colors_sha256, self._colors = sha256, colors_sha256, colors

    @torch.inference_mode()
    def detect(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[dict[str, Detected]]:
        """What is on each image; one at a time, since sizes differ."""
        return [self._detect(image) for image in images]

    def colors(self, image: npt.NDArray[np.uint8], name: str, objects: Detected) -> Sequence[str]:
        """The colour of each object of one class."""
        return self._colors(image, name, objects)

    def _detect(self, image: npt.NDArray[np.uint8]) -> dict[str, Detected]:
        pixels, resized = prepared(image)
        found = self.network(pixel_values=pixels.to(self.device))
        classes, boxes, masks = instances(
            found.class_queries_logits[0].float(),
            found.masks_queries_logits[0].float(),
            padded=(pixels.shape[2], pixels.shape[3]),
            resized=resized,
            original=(image.shape[0], image.shape[1]),
        )
        by_name = {}
        for number, name in enumerate(self.names):
            rows = classes == number
            if rows.any():
                by_name[name] = Detected(boxes[rows].cpu().numpy(), masks[rows].cpu().numpy())
        return by_name


def load_hf_detector(weights: Path, device: torch.device) -> HFMask2Former:
    """Loads both networks from a folder, without the internet.

    Args:
        weights: Folder of facebook/mask2former-swin-small-coco-instance with OpenAI's
            `ViT-L-14.pt` in it.
        device: Where the networks shall be.

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
    """The network of a folder of `transformers`.

    Raises:
        DimoError: The package is not installed, or the folder holds another network.
    """
    try:
        from transformers import Mask2FormerForUniversalSegmentation
    except ImportError as error:
        raise DimoError(
            "Mask2Former needs the package 'transformers'; install it with: pip install 'dimo[t2i]'"
        ) from error
    try:
        loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # damaged files and foreign configurations raise many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DimoError(
            f"cannot load Mask2Former from {folder}: {reason}; fetch the folder again"
        ) from error
    network, report = loaded
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise DimoError(
            f"weights in {folder} are not Mask2Former's: {len(lacking)} keys are missing, such as "
            f"{lacking[0]}; give facebook/mask2former-swin-small-coco-instance"
        )
    return network


def check_names(id2label: Mapping[int, str], source: str) -> None:
    """Refuses a network whose classes are not COCO's 80 in order.

    Raises:
        DimoError: They are others.
    """
    names = coco_names()
    found = [_OTHER_NAMES.get(label, label) for _, label in sorted(id2label.items())]
    for number, (ours, theirs) in enumerate(zip(names, found, strict=False)):
        if ours != theirs:
            raise DimoError(
                f"class {number} of the network in {source} is {theirs!r}; allowed: COCO's 80 "
                f"classes in order, here {ours!r}; give the weights that were trained on COCO"
            )
    if len(found) != len(names):
        raise DimoError(f"the network in {source} has {len(found)} classes; allowed: COCO's 80")
