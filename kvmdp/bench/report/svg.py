"""A small SVG writer: elements, the style sheet, and what tells series apart (colour, dash, marker, pattern).

Follows SVG 2 (W3C). Units: drawing units of the view box, one CSS pixel at natural size.

The colours are those of Okabe and Ito ("Color Universal Design", 2008) without the yellow, which no white ground
bears; on a light ground the orange and the sky blue are darkened to a contrast of 3:1. No series is told by colour
alone. Light and dark are one drawing: colours are CSS variables that `prefers-color-scheme` sets.
"""

from __future__ import annotations

import re
from xml.sax.saxutils import escape, quoteattr

NAMESPACE = "http://www.w3.org/2000/svg"

# Name of the variable -> light, dark. s0 to s7 are the series.
_COLOURS = {
    "ground": ("#ffffff", "#14181d"),
    "ink": ("#1b2026", "#e4e8ec"),
    "soft": ("#586069", "#a3adb8"),
    "rule": ("#d9dee3", "#343b43"),
    "panel": ("#f4f6f8", "#1d2329"),
    "s0": ("#0072b2", "#4a9fdc"),
    "s1": ("#d55e00", "#e8743b"),
    "s2": ("#00875f", "#1fb88c"),
    "s3": ("#b8609a", "#d68cb8"),
    "s4": ("#bb7c00", "#e69f00"),
    "s5": ("#444c56", "#c9d1d9"),
    "s6": ("#2f91cc", "#8fd0f5"),
    "s7": ("#6e7781", "#8b949e"),
}
SERIES = 8

DASHES = ("", "7 3", "2 2.5", "8 3 2 3", "12 4", "4 2", "1 3", "10 3 2 3 2 3")

# Around the origin, about 4 units to each side. The open ones are drawn by their stroke.
MARKERS = (
    "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0Z",
    "M-3.3 -3.3H3.3V3.3H-3.3Z",
    "M0 -4.4L4.2 3.2H-4.2Z",
    "M0 -4.6L4.6 0L0 4.6L-4.6 0Z",
    "M0 4.4L4.2 -3.2H-4.2Z",
    "M-4 0H4M0 -4V4",
    "M-3.3 -3.3L3.3 3.3M-3.3 3.3L3.3 -3.3",
    "M-4 0H4M-2 -3.5L2 3.5M2 -3.5L-2 3.5",
)

# Strokes in a tile of 6 by 6, by bar pattern: solid, empty, diagonals, dots, cross, upright, level.
PATTERNS = (
    None,
    "",
    "M-1 7L7 -1M-1 1L1 -1M5 7L7 5",
    "M1.5 1.5h0.01M4.5 4.5h0.01",
    "M-1 -1L7 7M5 -1L7 1M-1 5L1 7",
    "M0 3H6M3 0V6",
    "M3 0V6",
    "M0 3H6",
)

# What a point of a scatter looks like, drawn from where the point is. The last two stand out among the others.
DOTS = (
    "h0",
    "m-1.2 0h2.4",
    "m0 -1.2v2.4",
    "m-1 -1l2 2m0 -2l-2 2",
    "m-1 1l2 -2",
    "m-1 -1l2 2",
    "m-2.4 0h4.8m-2.4 -2.4v4.8",
    "m-1.9 -1.9l3.8 3.8m0 -3.8l-3.8 3.8",
)


def _variables(dark: bool) -> str:
    return "".join(f"--{name}:{pair[dark]};" for name, pair in _COLOURS.items())


# The root element is the SVG in a file of its own and the page where the SVG stands in HTML: one sheet serves both.
STYLE = (
    f":root{{color-scheme:light dark;{_variables(False)}}}\n"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables(True)}}}}}\n"
    ".chart text{font:12px system-ui,sans-serif;font-variant-numeric:tabular-nums;fill:var(--ink)}\n"
    ".chart .title{font-weight:600;font-size:13px}\n"
    ".chart .soft{fill:var(--soft)}\n"
    ".chart .rule{stroke:var(--rule);fill:none}\n"
    ".chart .axis{stroke:var(--soft);fill:none}\n"
    ".chart .ground{fill:var(--ground)}\n"
    ".chart .line{fill:none;stroke-width:1.6}\n"
    ".chart .marker{stroke-width:1.4}\n"
    ".chart .whisker{fill:none;stroke-width:1.1}\n"
    ".chart .over{stroke:var(--ink)}\n"
    ".chart .bar{stroke-width:1}\n"
    ".chart .dots{fill:none;stroke-width:1.5;stroke-linecap:round}\n"
    ".chart .key{stroke-width:2.2}\n"
    + "".join(f".chart .s{i}{{stroke:var(--s{i})}}.chart .f{i}{{fill:var(--s{i})}}" for i in range(SERIES))
    + "\n"
)

# Characters that XML 1.0 cannot hold, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def text_content(text: str) -> str:
    """Return `text` as it may stand between tags of SVG or HTML; what XML cannot hold becomes U+FFFD."""
    return escape(_FORBIDDEN.sub("\ufffd", text))


def attribute(text: str) -> str:
    """Return `text` as a quoted attribute."""
    return quoteattr(_FORBIDDEN.sub("\ufffd", text))


def element(tag: str, content: str = "", **attributes: str | float) -> str:
    """Return an element around `content`, which is markup already.

    Attributes keep their order; `_` stands for `-`, and one at the end (`class_`) for nothing. Numbers are rounded to
    a hundredth of a unit, which no eye sees, so that the same document gives the same bytes everywhere.
    """
    parts = [tag]
    for name, value in attributes.items():
        written = value if isinstance(value, str) else decimal(value)
        parts.append(f"{name.rstrip('_').replace('_', '-')}={attribute(written)}")
    opening = " ".join(parts)
    return f"<{opening}>{content}</{tag}>" if content else f"<{opening}/>"


def label(text: str, x: float, y: float, **attributes: str | float) -> str:
    """Return text at a place."""
    return element("text", text_content(text), x=x, y=y, **attributes)


def decimal(value: float) -> str:
    """Return a coordinate, as short as it can be written."""
    return f"{round(value, 2) + 0:.2f}".rstrip("0").rstrip(".")


def colour(index: int) -> int:
    """Return the number of the colour of series `index`."""
    return index % SERIES


def line_style(index: int) -> tuple[str, str]:
    """Return dash and marker of series `index`; after a full turn of the colours they are paired anew."""
    turn = index // SERIES
    return DASHES[(index + turn) % len(DASHES)], MARKERS[(index + 3 * turn) % len(MARKERS)]


def pattern(identifier: str, series: int, index: int) -> str:
    """Return the definition of pattern `index` in the colour of `series`, which fills bars."""
    strokes = PATTERNS[index % len(PATTERNS)]
    hue = colour(series)
    tile = element("rect", width=6, height=6, class_=f"f{hue}")
    if strokes is not None:
        tile = element("rect", width=6, height=6, class_="ground")
        if strokes:
            tile += element(
                "path", d=strokes, class_=f"s{hue}", fill="none", stroke_width=1.6, stroke_linecap="round"
            )
    return element("pattern", tile, id=identifier, width=6, height=6, patternUnits="userSpaceOnUse")
