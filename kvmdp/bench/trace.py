"""Traces: one record a fault, as JSON Lines.

The first line is an object that says what the run was:

    schema        kvmdp.trace/1
    version       of kvmdp
    contender     name of the way of demand paging, where several were compared
    trap          the trap; null where all memory was in place
    vcpus         number of vCPUs
    memory_bytes  RAM of the guest

Every other line is an array

    [time_us, gpa, size, origin, latency_us, pages]

which are the microseconds since the run's start at which the fault was resolved, the faulting page's gpa, the bytes
that became present, its actor ("vcpu 0", "device 0", "host"; "vcpu" where the kernel does not tell which), the
microseconds from the claim of the pages to the end of their admission, and how many pages were read from the source.
Lines are in the order of resolution. A file may hold several runs, each with a line of its own before it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE, Origin, PageFault
from kvmdp.paging.claim import Claim, State
from kvmdp.paging.jobs import Job

SCHEMA = "kvmdp.trace/1"

Record = list[int | float | str]


class Tracer(Job):
    """Takes note of each fault that a pager resolves: a job of the pager (`pager.jobs.add`).

    Called from every thread that resolves; an append is all it does there.
    """

    def __init__(self, layout: GuestLayout) -> None:
        self._layout = layout
        self._start = time.perf_counter_ns()
        self._records: list[tuple[int, PageFault, Claim, int]] = []

    def admitted(self, fault: PageFault, claim: Claim, began: int) -> None:
        """Note that `fault` was resolved by `claim`, begun at `began` (time.perf_counter_ns)."""
        self._records.append((time.perf_counter_ns(), fault, claim, began))

    def records(self) -> list[Record]:
        """Return the records so far."""
        return [
            [
                (ended - self._start) / 1000,
                self._layout.gpa_of_page(fault.page),
                claim.count * PAGE_SIZE,
                _origin(fault),
                (ended - began) / 1000,
                claim.before.count(State.SOURCE),
            ]
            for ended, fault, claim, began in self._records
        ]


def _origin(fault: PageFault) -> str:
    known = fault.number >= 0 and fault.origin is not Origin.HOST
    who = fault.origin.name.lower()
    return f"{who} {fault.number}" if known else who


def lines(header: dict[str, Any], records: Iterable[Record]) -> Iterator[str]:
    """Return the lines of one run, without line ends."""
    yield json.dumps({"schema": SCHEMA, **header})
    for record in records:
        yield json.dumps(record, separators=(",", ":"))
