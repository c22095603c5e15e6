"""The survey that `kvmdp compare` makes: every contender at every number of vCPUs and every network latency.

A place of that grid is one interleaved comparison. Then each contender does one traced run, and touches a large RAM
for what its memory costs. The result is one document (kvmdp.compare/1):

    schema, version, complete, host
    benches   a bench document (kvmdp.bench/1) a place
    traces    contender -> {"vcpus", "memory_bytes", "records"}, records as in kvmdp.bench.trace
    memory    a row a contender and size of RAM: {"contender", "gib", "vmpte_kib", "bitmap_bytes", "memslots",
              "slot_kib", "granule", "fault_around", "armed", "full"}; all of RAM touched by one vCPU, page by page,
              `fault_around` pages fetched a fault, `granule` bytes a memslot (null where RAM is one). slot_kib is by
              how much VmallocUsed grew, which is system-wide: what other processes do meanwhile is in it. armed and
              full tell the views apart (kvmdp.bench.memorycost).
    failed    {"where", "contender", "why"}, a run that failed
    claims    {"who", "claim", "verdict", "why"}, see kvmdp.bench.claims

Units: seconds, bytes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvmdp import __version__
from kvmdp.bench.claims import claims
from kvmdp.bench.comparison import Comparison
from kvmdp.bench.contender import PRESENT, SHARDED, Contender, contender
from kvmdp.bench.losses import Losses
from kvmdp.bench.measure import Measurement, check
from kvmdp.bench.memorycost import memory_contender, memory_cost
from kvmdp.bench.report.results import SCHEMA, Place, place_name
from kvmdp.bench.work import Work
from kvmdp.machine.hostinfo import available_memory, host_facts
from kvmdp.memory.layout import MIN_MEMORY, GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.size import format_size

# About what a fault takes without a network. The longer a fault waits, the less RAM is gone through.
_FAULT_SECONDS = 150e-6
# A trace is looked at, not averaged: more faults than of this much RAM a vCPU only make the figures heavy.
_TRACED_BYTES = 8 << 20
_RECORD_BYTES = 150  # of the report's files, a fault
_FIGURES_BYTES = 4 << 20  # of the report's other files


def default_names(vcpus: Sequence[int]) -> tuple[str, ...]:
    """Return what is compared if the user names nothing: with several vCPUs userfaultfd in its parallel forms too."""
    names = (PRESENT, "marker", "memory-fault", "mmio", "mmio:device-view", "userfaultfd")
    most = max(vcpus)
    return (*names, f"userfaultfd-r{most}", SHARDED) if most > 1 else names


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured.

    `bytes_per_vcpu` is RAM a vCPU; places with a long latency have less (`work`). `memory_sizes`: RAM, in bytes, for
    which memory costs are measured.
    """

    names: tuple[str, ...]
    vcpus: tuple[int, ...] = (1, 2, 4)
    latencies: tuple[float, ...] = (0.0, 30e-6, 500e-6)
    bytes_per_vcpu: int = 8 << 20
    backing: str = "memfd"
    bandwidth: float = 0.0
    rounds: int = 5
    warm_up: int = 1
    memory_sizes: tuple[int, ...] = (1 << 30,)

    @property
    def places(self) -> list[Place]:
        """The numbers of vCPUs and latencies, in the order in which they are measured."""
        return [(vcpus, latency) for latency in self.latencies for vcpus in self.vcpus]

    def work(self, vcpus: int, latency: float) -> Work:
        """Return the work at a place: RAM is halved for each doubling of the latency beyond a fault's own time."""
        size, wait = self.bytes_per_vcpu, latency
        while wait > _FAULT_SECONDS and size >= 2 * MIN_MEMORY:
            size, wait = size // 2 // PAGE_SIZE * PAGE_SIZE, wait / 2
        return Work(
            bytes_per_vcpu=size, vcpus=vcpus, backing=self.backing, latency=latency, bandwidth=self.bandwidth
        )

    @property
    def traced_work(self) -> Work:
        """The work of the traced runs: as many vCPUs as have a CPU, the shortest latency."""
        cpus = len(os.sched_getaffinity(0))
        vcpus = max((each for each in self.vcpus if each <= cpus), default=min(self.vcpus))
        work = self.work(vcpus, min(self.latencies))
        return replace(work, bytes_per_vcpu=min(work.bytes_per_vcpu, _TRACED_BYTES))

    def contenders(self, work: Work) -> list[Contender]:
        """Return the contenders for some work. Raises ValueError for a name that there is not."""
        return [contender(name, work) for name in self.names]

    def memory_contender(self, name: str, size: int) -> Contender:
        """Return a contender that touches all of `size` bytes of RAM."""
        return memory_contender(name, Work(bytes_per_vcpu=size, backing=self.backing))

    def check(self) -> None:
        """Raise ValueError, one sentence, if this cannot be done; KvmError where there is no KVM."""
        if len(self.names) < 2:
            raise ValueError(f"{self.names[0]} alone is no comparison: name at least two contenders")
        if repeated := [name for name in self.names if self.names.count(name) > 1]:
            raise ValueError(f"{repeated[0]} is named twice: a contender takes part once")
        for what, value, least in (("--rounds", self.rounds, 1), ("--warm-up", self.warm_up, 0)):
            if value < least:
                raise ValueError(f"{what} {value}: give at least {least}")
        # First, for planning the work in absurdly much memory takes minutes by itself.
        self._check_memory()
        for place in self.places:
            for each in self.contenders(self.work(*place)):
                if (each.work.vcpus, each.work.latency) != place:
                    raise ValueError(
                        f"{each.name}: the comparison sets vcpus and latency; leave them out, or use kvmdp bench"
                    )
                check(each)
        for size in self.memory_sizes:
            for name in self.names:
                check(self.memory_contender(name, size))

    def _check_memory(self) -> None:
        works = [each.work for place in self.places for each in self.contenders(self.work(*place))]
        for size in (*(work.memory_bytes for work in works if work.vcpus > 0), *self.memory_sizes):
            GuestLayout(size)
        most = max([work.memory_bytes for work in works] + list(self.memory_sizes))
        available = available_memory()
        if available and most > available:
            raise ValueError(
                f"{format_size(most)} of guest memory would be filled, and this host has "
                f"{format_size(available >> 20 << 20)} available: give less"
            )

    @property
    def report_bytes(self) -> int:
        """About as much as a report of this will take on the disk, rather more than less."""
        return _FIGURES_BYTES + _RECORD_BYTES * len(self.names) * self.traced_work.memory_bytes // PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Step:
    """How far a survey has got: what is under way, which contender did the last step, steps done of all."""

    what: str
    name: str
    done: int
    total: int


