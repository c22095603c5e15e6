"""The `layered` trap: absent memory is closed by region, and by markers inside a region once it has been touched.

For large guests. A closed memslot (`kvmdp.trap.slots.ram_slots`) covers a region of 2 MiB or more, all of them made at
arming: no page table and no marker for memory that is not touched. The first page admitted in a region puts markers on
the whole of it in the guest view, where nothing of it can be mapped yet, and only then replaces the closed slot by an
ordinary one, for which alone every vCPU is kept out of KVM_RUN (`kvmdp.trap.slots.ram_slots` says why). From there its
pages trap as under `marker`.

Shared memory only: there a page shut out keeps its bytes in the memory file, and nothing is staged.
Needs what `marker` and `memory-fault` need: Linux 6.18, no privilege beyond /dev/kvm.
"""

from __future__ import annotations

import dataclasses

from kvmdp.kvm import Vm
from kvmdp.memory.backing import Backing
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.ports import ForReaders
from kvmdp.trap.inspect import InspectedTrap, Picture
from kvmdp.trap.kind import Materials
from kvmdp.trap.slots.memory_fault import prepare_closed_slots
from kvmdp.trap.slots.ram_slots import RamSlots
from kvmdp.trap.slots.slot_map import Block, Kind, Piece
from kvmdp.trap.uffd.marker import MarkerTrap


class LayeredTrap(MarkerTrap):
    """Absent pages lie in closed regions, or under markers in open ones; present ones in open regions."""

    name = "layered"
    needs_shared = True
    needs_small_pages = True
    suits_large = True
    is_pure = False
    repeats = False  # the first touch of a region is another exit than the rest

    @classmethod
    def make(cls, made_of: Materials) -> InspectedTrap:
        """Make one, not yet armed."""
        return cls(made_of.vm, made_of.slots, made_of.backing)

    def __init__(self, vm: Vm, slots: RamSlots, backing: Backing) -> None:
        prepare_closed_slots(vm, slots, self.name)
        super().__init__(slots, backing)

    def arm(self, pager: ForReaders) -> None:
        """Close the regions that have no present page, put markers on what is absent in the others."""
        self._slots.unmap()
        size, pages = self._slots.closed_pages, self._backing.size // PAGE_SIZE
        closed: list[Piece] = []
        for first, count in pager.bitmap.absent_runs().tolist():
            # Whole regions of it; RAM's end ends one too.
            low, end = -(-first // size) * size, first + count
            high = end if end == pages else end // size * size
            if low < high:
                closed += self._slots.pieces(low, high - low, Kind.CLOSED, size)
        self._slots.close_pieces(closed)
        self._open_rest(closed, pages)
        super(MarkerTrap, self).arm(pager)
        for block in self._slots.blocks():
            if block.kind is Kind.OPEN:
                self._mark_absent(block)

    def _open_rest(self, closed: list[Piece], pages: int) -> None:
        """Give ordinary slots, as large as can be, to what the closed ones leave."""
        page = 0
        for first, end in (*((piece.first, piece.end) for piece in closed), (pages, pages)):
            for piece in self._slots.pieces(page, first - page, Kind.OPEN):
                self._slots.open(piece.first, piece.pages)
            page = end

    def _mark_absent(self, block: Block) -> None:
        assert self._pager is not None
        page = block.first
        while (run := self._pager.bitmap.next_absent_run(page, block.end)) is not None:
            self._mark(*run)
            page = run[0] + run[1]

    def _mark(self, first: int, count: int) -> None:
        for start, number, uffd in self._pieces(first, count):
            uffd.poison(self._hva(start), number * PAGE_SIZE)

    def admit(self, first: int, count: int) -> None:
        """Map pages whose content is in place, after the first touch of their region has opened it.

        A thread that comes second waits until the slot is there: a page mapped before the markers were set would lose
        its place to nothing, but the markers' call would be cut short.
        """
        if any(block.kind is Kind.CLOSED for block in self._slots.overlapping(first, count)):
            assert self._pager is not None
            claim = self._slots.claim(first, count)
            try:
                closed = [each for each in self._slots.overlapping(first, count) if each.kind is Kind.CLOSED]
                for block in closed:
                    self._mark(block.first, block.pages)
                if closed:  # none, if another thread's fault has opened the region while this one waited
                    self._pager.gate.while_stopped(lambda: self._slots.flip_all(closed))
            finally:
                self._slots.release(claim)
        super().admit(first, count)

    def collapse(self, first: int, count: int) -> bool:
        """Put present pages together into huge ones, and their memslots with those around them; True if both are."""
        assert self._pager is not None
        done = super().collapse(first, count)
        self._slots.merge_upward(first, count, self._pager.gate.quiesced)
        return done and self._slots.blocks_in(first, count) == 1

    def picture(self) -> Picture:
        """What is absent is in closed regions, or under markers in open ones."""
        return dataclasses.replace(super().picture(), absent=frozenset((Kind.CLOSED, Kind.OPEN)))

    def disarm(self) -> None:
        """Make RAM plain memory, one slot a region of the layout."""
        super().disarm()
        self._slots.unmap()
        self._slots.map_plain()
