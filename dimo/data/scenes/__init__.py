"""The bundled data set `scenes`: rendered 32 x 32 pictures of one to four shapes, with captions.

Whatever a prompt leaves open is a random function of (seed, index). Centres are on a grid of 4
pixels, and sizes and shades have two values, so that a network learns them in an hour on two cores.
In `free` pictures, for training detector and CLIP, all of them are continuous. The arithmetic is
+, -, *, / and square roots only, which are rounded alike on every machine.
"""

__all__ = [
    "RGB",
    "SIDE",
    "Scene",
    "SceneBatch",
    "batch",
    "boxes_of",
    "captions",
    "draw",
    "drawn_captions",
    "prompts",
    "render",
]

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dimo.data.scenes.prompts import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    TAGS,
    Prompt,
    Split,
    prompts,
)
from dimo.errors import DimoError
from dimo.rng import uniform

SIDE = 32
_MOST = 4  # objects
_MARGIN = 0.6  # pixels between an object and the edge of its part of the picture
_LATTICE = 4.0  # pixels between centres, except in free pictures
_ACROSS = 5.0  # pixels by which two free objects in a relation may be out of line
_STEPPED_ACROSS = 3.9  # the same before centres are rounded to the grid
_RADII = {1: (6.0, 12.0), 2: (5.2, 7.2), 3: (5.0, 6.9), 4: (5.0, 6.9)}  # by number of objects
_SIZED_RADII = ((5.0, 7.0), (9.5, 12.5))  # small, large
_LEVELS = ((195.0, 225.0), (105.0, 150.0), (28.0, 58.0))  # of light, grey and dark backgrounds
RGB = (
    (214.0, 38.0, 36.0),  # red
    (240.0, 138.0, 28.0),  # orange
    (240.0, 222.0, 45.0),  # yellow
    (42.0, 158.0, 62.0),  # green
    (42.0, 82.0, 214.0),  # blue
    (132.0, 46.0, 168.0),  # purple
    (244.0, 136.0, 190.0),  # pink
    (20.0, 20.0, 22.0),  # black
    (246.0, 246.0, 244.0),  # white
)
_DRAWS = 10 + 7 * _MOST  # numbers drawn for each picture
_COLORED_POSITIONS = "colored_position"  # a seventh kind of prompt, in training only


@dataclass(frozen=True)
class SceneBatch:
    """Pictures and up to four objects on each, in the order of the metadata."""

    images: Tensor  # uint8 [B, 3, 32, 32]
    prompt: Tensor  # int64 [B], index into the prompts
    shapes: Tensor  # int64 [B, 4], index into `SHAPES`; -1: no object
    colors: Tensor  # int64 [B, 4], index into `COLORS`
    centers: Tensor  # float32 [B, 4, 2], x and y in pixels
    radii: Tensor  # float32 [B, 4], pixels
    coverage: Tensor  # float32 [B, 4, 32, 32], fraction of each pixel covered by the object


@dataclass(frozen=True)
class Scene:
    """One picture and its n objects, in the order of the metadata."""

    image: Tensor  # uint8 [3, 32, 32]
    boxes: Tensor  # float32 [n, 4], x1, y1, x2, y2 of the mask in pixels
    masks: Tensor  # bool [n, 32, 32], pixels at least half covered by the object
    classes: tuple[str, ...]  # names of the shapes
    colors: tuple[str, ...]  # names of the colours


def render(prompt: Prompt, seed: int, index: int) -> Scene:
    """Picture `index` of a prompt."""
    first = torch.zeros(1, dtype=torch.int64)
    drawn = _draw(_Table.of((prompt,)), first, seed, torch.tensor([index]))
    count = len(prompt.shapes)
    masks = drawn.coverage[0, :count] >= 0.5
    return Scene(
        image=drawn.images[0],
        boxes=boxes_of(masks),
        masks=masks,
        classes=tuple(SHAPES[i] for i in drawn.shapes[0, :count].tolist()),
        colors=tuple(COLORS[i] for i in drawn.colors[0, :count].tolist()),
    )


