"""The memslots of guest RAM: one a region while RAM is plain, one a granule where the trap works by memslot.

A *closed* slot is bound to a guest_memfd whose descriptor has been closed: KVM cannot map it, so every vCPU
access exits with KVM_EXIT_MEMORY_FAULT. From the binding to the close the slot is live: a vCPU would read zeros
and its writes would vanish. So closed slots are made only while no vCPU is in KVM_RUN, and no descriptor of
that guest_memfd may survive anywhere: a copy held by a forked child would keep the slot live.

Measured on Linux 6.18 (kernel.md names the figures): a slot is kernel memory of 8.5 to 26 KB.

Units: bytes, unless a name says pages; granules are numbered in the order of RAM.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence

from kvmdp.abi.kvm import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CAP_NR_MEMSLOTS,
    KVM_MEM_GUEST_MEMFD,
)
from kvmdp.abi.kvm_x86 import KVM_X86_QUIRK_SLOT_ZAP_ALL
from kvmdp.kvm import Vm
from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import PAGE_SIZE, GuestLayout
from kvmdp.memory.mapping import Mapping
from kvmdp.memory.size import format_size

MAX_GRANULE_SLOTS = 16384
MAX_GRANULE = 1 << 30  # a granule must not reach over the hole at 3 GiB

_FIRST_RAM_SLOT = 8  # below: the machine's own (boot slot)
# What RAM can have where it is not known yet what this kernel allows: KVM_CAP_NR_MEMSLOTS on x86 since Linux 5.11.
MAX_SLOTS = 32764 - _FIRST_RAM_SLOT
_GUEST_MEMFD_FLAGS = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED


def least_granule(layout: GuestLayout) -> int:
    """Return the smallest power-of-two granule that cuts RAM into at most 16,384 memslots."""
    granule = PAGE_SIZE
    while -(-layout.memory_bytes // granule) > MAX_GRANULE_SLOTS:
        granule *= 2
    return granule


def check_granule(granule: int, layout: GuestLayout, available: int) -> None:
    """Raise ValueError if `granule` is no granule, or makes more slots of RAM than the `available` ones."""
    if granule < PAGE_SIZE or granule > MAX_GRANULE or granule & (granule - 1):
        raise ValueError(
            f"a granule of {format_size(granule)}: give a power of two from {format_size(PAGE_SIZE)} "
            f"to {format_size(MAX_GRANULE)}"
        )
    slots = -(-layout.memory_bytes // granule)
    if slots > available:
        raise ValueError(
            f"a granule of {format_size(granule)} cuts {format_size(layout.memory_bytes)} of RAM into {slots} "
            f"memslots, KVM has {available} for it: give a larger granule"
        )


class RamSlots:
    """The memslots that put `guest` (the guest view of RAM) into the VM's guest-physical space.

    Bound to `guest_memfd`, if RAM is in one: KVM then maps by that, and only its own accesses use the guest view.
    `count` is how many there are now. The caller serialises changes to one granule.
    """

    def __init__(
        self, vm: Vm, layout: GuestLayout, guest: Mapping, granule: int, guest_memfd: int = -1
    ) -> None:
        check_granule(granule, layout, vm.check_extension(KVM_CAP_NR_MEMSLOTS) - _FIRST_RAM_SLOT)
        # Deleting a slot would otherwise throw away the page tables of the whole VM.
        vm.disable_quirks(KVM_X86_QUIRK_SLOT_ZAP_ALL)
        self.granule = granule
        self._pages = granule // PAGE_SIZE
        self._vm = vm
        self._layout = layout
        self._guest = guest
        self._guest_memfd = guest_memfd
        self._used: set[int] = set()
        # What the memslot of a closed granule names as its memory. KVM itself reads and writes there (its
        # emulator, its paravirtual MSRs), and must fail, not find unfilled memory.
        self._nothing = Mapping.reserved(layout.memory_bytes)
        # (gpa, size, offset) a granule; the last one of a region may be smaller.
        self._granules = [
            (region.gpa + start, min(granule, region.size - start), region.offset + start)
            for region in layout.regions
            for start in range(0, region.size, granule)
        ]

    @property
    def count(self) -> int:
        """Memslots that RAM takes now."""
        return len(self._used)

    def granules(self, first: int, count: int) -> range:
        """Return the numbers of the granules that hold RAM pages [first, first + count)."""
        return range(first // self._pages, (first + count - 1) // self._pages + 1)

    def map_plain(self) -> None:
        """Put all of RAM in place, one slot a region; no other slot of RAM may exist."""
        for number, region in enumerate(self._layout.regions):
            self._create(number, region.gpa, region.size, region.offset)

    def unmap(self) -> None:
        """Delete every slot of RAM."""
        for number in sorted(self._used):
            self.delete(number)

    def open(self, number: int) -> None:
        """Give a granule that has no slot an ordinary one: the guest sees its memory."""
        gpa, size, offset = self._granules[number]
        self._create(number, gpa, size, offset)

    def delete(self, number: int) -> None:
        """Take a granule's slot away, whatever its kind; no vCPU is in its memory when this returns."""
        self._vm.set_user_memory_region(_FIRST_RAM_SLOT + number, 0, 0, 0)
        self._used.discard(number)

    def close_granules(self, numbers: Iterable[int]) -> None:
        """Give granules that have no slot a closed one. Only while no vCPU is in KVM_RUN.

        Needs KVM_CAP_GUEST_MEMFD_FLAGS with GUEST_MEMFD_FLAG_MMAP.
        """
        wanted = list(numbers)
        if not wanted:
            return
        total = sum(self._granules[number][1] for number in wanted)
        fd = self._vm.create_guest_memfd(total, _GUEST_MEMFD_FLAGS)
        try:
            position = 0
            for number in wanted:
                gpa, size, offset = self._granules[number]
                self._vm.set_user_memory_region2(
                    _FIRST_RAM_SLOT + number,
                    gpa,
                    size,
                    self._nothing.hva + offset,
                    KVM_MEM_GUEST_MEMFD,
                    fd,
                    position,
                )
                self._used.add(number)
                position += size
        finally:
            os.close(fd)

    def _create(self, number: int, gpa: int, size: int, offset: int) -> None:
        slot, hva = _FIRST_RAM_SLOT + number, self._guest.hva + offset
        if self._guest_memfd < 0:
            self._vm.set_user_memory_region(slot, gpa, size, hva)
        else:
            self._vm.set_user_memory_region2(
                slot, gpa, size, hva, KVM_MEM_GUEST_MEMFD, self._guest_memfd, offset
            )
        self._used.add(number)

    def close(self) -> None:
        """Give back the reserved addresses; the slots themselves go with the VM."""
        self._nothing.close()


