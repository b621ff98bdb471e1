"""Prompts of the bundled data set `scenes`: GenEval's grammar over shapes that can be drawn.

The six tags and the metadata are those of GenEval (Ghosh et al., arXiv:2310.11513); the classes
are seven shapes. So that there are many prompts of each tag, most may end in a background ("on a
dark background"), and single objects may have a size ("a small star"): drawn, but not asked for by
the metadata. Coloured positions ("a red circle above a blue square") are in training only.
"""

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

_HELD_OUT = 40  # prompts a tag
NUMBERS = {2: "two", 3: "three", 4: "four"}
_INVISIBLE = {("white", "light"), ("black", "dark")}  # colours that are not put on a background


@dataclass(frozen=True)
class Prompt:
    """What a picture is asked to show.

    Attributes:
        text: "a photo of three stars on a dark background".
        tag: One of `TAGS`.
        shapes: Index into `SHAPES` of each object, in the order of the metadata.
        colors: Index into `COLORS` of each object; -1 where the prompt leaves it open.
        relation: Index into `RELATIONS`, of the second object to the first; -1: none.
        background: Index into `BACKGROUNDS`; -1: open.
        size: Index into `SIZES`; -1: open.
    """

    text: str
    tag: str
    shapes: tuple[int, ...]
    colors: tuple[int, ...]
    relation: int = -1
    background: int = -1
    size: int = -1

    @property
    def metadata(self) -> dict[str, Any]:
        """What GenEval's rules judge a picture by, in the official format."""
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

    "held-out" has 40 prompts of each tag, chosen by the hash of their text. A base is a prompt
    without its background. Of positions and colour attributions, bases that are held out are not
    in training with any background or colour; of the other tags, with another background only.

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
        whole = len(bases) >= 3 * _HELD_OUT
        unseen = {_key(prompt) for prompt in chosen} if whole else set()
        every = itertools.chain(bases, _colored_positions() if tag == "position" else ())
        for base in every:
            if _key(base) not in unseen:
                prompts += [p for p in _on_backgrounds(base) if p.text not in texts]
    return tuple(prompts)


def _bases(tag: str) -> list[Prompt]:
    """The prompts of a tag that name no background."""
    numbers, colors = range(len(SHAPES)), range(len(COLORS))
    pairs = list(itertools.permutations(numbers, 2))
    if tag == "single_object":
        return [
            _prompt(tag, (shape,), size=size) for shape in numbers for size in range(-1, len(SIZES))
        ]
    if tag == "counting":
        return [_prompt(tag, (shape,) * count) for shape in numbers for count in NUMBERS]
    if tag == "two_object":
        return [_prompt(tag, pair) for pair in pairs]
    if tag == "colors":
        return [_prompt(tag, (shape,), (color,)) for shape in numbers for color in colors]
    if tag == "position":
        return [_prompt(tag, pair, relation=r) for pair in pairs for r in range(len(RELATIONS))]
    two = list(itertools.permutations(colors, 2))
    return [_prompt(tag, pair, chosen) for pair in pairs for chosen in two]


def _colored_positions() -> Iterator[Prompt]:
    for base in _bases("position"):
        for colors in itertools.permutations(range(len(COLORS)), 2):
            yield _prompt("position", base.shapes, colors, relation=base.relation)


def _held_out(bases: list[Prompt]) -> list[Prompt]:
    """As many prompts of each base as it takes, bases and backgrounds in the order of a hash."""
    of_each = -(-_HELD_OUT // len(bases))
    ranked = sorted(bases, key=_rank)
    chosen = [p for base in ranked for p in sorted(_on_backgrounds(base), key=_rank)[:of_each]]
    return chosen[:_HELD_OUT]


def _rank(prompt: Prompt) -> str:
    return sha256_bytes(prompt.text.encode())


def _key(prompt: Prompt) -> tuple[Any, ...]:
    """What a prompt asks for, apart from backgrounds and from the colours of a position."""
    colors = () if prompt.tag == "position" else prompt.colors
    return prompt.tag, prompt.shapes, colors, prompt.relation, prompt.size


def _on_backgrounds(base: Prompt) -> list[Prompt]:
    """The base itself, and on each background on which its colours can be seen."""
    named = [COLORS[color] for color in base.colors if color >= 0]
    prompts = [base]
    for number, background in enumerate(BACKGROUNDS):
        if not any((color, background) in _INVISIBLE for color in named):
            text = f"{base.text} on a {background} background"
            prompts.append(
                Prompt(text, base.tag, base.shapes, base.colors, base.relation, number, base.size)
            )
    return prompts


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
        _article(" ".join(filter(None, (COLORS[c] if c >= 0 else "", SHAPES[s]))))
        for s, c in zip(shapes, colors, strict=True)
    ]
    if tag == "counting":
        name = SHAPES[shapes[0]]
        said = f"{NUMBERS[len(shapes)]} {plural(name)}"
    elif relation >= 0:
        said = f"{names[1]} {RELATIONS[relation]} {names[0]}"
    elif size >= 0:
        said = _article(f"{SIZES[size]} {SHAPES[shapes[0]]}")
    else:
        said = " and ".join(names)
    return Prompt(f"a photo of {said}", tag, shapes, colors, relation, -1, size)


def plural(name: str) -> str:
    """Of the name of a shape."""
    return f"{name}{'es' if name.endswith('s') else 's'}"


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
