"""What the traps `marker` and `userfaultfd` share: the guest view registered with userfaultfd, filled, put together.

Shared memory is filled through the VMM view and mapped with UFFDIO_CONTINUE. It is registered MISSING as well as
MINOR: with MISSING alone the kernel could map the page cache's page behind our back. Private memory has no second
view, and shared memory registered MISSING alone must have no page in the page cache that is not present: both are
filled in a staging area, from where UFFDIO_COPY moves pages into place.

There the guest view is where the bytes are, and a caller that discards some of it (a balloon, by MADV_DONTNEED) takes
them from present pages. The kernel tells a reader first (UFFD_EVENT_REMOVE) and goes on when that is read, so that what
it is told of may be there for a moment still. From the event on the pages are ZERO, or their claim has a note of it. A
thread that makes one present in that very moment finds it there, and it goes all the same: then a present page has
nothing mapped, and reads as zeros, which is what was asked for. Its next access comes to a reader, or fails KVM_RUN
(EFAULT), and has zeros mapped (`reassert`). Only an access of this process itself must not meet it, which would sleep
in user space: so no device of this process may be at pages at the moment when a caller discards them without asking the
pager.

Units: RAM pages, unless a name says bytes.
"""

from __future__ import annotations

import threading
from array import array
from collections import Counter
from collections.abc import Callable, Sequence

from kvmdp.abi import userfaultfd as abi
from kvmdp.memory.backing import Backing
from kvmdp.page import PAGE_SIZE, REGION
from kvmdp.paging.ports import ForReaders
from kvmdp.trap.collapse import Regions, can_collapse
from kvmdp.trap.inspect import Picture
from kvmdp.trap.kind import TrapKind
from kvmdp.trap.slots.ram_slots import RamSlots
from kvmdp.trap.slots.slot_map import Kind
from kvmdp.trap.uffd.descriptor import Uffd, supported_features
from kvmdp.trap.uffd.registered_view import UffdView
from kvmdp.trap.uffd.staging import Staging


