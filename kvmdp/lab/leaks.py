"""Leaks: accesses to guest RAM that went by the pager, and how each shows.

The checks are pure: they get what was seen and say what it means. `kvmdp.lab.detector` does the looking.

What cannot be seen: a write to a page that is present, or that became present before the detector looked; any read of
such a page; a write of zeros where tmpfs hands out huge pages.

Units: gpa and lengths in bytes; RAM pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from kvmdp.machine.guest_abi import ParameterBlock
from kvmdp.machine.pv_msrs import PV_MSRS
from kvmdp.machine.workloads.arithmetic import Bools
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.claim import State

_PAGE_FAULT = 14
# Plain numbers: compared with a member of an enum, numpy looks up attributes of its class, which runs Python, and drops
# whatever is raised there: a KeyboardInterrupt was lost in it.
_SOURCE, _ZERO = int(State.SOURCE), int(State.ZERO)


class LeakKind(StrEnum):
    """How a leak showed."""

    PAGE_FAULT = "spurious page fault"
    MSR = "MSR page enabled while absent"
    DATA = "data in absent pages"
    TOUCH = "user-space touch of the guest view"


@dataclass(frozen=True, slots=True)
class Leak:
    """One access, or several alike, that the pager was not asked for. `gpa` is None where it is not known."""

    kind: LeakKind
    gpa: int | None
    origin: str
    detail: str

    def __str__(self) -> str:
        where = "an unknown address" if self.gpa is None else f"gpa {self.gpa:#x}"
        return f"{self.kind} at {where}, by {self.origin}: {self.detail}"


def spurious_page_fault(
    vcpu: int, block: ParameterBlock, layout: GuestLayout, translate: Callable[[int], int | None]
) -> Leak | None:
    """Look at a vCPU's exception record for a #PF on RAM that the guest's page tables map.

    `translate` returns the gpa behind a linear address by those tables, or None.
    """
    if not block.exception_count or block.exception_vector != _PAGE_FAULT:
        return None
    gpa = translate(block.exception_cr2)
    if gpa is None or layout.page_of_gpa(gpa) is None:
        return None
    return Leak(
        LeakKind.PAGE_FAULT,
        gpa,
        f"vCPU {vcpu}",
        f"#PF at RIP {block.exception_rip:#x}, error code {block.exception_error_code:#x}, though the guest's page "
        "tables map the address",
    )


def absent_msr_pages(
    vcpu: int, values: Mapping[int, int], layout: GuestLayout, is_present: Callable[[int], bool]
) -> list[Leak]:
    """Look for MSRs, index to value, that have KVM write to an absent page."""
    leaks = []
    for index, value in values.items():
        msr = PV_MSRS[index]
        gpa = msr.target(value)
        page = None if gpa is None or not msr.keeps else layout.page_of_gpa(gpa)
        if page is not None and not is_present(page):
            detail = f"MSR {index:#x} is {value:#x}, and KVM leaves out without a word what it cannot write"
            leaks.append(Leak(LeakKind.MSR, gpa, f"KVM's {msr.structure} of vCPU {vcpu}", detail))
    # The legacy MSR of kvmclock reads the same as the new one.
    return list({(leak.gpa, leak.origin): leak for leak in leaks}.values())


def absent(states: bytes) -> Bools:
    """Tell of pages, by their states a byte each, whether no bytes of them can be in RAM."""
    found = np.frombuffer(states, dtype=np.uint8)
    return np.asarray((found == _SOURCE) | (found == _ZERO))


def runs_with_data(before: bytes, resident: Bools, after: bytes) -> list[tuple[int, int]]:
    """Return the runs (first, count) of pages that have memory behind them although they were never filled.

    `resident` was seen between the states `before` and `after`: a page that was being filled meanwhile is not absent
    in both.
    """
    leaked = resident & absent(before) & absent(after)
    edges = np.flatnonzero(np.diff(leaked, prepend=False, append=False))
    return [(int(first), int(end - first)) for first, end in edges.reshape(-1, 2)]


def data_leak(layout: GuestLayout, first: int, count: int, *, in_guest_view: bool) -> Leak:
    """Describe a run found by `runs_with_data`; `in_guest_view`: our page table has its first page there.

    That alone does not tell which access it was: the kernel maps what it finds around a page that KVM asks for.
    """
    gpa = layout.gpa_of_page(first)
    views = "through the guest view" if in_guest_view else "not through the guest view"
    origin = f"a peer, or our own process {views}"
    return Leak(
        LeakKind.DATA,
        gpa,
        origin,
        f"{count * PAGE_SIZE} bytes up to {gpa + count * PAGE_SIZE:#x} have memory behind them, and the pager has "
        "filled none",
    )