def batch(seed: int, indices: Tensor, split: Split, *, free: bool = False) -> tuple[Tensor, Tensor]:
    """Captioned pictures: images uint8 [B, 3, 32, 32] and indices of their prompts int64 [B].

    Picture i of "held-out" shows prompt i modulo their number. "train" draws a tag (positions with
    and without colours count as two), then a prompt of it.

    Args:
        indices: int64 [B]; picture i is the same in any batch.
        split: "train" or "held-out", see `prompts`.
        free: Places, sizes and shades are continuous.
    """
    drawn = draw(seed, indices, split, free=free)
    return drawn.images, drawn.prompt


def draw(seed: int, indices: Tensor, split: Split, *, free: bool = False) -> SceneBatch:
    """As `batch`, with the objects."""
    table = _table(split)
    if indices.ndim != 1 or indices.dtype != torch.int64:
        raise DimoError(
            f"indices have shape {list(indices.shape)} and dtype {indices.dtype}; allowed: [B] "
            "int64; give one index a picture"
        )
    return _draw(table, _choose(table, seed, indices, split), seed, indices, free=free)


def captions() -> list[str]:
    """The training prompts, in the order in which `batch` numbers them."""
    return [prompt.text for prompt in prompts("train")]


def drawn_captions(count: int) -> list[str]:
    """Captions as training draws them: all tags equally often, with duplicates."""
    numbers = _choose(_table("train"), 0, torch.arange(count), "train").tolist()
    return [prompts("train")[number].text for number in numbers]


def boxes_of(masks: Tensor) -> Tensor:
    """Boxes x1, y1, x2, y2 around masks: bool [n, H, W] -> float32 [n, 4], 0 for an empty mask."""
    some = masks.flatten(1).any(dim=1)
    ends = []
    for over in (1, 2):  # rows, which leaves columns: x
        present = masks.any(dim=over).to(torch.uint8)
        first = present.argmax(dim=1)
        last = present.shape[1] - present.flip(1).argmax(dim=1)
        ends.append((first * some, last * some))
    (x1, x2), (y1, y2) = ends
    return torch.stack([x1, y1, x2, y2], dim=1).float()


@dataclass(frozen=True)
class _Table:
    """Prompts as arrays, int64 [P, 4] or [P].

    Prompts `order[starts[k] : starts[k + 1]]` are of kind k: a tag, or coloured positions.
    """

    shapes: Tensor
    colors: Tensor
    count: Tensor
    one_color: Tensor
    relation: Tensor
    background: Tensor
    size: Tensor
    order: Tensor
    starts: Tensor

    @staticmethod
    def of(given: tuple[Prompt, ...]) -> "_Table":
        def padded(rows: list[tuple[int, ...]]) -> Tensor:
            return torch.tensor([row + (-1,) * (_MOST - len(row)) for row in rows])

        kinds = [*TAGS, _COLORED_POSITIONS]
        number = torch.tensor([kinds.index(_kind(prompt)) for prompt in given])
        present = torch.bincount(number)
        present = present[present > 0]
        return _Table(
            shapes=padded([p.shapes for p in given]),
            colors=padded([p.colors for p in given]),
            count=torch.tensor([len(p.shapes) for p in given]),
            one_color=torch.tensor([p.tag == "counting" for p in given]),
            relation=torch.tensor([p.relation for p in given]),
            background=torch.tensor([p.background for p in given]),
            size=torch.tensor([p.size for p in given]),
            order=number.argsort(stable=True),
            starts=torch.cat([torch.zeros(1, dtype=torch.int64), present.cumsum(0)]),
        )


def _kind(prompt: Prompt) -> str:
    colored = prompt.tag == "position" and prompt.colors[0] >= 0
    return _COLORED_POSITIONS if colored else prompt.tag


@functools.cache
def _table(split: Split) -> _Table:
    return _Table.of(prompts(split))


def _choose(table: _Table, seed: int, index: Tensor, split: Split) -> Tensor:
    if split == "held-out":
        return index % len(table.count)
    u = uniform(seed, index, "scenes/prompt", (2,))
    kind = (u[:, 0] * (len(table.starts) - 1)).long()
    start, stop = table.starts[kind], table.starts[kind + 1]
    return table.order[start + (u[:, 1] * (stop - start)).long()]