@dataclass(slots=True)
class Survey:
    """What has been measured of a plan so far."""

    plan: Plan
    comparisons: list[Comparison] = field(default_factory=list)
    traced: Comparison | None = None
    memory: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False
    _memory_losses: dict[str, Losses] = field(default_factory=dict)
    _done: int = 0

    def run(self, on_step: Callable[[Step], None]) -> None:
        """Measure everything; ends at once if fewer than two contenders can run on this host.

        May be interrupted at any time: what has been measured stays.
        """
        plan = self.plan
        for place in plan.places:
            work = plan.work(*place)
            comparison = Comparison(work, plan.contenders(work), plan.rounds)
            self.comparisons.append(comparison)
            what = place_name(*place)
            on_step(self._step(f"{what}: warm-up" if plan.warm_up else what, "", 0))

            def tell(name: str, turn: int, measured: Measurement | None, what: str = what) -> None:
                on_step(self._step(f"{what}: round {turn + 1} of {plan.rounds}", name, measured is not None))

            comparison.run(plan.warm_up, tell)
            if len(self.ran) < 2:
                return
        self._trace(on_step)
        self._measure_memory(on_step)
        self.complete = all(each.complete for each in self.comparisons) and not self.failed

    def _trace(self, on_step: Callable[[Step], None]) -> None:
        work = self.plan.traced_work
        contenders = [each for each in self.plan.contenders(work) if each.name in self.ran]
        self.traced = Comparison(work, contenders, 1, traced=True)
        self.traced.run(
            0, lambda name, _, measured: on_step(self._step("traced runs", name, measured is not None))
        )

    def _measure_memory(self, on_step: Callable[[Step], None]) -> None:
        for size in self.plan.memory_sizes:
            what = f"memory for {format_size(size)} of RAM"
            losses = self._memory_losses[what] = Losses()
            for name in self.ran:
                measured = functools.partial(memory_cost, self.plan.memory_contender(name, size))
                row = losses.spare(name, measured)
                if row is None:
                    continue  # the report says which have no memory figures
                self.memory.append(row)
                on_step(self._step(what, name, 1))

    def _step(self, what: str, name: str, steps: int) -> Step:
        self._done += steps
        places = len(self.plan.places) * self.plan.rounds
        total = len(self.plan.names) * (places + 1 + len(self.plan.memory_sizes))
        return Step(what, name, self._done, total)

    @property
    def ran(self) -> list[str]:
        """The contenders of which something has been measured, in the plan's order."""
        return [
            name for name in self.plan.names if any(name in each.measurements for each in self.comparisons)
        ]

    @property
    def skipped(self) -> dict[str, str]:
        """The contenders that this host cannot run, with the reason."""
        return {name: reason for each in self.comparisons for name, reason in each.losses.skipped.items()}

    @property
    def failed(self) -> list[dict[str, str]]:
        """The runs that failed: where, of which contender, why."""
        losses = {place_name(each.work.vcpus, each.work.latency): each.losses for each in self.comparisons}
        if self.traced is not None:
            losses["traced runs"] = self.traced.losses
        losses |= self._memory_losses
        return [
            {"where": where, "contender": name, "why": why}
            for where, each in losses.items()
            for name, why in each.failed.items()
        ]

    def document(self) -> dict[str, Any]:
        """Return everything as the JSON document has it."""
        benches = [each.document() for each in self.comparisons if each.measurements or each.losses.skipped]
        document = {
            "schema": SCHEMA,
            "version": __version__,
            "complete": self.complete,
            "host": host_facts(),
            "benches": benches,
            "traces": self._traces(),
            "memory": self.memory,
            "failed": self.failed,
        }
        return document | {"claims": claims(document)}

    def _traces(self) -> dict[str, dict[str, Any]]:
        if self.traced is None:
            return {}
        return {
            each.name: {
                "vcpus": each.work.vcpus,
                "memory_bytes": each.work.memory_bytes,
                "records": self.traced.measurements[each.name][-1].trace,
            }
            for each in self.traced.contenders
            if each.trap is not None and each.name in self.traced.measurements
        }