class SlotTrap:
    """What the traps that work by memslot have in common."""

    latencies: Sequence[array[int]] = ()

    def __init__(self, slots: RamSlots, backing: Backing) -> None:
        self._slots = slots
        self._backing = backing

    @property
    def granule(self) -> int:
        """Bytes a memslot covers."""
        return self._slots.granule

    @property
    def fill_view(self) -> memoryview:
        """The VMM view: no page of it ever traps."""
        return self._backing.vmm.view

    @property
    def memslots(self) -> int:
        """How many memslots RAM takes now."""
        return self._slots.count

    def _populate(self, first: int, count: int) -> None:
        """Enter a run of pages, just admitted, into the guest view's page table.

        KVM maps the neighbours of the page it was asked for along with it, if it finds them there. One page has
        none, and KVM's own fault enters it for the same price.
        """
        if count > 1:
            self._backing.guest.populate(first * PAGE_SIZE, count * PAGE_SIZE)

    def disarm(self) -> None:
        """Replace the granules' slots by one a region."""
        self._slots.unmap()
        self._slots.map_plain()

    def forget(self, first: int, count: int) -> None:
        """Free the memory behind absent pages."""
        self._backing.forget(first * PAGE_SIZE, count * PAGE_SIZE)

    def reassert(self, first: int, count: int) -> None:
        """Do nothing: a slot does not go away by itself."""

    def release_sleepers(self) -> None:
        """Do nothing: an access to an absent page is an exit, nobody sleeps."""

    def close(self) -> None:
        """Give back the slots' reserved addresses."""
        self._slots.close()
