"""KVM's own writes to guest memory: kvmclock, the wall clock, steal time.

A guest switches them on with an MSR that names an address, and KVM writes there from then on, with no access of a
vCPU that could trap. What it cannot write because the page is absent it leaves out without a word. So the MSR filter
hands these writes of MSRs to user space: the page is made present and retained, then KVM is told.

Nothing else of the kind is offered to the guest: asynchronous page faults and PV EOI need an in-kernel APIC. Writes of
their MSRs are refused, as are all others in KVM's range.

Sources: `asm/kvm_para.h`, `asm/pvclock-abi.h`; "KVM-specific MSRs" in the kernel's documentation. Units: bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kvmdp.abi.kvm import KVM_MSR_EXIT_REASON_FILTER
from kvmdp.abi.kvm_cap import Cap
from kvmdp.abi.kvm_para import (
    KVM_CPUID_FEATURES,
    KVM_FEATURE_CLOCKSOURCE,
    KVM_FEATURE_CLOCKSOURCE2,
    KVM_FEATURE_STEAL_TIME,
    MSR_KVM_STEAL_TIME,
    MSR_KVM_SYSTEM_TIME,
    MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_WALL_CLOCK,
    MSR_KVM_WALL_CLOCK_NEW,
    STEAL_TIME_BYTES,
    TIME_INFO_BYTES,
    WALL_CLOCK_BYTES,
)
from kvmdp.errors import PagingError
from kvmdp.kvm import DeniedMsrs, Kvm, KvmError, MsrWrite, Vcpu, Vm
from kvmdp.machine.guest_abi import PvFlag
from kvmdp.machine.workloads.arithmetic import Pages, Words
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE, Origin, Outcome, PageFault
from kvmdp.paging.pager import Pager

_ENABLED = 1 << 0
_ALIGNMENT = 4
_LEGACY = DeniedMsrs(MSR_KVM_WALL_CLOCK, 2, read=False)
_KVM_RANGE = DeniedMsrs(MSR_KVM_WALL_CLOCK_NEW, 0x100, read=False)


@dataclass(frozen=True, slots=True)
class PvMsr:
    """An MSR that names an address for KVM to write `size` bytes to.

    `keeps` is whether it goes on writing until it is told another address or switched off by a clear bit 0; else it
    writes once. MSRs of one `structure` replace each other.
    """

    structure: str
    size: int
    feature: int
    keeps: bool = True

    def target(self, value: int) -> int | None:
        """Return the address that `value` of the MSR names; None if it switches off."""
        if not self.keeps:
            return value or None
        return value & ~_ENABLED if value & _ENABLED else None


PV_MSRS: dict[int, PvMsr] = {
    MSR_KVM_WALL_CLOCK: PvMsr("wall clock", WALL_CLOCK_BYTES, KVM_FEATURE_CLOCKSOURCE, keeps=False),
    MSR_KVM_SYSTEM_TIME: PvMsr("kvmclock", TIME_INFO_BYTES, KVM_FEATURE_CLOCKSOURCE),
    MSR_KVM_WALL_CLOCK_NEW: PvMsr("wall clock", WALL_CLOCK_BYTES, KVM_FEATURE_CLOCKSOURCE2, keeps=False),
    MSR_KVM_SYSTEM_TIME_NEW: PvMsr("kvmclock", TIME_INFO_BYTES, KVM_FEATURE_CLOCKSOURCE2),
    MSR_KVM_STEAL_TIME: PvMsr("steal time", STEAL_TIME_BYTES, KVM_FEATURE_STEAL_TIME),
}
_FEATURES = sum(1 << feature for feature in {each.feature for each in PV_MSRS.values()})


def offered_features(kvm: Kvm) -> int:
    """Return the bits of KVM_CPUID_FEATURES that a guest may see: of what KVM has, that which can be intercepted.

    None without KVM_CAP_X86_MSR_FILTER and KVM_CAP_X86_USER_SPACE_MSR. KVM has steal time where the kernel keeps
    scheduler statistics.
    """
    if not (kvm.check_extension(Cap.X86_MSR_FILTER) and kvm.check_extension(Cap.X86_USER_SPACE_MSR)):
        return 0
    leaves: dict[int, int] = {entry.function: entry.eax for entry in kvm.supported_cpuid()}
    return leaves.get(KVM_CPUID_FEATURES, 0) & _FEATURES


def pv_flags(kvm: Kvm) -> PvFlag:
    """Return what of `offered_features` the workload clock can use."""
    features = offered_features(kvm)
    flags = PvFlag.NONE
    if features & 1 << KVM_FEATURE_CLOCKSOURCE2:
        flags |= PvFlag.CLOCK
    if features & 1 << KVM_FEATURE_STEAL_TIME:
        flags |= PvFlag.STEAL_TIME
    return flags


class PvMsrs:
    """Carries out what guests write to the MSRs of `PV_MSRS`; a machine has one.

    `is_fixed(gpa, length)` says of memory outside RAM whether it is always present. `features` is what the guest's
    CPUID may show.
    """

    def __init__(
        self,
        kvm: Kvm,
        vm: Vm,
        layout: GuestLayout,
        pager: Pager,
        is_fixed: Callable[[int, int], bool],
    ) -> None:
        self.features = offered_features(kvm)
        self._layout = layout
        self._pager = pager
        self._is_fixed = is_fixed
        self._mutex = threading.Lock()  # guards what follows
        self._retained: dict[tuple[int, str], list[int]] = {}  # by vCPU and structure
        self._written: set[tuple[int, int]] = set()  # (gpa, size) of all that KVM was ever told to write to
        if self.features:
            vm.enable_cap(Cap.X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER)
            vm.set_msr_filter([_LEGACY, _KVM_RANGE])

    def write(self, vcpu: Vcpu, exit: MsrWrite) -> None:
        """Carry out an MSR write of the guest, or have it get #GP; the vCPU's next entry completes it.

        #GP comes where KVM gives it, for an MSR that is not offered, and for an address that is not aligned to 4 or
        not memory: the documentation demands both, but KVM takes such an address and then writes nothing. Belongs
        to the vCPU's thread. Raises PagingError if the page cannot be had.
        """
        vcpu.complete_msr(error=not self._write(vcpu, exit.index, exit.data))

    def _write(self, vcpu: Vcpu, index: int, value: int) -> bool:
        msr = PV_MSRS.get(index)
        if msr is None or not self.features & 1 << msr.feature:
            return False
        target = msr.target(value)
        pages: list[int] = []
        if target is not None:
            # The low bits of steal time's MSR are reserved, which KVM checks.
            found = self._pages(target, msr.size) if target % _ALIGNMENT == 0 else None
            if found is None:
                return False
            pages = found
        self._retain(pages)
        try:
            self._make_present(pages, vcpu.index)
            vcpu.registers.set_msr(index, value)
        except KvmError:
            self._let_go(pages)
            return False
        except BaseException:
            self._let_go(pages)
            raise
        if target is not None:
            with self._mutex:
                self._written.add((target, msr.size))
        if msr.keeps:
            with self._mutex:
                before = self._retained.pop((vcpu.index, msr.structure), [])
                self._retained[vcpu.index, msr.structure] = pages
            pages = before
        self._let_go(pages)  # those of the address before; of what is written once, the page just written
        return True

    def switch_off(self, vcpu: Vcpu) -> None:
        """Have KVM write to memory for this vCPU no more, as after a reset. It must not run meanwhile."""
        with self._mutex:
            on = [key for key in self._retained if key[0] == vcpu.index]
            pages = [page for key in on for page in self._retained.pop(key)]
        for index, msr in PV_MSRS.items():
            if (vcpu.index, msr.structure) in on and msr.keeps and self.features & 1 << msr.feature:
                vcpu.registers.set_msr(index, 0)
        self._let_go(pages)

    def _pages(self, gpa: int, length: int) -> list[int] | None:
        """Return the RAM pages that hold a structure, two if it crosses; None if it is not all in memory."""
        pages = []
        for at, _, count in _pieces(gpa, length):
            page = self._layout.page_of_gpa(at)
            if page is not None:
                pages.append(page)
            elif not self._is_fixed(at, count):
                return None
        return pages

    def _retain(self, pages: list[int]) -> None:
        for page in pages:
            self._pager.retain(page, 1)

    def _let_go(self, pages: list[int]) -> None:
        for page in pages:
            self._pager.let_go(page, 1)

    def _make_present(self, pages: list[int], vcpu: int) -> None:
        """Make pages present that are retained: then they stay so."""
        for page in pages:
            outcome = self._pager.resolve(PageFault(page, Origin.VCPU, vcpu))
            if outcome in (Outcome.PRESENT, Outcome.ADMITTED):
                continue
            if outcome is Outcome.FAILED and self._pager.error is not None:
                raise self._pager.error
            if (
                outcome is not Outcome.CANCELLED
            ):  # the machine is stopping: its guest will not see what is missing
                raise PagingError(
                    f"the page at gpa {self._layout.gpa_of_page(page):#x}, which vCPU {vcpu} has KVM write to, is "
                    f"{outcome.name.lower()}"
                )

    def ignore_writes(self, pages: Pages, difference: Words) -> None:
        """Clear what KVM may have written: `difference` is uint64[n, 512], set where `pages` are not as they were."""
        raw = difference.view(np.uint8)
        with self._mutex:
            written = sorted(self._written)
        for gpa, size in written:
            for at, start, count in _pieces(gpa, size):
                raw[pages == self._layout.page_of_gpa(at), start : start + count] = 0


def _pieces(gpa: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Cut a range at page borders: yields (gpa, offset in its page, bytes)."""
    while size:
        start = gpa % PAGE_SIZE
        count = min(PAGE_SIZE - start, size)
        yield gpa, start, count
        gpa, size = gpa + count, size - count
