"""What a figure is: panels (charts), a caption, and its numbers as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvmdp.bench.report.chart import Chart

Value = str | int | float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a header that names quantity and unit of each column. None is a figure that was not measured."""

    header: Sequence[str]
    rows: Sequence[Sequence[Value]]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the report.

    `table` stands beneath it; `data`, where given, is longer and goes to the CSV in its stead. `missing` says what
    one would look for in the figure and not find.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Chart]
    table: Table
    data: Table | None = None
    missing: Sequence[str] = field(default=())
