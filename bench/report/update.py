"""Tables inside a hand-written Markdown page that a report keeps up to date."""

__all__ = ["renewed"]

import re
from collections.abc import Callable

from dimo.errors import DimoError

_BLOCK = re.compile(
    r"^<!-- dimo report --protocol (\S+) -->\n(.*?)^<!-- dimo report end -->$", re.M | re.S
)


def renewed(page: str, section: Callable[[str], str]) -> str:
    """The page with each table between its marks made again, and all else as it was.

    Args:
        page: Text with blocks between the lines `<!-- dimo report --protocol NAME -->` and
            `<!-- dimo report end -->`.
        section: Protocol name -> Markdown that ends with a newline.

    Raises:
        DimoError: There is no such block, or a line that begins or ends one stands alone.
    """
    begin, end = "<!-- dimo report --protocol ", "<!-- dimo report end -->"
    blocks = len(_BLOCK.findall(page))
    if not blocks or not page.count(begin) == page.count(end) == blocks:
        raise DimoError(
            f"the page has {blocks} whole tables between {begin}NAME --> and {end}, each on a line "
            f"of its own, {page.count(begin)} beginnings and {page.count(end)} ends; correct it"
        )
    return _BLOCK.sub(lambda found: f"{begin}{found[1]} -->\n{section(found[1])}{end}", page)
