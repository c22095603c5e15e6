"""Statistics of few noisy figures: median with minimum and maximum, interleaved ratios, latency buckets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BUCKETS = 24  # powers of two of microseconds, as QEMU's post-copy blocktime reports them


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum and maximum of the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        """Return the spread of at least one figure."""
        return cls(statistics.median(figures), min(figures), max(figures))


def ratios(a: Sequence[float], b: Sequence[float]) -> Spread:
    """Return the spread of a / b, round by round: both were measured next to each other."""
    return Spread.of([first / second for first, second in zip(a, b, strict=True)])


def buckets(latencies: npt.NDArray[np.uint64]) -> list[int]:
    """Count latencies (nanoseconds) by power of two of microseconds.

    Bucket k holds those from 2**k up to 2**(k + 1) microseconds; the first also the shorter ones, the last also the
    longer ones.
    """
    microseconds = np.maximum(latencies // np.uint64(1000), 1)
    # The exponent of the float is exact: a microsecond count fits its mantissa.
    exponents = np.frexp(microseconds.astype(np.float64))[1] - 1
    counts = np.bincount(np.clip(exponents, 0, BUCKETS - 1), minlength=BUCKETS)
    return [int(count) for count in counts]


def percentiles(latencies: npt.NDArray[np.uint64]) -> dict[str, float]:
    """Return p50, p90, p99 and max of latencies (nanoseconds) in microseconds; zeros if there are none."""
    if not len(latencies):
        return {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0}
    values = np.percentile(latencies, [50, 90, 99, 100]) / 1000
    return {
        name: round(float(value), 2) for name, value in zip(("p50", "p90", "p99", "max"), values, strict=True)
    }
