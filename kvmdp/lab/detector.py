"""Watches a machine for leaks (`kvmdp.lab.leaks`): at faults, at each tick, and at its end.

Memory behind absent pages shows in what the kernel knows of the RAM file (mincore on the VMM view) or, for private
memory, of our page table (pagemap). Neither touches a page.

Units: RAM pages.
"""

from __future__ import annotations

import threading

import numpy as np

from kvmdp.abi import pagemap
from kvmdp.abi.libc import mincore
from kvmdp.errors import UnsupportedError
from kvmdp.kvm import Vcpu
from kvmdp.lab.leaks import Leak, absent_msr_pages, data_leak, runs_with_data, spurious_page_fault
from kvmdp.machine.hostinfo import tmpfs_has_huge_pages
from kvmdp.machine.machine import Machine
from kvmdp.machine.pv_msrs import PV_MSRS
from kvmdp.machine.workloads.arithmetic import Bools
from kvmdp.memory.mapping import Mapping
from kvmdp.page import PAGE_SIZE

_TICK_PAGES = 1 << 16  # looked at in one tick, and at once: 256 MiB


class LeakDetector:
    """Looks for leaks of one machine; `leaks` has what was found, each once."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards what follows
        self._found: dict[tuple[object, ...], Leak] = {}
        self._cursor = 0

    @property
    def leaks(self) -> list[Leak]:
        """What was found so far."""
        with self._mutex:
            return list(self._found.values())

    def attach(self, machine: Machine) -> None:
        """Have every vCPU look at its MSRs before a fault is resolved; before the machine runs."""
        for thread in machine.threads:
            thread.inspect = lambda vcpu: self._look_at_msrs(machine, vcpu)

    def tick(self, machine: Machine) -> None:
        """Look at a part of RAM, the next one each time."""
        first = self._cursor if self._cursor < machine.layout.pages else 0
        self._look_at_memory(machine, first)
        self._cursor = first + _TICK_PAGES

    def finish(self, machine: Machine) -> None:
        """Look at everything once more; no vCPU runs, but for one that did not stop: what it knows is left out."""
        for thread in machine.threads:
            if not thread.join(0):
                continue  # KVM_RUN holds it, and would hold us in the vCPU's ioctls too
            vcpu = thread.vcpu
            self._look_at_msrs(machine, vcpu)
            leak = spurious_page_fault(vcpu.index, thread.parameters, machine.layout, vcpu.translate)
            self._add([leak] if leak else [])
        for first in range(0, machine.layout.pages, _TICK_PAGES):
            self._look_at_memory(machine, first)

    def _add(self, leaks: list[Leak]) -> None:
        with self._mutex:
            for leak in leaks:
                self._found.setdefault((leak.kind, leak.gpa, leak.origin), leak)

    def _look_at_msrs(self, machine: Machine, vcpu: Vcpu) -> None:
        values = vcpu.registers.get_msrs(index for index, msr in PV_MSRS.items() if msr.keeps)
        self._add(absent_msr_pages(vcpu.index, values, machine.layout, machine.pager.bitmap.test))

    def _look_at_memory(self, machine: Machine, first: int) -> None:
        pager, backing = machine.pager, machine.backing
        end = min(first + _TICK_PAGES, machine.layout.pages)
        with pager.mutex:
            before = bytes(pager.ledger.states[first:end])
        resident = (
            _in_memory_file(backing.vmm, first, end) if backing.shared else _mapped(backing.guest, first, end)
        )
        with pager.mutex:
            after = bytes(pager.ledger.states[first:end])
            failed = pager.error is not None
        if failed:
            return  # a fill that failed half-way has left something where nothing is
        for at, count in runs_with_data(before, resident, after):
            page = first + at
            around = _has_memory_around_pages(machine)
            if around and not self._has_bytes(machine, page, count):
                continue  # the zeros around a page that was filled
            with pager.mutex:
                now = bytes(pager.ledger.states[page : page + count])
            if around and now != after[at : at + count]:
                continue  # the bytes may have come since; what is a leak is there at the next look too
            in_view = bool(_mapped(backing.guest, page, page + 1)[0])
            self._add([data_leak(machine.layout, page, count, in_guest_view=in_view)])

    def _has_bytes(self, machine: Machine, page: int, count: int) -> bool:
        view = machine.backing.vmm.view[page * PAGE_SIZE : (page + count) * PAGE_SIZE]
        return bool(np.frombuffer(view, dtype=np.uint64).any())


def _has_memory_around_pages(machine: Machine) -> bool:
    """Whether the kernel may give memory to what lies beside a page that is filled: huge pages, a disk's page cache."""
    backing = machine.backing
    if backing.page_size > machine.pager.trap.granule or backing.thp or backing.reads_ahead:
        return True
    return backing.shared and tmpfs_has_huge_pages()


def _in_memory_file(mapping: Mapping, first: int, end: int) -> Bools:
    """Tell of pages whether the mapped file has memory for them, mapped or not."""
    found = mincore(mapping.hva + first * PAGE_SIZE, (end - first) * PAGE_SIZE)
    return np.asarray(np.frombuffer(found, dtype=np.uint8) & 1 != 0)


def _mapped(mapping: Mapping, first: int, end: int) -> Bools:
    """Tell of pages whether our page table has them. Raises UnsupportedError."""
    try:
        entries = pagemap.entries(mapping.hva + first * PAGE_SIZE, end - first)
    except (FileNotFoundError, PermissionError) as error:
        raise UnsupportedError(
            f"leaks are looked for in {error.filename}, which cannot be read ({error.strerror}): mount /proc, or leave "
            "--detect-leaks out"
        ) from None
    return np.asarray(entries & pagemap.MAPPED != 0)
