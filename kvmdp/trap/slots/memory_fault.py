"""The `memory-fault` trap: absent granules lie in memslots bound to a closed guest_memfd.

A vCPU access exits with KVM_EXIT_MEMORY_FAULT and the gpa, whatever the size of the host's pages, and absent
memory takes no user page tables. Documented for guest_memfd as an error return; that it is a clean, retryable
exit is how Linux 6.18 and later behave, which `kvmdp.lab.probe` proves before anyone relies on it.

Needs KVM_CAP_GUEST_MEMFD_FLAGS (6.18) with GUEST_MEMFD_FLAG_MMAP, and no privilege beyond /dev/kvm.
"""

from __future__ import annotations

from kvmdp.abi.kvm import GUEST_MEMFD_FLAG_MMAP
from kvmdp.abi.kvm_cap import Cap
from kvmdp.errors import UnsupportedError
from kvmdp.kvm import Vm
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.ports import ForTraps
from kvmdp.trap.kind import Materials
from kvmdp.trap.slots.ram_slots import RamSlots
from kvmdp.trap.slots.slot_map import Block, Kind, Piece
from kvmdp.trap.slots.slot_trap import SlotTrap


def prepare_closed_slots(vm: Vm, slots: RamSlots, trap: str) -> None:
    """Get ready to make closed slots; raises UnsupportedError, in the name of `trap`, where this host cannot."""
    if not vm.check_extension(Cap.GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_MMAP:
        raise UnsupportedError(
            f"the trap {trap} needs guest_memfd with GUEST_MEMFD_FLAG_MMAP (KVM_CAP_GUEST_MEMFD_FLAGS), "
            "which this kernel's KVM lacks: use Linux 6.18 or later, or another trap"
        )
    try:
        slots.prepare_to_close()
    except OSError as error:
        # There is no other way that is safe: whatever this process did by itself, a fork in any of its threads, by
        # any library, could undo, and nothing would say so but wrong bytes.
        raise UnsupportedError(
            f"the trap {trap} needs a thread whose descriptors no child of this process gets a copy of, and may have "
            f"none here ({error.strerror}): have the container's seccomp profile allow close_range, or use marker or "
            "mmio"
        ) from None


class MemoryFaultTrap(SlotTrap):
    """Absent granules are closed slots; admitting one replaces it by an ordinary slot.

    Either way every vCPU is out of KVM_RUN meanwhile (`kvmdp.trap.slots.ram_slots` says why).
    """

    name = "memory-fault"
    repeats = True
    absent = frozenset((Kind.CLOSED,))

    def __init__(self, made_of: Materials) -> None:
        super().__init__(made_of)
        prepare_closed_slots(made_of.vm, made_of.slots, self.name)

    def arm(self, pager: ForTraps) -> None:
        """Open what is present, close what is absent: by granules, or by larger blocks where those are too many."""
        super().arm(pager)
        closed: list[Piece] = []
        for first, count in pager.bitmap.absent_runs().tolist():
            closed += self._slots.pieces(first, count, Kind.CLOSED, self._slots.closed_pages)
        self._slots.close_pieces(closed)

    def admit(self, first: int, count: int) -> None:
        """Replace closed slots by ordinary ones; a slot that has other absent pages too is cut."""
        assert self._pager is not None
        slots = self._slots
        claim = slots.claim(first, count)
        try:
            self._pager.gate.while_stopped(lambda: self._exchange(first, first + count))
        finally:
            slots.release(claim)
        self._populate(first, count)
        self._changed(first, count)

    def _exchange(self, first: int, end: int) -> None:
        for block in self._slots.overlapping(first, end - first):
            if first <= block.first and block.end <= end:
                self._slots.flip(block)
            else:
                self._cut(block, max(first, block.first), min(end, block.end))

    def _cut(self, block: Block, first: int, end: int) -> None:
        """Open the pages [first, end) of a closed block and close what is left of it."""
        self._slots.delete(block)
        self._slots.open(first, end - first)
        self._slots.close_pieces(block.without(first, end))

    def _shut_out(self, first: int, count: int) -> None:
        """Replace ordinary slots by closed ones; a slot that has other present pages too is cut.

        By granules, which are then admitted without a cut; in regions one slot for all, and for what is closed beside
        it, so that a region has no more slots than runs of pages.
        """
        low, high, size = first, first + count, self.granule // PAGE_SIZE
        if self._slots.in_regions:
            size = self._slots.closed_pages
            low = first // size * size
            high = min(-(-high // size) * size, self._backing.size // PAGE_SIZE)
        claim = self._slots.claim(low, high - low)
        try:
            if self._slots.in_regions:
                first, count = self._with_closed_neighbours(first, count, low, high)
            self._slots.take_out(first, count)
            self._slots.close_pieces(self._slots.pieces(first, count, Kind.CLOSED, size))
        finally:
            self._slots.release(claim)
        self._changed(first, count)

    def _with_closed_neighbours(self, first: int, count: int, low: int, high: int) -> tuple[int, int]:
        """Widen a run inside [low, high) by the closed blocks that touch it and lie in there."""
        end = first + count
        before = self._slots.overlapping(first - 1, 1) if first > low else []
        after = self._slots.overlapping(end, 1) if end < high else []
        if before and before[0].kind is Kind.CLOSED and before[0].first >= low:
            first = before[0].first
        if after and after[0].kind is Kind.CLOSED and after[0].end <= high:
            end = after[0].end
        return first, end - first
