"""Figures of matplotlib as SVG inside the page: its colours are the page's, and points have titles.

A page with a strict content security policy takes no ``style`` attributes, and one that is also
dark takes no fixed colours: each style becomes an attribute, each colour that stands for one of
the page's a class.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
#: Colours of series; the page has as many.
SERIES = tuple(f"#0000{n:02x}" for n in range(1, 9))
INK, FAINT, BAND = "#0000a0", "#0000a1", "#f2f2f2"
#: Colours that stand for those of the page, by the end of their class.
_CLASSES = {INK: "ink", FAINT: "faint", BAND: "band", **{c: f"c{n}" for n, c in enumerate(SERIES)}}
#: Width and height in pixels, on a wide and on a narrow screen.
SIZES = {"wide": (720, 360), "narrow": (340, 320)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 11.5, "axes.labelsize": 11.5,
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": FAINT,
    "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": FAINT,
    "grid.linewidth": 0.5, "grid.alpha": 0.45, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 72,
}  # fmt: skip

Draw = Callable[[Figure, bool], Mapping[str, Sequence[str]]]


def chart(name: str, draw: Draw, summary: str, height: float = 1.0) -> Markup:
    """Draw a figure for wide and narrow screens.

    Parameters
    ----------
    name : str
        Tells its ids from those of other charts.
    draw : callable
        ``(figure, narrow) -> {gid: titles}``: the titles of the points of artists with a gid.
    summary : str
        What the chart shows, for who cannot see it.
    height : float
        In the usual height.

    Returns
    -------
    Markup
        Two ``<svg>``, of which the page shows the one that fits.
    """
    made = []
    for size, (wide, high) in SIZES.items():
        with mpl.rc_context({**_STYLE, "svg.hashsalt": f"{name}-{size}"}):
            figure = Figure(figsize=(wide / 72, high * height / 72), layout="constrained")
            titles = draw(figure, size == "narrow")
            stream = io.StringIO()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # glyphs that its own font lacks: the page's has
                figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        made.append(_inline(stream.getvalue(), f"chart {size}", f"{name}-{size}", summary, titles))
    return Markup("\n").join(made)


def _inline(
    text: str, kind: str, name: str, summary: str, titles: Mapping[str, Sequence[str]]
) -> Markup:
    root = ET.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if _tag(child) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        _restyle(element)
        _rename(element, name)
    for gid, texts in titles.items():
        group = next((e for e in root.iter() if e.get("id") == f"{name}-{gid}"), None)
        points = [e for e in group.iter() if _tag(e) == "use"] if group is not None else []
        if len(points) == len(texts):  # a point beside the axes is not drawn
            for point, words in zip(points, texts, strict=True):
                ET.SubElement(point, f"{{{_SVG}}}title").text = words
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"class": kind, "role": "img", "aria-label": summary}
    for element in root.iter():
        element.tag = _tag(element)
    return Markup(ET.tostring(root, encoding="unicode"))


def _tag(element: ET.Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _restyle(element: ET.Element) -> None:
    """Turn a style into attributes, and the page's colours into classes."""
    for part in (element.attrib.pop("style", "") or "").split(";"):
        key, _, value = (p.strip() for p in part.partition(":"))
        if key == "font":
            size = re.search(r"([\d.]+)px", value)
            element.set("font-size", size[1] if size else "11")
            if "bold" in value or re.search(r"\b[6-9]00\b", value):
                element.set("font-weight", "600")
        elif key and value:
            element.set(key, value)
    if _tag(element) == "text" and "fill" not in element.attrib:
        element.set("fill", INK)
    classes = []
    for key, letter in (("fill", "f"), ("stroke", "s")):
        if (name := _CLASSES.get(element.get(key, "").lower())) is not None:
            del element.attrib[key]
            classes.append(f"{letter}-{name}")
    if classes:
        element.set("class", " ".join(classes))


def _rename(element: ET.Element, name: str) -> None:
    """Make ids unique in the page."""
    if "id" in element.attrib:
        element.set("id", f"{name}-{element.attrib['id']}")
    link = element.attrib.pop(f"{{{_XLINK}}}href", None)
    if link is not None:
        element.set("href", f"#{name}-{link.removeprefix('#')}")
    if "clip-path" in element.attrib:
        element.set("clip-path", element.attrib["clip-path"].replace("url(#", f"url(#{name}-"))
