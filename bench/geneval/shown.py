"""Which verdicts of a row people are shown: as many of each tag, spread evenly over its images."""

__all__ = ["SHEET_COLUMNS", "SHEET_SIDE", "chosen"]

from collections.abc import Sequence

SHEET_SIDE = 64  # pixels of a tile of the sheet of their images, at most
SHEET_COLUMNS = 10
_EACH = 10  # of a tag


def chosen(tags: Sequence[str]) -> list[int]:
    """Numbers of the images, ascending within each tag, tags in the order in which they come.

    From step to step the place in a step moves on by one, so that not every image is the first of
    its prompt.

    Args:
        tags: Of each image.
    """
    rows: dict[str, list[int]] = {}
    for number, tag in enumerate(tags):
        rows.setdefault(tag, []).append(number)
    return [
        numbers[len(numbers) * place // count + place % (len(numbers) // count)]
        for numbers in rows.values()
        for count in [min(_EACH, len(numbers))]
        for place in range(count)
    ]