class UffdTrap(UffdView, TrapKind):
    """The guest view, registered; RAM has one plain memslot a region.

    With `minor`, which shared memory alone can have, pages are filled in the memory file and then mapped; without it
    in a staging area. `features` are what the trap needs beyond those of its memory.
    """

    registers = True
    latencies: Sequence[array[int]] = ()

    def __init__(
        self,
        slots: RamSlots,
        backing: Backing,
        features: int,
        *,
        minor: bool,
        kernel_faults: bool,
        readers: int = 1,
        shards: int = 1,
    ) -> None:
        mode = abi.UFFDIO_REGISTER_MODE_MISSING
        huge = backing.page_size > PAGE_SIZE
        if huge:
            features |= abi.UFFD_FEATURE_MISSING_HUGETLBFS
        elif backing.shared:
            features |= abi.UFFD_FEATURE_MISSING_SHMEM
        if minor:
            features |= abi.UFFD_FEATURE_MINOR_HUGETLBFS if huge else abi.UFFD_FEATURE_MINOR_SHMEM
            mode |= abi.UFFDIO_REGISTER_MODE_MINOR
        if supported_features() & features & abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM:
            mode |= abi.UFFDIO_REGISTER_MODE_WP
        if not minor:
            features |= abi.UFFD_FEATURE_EVENT_REMOVE
        super().__init__(
            backing.guest,
            backing.vmm,
            features,
            mode,
            kernel_faults=kernel_faults,
            page_size=backing.page_size,
            readers=readers,
            shards=shards,
        )
        self._slots = slots
        self._backing = backing
        self._hears_kernel = all(uffd.takes_kernel_faults for uffd in self._uffds)
        self._regions = Regions(
            backing.guest,
            self._register,
            self._unregister,
            # Private memory keeps its other pages mapped when a huge mapping is split.
            remap=self._remap if backing.shared and not self._hears_kernel else None,
            shared=backing.shared,
            thp=backing.thp,
        )
        self._mutex = threading.Lock()  # guards what follows
        # (start, end) hva of drops of our own that a reader has still to be told of
        self._own_drops: Counter[tuple[int, int]] = Counter()
        self._staging: Staging | None = None
        if not minor:
            try:
                self._staging = Staging(backing)
            except BaseException:
                self._close_descriptors()
                raise

    @property
    def granule(self) -> int:
        """A page of the backing: what userfaultfd maps as one."""
        return self._unit_bytes

    @property
    def needs_quiesce(self) -> bool:
        """Whether a vCPU could do harm or come to harm while pages are revoked.

        Pages must stand still while their bytes move to the staging area. Where there is none they need not, if a vCPU
        that meets a hole meanwhile sleeps until it is filled or marked; without events of the kernel's own faults
        KVM_RUN would fail.
        """
        return self._staging is not None or not self._hears_kernel

    @property
    def fill_view(self) -> memoryview:
        """The staging area, where there is one, else the VMM view."""
        return (self._staging or self._backing.vmm).view

    @property
    def ram_view(self) -> memoryview:
        """The VMM view; of private memory the guest view itself, where present pages do not trap."""
        return self._backing.vmm.view

    @property
    def populate(self) -> Callable[[int, int], None] | None:
        """What comes before a store in the VMM view; the staging area is ordinary memory."""
        return self._backing.populate if self._backing.refusable and self._staging is None else None

    @property
    def memslots(self) -> int:
        """How many memslots RAM takes now."""
        return self._slots.count

    def arm(self, pager: ForReaders) -> None:
        """Give RAM its memslots, register the guest view, start the readers."""
        if not self._slots.count:
            self._slots.map_plain()
        if not self._backing.shared:
            # What was discarded while it was plain memory is a hole, which reads as zeros.
            for first, count in pager.bitmap.present_runs().tolist():
                self._view.populate(first * PAGE_SIZE, count * PAGE_SIZE)
        super().arm(pager)
        self._regions.registered()
        if self._staging is None and not self._hears_kernel:
            for first, count in pager.bitmap.present_runs().tolist():
                self._map(first, count)

    def _remap(self, first: int, count: int) -> None:
        """Map what is present of a region of shared memory, put markers on the rest; no vCPU is in KVM_RUN.

        What is not present is on its way out, by another thread, which drops and marks it once more. Should that come
        to nothing, because the page is in use, the marker is on a present page: `reassert` mends it at its first touch.
        """
        assert self._pager is not None
        self._view.drop(first * PAGE_SIZE, count * PAGE_SIZE)
        page, end = first, first + count
        while page < end:
            absent, number = self._pager.bitmap.next_absent_run(page, end) or (end, 0)
            if page < absent:
                self._map(page, absent - page)
            for start, pages, uffd in self._pieces(absent, number) if number else ():
                uffd.poison(self._hva(start), pages * PAGE_SIZE)
            page = absent + number

    def _map(self, first: int, count: int) -> None:
        """Map present pages of shared memory, small ones, whatever is mapped there: one call passes over nothing."""
        self._view.drop(first * PAGE_SIZE, count * PAGE_SIZE)
        for start, number, uffd in self._pieces(first, count):
            uffd.continue_(self._hva(start), number * PAGE_SIZE)

    def _register(self, first: int, count: int) -> None:
        for start, number, uffd in self._pieces(first, count):
            uffd.register(self._hva(start), number * PAGE_SIZE, self._mode)

    def _unregister(self, first: int, count: int) -> None:
        for start, number, uffd in self._pieces(first, count):
            uffd.unregister(self._hva(start), number * PAGE_SIZE)

    def _pieces(self, first: int, count: int) -> list[tuple[int, int, Uffd]]:
        """Split a run of pages by the descriptors that have them, and by regions where these may differ."""
        pieces = super()._pieces(first, count)
        if not self._regions.used or first // REGION == (first + count - 1) // REGION:
            return pieces
        return [
            (max(start, page), min(start + number, page + REGION) - max(start, page), uffd)
            for start, number, uffd in pieces
            for page in range(start // REGION * REGION, start + number, REGION)
        ]

    @property
    def collapses(self) -> bool:
        """Whether small pages can be put together: not where an absent page has to be a hole of the memory file.

        For a hole cannot be punched for certain into a huge page.
        """
        backing = self._backing
        return backing.transparent and can_collapse(backing.guest) and not (self._staging and backing.shared)

    def collapse(self, first: int, count: int) -> bool:
        """Put the pages of whole regions together into huge ones; see `kvmdp.trap.collapse`.

        Plain memory from then on: a discard of its pages behind the pager's back is not noticed.
        """
        return self._regions.collapse(first, count)

    def admit(self, first: int, count: int) -> None:
        """Map pages whose content is in place, over nothing or over markers, and wake the vCPUs that sleep on them."""
        for start, number, uffd in self._pieces(first, count):
            length = number * PAGE_SIZE
            if self._staging is None:
                uffd.continue_(self._hva(start), length)
            else:
                uffd.copy(self._hva(start), self._staging.hva + start * PAGE_SIZE, length)
                self._staging.drop(start * PAGE_SIZE, length)

    def reassert(self, first: int, count: int) -> bool:
        """Map present pages that something took out of the page table, or put a marker over; True if there were any.

        A marker trap's reader can: it sees a fault, finds the page not admitted yet, and sets the marker after the
        admit, if the page was taken out of the page table once more between the two.
        """
        if self._regions.is_plain(first):
            return False
        mended = [self._map_again(uffd, start, number) for start, number, uffd in self._pieces(first, count)]
        return any(mended)

    def _map_again(self, uffd: Uffd, first: int, count: int) -> bool:
        """Map present pages, claimed or pinned, of which something is not mapped any more; True if there was any such.

        What was mapped from the staging area has gone with its bytes: it reads as zeros, as that area does now.
        """
        hva, length = self._hva(first), count * PAGE_SIZE
        if self._staging is None:
            return uffd.continue_(hva, length) > 0
        if self._backing.shared:
            # A page that the memory file holds is mapped without an event: this one was a hole.
            for page in range(first, first + count, self._unit):
                self._fill_hole(self._hva(page))
            uffd.wake(hva, length)
            return False
        return uffd.copy(hva, self._staging.hva + first * PAGE_SIZE, length) > 0

    def _drop(self, first: int, count: int) -> None:
        """Unmap pages, leaving word for the reader that is told of it, if one is, that this loses nothing.

        Such a drop sleeps until a reader has taken the event that announces it, and may be over before the reader looks
        at it.
        """
        for start, number, _ in self._pieces(first, count):
            self._announce(start, number)
            self._view.drop(start * PAGE_SIZE, number * PAGE_SIZE)

    def _announce(self, first: int, count: int) -> None:
        with self._mutex:
            self._own_drops[self._hva(first), self._hva(first + count)] += 1

    def _removed(self, start: int, end: int) -> None:
        """Take note that a balloon, say, discards a range of the guest view: it reads as zeros from now on."""
        assert self._pager is not None
        with self._mutex:
            announced = self._own_drops.get((start, end), 0)
            if announced > 1:
                self._own_drops[start, end] = announced - 1
            elif announced:
                del self._own_drops[start, end]
            if announced:
                return
        first = (start - self._view.hva) // PAGE_SIZE
        self._pager.note_discarded(first, (end - start) // PAGE_SIZE)

    def forget(self, first: int, count: int) -> None:
        """Give up the bytes of pages that were revoked, wherever they lie."""
        if self._staging is not None:
            self._staging.drop(first * PAGE_SIZE, count * PAGE_SIZE)
        else:
            self._backing.forget(first * PAGE_SIZE, count * PAGE_SIZE)

    def _stage(self, first: int, count: int) -> None:
        """Put aside the bytes of pages that are about to go, where there is a staging area: no vCPU is in KVM_RUN."""
        if self._staging is not None:
            self._staging.save(first * PAGE_SIZE, count * PAGE_SIZE)

    def picture(self) -> Picture:
        """All of RAM is in open memslots; what is absent is not mapped."""
        staged = self._staging is not None
        return Picture(
            self._slots.blocks(),
            frozenset((Kind.OPEN,)),
            self._view,
            is_only_copy=staged and not self._backing.shared,
            plain=self._regions.plain(),
            file=self._backing.vmm if staged and self._backing.shared else None,
        )

    def poison_absent(self) -> None:
        """Put markers on all that is absent: an access there is an exit.

        But for a page of a plain region whose revocation has only begun: it still lets the guest in.
        """
        assert self._pager is not None
        for first, count in self._pager.bitmap.absent_runs().tolist():
            for start, number, uffd in self._pieces(first, count):
                with self._regions.unless_plain(start, number):
                    uffd.poison(self._hva(start), number * PAGE_SIZE)

    def close(self) -> None:
        """Stop the readers, close the descriptors, give back the staging area."""
        super().close()
        if self._staging is not None:
            self._staging.close()
        self._slots.close()
