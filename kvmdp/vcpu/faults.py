"""A vCPU's side of demand paging: from the exit KVM gave to the page it was about, and back into the guest.

Common to all traps, because an exit of any kind can come under any of them: KVM's emulator (all of ring 0 on some
hosts) meets a marker and exits as MMIO; a vCPU that looks for a memslot while another thread flips it exits as
MMIO too; and an instruction the emulator does not know becomes an emulation failure.

An access is *retried* where KVM left the instruction unexecuted. Where its emulator has begun the instruction, that is
taken back first if it can be, and *completed* if not (`kvmdp.vcpu.emulated`).

An access to a poisoned page becomes a machine check (`VcpuPaging._machine_check`), with RIP at the instruction and all
registers as they were before it, in either case but two: a store that KVM emulated is done with by then, and LEAVE has
set RSP to RBP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

from kvmdp.abi.kvm_x86 import kvm_regs
from kvmdp.abi.signal import BUS_MCEERR_AR
from kvmdp.errors import PagingError
from kvmdp.kvm import (
    BadAddress,
    BusError,
    Exit,
    InternalError,
    Interrupted,
    IoIn,
    KvmError,
    MemoryFault,
    Mmio,
    MmioRead,
    MmioWrite,
    Vcpu,
)
from kvmdp.kvm.machine_check import PoisonedAccess
from kvmdp.memory.backing import Backing
from kvmdp.page import PAGE_SHIFT, PAGE_SIZE, Access, Origin, Outcome, PageFault
from kvmdp.paging.pager import Pager
from kvmdp.vcpu.emulated import Emulation, Form, Store
from kvmdp.vcpu.gate import VcpuGate
from kvmdp.vcpu.instruction import InstructionReader

# How often one instruction may fault on one page while nothing is revoked and nothing found that could be mended. One
# repeat is normal (a SIGBUS that was on its way when another thread admitted the page); this many are a livelock.
_MAX_REPEATS = 64

# On the way of every fault; as attributes of their enums they would be looked up each time.
_VCPU, _ADMITTED = Origin.VCPU, Outcome.ADMITTED

_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class LivelockError(PagingError):
    """The same access faults again and again although its page is present."""


class VcpuPaging:
    """Turns the exits of one vCPU into page faults, resolves them, completes what KVM emulated.

    `read_physical(gpa, length)` returns bytes of present guest memory for decoding an instruction, or None
    where there is none; `empty_table` is the gpa of a page of zeros that the guest cannot reach. Belongs to the vCPU's
    thread.
    """

    def __init__(
        self,
        pager: Pager,
        gate: VcpuGate,
        vcpu: Vcpu,
        backing: Backing,
        read_physical: Callable[[int, int], bytes | None],
        empty_table: int,
    ) -> None:
        self._pager = pager
        self._vcpu = vcpu
        self._layout = pager.layout
        self.instruction = InstructionReader(vcpu, pager.layout, read_physical)
        self._emulation = Emulation(vcpu, self.instruction, empty_table)
        self._gate = gate
        # Of an access that has been settled: the exit it ended with, and what it stores.
        self._following: Exit = Interrupted()
        self._stores: list[Store] = []
        self._view = backing.vmm.view
        self._guest_hva = backing.guest.hva
        self._guest_size = backing.size
        # Pages of an access -> faults without effect at _repeat_rip, since the last revocation.
        self._repeats: dict[tuple[int, ...], int] = {}
        self._repeat_rip = -1
        self._repeat_revoked = -1

    @property
    def emulated(self) -> Counter[Form]:
        """What KVM's emulator has completed for this vCPU, by form."""
        return self._emulation.completed

    def handle(self, exit: Exit) -> Exit | None:
        """Deal with `exit` if it is about an absent page. An `Mmio` has been settled before.

        Returns None if the vCPU is to be entered again, `exit` itself if it was none of ours, or the exit
        with which the completion of an emulated access ended. Raises PagingError if the page cannot be had, or
        the access does not get anywhere.
        """
        if type(exit) is BusError:
            self._retry(self._page_of_bus_error(exit))
            return None
        if type(exit) is MemoryFault:
            page = self._layout.page_of_gpa(exit.gpa)
            if page is None:
                return exit
            self._retry(page)
            return None
        if isinstance(exit, Mmio):
            page = self._layout.page_of_gpa(exit.gpa)
            return exit if page is None else self._go_on(exit, page)
        if type(exit) is BadAddress or (type(exit) is InternalError and exit.is_emulation_failure):
            return None if self._resolve_instruction() else exit
        if type(exit) is InternalError and exit.delivery_gpa is not None:
            # No absent page is in a memslot that KVM could read the stack or a descriptor table from.
            page = self._layout.page_of_gpa(exit.delivery_gpa)
            return None if page is not None and self._resolve_one_of([page]) else exit
        return exit

    def _retry(self, page: int) -> None:
        """Make the page present; the instruction has not run, and runs when the vCPU is entered again."""
        outcome = self._pager.resolve(PageFault(page, _VCPU, self._vcpu.index))
        if outcome is _ADMITTED:
            return
        if outcome is Outcome.POISONED:
            self._machine_check(page)
            return
        self._check(outcome, page)
        if self._repeats_of(page) > _MAX_REPEATS:
            raise LivelockError(
                f"vCPU {self._vcpu.index} at RIP {self._vcpu.regs.rip:#x} faults again and again on gpa "
                f"{self._layout.gpa_of_page(page):#x}, which is present: the host page may be broken hardware, or "
                "this KVM does not retry the access; try another trap"
            )
        # Present, and yet it trapped: on its way before the admit, or the trap is wrong about the page.
        self._reassert([page])

    def _check(self, outcome: Outcome, page: int) -> None:
        if outcome in (Outcome.PRESENT, Outcome.ADMITTED, Outcome.CANCELLED):
            return
        if outcome is Outcome.FAILED and self._pager.error is not None:
            raise self._pager.error
        raise PagingError(f"the page at gpa {self._layout.gpa_of_page(page):#x} is {outcome.name.lower()}")

    def _repeats_of(self, *pages: int) -> int:
        """Count a fault without effect at the present RIP on these pages; return how many it has been."""
        rip = self._vcpu.regs.rip
        revoked = self._pager.counters.pages_revoked
        if rip != self._repeat_rip or revoked != self._repeat_revoked:
            self._repeat_rip, self._repeat_revoked = rip, revoked
            self._repeats.clear()
        count = self._repeats[pages] = self._repeats.get(pages, 0) + 1
        return count

    def _reassert(self, pages: list[int]) -> None:
        """Have the trap mend these pages. If it could, that has had an effect: a peer may punch holes all the time."""
        mended = [self._pager.reassert(page) for page in pages]
        if any(mended):
            self._repeats.clear()

    def _page_of_bus_error(self, error: BusError) -> int:
        """Return the RAM page a SIGBUS is about; one that is not about the guest view is real, and fatal."""
        offset = error.hva - self._guest_hva
        if error.code != BUS_MCEERR_AR or not 0 <= offset < self._guest_size:
            raise PagingError(
                f"vCPU {self._vcpu.index} got SIGBUS code {error.code} at host address {error.hva:#x}, which is no "
                "marker of ours: a hardware memory error, or memory that was taken away"
            )
        return offset >> PAGE_SHIFT

    # Accesses that KVM's emulator has begun

    def settle(self, access: MmioRead | MmioWrite) -> None:
        """Take an instruction out of the hands of KVM's emulator; before the vCPU leaves the gate, and before `handle`.

        Waits for nothing. What is left to be done for the access is done by `handle`.
        """
        page = self._layout.page_of_gpa(access.gpa)
        if page is None:
            return
        self._stores = []
        if isinstance(access, MmioWrite):
            self._stores, self._following = self._emulation.finish_store(access)
        else:
            self._following = self._emulation.call_off(access)

    def _go_on(self, access: MmioRead | MmioWrite, page: int) -> Exit | None:
        """Make the pages present that a settled access is about, and store what it has stored."""
        following = _unless_interrupted(self._following)
        if isinstance(access, MmioRead):
            if following is None:
                self._retry(page)
            return following
        for gpa, data in self._stores:
            stored = self._layout.page_of_gpa(gpa)
            if stored is None:
                return MmioWrite(gpa, len(data), memoryview(data))
            with self._pager.held(PageFault(stored, _VCPU, self._vcpu.index, Access.WRITE)) as outcome:
                if outcome is Outcome.PRESENT:
                    self._transfer(stored * PAGE_SIZE + gpa % PAGE_SIZE, data)
            if outcome is Outcome.POISONED:
                self._machine_check(stored, PoisonedAccess.LOST_STORE if data else None)
                break
            self._check(outcome, stored)
        return following

    def _transfer(self, offset: int, data: bytes) -> None:
        """Copy to RAM; an aligned access is one store."""
        size = len(data)
        ram = self._view[offset : offset + size]
        if size in _FORMATS and offset % size == 0:
            ram.cast(_FORMATS[size])[0] = int.from_bytes(data, "little")
        else:
            ram[:] = data

    def answer(self, io: IoIn, device: Callable[[], None]) -> Exit | None:
        """Have `device` answer port input; what a string instruction stores of it is in RAM when this returns.

        Returns None if the vCPU is to be entered again, or the exit with which the instruction ended. While the machine
        stops the device may not have been asked: the gate lets no vCPU in then. Raises PagingError as `handle`, before
        the device is asked.
        """
        target = self._emulation.input_target(io)
        pages = [page for gpa, _ in target if (page := self._layout.page_of_gpa(gpa)) is not None]
        if not pages:
            device()
            return None
        with self._pager.vcpu_accesses.visiting(pages) as pin:
            while (page := self._pager.vcpu_accesses.enter(pin)) is not None:
                self._pager.vcpu_accesses.insist(pin)
                outcome = self._pager.resolve(PageFault(page, _VCPU, self._vcpu.index, Access.WRITE))
                if outcome is Outcome.POISONED:
                    return self._poisoned_input(io, page)
                self._check(outcome, page)
                if outcome is Outcome.CANCELLED:
                    return None
            device()
            return _unless_interrupted(self._inside(self._emulation.finish))

    def _poisoned_input(self, io: IoIn, page: int) -> Exit | None:
        """Take string input back that would be stored in a poisoned page."""
        following = _unless_interrupted(self._inside(lambda: self._emulation.call_off(io)))
        if following is None:
            self._machine_check(page)
        return following

    def _inside(self, step: Callable[[], Exit]) -> Exit:
        """Have KVM finish something, at a time when the vCPUs are not kept out of KVM_RUN."""
        self._gate.enter(self._vcpu, only_complete=True)
        try:
            return step()
        finally:
            self._gate.leave(self._vcpu)

    # Poisoned pages

    def _machine_check(self, page: int, access: PoisonedAccess | None = None) -> None:
        """Have the guest take a machine check for its access to a poisoned page, as its next step.

        `access` None is of the instruction at RIP, which has not happened.
        The vCPU cannot be stuck here: it goes on in the guest's handler, or the run ends with what keeps it from that.
        """
        gpa = self._layout.gpa_of_page(page)
        where = f"vCPU {self._vcpu.index} at RIP {self._vcpu.regs.rip:#x} touched gpa {gpa:#x}, which is poisoned, and"
        try:
            if access is None:
                is_fetched = self.instruction.is_fetched(page)
                access = PoisonedAccess.FETCH if is_fetched else PoisonedAccess.LOAD
            taken = self._vcpu.inject_machine_check(gpa, access)
        except KvmError as error:
            raise PagingError(f"{where} this KVM cannot tell it so by a machine check: {error}") from error
        if not taken:
            raise PagingError(
                f"{where} its guest cannot be told so: it has machine checks switched off (CR4.MCE, MCi_CTL), or has "
                "not cleared MCG_STATUS after the last one"
            )

    # Instructions that KVM cannot emulate, on which it spins, or for which it has found no page and says no address

    def _resolve_instruction(self) -> bool:
        """Make one page present that the instruction at RIP needs, or have the trap mend them if all of them are.

        Present pages trap like this where the host has taken them out of the guest view (reclaim), and the trap's
        userfaultfd is not told of KVM's own faults. Returns False if that has been no help, again and again.
        """
        return self._resolve_one_of(self.instruction.pages())

    def resolve_refused(self, registers: kvm_regs) -> bool:
        """Make one page present that an instruction needs which KVM's emulator has refused with #UD.

        `registers` are those before it. Returns False if it needs none: then it is the guest's own fault.
        """
        pages = self.instruction.pages(registers)
        return bool(pages) and self._resolve_one_of(pages)

    def _resolve_one_of(self, pages: list[int]) -> bool:
        for page in pages:
            # Not a look at the bitmap: the bit is set before the trap has admitted the page, and until then the
            # instruction would only fail again.
            outcome = self._pager.resolve(PageFault(page, Origin.VCPU, self._vcpu.index))
            if outcome is Outcome.ADMITTED:
                return True
            if outcome is Outcome.POISONED:
                self._machine_check(page)
                return True
            self._check(outcome, page)
        # All are present: another thread has been faster, they are not mapped, or KVM cannot emulate this at all.
        if self._repeats_of(*pages) > _MAX_REPEATS:
            return False
        self._reassert(pages)
        return True

    def resolve_stall(self) -> bool:
        """Make present what the instruction at RIP needs, for a vCPU that sat in KVM_RUN without an exit.

        Returns whether a page was absent; if not, the guest was merely busy.
        """
        for page in self.instruction.pages():
            if not self._pager.bitmap.test(page):
                self._retry(page)
                return True
        return False


def _unless_interrupted(exit: Exit) -> Exit | None:
    """Return what KVM came out for in the end, None if it had nothing left to do."""
    return None if type(exit) is Interrupted else exit
