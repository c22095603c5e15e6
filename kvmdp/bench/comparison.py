"""A comparison: the contenders take turns, round after round, and the result is one document (kvmdp.bench/1).

Figures of one comparison were taken next to each other; between two comparisons only ratios carry over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmdp import __version__
from kvmdp.bench.access import AccessCosts
from kvmdp.bench.contender import Contender
from kvmdp.bench.losses import Losses
from kvmdp.bench.measure import Measurement, floor, measure
from kvmdp.bench.spread import Spread, buckets, percentiles, ratios
from kvmdp.bench.trace import lines
from kvmdp.bench.work import Work
from kvmdp.machine.hostinfo import host_facts
from kvmdp.trap.registry import trap_class

SCHEMA = "kvmdp.bench/1"
BASELINE = "userfaultfd"
_METRICS = ("pages_per_second", "cpu_us_per_fault")


@dataclass(slots=True)
class Comparison:
    """What has been measured so far; complete when `rounds` have been done.

    `device`, if given, is measured once a round too. `losses` says why a contender takes part no more.
    """

    work: Work
    contenders: list[Contender]
    rounds: int
    traced: bool = False
    device: AccessCosts | None = None
    measurements: dict[str, list[Measurement]] = field(default_factory=dict)
    floors: dict[str, list[float]] = field(default_factory=dict)
    losses: Losses = field(default_factory=Losses)

    def run(self, warm_up: int, on_round: Callable[[str, int, Measurement | None], None]) -> None:
        """Let the contenders take turns. `on_round` is told of each measurement (None: of a floor).

        May be interrupted at any time: what has been measured stays.
        """
        for turn in range(-warm_up, self.rounds):
            for each in list(self.contenders):
                measurement = self._try(each)
                if measurement is not None and turn >= 0:
                    self.measurements.setdefault(each.name, []).append(measurement)
                    on_round(each.name, turn, measurement)
            if turn >= 0:
                self._measure_floors(turn, on_round)
            if self.device is not None:
                take_turn = functools.partial(self.device.take_turn, self.contenders, keep=turn >= 0)
                self.losses.spare("device", take_turn)

    def _try(self, contender: Contender) -> Measurement | None:
        measured = self.losses.spare(contender.name, lambda: measure(contender, traced=self.traced))
        if measured is None:
            self.contenders.remove(contender)
        return measured

    def _measure_floors(self, turn: int, on_round: Callable[[str, int, Measurement | None], None]) -> None:
        """Measure the floor once a round for each trap that has one, in the machine of its first contender."""
        first = {each.trap: each for each in reversed(self.contenders) if each.trap is not None}
        for trap, each in first.items():
            if not trap_class(trap).repeats:
                continue
            seconds = self.losses.spare(f"floor of {trap}", functools.partial(floor, each))
            if seconds is None:
                continue
            self.floors.setdefault(trap, []).append(seconds)
            on_round(f"floor of {trap}", turn, None)

    @property
    def complete(self) -> bool:
        """Whether every contender that can run has done all rounds, and the device too."""
        if self.losses.failed:
            return False
        if self.device is not None and self.device.rounds < self.rounds:
            return False
        return all(len(self.measurements.get(each.name, ())) == self.rounds for each in self.contenders)

    def trace_lines(self) -> Iterator[str]:
        """Return the trace (`kvmdp.bench.trace`) of each contender's last round."""
        for each in self.contenders:
            if measured := self.measurements.get(each.name):
                yield from lines(trace_header(each), measured[-1].trace)

    def document(self) -> dict[str, Any]:
        """Return everything as the JSON document has it."""
        names = [each.name for each in self.contenders if self.measurements.get(each.name)]
        traps = {each.name: each for each in self.contenders}
        return {
            "schema": SCHEMA,
            "version": __version__,
            "complete": self.complete,
            "host": host_facts(),
            "options": asdict(self.work) | {"memory_bytes": self.work.memory_bytes, "rounds": self.rounds},
            "floor_us": {
                trap: _spread(Spread.of([1e6 * seconds for seconds in self.floors[trap]]))
                if trap in self.floors
                else None
                for trap in dict.fromkeys(traps[name].trap for name in names if traps[name].trap)
            },
            "contenders": [self._contender(traps[name], self.measurements[name]) for name in names],
            "ratios": self._ratios(names),
            "device": self.device.document() if self.device else None,
            "skipped": self.losses.skipped,
            "failed": self.losses.failed,
        }

    def _contender(self, contender: Contender, measured: Sequence[Measurement]) -> dict[str, Any]:
        rates = [each.round.pages_per_second for each in measured]
        latencies = np.concatenate([each.latencies for each in measured])
        micros = Spread.of([1e6 / rate for rate in rates])
        own = None
        if contender.trap in self.floors:
            floors = self.floors[str(contender.trap)]
            own = _spread(
                Spread.of([1e6 / rate - 1e6 * low for rate, low in zip(rates, floors, strict=False)])
            )
        return {
            "name": contender.name,
            "trap": contender.trap,
            "vcpus": contender.work.vcpus,
            "rounds": [asdict(each.round) for each in measured],
            "pages_per_second": _spread(Spread.of(rates)),
            "page_us": _spread(micros),
            "own_cost_us": own,
            "cpu_us_per_fault": _spread(Spread.of([_cpu_us(each) for each in measured])),
            "switches_per_fault": _spread(Spread.of([_switches(each) for each in measured])),
            "latency_us": _latency(latencies),
            "device": _device(measured) if contender.work.device_pages else None,
            "arm_ms": _spread(Spread.of([1e3 * each.arm_seconds for each in measured])),
            "in_flight": round(float(np.mean([each.in_flight for each in measured])), 2),
            "memory": {
                "vmpte_kib": max(each.vmpte_bytes for each in measured) // 1024,
                "bitmap_bytes": measured[0].bitmap_bytes,
                "memslots": max(each.memslots for each in measured),
                "slot_kib": max(each.slot_bytes for each in measured) // 1024,
                "resident_beyond_kib": max(each.resident_beyond_bytes for each in measured) // 1024,
                # Memslots, page tables and all else together.
                "beyond_touched_kib": max(
                    each.slot_bytes + each.vmpte_bytes + each.resident_beyond_bytes for each in measured
                )
                // 1024,
            },
        }

    def _ratios(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the ratio of each contender to each other one, by rounds that both have done."""
        rows = []
        for b in names:
            for a in names:
                for metric in _METRICS:
                    first, second = (self._figures(name, metric) for name in (a, b))
                    both = min(len(first), len(second))
                    if a != b and both and all(second[:both]):
                        spread = _spread(ratios(first[:both], second[:both]))
                        rows.append({"a": a, "b": b, "metric": metric, **spread})
        return rows

    def _figures(self, name: str, metric: str) -> list[float]:
        measured = self.measurements[name]
        if metric == "pages_per_second":
            return [each.round.pages_per_second for each in measured]
        return [_cpu_us(each) for each in measured if each.round.faults]


def _latency(latencies: npt.NDArray[np.uint64]) -> dict[str, Any]:
    """Return percentiles, how far apart p99 and p50 are (None without faults), and buckets."""
    found = percentiles(latencies)
    apart = round(found["p99"] / found["p50"], 2) if found["p50"] else None
    return {**found, "p99_over_p50": apart, "buckets": buckets(latencies)}


def trace_header(contender: Contender) -> dict[str, Any]:
    """Return what the header of a trace (`kvmdp.bench.trace`) says of a contender's run."""
    return {
        "version": __version__,
        "contender": contender.name,
        "trap": contender.trap,
        "vcpus": contender.work.vcpus,
        "memory_bytes": contender.work.memory_bytes,
    }


def _cpu_us(measurement: Measurement) -> float:
    """CPU microseconds, guest included, a fault; a page where there were none."""
    each = measurement.round
    return 1e6 * (each.user_s + each.system_s) / (each.faults or each.pages)


def _switches(measurement: Measurement) -> float:
    each = measurement.round
    return (each.voluntary_switches + each.involuntary_switches) / (each.faults or each.pages)


def _device(measured: Sequence[Measurement]) -> dict[str, Any]:
    """Pages that the device thread got to before the guest was done, in all rounds, and what each read took."""
    latencies = np.concatenate([each.device_latencies for each in measured])
    return {"pages": len(latencies), "latency_us": {**percentiles(latencies), "buckets": buckets(latencies)}}


def _spread(spread: Spread) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in asdict(spread).items()}
