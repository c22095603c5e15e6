"""The memslots of guest RAM: one a region of the layout while RAM is plain, blocks of pages where a trap cuts them up.

A *closed* slot is bound to a guest_memfd whose descriptor has been closed: KVM cannot map it, so every vCPU
access exits with KVM_EXIT_MEMORY_FAULT. From the binding to the close the slot is live: a vCPU would read zeros
and its writes would vanish. So closed slots are made only while no vCPU is in KVM_RUN, and no descriptor of
that guest_memfd may survive anywhere. A child would keep the slot live that any thread of the process forks between
the two, until it execs: so a thread makes them whose descriptors no fork copies (`kvmdp.secluded`).

Memslots are changed only while no vCPU is in KVM_RUN, whatever the change:
- Closed to open is a delete and a create. A vCPU that looks between the two finds no slot, and KVM hands its access to
  the emulator. That looks for the memslot again, finds the new one, and retires the instruction with no exit at all;
  where it takes the instruction for another one (`lzcnt` for `bsr`), the result is wrong and nothing tells of it.
- Present pages, to a slot of another size: the emulator looks for the memslot more than once within one instruction,
  and a LOCK-prefixed one would lose another vCPU's update.
- Into closed: the slot is live between its binding and the close, as above.

Changes come from several threads. What spans the ioctls of one is a claim on its blocks (`RamSlots.claim`), not a
mutex: the mutex guards the map and the list of claims, for a few statements. The owner of a claim takes no second one
and waits for nothing but the kernel and the vCPUs' way out of KVM_RUN, where no thread waits for a claim.

Measured on Linux 6.18: a slot is kernel memory of 8.5 to 26 KB.

Units: RAM pages, unless a name says bytes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from kvmdp.abi.kvm import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_MEM_GUEST_MEMFD
from kvmdp.abi.kvm_cap import Cap
from kvmdp.abi.kvm_x86 import KVM_X86_QUIRK_SLOT_ZAP_ALL
from kvmdp.errors import PagingError
from kvmdp.kvm import Vm
from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import GuestLayout
from kvmdp.memory.mapping import Mapping
from kvmdp.page import HUGE_PAGE, PAGE_SIZE, REGION
from kvmdp.secluded import SecludedThread
from kvmdp.size import format_size
from kvmdp.trap.slots.slot_map import Block, Kind, Piece, SlotMap, SlotsExhaustedError
from kvmdp.waiting import Condition

MAX_GRANULE_SLOTS = 16384
MAX_GRANULE = 1 << 30
_MOST_REGIONS = 512

_FIRST_RAM_SLOT = 8  # below: the machine's own (boot slot)
_GUEST_MEMFD_FLAGS = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
_MAX_DELETES = 32  # slots that one stop of the vCPUs merges: it takes milliseconds at the most
_PARENTS = (32 * REGION, 1024 * REGION)  # 64 MiB and 2 GiB: what a merge goes on to, 32 to one each time

Quiesced = Callable[[], AbstractContextManager[None]]


def least_granule(layout: GuestLayout, page_size: int = PAGE_SIZE) -> int:
    """Return the smallest power-of-two granule, in bytes, that cuts RAM into at most 16,384 memslots.

    4 KiB in any case where the host has RAM in larger pages (`page_size`): a caller that takes those wants faults that
    are not.
    """
    granule = PAGE_SIZE
    if page_size > PAGE_SIZE:
        return granule
    while -(-layout.memory_bytes // granule) > MAX_GRANULE_SLOTS:
        granule *= 2
    return granule


def region_size(layout: GuestLayout) -> int:
    """Return how many bytes a closed memslot covers where pages trap in another way once their region was touched.

    2 MiB, or the least power of two that makes at most 512 of them. The first touch of a region costs several times
    what another does, for its memslot is replaced. With few regions that is a small share of all faults; the price is
    page tables, 2 KiB a MiB, for what a touched region has beside.
    """
    size = HUGE_PAGE
    while -(-layout.memory_bytes // size) > _MOST_REGIONS:
        size *= 2
    return size


def check_granule(granule: int, layout: GuestLayout) -> None:
    """Raise ValueError if `granule` bytes are no granule, or if the hole of the map is in the middle of one."""
    if granule < PAGE_SIZE or granule > MAX_GRANULE or granule & (granule - 1):
        raise ValueError(
            f"a granule of {format_size(granule)}: give a power of two from {format_size(PAGE_SIZE)} "
            f"to {format_size(MAX_GRANULE)}"
        )
    if layout.cuts(granule):
        hole = layout.low_ram_end
        raise ValueError(
            f"a granule of {format_size(granule)} reaches over RAM's hole at {format_size(hole)}: give at most "
            f"{format_size(hole & -hole)}"
        )


class RamSlots:
    """The memslots that put RAM into the VM's guest-physical space.

    `granule` is bytes; `count` is how many there are now, `spare` how many KVM has beyond those that close absent
    memory. A thread that changes blocks has claimed them, but for `map_plain` and `unmap`, which are for a time when no
    other is active. Where RAM is in a guest_memfd the open ones are bound to it: KVM then maps by that, and only its
    own accesses use the guest view.
    """

    def __init__(self, vm: Vm, layout: GuestLayout, backing: Backing, granule: int) -> None:
        check_granule(granule, layout)
        # Deleting a slot would otherwise throw away the page tables of the whole VM.
        vm.disable_quirks(KVM_X86_QUIRK_SLOT_ZAP_ALL)
        self.granule = granule
        self._vm = vm
        self._layout = layout
        self._guest = backing.guest
        self._guest_memfd = backing.guest_memfd
        self._mutex = threading.RLock()
        self._changed = Condition(self._mutex)
        ids = range(_FIRST_RAM_SLOT, vm.check_extension(Cap.NR_MEMSLOTS))
        self.spare = len(ids) - MAX_GRANULE_SLOTS
        self._map = SlotMap(ids, [region.offset // PAGE_SIZE for region in layout.regions])
        self._claims: list[tuple[int, int]] = []
        self._waiting = 0  # threads that wait for the end of a claim
        # What the memslot of a closed block names as its memory. KVM itself reads and writes there (its
        # emulator, its paravirtual MSRs), and must fail, not find unfilled memory.
        self._nothing = Mapping.reserved(layout.memory_bytes)
        self._closer: SecludedThread | None = None

    @property
    def count(self) -> int:
        """Memslots that RAM takes now."""
        return self._map.count

    @property
    def in_regions(self) -> bool:
        """Whether RAM has too many granules for a slot each: then absent memory is closed by larger blocks."""
        return -(-self._layout.memory_bytes // self.granule) > MAX_GRANULE_SLOTS

    @property
    def closed_pages(self) -> int:
        """Pages of the blocks that absent memory is closed by while nothing of it has been touched.

        A granule where that makes at most 16,384 slots, else the least power of two from 2 MiB that does.
        """
        pages = max(self.granule // PAGE_SIZE, REGION) if self.in_regions else self.granule // PAGE_SIZE
        while -(-self._layout.pages // pages) > MAX_GRANULE_SLOTS:
            pages *= 2
        return pages

    # Looking

    def blocks(self) -> list[Block]:
        """Return all blocks in the order of their pages."""
        with self._mutex:
            return self._map.blocks()

    def overlapping(self, first: int, count: int) -> list[Block]:
        """Return the blocks that hold any of these pages, ascending."""
        with self._mutex:
            return self._map.overlapping(first, count)

    def blocks_in(self, first: int, count: int) -> int:
        """Return how many blocks hold any of these pages."""
        with self._mutex:
            return self._map.blocks_in(first, count)

    def pieces(self, first: int, count: int, kind: Kind, size: int | None = None) -> list[Piece]:
        """Cut a run into pieces where RAM is not contiguous, and at the multiples of `size` pages."""
        return self._map.pieces(first, count, kind, size)

    # Claims

    # No context manager: a fault of the traps by memslot makes one claim, and a generator costs it 16 frames of Python.
    # No interruption comes between `claim` and the `try` behind it: the pager puts them off while a trap is at work.

    def claim(self, first: int, count: int) -> tuple[int, int]:
        """Be the only one to change the blocks that hold these pages, and what lies between them, until `release`.

        Returns what is to be released. Waits for claims on the same blocks.
        """
        with self._mutex:
            while True:
                claim = low, high = self._map.extent(first, count)
                for start, end in self._claims:
                    if start < high and low < end:
                        break
                else:
                    self._claims.append(claim)
                    return claim
                self._waiting += 1
                try:
                    self._changed.wait()
                finally:
                    self._waiting -= 1

    def release(self, claim: tuple[int, int]) -> None:
        """Undo one `claim`."""
        with self._mutex:
            self._claims.remove(claim)
            if self._waiting:
                self._changed.notify_all()

    # One block at a time

    def prepare_to_close(self) -> None:
        """Start the thread that makes closed slots; once. Raises OSError, as `SecludedThread`."""
        self._closer = SecludedThread(self._vm.fd, "closed-slots")

    def open(self, first: int, count: int) -> None:
        """Give pages without a slot an ordinary one: the guest sees their memory."""
        block = self._add(Piece(first, count, Kind.OPEN))
        try:
            self._set(block)
        except BaseException:
            self._remove(block)
            raise

    def flip(self, block: Block) -> None:
        """Replace the slot of a closed block, whose pages are absent, by an ordinary one."""
        self._vm.set_user_memory_region(block.slot, 0, 0, 0)
        try:
            self._set(block)
        except BaseException:
            self._remove(block)
            raise
        with self._mutex:
            self._map.flip(block, Kind.OPEN)

    def flip_all(self, blocks: Sequence[Block]) -> None:
        """Replace the slots of closed blocks by ordinary ones."""
        for block in blocks:
            self.flip(block)

    def delete(self, block: Block) -> None:
        """Take a slot away, whatever its kind; no vCPU is in its memory when this returns."""
        self._vm.set_user_memory_region(block.slot, 0, 0, 0)
        self._remove(block)

    def close_pieces(self, pieces: Sequence[Piece]) -> None:
        """Give pages without a slot closed ones. Only while no vCPU is in KVM_RUN.

        Only after `prepare_to_close`. Needs KVM_CAP_GUEST_MEMFD_FLAGS with GUEST_MEMFD_FLAG_MMAP.
        """
        if pieces:
            assert self._closer is not None
            self._closer.do(lambda: self._close_pieces(pieces))

    def _close_pieces(self, pieces: Sequence[Piece]) -> None:
        fd = self._vm.create_guest_memfd(sum(piece.pages for piece in pieces) * PAGE_SIZE, _GUEST_MEMFD_FLAGS)
        try:
            position = 0
            for piece in pieces:
                block = self._add(piece)
                try:
                    self._bind(block, self._nothing.hva, fd, position)
                except BaseException:
                    self._remove(block)
                    raise
                position += piece.pages * PAGE_SIZE
        finally:
            os.close(fd)

    def _add(self, piece: Piece) -> Block:
        try:
            with self._mutex:
                return self._map.add(piece)
        except SlotsExhaustedError as error:
            raise PagingError(f"{error}: give a larger granule") from None

    def _remove(self, block: Block) -> None:
        with self._mutex:
            self._map.remove(block)

    def _set(self, block: Block) -> None:
        """Make the ordinary slot of a block."""
        if self._guest_memfd >= 0:
            self._bind(block, self._guest.hva, self._guest_memfd, block.first * PAGE_SIZE)
            return
        gpa, offset = self._layout.gpa_of_page(block.first), block.first * PAGE_SIZE
        self._vm.set_user_memory_region(block.slot, gpa, block.pages * PAGE_SIZE, self._guest.hva + offset)

    def _bind(self, block: Block, hva: int, fd: int, position: int) -> None:
        """Make a slot that is bound to a guest_memfd; `hva` is that of RAM's first byte, `position` is bytes."""
        gpa, offset, size = (
            self._layout.gpa_of_page(block.first),
            block.first * PAGE_SIZE,
            block.pages * PAGE_SIZE,
        )
        self._vm.set_user_memory_region2(
            block.slot, gpa, size, hva + offset, KVM_MEM_GUEST_MEMFD, fd, position
        )

    # All of RAM

    def map_plain(self) -> None:
        """Put all of RAM in place, one slot a region of the layout; no other slot of RAM may exist."""
        for region in self._layout.regions:
            self.open(region.offset // PAGE_SIZE, region.size // PAGE_SIZE)

    def unmap(self) -> None:
        """Delete every slot of RAM."""
        for block in self.blocks():
            self.delete(block)

    # Cutting and merging

    def take_out(self, first: int, count: int) -> None:
        """Leave pages without a slot; what else was in their blocks keeps one of the same kind.

        Only while no vCPU is in KVM_RUN.
        """
        closed: list[Piece] = []
        for block in self.overlapping(first, count):
            self.delete(block)
            for left in block.without(first, first + count):
                if left.kind is Kind.OPEN:
                    self.open(left.first, left.pages)
                else:
                    closed.append(left)
        self.close_pieces(closed)

    def merge(self, first: int, count: int, quiesced: Quiesced, kind: Kind = Kind.OPEN) -> None:
        """Put the blocks of a kind that hold these pages together, where they are adjacent; call with no claim held.

        32 to one in each stop of the vCPUs, then those again, so that every stop is short. Their pages stay present, or
        absent, and need not be claimed of the pager: while no vCPU looks nothing else sees the slots.
        """
        merged = True
        while merged:
            merged, page, end = False, first, first + count
            while page < end:
                with self._mutex:
                    group = self._map.group(page, end, _MAX_DELETES, kind)
                if not group:
                    break
                low, page = group[0].first, group[-1].end
                claim = self.claim(low, page - low)
                try:
                    if self.overlapping(low, page - low) != group:
                        continue  # changed before they were claimed; the thread that did it sees to the rest
                    with quiesced():
                        for block in group:
                            self.delete(block)
                        if kind is Kind.OPEN:
                            self.open(low, page - low)
                        else:
                            self.close_pieces([Piece(low, page - low, kind)])
                finally:
                    self.release(claim)
                merged = True

    def merge_upward(self, first: int, count: int, quiesced: Quiesced) -> None:
        """Merge these pages' blocks, and go on with all that lies around them, as far as that is open altogether."""
        self.merge(first, count, quiesced)
        for pages in _PARENTS:
            low = first // pages * pages
            high = min(-(-(first + count) // pages) * pages, self._layout.pages)
            if not self._is_open(low, high - low):
                return
            self.merge(low, high - low, quiesced)
        if self._is_open(0, self._layout.pages):
            self.merge(0, self._layout.pages, quiesced)

    def _is_open(self, first: int, count: int) -> bool:
        with self._mutex:
            return self._map.is_open(first, count)

    def close(self) -> None:
        """Give back the reserved addresses; the slots themselves go with the VM, which is closed after this."""
        if self._closer is not None:
            self._closer.close()
        self._nothing.close()
