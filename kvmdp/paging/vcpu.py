"""A vCPU's side of demand paging: from the exit KVM gave to the page it was about, and back into the guest.

Common to all traps, because an exit of any kind can come under any of them: KVM's emulator (all of ring 0 on some
hosts) meets a marker and exits as MMIO; a vCPU that looks for a memslot while another thread flips it exits as
MMIO too; and an instruction the emulator does not know becomes an emulation failure.

An access is *retried* where KVM left the instruction unexecuted, and *completed* where it emulated half of it.

An access to a poisoned page becomes a machine check (`VcpuPaging._machine_check`), with RIP at the instruction and all
general registers as they were before it, in either case but one: a store that KVM emulated is done with by then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Literal

from kvmdp.abi.kvm_x86 import kvm_regs
from kvmdp.abi.signal import BUS_MCEERR_AR
from kvmdp.kvm import (
    BadAddress,
    BusError,
    Exit,
    InternalError,
    Interrupted,
    Io,
    KvmError,
    MemoryFault,
    Mmio,
    Vcpu,
)
from kvmdp.kvm.machine_check import PoisonedAccess
from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import PAGE_SHIFT, PAGE_SIZE
from kvmdp.paging.fault import Origin, Outcome, PageFault, PagingError
from kvmdp.paging.pager import DemandPager
from kvmdp.paging.trap.operand import MAX_INSTRUCTION, TruncatedError, memory_operands

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
    where there is none. Belongs to the vCPU's thread.
    """

    def __init__(
        self,
        pager: DemandPager,
        vcpu: Vcpu,
        backing: Backing,
        read_physical: Callable[[int, int], bytes | None],
    ) -> None:
        self._pager = pager
        self._vcpu = vcpu
        self._gate = pager.gate
        self._layout = pager.layout
        self._read_physical = read_physical
        self._view = backing.vmm.view
        self._guest_hva = backing.guest.hva
        self._guest_size = backing.size
        # Pages of an access -> faults without effect at _repeat_rip, since the last revocation.
        self._repeats: dict[tuple[int, ...], int] = {}
        self._repeat_rip = -1
        self._repeat_revoked = -1

    def handle(self, exit: Exit) -> Exit | None:
        """Deal with `exit` if it is about an absent page.

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
        if type(exit) is Mmio:
            page = self._layout.page_of_gpa(exit.gpa)
            return exit if page is None else self._complete(exit, page)
        if type(exit) is BadAddress or (type(exit) is InternalError and exit.is_emulation_failure):
            return None if self._resolve_instruction() else exit
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

    # Accesses that KVM emulated

    def _complete(self, mmio: Mmio, page: int) -> Exit | None:
        """Supply or store the bytes of an access that KVM took for device I/O, and let it finish.

        The page is pinned until KVM_RUN, entered with immediate_exit, has finished the instruction. Without that
        it could be taken away between the bytes supplied here and KVM's own access in the instruction's second half:
        a LOCK-prefixed one, which KVM does as compare-and-exchange on present memory, would be done as a plain write,
        and another vCPU's update lost. And a poisoned one could be healed (`_finish_poisoned`).
        """
        with self._pager.held(PageFault(page, Origin.VCPU, self._vcpu.index)) as outcome:
            if outcome is Outcome.PRESENT:
                self._transfer(mmio, page)
                following = self._finish()
            elif outcome is Outcome.POISONED:
                following = self._finish_poisoned(mmio)
            else:
                self._check(outcome, page)
                return None
        if type(following) is not Interrupted:
            return following
        if outcome is Outcome.POISONED:
            self._machine_check(page, PoisonedAccess.LOST_STORE if mmio.is_write else PoisonedAccess.LOAD)
        return None

    def _finish(self) -> Exit | None:
        """Have KVM finish the access it exited for, and return what it exits for next.

        That is Interrupted if the access is done with; None if the machine is stopping, and it has not been tried.
        """
        if not self._gate.enter(self._vcpu, only_complete=True):
            return None
        try:
            return self._vcpu.run()
        finally:
            self._gate.leave(self._vcpu)

    def _transfer(self, mmio: Mmio, page: int) -> None:
        """Copy between RAM and the exit; an aligned access is one load or store."""
        size = mmio.size
        offset = page * PAGE_SIZE + mmio.gpa % PAGE_SIZE
        ram = self._view[offset : offset + size]
        if size in _FORMATS and offset % size == 0:
            ram, data = ram.cast(_FORMATS[size]), mmio.data.cast(_FORMATS[size])
            if mmio.is_write:
                ram[0] = data[0]
            else:
                data[0] = ram[0]
        elif mmio.is_write:
            ram[:] = mmio.data
        else:
            mmio.data[:] = ram

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
                access = PoisonedAccess.FETCH if self._is_fetched(page) else PoisonedAccess.LOAD
            taken = self._vcpu.inject_machine_check(gpa, access)
        except KvmError as error:
            raise PagingError(f"{where} this KVM cannot tell it so by a machine check: {error}") from error
        if not taken:
            raise PagingError(
                f"{where} its guest cannot be told so: it has machine checks switched off (CR4.MCE, MCi_CTL), or has "
                "not cleared MCG_STATUS after the last one"
            )

    def _is_fetched(self, page: int) -> bool:
        """Whether the instruction at RIP needs an absent page for its own bytes, and not for an operand."""
        rip = self._vcpu.regs.rip
        if self._ram_page(rip) == page:
            return True
        code = self._code_at(rip)
        goes_on_there = len(code) < MAX_INSTRUCTION and self._ram_page(rip + len(code)) == page
        return goes_on_there and page not in self._pages_of_operands(code)

    def _finish_poisoned(self, mmio: Mmio) -> Exit | None:
        """Get an access that KVM took for device I/O out of the way; its page is poisoned, and held. As `_finish`.

        There is no way to call such an access off: it has to be finished. So a load gets zeros, which nobody sees
        because the general registers are put back: the instruction has not happened. Whatever else it exits for
        meanwhile is not done either. But what KVM stores by itself while it finishes is, in memory that is present:
        `movs` and `push` out of a poisoned page leave zeros where they move to, and a read-modify-write over the border
        of a poisoned page and a good one has changed the good one's part. A vector load leaves zeros in its register.

        A store is dropped. It has retired before the exit, with RIP behind it.

        Why the page is held: KVM does the store of a read-modify-write at the end of this. Into a page that is healed
        by then it would store what it has made of the zeros given here. So also the second page of an access over two
        is held, from its own exit on, if it is poisoned.
        """
        registers = kvm_regs.from_buffer_copy(self._vcpu.regs)
        following: Exit | None = mmio
        with contextlib.ExitStack() as held:
            while isinstance(following, Mmio | Io):
                page = self._layout.page_of_gpa(following.gpa) if isinstance(following, Mmio) else None
                if page is not None and self._pager.hold_settled(page) is not None:
                    held.callback(self._pager.release, page)
                if isinstance(following, Io) or not following.is_write:
                    following.data[:] = bytes(len(following.data))
                following = self._finish()
        if type(following) is Interrupted and not mmio.is_write:
            self._vcpu.set_regs(registers)
        return following

    # Instructions that KVM cannot emulate, on which it spins, or for which it has found no page and says no address

    def _resolve_instruction(self) -> bool:
        """Make one page present that the instruction at RIP needs, or have the trap mend them if all of them are.

        Present pages trap like this where the host has taken them out of the guest view (reclaim), and the trap's
        userfaultfd is not told of KVM's own faults. Returns False if that has been no help, again and again.
        """
        pages = self._pages_of_instruction(self._vcpu.regs.rip)
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
        for page in self._pages_of_instruction(self._vcpu.regs.rip):
            if not self._pager.bitmap.test(page):
                self._retry(page)
                return True
        return False

    def _pages_of_instruction(self, rip: int) -> list[int]:
        """Return the RAM pages the instruction at `rip` may touch: its own bytes', then its operands'."""
        page = self._ram_page(rip)
        if page is not None and not self._pager.bitmap.test(page):
            return [page]
        code = self._code_at(rip)
        pages = self._pages_of_operands(code)
        if len(code) < MAX_INSTRUCTION:
            # It may go on in the next page. Last, because a short one does not.
            pages.append(self._ram_page(rip + len(code)))
        return list(dict.fromkeys(page for page in pages if page is not None))

    def _pages_of_operands(self, code: bytes) -> list[int | None]:
        """Return where the memory operands of the instruction at RIP begin and end; none if `code` is not all of it."""
        sregs = self._vcpu.sregs
        try:
            operands = memory_operands(code, self._vcpu.regs, sregs.fs.base, sregs.gs.base)
        except TruncatedError:
            return []
        return [
            self._ram_page(address)
            for operand in operands
            for address in (operand.address, operand.address + operand.length - 1)
        ]

    def _ram_page(self, address: int) -> int | None:
        gpa = self._vcpu.translate(address)
        return None if gpa is None else self._layout.page_of_gpa(gpa)

    def _code_at(self, rip: int) -> bytes:
        """Return up to 15 bytes at `rip`, fewer if the next page is not there."""
        code = b""
        while len(code) < MAX_INSTRUCTION:
            address = rip + len(code)
            count = min(MAX_INSTRUCTION - len(code), PAGE_SIZE - address % PAGE_SIZE)
            gpa = self._vcpu.translate(address)
            piece = None if gpa is None else self._read_physical(gpa, count)
            if piece is None:
                break
            code += piece
        return code
