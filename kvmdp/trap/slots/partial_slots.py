"""The 2 MiB regions whose memslots are in pieces: merged when they are full, bounded in what they take of the kernel.

A region of which some pages are present and some absent takes a memslot for each of its pieces. When its last page
comes it is merged, with its neighbours as far as they are full too. When all partial regions together take more kernel
memory than they may, or more memslots than KVM can spare, the fullest are completed: what they lack is fetched, and
they are merged. Where not all of RAM may be present at once (`Job.most_at_once`) others would have to go for that, and
leave pieces: there the emptiest are shut off, which makes one memslot of each, unless a thread is at a page of it.

That is not done where the page becomes present, but by `after_fault`, with no claim held: it stops the vCPUs and may
fetch. One thread at a time does it, the others go on. It waits for no claim (`complete`, `shut_off`): its caller may
hold a pin on which the owner of a claim waits. An interruption is let in while it fetches, and else put off: it could
come between the memslots that are deleted and the one that replaces them.

Units: RAM pages; memory in bytes.
"""

from __future__ import annotations

import threading

from kvmdp.interruption import Interruptible, Uninterrupted
from kvmdp.page import REGION, Outcome
from kvmdp.paging.jobs import Job
from kvmdp.paging.ports import ForMemslots
from kvmdp.size import format_size
from kvmdp.trap.slots.ram_slots import RamSlots
from kvmdp.trap.slots.slot_map import Kind

SLOT_BYTES = 26 << 10  # kernel memory of a memslot, the most that was measured
DEFAULT_SLOT_MEMORY = 256 << 20
LEAST_SLOT_MEMORY = 2 * REGION * SLOT_BYTES  # room for a few regions in pieces
# What several threads may cut up before the one that keeps house has merged something: regions, each to its pages.
_MARGIN = 4 * REGION


def check_slot_memory(memory: int) -> None:
    """Raise ValueError if `memory` bytes are too little for the memslots of regions in pieces."""
    if memory < LEAST_SLOT_MEMORY:
        raise ValueError(
            f"{format_size(memory)} of kernel memory for memslots: give at least {format_size(LEAST_SLOT_MEMORY)}"
        )


class PartialRegions(Job):
    """Keeps count of the partial regions of `slots`, whose memslots may take `memory` bytes of the kernel's."""

    def __init__(self, slots: RamSlots, pager: ForMemslots, pages: int, memory: int) -> None:
        self._slots = slots
        self._pager = pager
        self._pages = pages
        self._most = min(memory // SLOT_BYTES, slots.spare - _MARGIN)
        self._mutex = threading.Lock()  # guards all that follows
        self._partial: dict[int, int] = {}  # region -> memslots that have pages of it
        self._taken = 0  # the sum of them
        self._full: set[int] = set()  # to be merged
        self._kept = False  # a thread is keeping house

    def changed(self, first: int, count: int) -> None:
        """Take note that the memslots of these pages are others now, or may be."""
        for region in range(first // REGION, (first + count - 1) // REGION + 1):
            # Pages whose trap is still being told count as there too: the thread that tells it comes here later.
            if self._recount(region):
                with self._mutex:
                    self._full.add(region)

    def _recount(self, region: int) -> bool:
        """Count a region's memslots anew; True if all its pages are present, and in more than one."""
        low, size = self._run(region)
        taken = self._slots.blocks_in(low, size)
        present = self._pager.bitmap.count_range(low, size)
        with self._mutex:
            self._taken -= self._partial.pop(region, 0)
            if taken > 1 or 0 < present < size:
                self._partial[region] = taken
                self._taken += taken
        return present == size and taken > 1

    def _run(self, region: int) -> tuple[int, int]:
        """Return (first, count) of a region's pages; the last may be smaller."""
        low = region * REGION
        return low, min(REGION, self._pages - low)

    def after_fault(self) -> None:
        """Merge the regions that are full, and complete some if too much is in pieces."""
        if (
            not self._full and self._taken <= self._most
        ):  # the usual case; a stale look is made good by the next
            return
        with Uninterrupted():
            self._keep_house()

    def _keep_house(self) -> None:
        with self._mutex:
            if self._kept:
                return  # that thread looks again before it leaves
            self._kept = True
        try:
            if self._taken > self._most:
                self._reduce()
            while self._merge_full():
                pass
        except BaseException:
            with self._mutex:
                self._kept = False
            raise

    def _merge_full(self) -> bool:
        """Merge one full region; False if there was none, and then this thread keeps house no longer."""
        with self._mutex:
            if not self._full:
                self._kept = False
                return False
            region = self._full.pop()
        low, size = self._run(region)
        self._slots.merge_upward(low, size, self._pager.gate.quiesced)
        self._recount(region)  # a page on its way in comes to `changed` itself
        return True

    def _reduce(self) -> None:
        """Complete the fullest regions, or shut off the emptiest, until there are a good part fewer pieces."""
        with self._mutex:
            partial = dict(self._partial)
            left = self._taken
        present, is_limited = self._pager.bitmap.count_range, self._pager.jobs.most_at_once is not None
        for region in sorted(partial, key=lambda each: present(*self._run(each)), reverse=not is_limited):
            if left <= self._most * 7 // 8:
                return
            low, size = self._run(region)
            if is_limited:
                self._pager.shut_off(low, size)
                self._slots.merge(low, size, self._pager.gate.quiesced, Kind.CLOSED)
                self._recount(region)
                left += self._partial.get(region, 0) - partial[region]
                continue
            with Interruptible():
                outcome = self._pager.complete(low, size)
            if outcome is not Outcome.PRESENT:
                return  # the machine stops, or the source has failed
            if self._recount(region):
                with self._mutex:
                    self._full.add(region)
                left -= partial[region]
