"""The detector of the protocol `scenes-geneval`: a small network that finds shapes and masks.

It takes one picture at a time as Mask2Former does, and returns the same: boxes with scores, masks
and classes. Every second pixel says which shape is centred on it and where its box ends
(CenterNet, arXiv:1904.07850, without its blurred targets); a mask is the foreground within a box.
Colours are told apart by the colour of the mask's pixels, not by the network.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.features.small import SceneNetwork, TrainingStep, fit_network
from bench.metrics.geneval import Detected
from bench.suites.geneval.detectors import verdicts
from dimo.data.scenes import RGB, SIDE, SceneBatch, batch, boxes_of, draw
from dimo.data.scenes.prompts import COLORS, SHAPES, prompts
from dimo.errors import DimoError
from dimo.rng import normal, random_ranks, uniform
from dimo.util.files import sha256_file
from dimo.weights.catalog import ASSETS
from dimo.weights.files import load_state_dict

_STRIDE = SceneNetwork.stride
_CELLS = SIDE // _STRIDE
_NEAR = 0.9  # cells from a centre within which a cell must see the shape
_UNSURE = 2.2  # cells from a centre beyond which it must not
_WINDOW = 7  # cells: only the highest score of a shape in such a window is a detection
_LEAST = 0.05  # scores below are not reported
_SHADES = (0.8, 0.9, 1.0, 1.07)  # of each colour
_FEW = 4  # pixels
_BATCH = 120  # pictures at a time
_SPOILT = 6  # one in this many training pictures shows nothing
_PARTS = 8  # along each side, where parts of a picture are shuffled


def detection_loss(maps: dict[str, Tensor], scenes: SceneBatch) -> Tensor:
    """Cross-entropy of shapes and foreground, and the distance of box ends in pixels."""
    middle = (torch.arange(_CELLS) + 0.5) * _STRIDE
    x, y = middle[None, :].expand(_CELLS, -1), middle[:, None].expand(-1, _CELLS)  # [16, 16]
    present = scenes.shapes >= 0  # [B, 4]
    center_x, center_y = scenes.centers[..., None, None].unbind(dim=2)  # [B, 4, 1, 1]
    distance = torch.hypot(x - center_x, y - center_y) / _STRIDE  # [B, 4, 16, 16]
    near = (distance < _NEAR) & present[..., None, None]
    unsure = (distance < _UNSURE) & present[..., None, None]
    one_hot = F.one_hot(scenes.shapes.clamp(min=0), len(SHAPES)).bool()  # [B, 4, 7]
    target = (near[:, :, None] & one_hot[..., None, None]).any(dim=1)  # [B, 7, 16, 16]
    ignored = (unsure[:, :, None] & one_hot[..., None, None]).any(dim=1) & ~target
    shapes = F.binary_cross_entropy_with_logits(
        maps["shapes"], target.float(), reduction="none"
    ).masked_fill(ignored, 0.0)

    masks = scenes.coverage >= 0.5  # [B, 4, 32, 32]
    ends = boxes_of(masks.flatten(0, 1)).view(*scenes.shapes.shape, 4)[..., None, None]
    left, top, right, bottom = ends.unbind(dim=2)  # [B, 4, 1, 1] each
    distances = torch.stack([x - left, y - top, right - x, bottom - y], dim=2)  # [B, 4, 4, 16, 16]
    missed = (maps["boxes"][:, None] - distances).abs() * near[:, :, None]
    foreground = F.binary_cross_entropy_with_logits(
        maps["foreground"], scenes.coverage.sum(dim=1).clamp(max=1)
    )
    objects = present.sum().clamp(min=1)
    return shapes.sum() / objects + 0.1 * missed.sum() / objects + 2 * foreground


def disturbed(images: Tensor, seed: int, index: Tensor) -> Tensor:
    """Pictures as a generator might make them: some blurred, noisy, or blocky by 4 x 4 pixels."""
    u = uniform(seed, index, "disturbance", (4,)).float()[:, :, None, None, None]
    levels = images.float()
    blurred = F.avg_pool2d(F.pad(levels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    levels = torch.lerp(levels, blurred, (1.6 * u[:, 0] - 0.6).clamp(min=0))
    blocks = F.interpolate(F.avg_pool2d(levels, 4), scale_factor=4)
    levels = torch.lerp(levels, blocks, (0.9 * u[:, 1] - 0.5).clamp(min=0))
    noise = normal(seed, index, "disturbance/noise", (3, SIDE, SIDE))
    coarse = F.interpolate(normal(seed, index, "disturbance/coarse", (3, 8, 8)), scale_factor=4)
    levels = levels + 24 * (u[:, 2] - 0.4).clamp(min=0) * noise
    levels = levels + 24 * (u[:, 3] - 0.4).clamp(min=0) * coarse
    return (levels + 0.5).floor().clamp(0, 255).to(torch.uint8)


def spoilt(images: Tensor, seed: int, index: Tensor) -> Tensor:
    """Pictures that show no shape: shuffled parts of pictures, blotches, blocks, plain ones."""
    count = len(images)
    u = uniform(seed, index, "spoilt", (2,)).float()[:, :, None, None, None]
    colors = uniform(seed, index, "spoilt/colors", (3, 8, 8)).float()
    plain = 255 * colors[:, :, :1, :1]
    blocks = plain + 400 * u[:, 1] * (colors - 0.5)
    order = random_ranks(seed, index, "spoilt/order", _PARTS**2)
    size = SIDE // _PARTS
    parts = images.float().view(count, 3, _PARTS, size, _PARTS, size).permute(0, 2, 4, 1, 3, 5)
    parts = parts.reshape(count, _PARTS**2, 3, size, size)[torch.arange(count)[:, None], order]
    parts = parts.view(count, _PARTS, _PARTS, 3, size, size).permute(0, 3, 1, 4, 2, 5)
    kinds = (
        parts.reshape(images.shape),
        F.interpolate(blocks, scale_factor=4),
        F.interpolate(blocks, scale_factor=4, mode="bilinear"),
        F.interpolate(blocks[:, :, :4, :4], scale_factor=8, mode="bicubic"),
        plain.expand(images.shape),
    )
    kind = (u[:, 0, 0, 0, 0] * len(kinds)).long()
    levels = torch.stack(kinds)[kind, torch.arange(count)]
    return levels.clamp(0, 255).to(torch.uint8)


def _lesson(seed: int, index: Tensor, *, with_spoilt: bool) -> tuple[Tensor, SceneBatch]:
    """Disturbed pictures of training prompts; one in a few may be spoilt and show nothing."""
    scenes = draw(seed, index, "train", free=True)
    empty = (index % _SPOILT == 0) & with_spoilt
    images = scenes.images.clone()
    images[empty] = spoilt(images[empty], seed, index[empty])
    scenes = dataclasses.replace(
        scenes,
        shapes=scenes.shapes.masked_fill(empty[:, None], -1),
        coverage=scenes.coverage.masked_fill(empty[:, None, None, None], 0.0),
    )
    return disturbed(images, seed, index), scenes


def train_scene_network(
    *,
    steps: int,
    batch_size: int,
    learning_rate: Callable[[int], float],
    weight_decay: float,
    seed: int,
    on_step: TrainingStep | None = None,
) -> SceneNetwork:
    """Trains on disturbed pictures of the training prompts; later, on some that show nothing too.

    Arguments as of `bench.features.small.train_digits_cnn`.
    """
    torch.manual_seed(seed)
    network = SceneNetwork().train()
    with torch.no_grad():
        bias = network.heads.bias
        assert bias is not None
        bias[: len(SHAPES)] = -4.0  # most cells have no shape

    def loss_at(step: int) -> Tensor:
        index = torch.arange(step * batch_size, (step + 1) * batch_size)
        images, scenes = _lesson(seed, index, with_spoilt=3 * step >= steps)
        return detection_loss(network(images), scenes)

    fit_network(
        network,
        loss_at,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        on_step=on_step,
    )
    return network.eval()


class SceneDetector:
    """Pictures of scenes -> what is on them, in the form that GenEval's rules take."""

    colors_sha256 = ""

    def __init__(self, network: nn.Module, device: torch.device, sha256: str = "") -> None:
        self.network, self.device, self.sha256 = network.to(device).eval(), device, sha256

    @torch.inference_mode()
    def detect(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[dict[str, Detected]]:
        """uint8 images [32, 32, 3] -> for each, detections by class name."""
        sizes = {image.shape[:2] for image in images} - {(SIDE, SIDE)}
        if sizes:
            height, width = min(sizes)
            raise DimoError(
                f"the detector of scenes takes images of {SIDE} x {SIDE}, not {height} x {width}; "
                "give the pictures as they were made"
            )
        detections: list[dict[str, Detected]] = []
        for start in range(0, len(images), _BATCH):
            chunk = torch.from_numpy(np.stack(images[start : start + _BATCH])).permute(0, 3, 1, 2)
            maps = {k: v.float().cpu() for k, v in self.network(chunk.to(self.device)).items()}
            logits = maps["shapes"]  # compared before the sigmoid, which rounds high ones to 1
            highest = F.max_pool2d(logits, _WINDOW, stride=1, padding=_WINDOW // 2)
            peaks = (logits == highest) & (logits.sigmoid() > _LEAST)
            detections += [_detections(maps, peaks, picture) for picture in range(len(chunk))]
        return detections

    def colors(self, image: npt.NDArray[np.uint8], name: str, objects: Detected) -> Sequence[str]:
        """As `scene_colors`."""
        return scene_colors(image, objects)


def load_scene_detector(weights: Path | None, device: torch.device) -> SceneDetector:
    """The detector with the weights of a file; None: those that come with dimo."""
    path, network = weights or ASSETS / "scenes-detector.safetensors", SceneNetwork()
    load_state_dict(network, path)
    return SceneDetector(network, device, sha256_file(path))


def detector_accuracy(
    detector: SceneDetector, *, seed: int, per_prompt: int, disturb: bool = False
) -> dict[str, float]:
    """Fraction of correct verdicts on rendered pictures of the held-out prompts, by tag.

    Every picture shows what it is asked for, so every right verdict is "correct". With `disturb`,
    pictures are `disturbed` first.
    """
    asked = prompts("held-out")
    right: Counter[str] = Counter()
    for start in range(per_prompt):
        index = torch.arange(start * len(asked), (start + 1) * len(asked))
        images, _ = batch(seed, index, "held-out")
        if disturb:
            images = disturbed(images, seed, index)
        pixels = list(images.permute(0, 2, 3, 1).contiguous().numpy())
        judged = verdicts(detector, pixels, [prompt.metadata for prompt in asked])
        right.update(p.tag for p, verdict in zip(asked, judged, strict=True) if verdict.correct)
    totals = Counter(prompt.tag for prompt in asked)
    return {tag: right[tag] / (per_prompt * totals[tag]) for tag in totals}


def _detections(maps: dict[str, Tensor], peaks: Tensor, picture: int) -> dict[str, Detected]:
    """One picture of a batch of maps; `peaks` is bool [B, 7, 16, 16]."""
    middle = (torch.arange(_CELLS) + 0.5) * _STRIDE
    pixels = torch.arange(SIDE) + 0.5
    foreground = maps["foreground"][picture] > 0
    detected = {}
    for shape, name in enumerate(SHAPES):
        rows, columns = peaks[picture, shape].nonzero(as_tuple=True)
        if not len(rows):
            continue
        left, top, right, bottom = maps["boxes"][picture, :, rows, columns]  # [n] each
        x, y = middle[columns], middle[rows]
        boxes = torch.stack([x - left, y - top, x + right, y + bottom], dim=1).clamp(0, SIDE)
        within_x = (pixels > boxes[:, :1]) & (pixels < boxes[:, 2:3])  # [n, W]
        within_y = (pixels > boxes[:, 1:2]) & (pixels < boxes[:, 3:])  # [n, H]
        masks = within_y[:, :, None] & within_x[:, None] & foreground
        scores = maps["shapes"][picture, shape, rows, columns].sigmoid()
        detected[name] = Detected(torch.cat([boxes, scores[:, None]], dim=1).numpy(), masks.numpy())
    return detected


def scene_colors(image: npt.NDArray[np.uint8], objects: Detected) -> Sequence[str]:
    """Colour of each object on an image uint8 [H, W, 3]: the shade nearest to its median pixel.

    Pixels at the mask's edge are mixed with the background and left out, where others remain.
    """
    assert objects.masks is not None, "the detector of scenes gives masks"
    shades = np.array(RGB)[:, None] * np.array(_SHADES)[:, None]  # [colour, shade, RGB]
    colors = []
    for mask in objects.masks:
        inner = _inner(mask)
        chosen = inner if inner.sum() >= _FEW else mask
        median = np.median(image[chosen] if chosen.any() else image.reshape(-1, 3), axis=0)
        distances = np.square(shades - median).sum(axis=2).min(axis=1)
        colors.append(COLORS[int(distances.argmin())])
    return colors


def _inner(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Pixels of a mask whose four neighbours belong to it too."""
    wide = np.pad(mask, 1)
    inner: npt.NDArray[np.bool_] = (
        mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    )
    return inner
