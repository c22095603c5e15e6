"""One chart: a titled plot with axes, what is drawn in it, and a legend below.

Units: drawing units of the view box. All charts are WIDTH wide, narrow enough for a telephone; the height follows
from what stands below the plot.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise

from kvmdp.bench.report.scale import Scale
from kvmdp.bench.report.svg import (
    DOTS,
    NAMESPACE,
    STYLE,
    colour,
    decimal,
    element,
    label,
    line_style,
    pattern,
    text_content,
)

WIDTH = 440.0
_TOP = 30.0
_RIGHT = 14.0
_LINE = 17.0
_LETTER = 7.3  # width of a letter at the style sheet's 12 px in a wide font
_NOTE_LETTERS = 58
_NEUTRAL = 7  # series whose grey stands for any

Point = tuple[float, float]
Ticks = Sequence[tuple[float, str]]


class Chart:
    """A chart under construction. `name` makes its identifiers unique among the charts of a page."""

    def __init__(self, name: str, title: str, description: str, height: float, left: float = 74.0) -> None:
        self.name = name
        self.title = title
        self.description = description
        self.left, self.right = left, WIDTH - _RIGHT
        self.top, self.bottom = _TOP, _TOP + height
        self._end = self.bottom
        self._marks: list[str] = []
        self._frame: list[str] = []
        self._patterns: dict[tuple[int, int], str] = {}

    # Axes

    def x_scale(self, low: float, high: float, log: bool = False) -> Scale:
        """Return a scale over the width of the plot."""
        return Scale(low, high, self.left, self.right, log)

    def y_scale(self, low: float, high: float, log: bool = False) -> Scale:
        """Return a scale over the height of the plot, upwards."""
        return Scale(low, high, self.bottom, self.top, log)

    def x_axis(self, scale: Scale, ticks: Ticks, title: str, grid: bool = True) -> None:
        """Draw the axis below the plot; `title` says quantity and unit.

        Where labels would touch, only every second one is written, or every third, and so on.
        """
        # The last label may not leave the drawing.
        halves = [len(text) * _LETTER / 2 for _, text in ticks]
        places = [min(scale(value), WIDTH - half - 1) for (value, _), half in zip(ticks, halves, strict=True)]
        widest = 2 * max(halves, default=0) + _LETTER / 2
        step = 1
        while any(b - a < widest for a, b in pairwise(places[::step])):
            step += 1
        for index, (value, text) in enumerate(ticks):
            x = scale(value)
            if grid:
                self._frame.append(element("path", d=_path((x, self.top), (x, self.bottom)), class_="rule"))
            mark = _path((x, self.bottom), (x, self.bottom + 4))
            self._frame.append(element("path", d=mark, class_="axis"))
            if index % step == 0:
                self._frame.append(label(text, places[index], self.bottom + 17, text_anchor="middle"))
        middle = (self.left + self.right) / 2
        self._frame.append(label(title, middle, self.bottom + 35, text_anchor="middle", class_="soft"))
        corners = (self.left, self.bottom), (self.right, self.bottom)
        self._frame.append(element("path", d=_path(*corners), class_="axis"))
        self._end = self.bottom + 40

    def y_axis(self, scale: Scale, ticks: Ticks, title: str) -> None:
        """Draw the axis at the left of the plot, with a grid."""
        for value, text in ticks:
            y = scale(value)
            self._frame.append(element("path", d=_path((self.left, y), (self.right, y)), class_="rule"))
            self._frame.append(label(text, self.left - 7, y + 4, text_anchor="end"))
        middle = (self.top + self.bottom) / 2
        self._frame.append(
            label(
                title,
                0,
                0,
                text_anchor="middle",
                class_="soft",
                transform=f"translate(11 {middle:g}) rotate(-90)",
            )
        )

    def categories(self, names: Sequence[str], step: float) -> None:
        """Name the rows of a bar chart, each `step` high, at the left. A name too long for its place is cut."""
        most = int((self.left - 7) / _LETTER)
        for row, name in enumerate(names):
            shown = name if len(name) <= most else name[: most - 2] + ".."
            self._frame.append(
                label(shown, self.left - 7, self.top + (row + 0.5) * step + 4, text_anchor="end")
            )
        self._frame.append(
            element("path", d=_path((self.left, self.top), (self.left, self.bottom)), class_="axis")
        )

    # Marks

    def line(self, points: Sequence[Point], series: int, markers: Sequence[Point]) -> None:
        """Draw a line through `points`, with the series' marker at each of `markers`."""
        hue, (dash, marker) = colour(series), line_style(series)
        if len(points) > 1:
            self._marks.append(
                element(
                    "path",
                    d=_path(*points),
                    class_=f"line s{hue}",
                    **({"stroke_dasharray": dash} if dash else {}),
                )
            )
        self._marks += [_marker(marker, hue, x, y) for x, y in markers]

    def whisker(self, low: Point, high: Point, css: str) -> None:
        """Draw the way from minimum to maximum, upright or level, with a bar across each end."""
        (x0, y0), (x1, y1) = low, high
        across = "M{0} {1}h6" if x0 == x1 else "M{0} {1}v6"
        dx, dy = (3, 0) if x0 == x1 else (0, 3)
        ends = "".join(across.format(decimal(x - dx), decimal(y - dy)) for x, y in (low, high))
        self._marks.append(element("path", d=_path((x0, y0), (x1, y1)) + ends, class_=f"whisker {css}"))

    def bar(self, y: float, height: float, end: float, series: int, fill: int) -> None:
        """Draw a level bar from the left axis to `end`, in the series' colour, filled with pattern `fill`."""
        self._marks.append(
            element(
                "rect",
                x=self.left,
                y=y,
                width=max(end - self.left, 0.5),
                height=height,
                class_=f"bar s{colour(series)}",
                fill=self._fill(series, fill),
            )
        )

    def text(self, text: str, x: float, y: float) -> None:
        """Write a remark next to a mark."""
        self._marks.append(label(text, x, y, class_="soft", style="font-size:10px"))

    def dots(self, points: Sequence[Point], series: int) -> None:
        """Draw many points of one series as one path."""
        mark = DOTS[series % len(DOTS)]
        path = "".join(f"M{decimal(x)} {decimal(y)}{mark}" for x, y in points)
        self._marks.append(element("path", d=path, class_=f"dots s{colour(series)}"))

    def empty(self, text: str) -> None:
        """Say in the plot's middle why there is nothing in it."""
        middle = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        self._marks.append(label(text, *middle, text_anchor="middle", class_="soft"))

    # Below the plot

    def legend(self, entries: Sequence[tuple[str, int]], kind: str) -> None:
        """Explain the series (name, number), in lines as wide as the chart.

        `kind` is line, dots, or bar; for that the numbers are of patterns.
        """
        x, y = 12.0, self._end + _LINE
        for name, series in entries:
            width = 34 + len(name) * _LETTER + 12
            if x > 12 and x + width > WIDTH:
                x, y = 12.0, y + _LINE
            self._frame.append(self._key(kind, series, x, y) + label(name, x + 34, y))
            x += width
        self._end = y + 4

    def note(self, text: str) -> None:
        """Write a remark below everything, folded."""
        for line in textwrap.wrap(text, _NOTE_LETTERS, break_on_hyphens=False):
            self._end += _LINE
            self._frame.append(label(line, 12, self._end, class_="soft"))

    def _key(self, kind: str, series: int, x: float, y: float) -> str:
        if kind == "bar":
            fill = self._fill(_NEUTRAL, series)
            return element("rect", x=x, y=y - 10, width=26, height=11, class_=f"bar s{_NEUTRAL}", fill=fill)
        hue, (dash, marker) = colour(series), line_style(series)
        if kind == "dots":
            mark = DOTS[series % len(DOTS)]
            path = "".join(f"M{decimal(x + step)} {decimal(y - 4)}{mark}" for step in (4, 13, 22))
            return element("path", d=path, class_=f"dots key s{hue}")
        dashed = {"stroke_dasharray": dash} if dash else {}
        line = element("path", d=_path((x, y - 4), (x + 28, y - 4)), class_=f"line s{hue}", **dashed)
        return line + _marker(marker, hue, x + 14, y - 4)

    def _fill(self, series: int, fill: int) -> str:
        identifier = f"{self.name}-fill-{series}-{fill}"
        self._patterns[series, fill] = pattern(identifier, series, fill)
        return f"url(#{identifier})"

    def render(self, standalone: bool) -> str:
        """Return the SVG: a file of its own with its style sheet, or what goes into a page that has STYLE."""
        height = decimal(self._end + 10)
        title, description = f"{self.name}-title", f"{self.name}-desc"
        parts = [
            element("title", text_content(self.title), id=title),
            element("desc", text_content(self.description), id=description),
        ]
        if standalone:
            parts.append(element("style", text_content(STYLE)))
        if self._patterns:
            parts.append(element("defs", "".join(self._patterns[key] for key in sorted(self._patterns))))
        parts.append(element("rect", width=WIDTH, height=height, class_="ground"))
        parts.append(label(self.title, 12, 18, class_="title"))
        parts += self._frame + self._marks
        return element(
            "svg",
            "\n" + "\n".join(parts) + "\n",
            **({"xmlns": NAMESPACE} if standalone else {}),
            viewBox=f"0 0 {WIDTH:g} {height}",
            class_="chart",
            role="img",
            aria_labelledby=f"{title} {description}",
        )


def _path(*points: Point) -> str:
    return "M" + "L".join(f"{decimal(x)} {decimal(y)}" for x, y in points)


def _marker(marker: str, hue: int, x: float, y: float) -> str:
    # Open markers (no Z) have no inside to fill.
    fill = f"f{hue}" if marker.endswith("Z") else ""
    return element(
        "path",
        d=marker,
        class_=f"marker s{hue} {fill}".strip(),
        transform=f"translate({decimal(x)} {decimal(y)})",
    )
