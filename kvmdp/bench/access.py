"""What accesses that no vCPU makes cost: of present pages a call, of absent ones as latencies; and a disk's rate.

A call of `GuestMemory` is held against a plain slice of the VMM view, which is what it replaces. Both, and the other
kinds of access, go over the same pages in turn, so that a ratio is of figures taken next to each other. The guest does
not run meanwhile: what it costs when it does is what a contender with `device=N` measures.

Units: microseconds a call; latencies in nanoseconds; bytes a second.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmdp.bench.contender import Contender
from kvmdp.bench.disk import measure_disk
from kvmdp.bench.measure import machine_options, source_of
from kvmdp.bench.spread import Spread, buckets, percentiles, ratios
from kvmdp.errors import PagingError
from kvmdp.interruption import entered
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.memory.layout import MIN_MEMORY
from kvmdp.page import PAGE_SIZE, Outcome
from kvmdp.paging.access import GuestMemory
from kvmdp.source.synthetic import SyntheticSource

_PAGES = 64  # gone over again and again: they stay in the CPU's cache, so that copying does not hide the rest
_PASSES = (
    10  # over them for one figure; short, so that what disturbs one kind of access disturbs its neighbour too
)
_TURNS = 10  # figures a round, of which the round's is the median
_FAULTS = 512  # of each contender, a round
_ANY_TRAP = "mmio"  # where it does not matter which: this one every host has

# A ratio of two kinds of access.
_RATIOS = {"read_4k_ratio": ("read_4k", "slice_4k"), "read_8_ratio": ("read_8", "slice_8")}

_Pass = Callable[[Sequence[int]], None]


@dataclass(slots=True)
class AccessCosts:
    """What has been measured so far, a figure a round.

    `calls` by kind of access, in microseconds; `faults` by contender, each read of an absent page in nanoseconds;
    `disk` in bytes a second, by where the device is, then whether memory is present or absent to begin with. The
    disk is that of a machine with the first contender's trap.
    """

    calls: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, list[array[int]]] = field(default_factory=dict)
    disk: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    disk_trap: str = _ANY_TRAP

    def take_turn(self, contenders: Sequence[Contender], *, keep: bool) -> None:
        """Measure everything once; the figures count if `keep`. Raises what a machine raises."""
        self.disk_trap = next((each.trap for each in contenders if each.trap is not None), _ANY_TRAP)
        calls = _measure_calls()
        faults = {each.name: _measure_faults(each) for each in contenders if each.trap is not None}
        disk = measure_disk(MachineOptions(MIN_MEMORY, self.disk_trap), rounds=1)
        if keep:
            for kind, cost in calls.items():
                self.calls.setdefault(kind, []).append(cost)
            for name, latencies in faults.items():
                self.faults.setdefault(name, []).append(latencies)
            for place, states in disk.items():
                for state, rates in states.items():
                    self.disk.setdefault(place, {}).setdefault(state, []).extend(rates)

    @property
    def rounds(self) -> int:
        """How many rounds have been done."""
        return max(map(len, self.calls.values()), default=0)

    def document(self) -> dict[str, Any] | None:
        """Return the figures as the JSON document has them; None before the first round is done."""
        if not self.rounds:
            return None
        spreads = {f"{kind}_us": Spread.of(costs) for kind, costs in self.calls.items()}
        spreads |= {name: ratios(self.calls[a], self.calls[b]) for name, (a, b) in _RATIOS.items()}
        return {
            "calls": _PAGES * _PASSES * _TURNS,
            **{name: _figures(spread) for name, spread in spreads.items()},
            "faults": [_faults(name, np.concatenate(rounds)) for name, rounds in self.faults.items()],
            "disk": {
                "trap": self.disk_trap,
                "memory_bytes": MIN_MEMORY,
                "bytes_per_second": {
                    place: {state: _figures(Spread.of(rates)) for state, rates in states.items()}
                    for place, states in self.disk.items()
                },
            },
        }


def _figures(spread: Spread) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in asdict(spread).items()}


def _faults(name: str, latencies: npt.NDArray[np.uint64]) -> dict[str, Any]:
    return {
        "name": name,
        "faults": len(latencies),
        "latency_us": {**percentiles(latencies), "buckets": buckets(latencies)},
    }


def _measure_calls() -> dict[str, float]:
    """Return what a call of each kind takes on present pages, in microseconds: the median of some short turns."""
    # No trap is asked about a page that is present.
    with entered(Machine, MachineOptions(MIN_MEMORY, _ANY_TRAP), SyntheticSource(MIN_MEMORY)) as machine:
        if machine.pager.mark_present(0, machine.layout.pages) is not Outcome.PRESENT:
            raise machine.pager.error or PagingError("memory could not be made present")
        kinds = _kinds(machine.memory_for_device(0), machine.backing.vmm.view)
        gpas = [page * PAGE_SIZE for page in range(_PAGES)] * _PASSES
        costs: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(_TURNS):
            for kind, go_over in kinds.items():
                began = time.perf_counter_ns()
                go_over(gpas)
                costs[kind].append((time.perf_counter_ns() - began) / len(gpas) / 1000)
    return {kind: float(np.median(each)) for kind, each in costs.items()}


def _kinds(memory: GuestMemory, plain: memoryview) -> dict[str, _Pass]:
    """Return a loop over gpas for each kind of access. To a plain slice they are offsets in RAM, as below 3 GiB."""
    # The kinds that a ratio is of are neighbours. Loops are written out: a call between would be part of the figure.
    page = bytes(PAGE_SIZE)

    def slice_4k(gpas: Sequence[int]) -> None:
        for gpa in gpas:
            bytes(plain[gpa : gpa + PAGE_SIZE])

    def read_4k(gpas: Sequence[int]) -> None:
        for gpa in gpas:
            memory.read(gpa, PAGE_SIZE)

    def write_4k(gpas: Sequence[int]) -> None:
        for gpa in gpas:
            memory.write(gpa, page)

    def view_4k(gpas: Sequence[int]) -> None:
        for gpa in gpas:
            with memory.view(gpa, PAGE_SIZE):
                pass

    def slice_8(gpas: Sequence[int]) -> None:
        for gpa in gpas:
            bytes(plain[gpa : gpa + 8])

    def read_8(gpas: Sequence[int]) -> None:
        for gpa in gpas:
            memory.read(gpa, 8)

    def load64(gpas: Sequence[int]) -> None:
        for gpa in gpas:
            memory.load64(gpa)

    def store64(gpas: Sequence[int]) -> None:
        for gpa in gpas:
            memory.store64(gpa, gpa)

    return {
        each.__name__: each
        for each in (slice_4k, read_4k, write_4k, view_4k, slice_8, read_8, load64, store64)
    }


def _measure_faults(contender: Contender) -> array[int]:
    """Return the nanoseconds that each of some reads of an absent page takes a device."""
    latencies = array("Q")
    source, _ = source_of(contender.work)
    with entered(Machine, machine_options(contender), source) as machine:
        memory = machine.device_view or machine.memory_for_device(0)
        # What one fault fetches is passed over: each read is of a page that is absent still.
        step = max(machine.pager.trap.granule // PAGE_SIZE, contender.work.fault_around)
        pages = range(0, machine.layout.pages, step)[:_FAULTS]
        for gpa in map(machine.layout.gpa_of_page, pages):
            began = time.perf_counter_ns()
            memory.read(gpa, PAGE_SIZE)
            latencies.append(time.perf_counter_ns() - began)
    return latencies
