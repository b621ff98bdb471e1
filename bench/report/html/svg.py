"""SVG of matplotlib -> SVG that is part of a page: colours by class, no style attributes, no ids
that another picture has. So the page's style sheet gives it the colours of light and dark, and its
security policy can forbid every other style.
"""

import re
from xml.etree import ElementTree as ET

from bench.report.plots import STYLES, Ink

# Stand-ins: no colour that is seen, only names that `inline` turns into classes.
PAGE_INK = Ink(
    text="#010000",
    faint="#020000",
    muted="#030000",
    paper="#040000",
    lines=tuple(f"#0{i}0100" for i in range(STYLES)),
)
_NAMES = {
    PAGE_INK.text: "ink",
    PAGE_INK.faint: "faint",
    PAGE_INK.muted: "muted",
    PAGE_INK.paper: "paper",
    **{color: str(i) for i, color in enumerate(PAGE_INK.lines)},
}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_KEPT = {  # style properties that are attributes too
    "fill-opacity",
    "opacity",
    "stroke-dasharray",
    "stroke-linecap",
    "stroke-linejoin",
    "stroke-opacity",
    "stroke-width",
    "text-anchor",
}


def inline(svg: bytes, *, prefix: str, label: str = "") -> str:
    """An SVG for the inside of a page.

    Args:
        svg: What matplotlib wrote with the colours of `PAGE_INK`.
        prefix: What its ids begin with; no other picture of the page has the same.
        label: The picture in words; empty: it is decoration.
    """
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    text = ET.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    for element in root.iter():
        _restyle(element)
        _rename(element, prefix, used)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    if label:
        root.set("role", "img")
        root.set("aria-label", label)
    else:
        root.set("aria-hidden", "true")
    text = ET.tostring(root, encoding="unicode", short_empty_elements=True)
    text = re.sub(r"\s*xmlns(:\w+)?=\"[^\"]+\"", "", text)
    text = re.sub(r"<(/?)(?:ns\d+|svg):", r"<\1", text)
    text = re.sub(r"(?:ns\d+|xlink):href", "href", text)
    return re.sub(r">\s+<", "><", text)


def _restyle(element: ET.Element) -> None:
    classes = []
    for part in element.attrib.pop("style", "").split(";"):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if name in ("fill", "stroke"):
            if value in _NAMES:
                classes.append(f"{'f' if name == 'fill' else 'k'}-{_NAMES[value]}")
            elif value == "none":
                element.set(name, value)
        elif name in ("font", "font-size"):
            found = re.search(r"([\d.]+)px", value)
            assert found is not None, value
            element.set("font-size", found[1])
        elif name in _KEPT:
            element.set(name, value)
    for name in ("fill", "stroke"):
        value = element.attrib.get(name, "")
        if value in _NAMES:
            classes.append(f"{name.replace('stroke', 'k')[0]}-{_NAMES[value]}")
            del element.attrib[name]
    if classes:
        element.set("class", " ".join(classes))
    for name in ("d", "x", "y", "transform", "points", "width", "height", "stroke-dasharray"):
        if name in element.attrib and element.tag != f"{_SVG}svg":
            element.set(name, re.sub(r"-?\d+\.\d+", _short, " ".join(element.attrib[name].split())))


def _short(number: re.Match[str]) -> str:
    return f"{round(float(number[0]), 2) + 0.0:g}"


def _rename(element: ET.Element, prefix: str, used: set[str]) -> None:
    name = element.attrib.pop("id", None)
    if name in used:
        element.set("id", f"{prefix}-{name}")
    for key in (f"{_XLINK}href", "href"):
        if key in element.attrib:
            element.set(key, f"#{prefix}-{element.attrib[key].removeprefix('#')}")
    if "clip-path" in element.attrib:
        element.set("clip-path", re.sub(r"#", f"#{prefix}-", element.attrib["clip-path"]))