def _draw(
    table: _Table, prompt: Tensor, seed: int, index: Tensor, *, free: bool = False
) -> SceneBatch:
    u = uniform(seed, index, "scenes/picture", (_DRAWS,)).float()
    general, each = u[:, :10], u[:, 10:].view(-1, 7, _MOST)
    if not free:
        for draws, steps in (
            *((general[:, 3:4], 2), (general[:, 4:7], 1), (general[:, 7:9], 2)),  # background
            *((each[:, 1], 2), (each[:, 5], 2), (each[:, 6], 1)),  # sizes, paint
        ):
            draws.copy_(((draws * steps).floor() + 0.5) / steps)
    shapes, count = table.shapes[prompt], table.count[prompt]
    colors, background = _colors(table, prompt, general[:, 0], each[:, 0])
    radii = _radii(count, table.size[prompt], each[:, 1])
    centers = _centers(
        *(count, table.relation[prompt], radii, general[:, 1:3], each[:, 2:5]),
        out_of_line=_ACROSS if free else _STEPPED_ACROSS,
    )
    if not free:
        centers = (centers / _LATTICE + 0.5).floor() * _LATTICE
    coverage = _coverage(shapes, centers, radii)
    canvas = _background(background, general[:, 3:])
    paint = torch.tensor(RGB)[colors.clamp(min=0)]  # [B, 4, 3]
    paint = paint * (0.85 + 0.2 * each[:, 5])[:, :, None] + (16 * each[:, 6] - 8)[:, :, None]
    for slot in range(_MOST):
        alpha = coverage[:, slot, None]
        canvas = canvas + alpha * (paint[:, slot, :, None, None] - canvas)
    images = (canvas + 0.5).floor().clamp(0, 255).to(torch.uint8)
    return SceneBatch(images, prompt, shapes, colors, centers, radii, coverage)


