"""Tables inside a hand-written Markdown page that a report keeps up to date."""

__all__ = ["renewed"]

import re
from collections.abc import Callable

from dimo.errors import DimoError

_BLOCK = re.compile(
    r"^<!-- dimo report --protocol (\S+)( --ablation)? -->\n(.*?)^<!-- dimo report end -->$",
    re.M | re.S,
)


def renewed(page: str, section: Callable[[str, bool], str]) -> str:
    """The page with each table between its marks made again, and all else as it was.

    Args:
        page: Text with blocks between the lines `<!-- dimo report --protocol NAME -->` and
            `<!-- dimo report end -->`; ` --ablation` may follow the name.
        section: Protocol name, and whether of its ablations -> Markdown that ends with a newline.

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

    def again(found: re.Match[str]) -> str:
        name, ablation = found[1], found[2] or ""
        return f"{begin}{name}{ablation} -->\n{section(name, bool(ablation))}{end}"

    return _BLOCK.sub(again, page)
