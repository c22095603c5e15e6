"""Bounds that a comparison is held against: a small TOML file of rows.

    [[bound]]
    metric = "pages_per_second"   # a ratio of two contenders, round by round
    a = "marker"
    b = "userfaultfd"
    min = 1.10

    [[bound]]
    metric = "own_cost_us"        # or a figure of one contender
    contender = "marker"
    max = 25

    [[bound]]
    metric = "device.read_4k_ratio"   # or, with neither, a figure of the document itself
    max = 2.5

The metrics are those of the document and its contenders that are a spread (their median counts), or a plain number such
as `in_flight`, `latency_us.p99`, `memory.vmpte_kib`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any

from kvmdp.bench.text_file import read_text

_KEYS = {"metric", "a", "b", "contender", "min", "max"}


@dataclass(frozen=True, slots=True)
class Bound:
    """One row: a metric of the document, of one contender, or the ratio of two, between `least` and `most`."""

    metric: str
    contenders: tuple[str, ...]
    least: float | None
    most: float | None

    def __str__(self) -> str:
        what = f"{self.metric} of {' / '.join(self.contenders)}" if self.contenders else self.metric
        limits = [f"at least {self.least:g}"] if self.least is not None else []
        limits += [f"at most {self.most:g}"] if self.most is not None else []
        return f"{what}: {' and '.join(limits)}"


def read_bounds(path: str) -> list[Bound]:
    """Return the rows of a file. Raises ValueError, one sentence, if it is not such a file; OSError."""
    try:
        rows = tomllib.loads(read_text(path)).get("bound")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} has no [[bound]]: see the documentation of bench --check")
    return [_bound(path, number, row) for number, row in enumerate(rows, 1)]


def _bound(path: str, number: int, row: dict[str, Any]) -> Bound:
    where = f"{path}, bound {number}"
    if unknown := row.keys() - _KEYS:
        raise ValueError(
            f"{where}: there is no {', '.join(sorted(unknown))}; there are {', '.join(sorted(_KEYS))}"
        )
    named = [row["contender"]] if "contender" in row else [row[name] for name in ("a", "b") if name in row]
    contenders = tuple(name for name in named if isinstance(name, str))
    if "metric" not in row or len(contenders) < len(named) or ("a" in row) != ("b" in row):
        raise ValueError(f"{where}: give metric, and contender, a and b, or neither")
    limits = [row.get("min"), row.get("max")]
    if limits == [None, None] or any(not isinstance(limit, int | float | None) for limit in limits):
        raise ValueError(f"{where}: give min or max, as numbers")
    return Bound(row["metric"], contenders, *limits)


def judge(bound: Bound, document: dict[str, Any]) -> tuple[bool, str]:
    """Return whether the document holds the bound, and a sentence that says what it found."""
    figure = _figure(bound, document)
    if figure is None:
        return False, f"{bound}; not measured"
    good = (bound.least is None or figure >= bound.least) and (bound.most is None or figure <= bound.most)
    return good, f"{bound}; measured {figure:.4g}"


def _figure(bound: Bound, document: dict[str, Any]) -> float | None:
    if len(bound.contenders) == 2:
        return _ratio(bound, document)
    value: Any = document
    if bound.contenders:
        name = bound.contenders[0]
        value = next((each for each in document["contenders"] if each["name"] == name), None)
    for key in bound.metric.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, dict):
        value = value.get("median")
    return float(value) if isinstance(value, int | float) else None


def _ratio(bound: Bound, document: dict[str, Any]) -> float | None:
    """Return the median of the interleaved ratio of two contenders."""
    a, b = bound.contenders
    for row in document["ratios"]:
        if (row["a"], row["b"], row["metric"]) == (a, b, bound.metric):
            return float(row["median"])
    return None