def _colors(
    table: _Table, prompt: Tensor, u_background: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    """Colours [B, 4] and backgrounds [B]; unspecified ones are drawn among the visible ones."""
    given, background = table.colors[prompt], table.background[prompt]
    white, black = COLORS.index("white"), COLORS.index("black")
    allowed = torch.ones(len(prompt), len(BACKGROUNDS), dtype=torch.bool)
    allowed[:, 0] = ~(given == white).any(dim=1)
    allowed[:, 2] = ~(given == black).any(dim=1)
    background = torch.where(background < 0, _pick(allowed, u_background), background)
    visible = torch.ones(len(prompt), len(COLORS), dtype=torch.bool)
    visible[:, white] = background != 0
    visible[:, black] = background != 2
    drawn = torch.stack([_pick(visible, u[:, slot]) for slot in range(_MOST)], dim=1)
    drawn = torch.where(table.one_color[prompt][:, None], drawn[:, :1], drawn)
    colors = torch.where(given < 0, drawn, given)
    return colors.masked_fill(table.shapes[prompt] < 0, -1), background


def _pick(allowed: Tensor, u: Tensor) -> Tensor:
    """A uniformly drawn allowed column of each row, bool [B, N]: int64 [B]."""
    place = allowed.cumsum(dim=1)
    rank = (u * place[:, -1]).long() + 1
    return ((place == rank[:, None]) & allowed).to(torch.uint8).argmax(dim=1)


def _radii(count: Tensor, size: Tensor, u: Tensor) -> Tensor:
    limits = torch.tensor([_RADII[n] for n in sorted(_RADII)])[count - 1]  # [B, 2]
    sized = torch.tensor(_SIZED_RADII)[size.clamp(min=0)]
    low, high = torch.where((size < 0)[:, None], limits, sized).unbind(dim=1)
    return low[:, None] + u * (high - low)[:, None]


def _centers(
    count: Tensor, relation: Tensor, radii: Tensor, u: Tensor, each: Tensor, *, out_of_line: float
) -> Tensor:
    """Centres [B, 4, 2]: one object anywhere, two in halves, more in quarters of the picture."""
    reach = radii + _MARGIN
    anywhere = [reach + each[:, axis] * (SIDE - 2 * reach) for axis in (0, 1)]
    within = [reach + each[:, axis] * (SIDE / 2 - 2 * reach).clamp(min=0) for axis in (0, 1)]

    # two objects: one half each, left and right or top and bottom
    related = relation >= 0
    vertical = torch.where(related, relation >= RELATIONS.index("above"), u[:, 0] < 0.5)
    second_is_first = relation.remainder(2) == 0  # "left of", "above": the second comes first
    swapped = torch.where(related, second_is_first, u[:, 1] < 0.5)
    half = torch.zeros_like(radii)
    half[:, 0], half[:, 1] = swapped.float(), 1 - swapped.float()
    along = half * (SIDE / 2) + within[0]
    across = anywhere[1].clone()
    near = across[:, 0] + out_of_line * (2 * each[:, 1, 1] - 1)
    near = near.maximum(reach[:, 1]).minimum(SIDE - reach[:, 1])
    across[:, 1] = torch.where(related, near, across[:, 1])
    side = vertical[:, None]
    two = torch.stack([torch.where(side, across, along), torch.where(side, along, across)], dim=2)

    # three or four: a quarter each
    quarter = each[:, 2].argsort(dim=1)
    corner = torch.stack([quarter % 2, quarter // 2], dim=2) * (SIDE / 2)
    more = corner + torch.stack(within, dim=2)

    number = count[:, None, None]
    one = torch.stack(anywhere, dim=2)
    return torch.where(number == 1, one, torch.where(number == 2, two, more))


def _background(background: Tensor, u: Tensor) -> Tensor:
    """Grey with a slight tint and gradient, float32 [B, 3, 32, 32]."""
    low, high = torch.tensor(_LEVELS)[background].unbind(dim=1)
    level = (low + u[:, 0] * (high - low))[:, None] + 12 * u[:, 1:4] - 6  # [B, 3]
    ramp = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    slope = 24 * u[:, 4:6] - 12
    shade = slope[:, 0, None, None] * ramp + slope[:, 1, None, None] * ramp[:, None]  # [B, H, W]
    return level[:, :, None, None] + shade[:, None]


def _coverage(shapes: Tensor, centers: Tensor, radii: Tensor) -> Tensor:
    """Fraction of each pixel covered by each object, float32 [B, 4, 32, 32]."""
    drawn = torch.zeros(*shapes.shape, SIDE, SIDE)
    grid = torch.arange(SIDE) + 0.5
    for number, name in enumerate(SHAPES):
        rows, slots = (shapes == number).nonzero(as_tuple=True)
        radius = radii[rows, slots, None, None]
        center = centers[rows, slots]
        x = (grid - center[:, 0, None, None]) / radius  # [M, 1, W]
        y = (grid[:, None] - center[:, 1, None, None]) / radius  # [M, H, 1]
        drawn[rows, slots] = (0.5 - _DISTANCES[name](x, y) * radius).clamp(0, 1)
    return drawn


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five lines; a point is inside if it is beyond at most one of them."""
    normals = ((0.0, -1.0), (0.951, -0.309), (0.588, 0.809), (-0.588, 0.809), (-0.951, -0.309))
    lines = torch.stack([a * x + b * y - 0.34 for a, b in normals])
    return lines.topk(2, dim=0).values[1]


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    wide = torch.maximum(x - 0.95, y - 0.33)
    return torch.minimum(wide, torch.maximum(y - 0.95, x - 0.33))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x = x.abs()
    lobe = ((x - 0.45) * (x - 0.45) + (y + 0.35) * (y + 0.35)).sqrt() - 0.52
    tip = torch.maximum(0.751 * x + 0.66 * (y - 0.95), -y - 0.01)
    middle = torch.maximum(torch.maximum(x - 0.45, -y - 0.35), y - 0.3)
    return torch.minimum(torch.minimum(lobe, tip), middle)


# Signed distances to the outline of a shape of radius 1, negative inside; y points down.
_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: (x * x + y * y).sqrt() - 0.95,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.85,
    "triangle": lambda x, y: torch.maximum(0.879 * x.abs() - 0.477 * (y + 0.95), y - 0.8),
    "star": _star,
    "cross": _cross,
    "ring": lambda x, y: ((x * x + y * y).sqrt() - 0.7).abs() - 0.25,
    "heart": _heart,
}
