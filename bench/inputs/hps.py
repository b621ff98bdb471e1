"""HPSv2's benchmark on disk: its prompts by style, and one image a prompt in a folder a style."""

__all__ = ["hps_images", "hps_prompts"]

import json
from collections.abc import Mapping
from pathlib import Path

from bench.metrics.hps import STYLES
from dimo.errors import DimoError
from dimo.strict import Origin

PROMPTS_PER_STYLE = 800
_SUFFIXES = (".png", ".jpg")


def hps_prompts(
    folder: Path, *, prompts_per_style: int = PROMPTS_PER_STYLE
) -> Mapping[str, tuple[str, ...]]:
    """Style -> prompts, from `STYLE.json`, a list of texts each.

    Args:
        folder: The folder `benchmark` of the data set zhwang/HPDv2.
        prompts_per_style: Length of each list.

    Raises:
        DimoError: A missing file, or one that is not a list of so many texts.
    """
    found: dict[str, tuple[str, ...]] = {}
    for style in STYLES:
        path = folder / f"{style}.json"
        origin = Origin(str(path), "give the folder benchmark of the data set zhwang/HPDv2")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise origin.error(f"cannot read prompts: {error.strerror}") from None
        except ValueError as error:
            raise origin.error(f"not valid JSON: {error}") from error
        if not isinstance(content, list) or not all(
            isinstance(prompt, str) and prompt.strip() for prompt in content
        ):
            raise origin.error("not a list of texts")
        if len(content) != prompts_per_style:
            raise origin.error(f"{len(content)} prompts instead of {prompts_per_style}")
        found[style] = tuple(content)
    return found


def hps_images(
    folder: Path, *, prompts_per_style: int = PROMPTS_PER_STYLE
) -> Mapping[str, tuple[Path, ...]]:
    """Style -> its images in the order of the prompts: `STYLE/00000.png` and on, or `.jpg`.

    Args:
        folder: Holds a folder for each style.
        prompts_per_style: Images in each.

    Raises:
        DimoError: Missing folders or images, an image that is there twice, or further images.
    """
    absent = [style for style in STYLES if not (folder / style).is_dir()]
    if absent:
        raise DimoError(
            f"{folder} has no folder {', '.join(absent)}; HPS needs {', '.join(STYLES)}, each with "
            f"{prompts_per_style} images"
        )
    found: dict[str, tuple[Path, ...]] = {}
    missing: list[str] = []
    for style in STYLES:
        present = {path.name for path in (folder / style).iterdir()}
        images: list[Path] = []
        for number in range(prompts_per_style):
            names = [f"{number:05d}{suffix}" for suffix in _SUFFIXES]
            there = [name for name in names if name in present]
            if len(there) == 2:
                raise DimoError(f"{folder / style} has {names[0]} and {names[1]}; remove one")
            missing += [] if there else [f"{style}/{names[0]}"]
            images += [folder / style / name for name in there]
        others = sorted(
            name
            for name in present - {path.name for path in images}
            if Path(name).suffix in _SUFFIXES
        )
        if others:
            raise DimoError(
                f"{folder / style} has {len(others)} images more than its {prompts_per_style} "
                f"prompts, the first is {others[0]}; remove them"
            )
        found[style] = tuple(images)
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise DimoError(
            f"{folder} misses {', '.join(missing[:3])}{more} (or .jpg); HPS needs one image for "
            f"each of {prompts_per_style} prompts a style; generate them again"
        )
    return found
