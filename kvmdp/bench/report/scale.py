"""Scales and ticks of a chart's axes, and how numbers are written on them.

Units: a scale takes values in the unit of its axis and gives drawing units of the SVG's view box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_KIB = 1024


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from `low` to `high` onto `start` to `end`; logarithmic if `log` (then `low` is above 0)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return where `value` lies. What is beyond the scale lies at its end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def linear_ticks(high: float, most: int = 6) -> list[float]:
    """Return at most `most` round values from 0 up to the first that is not below `high`."""
    if high <= 0:
        return [0.0, 1.0]
    magnitude = 10.0 ** math.floor(math.log10(high / most))
    factors = (1, 2, 2.5, 5, 10, 20)
    step = next(f * magnitude for f in factors if math.ceil(high / (f * magnitude)) < most)
    return [round(step * index, 12) for index in range(math.ceil(high / step) + 1)]


def log_ticks(low: float, high: float, base: float = 10) -> list[float]:
    """Return the powers of `base` from the last not above `low` to the first not below `high`; at least two."""
    # The tolerance keeps an exact power, whose logarithm may be off by a bit, from gaining a tick.
    first = math.floor(math.log(low, base) + 1e-9)
    last = max(math.ceil(math.log(high, base) - 1e-9), first + 1)
    return [base**exponent for exponent in range(first, last + 1)]


def number(value: float) -> str:
    """Return a number as it stands in a table: up to ten digits, thousands set apart."""
    return f"{value:,.10g}" if abs(value) < 1e10 else f"{value:,.0f}"


def rough(value: float) -> str:
    """Return a number for a sentence: three digits where it is small, whole where it is large."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(microseconds: float) -> str:
    """Return a time in the unit that suits it: "30 us", "1 ms", "2.5 s"."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.4g} us"


def memory(kib: float) -> str:
    """Return an amount of memory, given in KiB, in the binary unit that suits it: "32 KiB", "2 MiB"."""
    size = kib * _KIB
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < _KIB:
            return f"{size:.4g} {unit}"
        size /= _KIB
    return f"{size:.4g} TiB"
