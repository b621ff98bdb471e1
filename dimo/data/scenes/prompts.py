"""Prompts of the bundled data set `scenes`: GenEval's grammar (arXiv:2310.11513) over seven shapes.

For more prompts of each tag, most may end in a background ("on a dark background"), and single
objects may have a size ("a small star"); the metadata do not ask for these. Coloured positions ("a
red circle above a blue square") are in training only.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from dimo.errors import unknown_name
from dimo.util.files import sha256_bytes

Split: TypeAlias = Literal["train", "held-out"]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white")
BACKGROUNDS = ("light", "grey", "dark")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

_HELD_OUT = 40  # prompts per tag
NUMBERS = {2: "two", 3: "three", 4: "four"}
_INVISIBLE = {("white", "light"), ("black", "dark")}  # (colour, background), never combined


@dataclass(frozen=True)
class Prompt:
    """A prompt; shapes, colours etc. are indices into the tuples above, -1 if unspecified."""

    text: str  # "a photo of three stars on a dark background"
    tag: str
    shapes: tuple[int, ...]  # of each object, in the order of the metadata
    colors: tuple[int, ...]
    relation: int = -1  # of the second object to the first
    background: int = -1
    size: int = -1

    @property
    def metadata(self) -> dict[str, Any]:
        """GenEval's metadata of the prompt, in the official format."""
        if self.tag == "counting":
            name, count = SHAPES[self.shapes[0]], len(self.shapes)
            return {
                "tag": self.tag,
                "include": [{"class": name, "count": count}],
                "exclude": [{"class": name, "count": count + 1}],
                "prompt": self.text,
            }
        include: list[dict[str, Any]] = []
        for shape, color in zip(self.shapes, self.colors, strict=True):
            include.append({"class": SHAPES[shape], "count": 1})
            if color >= 0:
                include[-1]["color"] = COLORS[color]
        if self.relation >= 0:
            include[1]["position"] = [RELATIONS[self.relation], 0]
        return {"tag": self.tag, "include": include, "prompt": self.text}


@functools.cache
def prompts(split: Split) -> tuple[Prompt, ...]:
    """All prompts of a split, by tag; the splits share no text.

    "held-out" has 40 prompts of each tag, chosen by the hash of their text. Held-out positions and
    colour attributions are not in training with any background or colour; prompts of other tags
    may be there with another background.

    Raises:
        DimoError: Unknown split.
    """
    if split not in ("train", "held-out"):
        raise unknown_name("split of scenes", split, ("train", "held-out"))
    prompts: list[Prompt] = []
    for tag in TAGS:
        bases = _bases(tag)
        chosen = _held_out(bases)
        if split == "held-out":
            prompts += chosen
            continue
        texts = {prompt.text for prompt in chosen}
        unseen = {_key(p) for p in chosen} if len(bases) >= 3 * _HELD_OUT else set()
        for base in itertools.chain(bases, _colored_positions() if tag == "position" else ()):
            if _key(base) not in unseen:
                prompts += [p for p in _on_backgrounds(base) if p.text not in texts]
    return tuple(prompts)


def _bases(tag: str) -> list[Prompt]:
    """The prompts of a tag without backgrounds."""
    shapes, colors = range(len(SHAPES)), range(len(COLORS))
    pairs = list(itertools.permutations(shapes, 2))
    if tag == "single_object":
        sizes = range(-1, len(SIZES))
        return [_prompt(tag, (shape,), size=size) for shape in shapes for size in sizes]
    if tag == "counting":
        return [_prompt(tag, (shape,) * count) for shape in shapes for count in NUMBERS]
    if tag == "two_object":
        return [_prompt(tag, pair) for pair in pairs]
    if tag == "colors":
        return [_prompt(tag, (shape,), (color,)) for shape in shapes for color in colors]
    if tag == "position":
        return [_prompt(tag, pair, relation=r) for pair in pairs for r in range(len(RELATIONS))]
    return [_prompt(tag, pair, two) for pair in pairs for two in itertools.permutations(colors, 2)]


def _colored_positions() -> Iterator[Prompt]:
    for base in _bases("position"):
        for colors in itertools.permutations(range(len(COLORS)), 2):
            yield _prompt("position", base.shapes, colors, relation=base.relation)


def _held_out(bases: list[Prompt]) -> list[Prompt]:
    """40 prompts, equally many of each base; bases and backgrounds are sorted by hash."""
    of_each = -(-_HELD_OUT // len(bases))
    ranked = (sorted(_on_backgrounds(base), key=_rank) for base in sorted(bases, key=_rank))
    return [prompt for prompts in ranked for prompt in prompts[:of_each]][:_HELD_OUT]


def _rank(prompt: Prompt) -> str:
    return sha256_bytes(prompt.text.encode())


def _key(prompt: Prompt) -> tuple[Any, ...]:
    """What identifies a prompt apart from backgrounds and the colours of a position."""
    colors = () if prompt.tag == "position" else prompt.colors
    return prompt.tag, prompt.shapes, colors, prompt.relation, prompt.size


def _on_backgrounds(base: Prompt) -> list[Prompt]:
    """The base itself, and the base on each background on which its colours are visible."""
    named = [COLORS[color] for color in base.colors if color >= 0]
    return [base] + [
        dataclasses.replace(
            base, text=f"{base.text} on a {background} background", background=number
        )
        for number, background in enumerate(BACKGROUNDS)
        if not any((color, background) in _INVISIBLE for color in named)
    ]


def _prompt(
    tag: str,
    shapes: tuple[int, ...],
    colors: tuple[int, ...] = (),
    *,
    relation: int = -1,
    size: int = -1,
) -> Prompt:
    colors = colors or (-1,) * len(shapes)
    names = [
        _article(f"{COLORS[c]} {SHAPES[s]}" if c >= 0 else SHAPES[s])
        for s, c in zip(shapes, colors, strict=True)
    ]
    if tag == "counting":
        scene = f"{NUMBERS[len(shapes)]} {plural(SHAPES[shapes[0]])}"
    elif relation >= 0:
        scene = f"{names[1]} {RELATIONS[relation]} {names[0]}"
    elif size >= 0:
        scene = _article(f"{SIZES[size]} {SHAPES[shapes[0]]}")
    else:
        scene = " and ".join(names)
    return Prompt(f"a photo of {scene}", tag, shapes, colors, relation, -1, size)


def plural(name: str) -> str:
    """The plural of a shape's name."""
    return f"{name}{'es' if name.endswith('s') else 's'}"


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
