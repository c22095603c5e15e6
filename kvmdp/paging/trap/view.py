"""A view of RAM registered with userfaultfd, and the threads that read its faults.

`UffdView` is what the guest view of the traps `marker` and `userfaultfd` and the device view of the hybrid traps
have in common, `UffdTrap` what these two traps share.

Shared memory is filled through the VMM view and mapped with UFFDIO_CONTINUE. It is registered MISSING as well as
MINOR: with MISSING alone the kernel could map the page cache's page behind our back. Private memory has no second
view, and shared memory registered MISSING alone must have no page in the page cache that is not present: both are
filled in a staging area, from where UFFDIO_COPY moves pages into place.

A page can go from the memory file while it is present, or between its fill and UFFDIO_CONTINUE: a peer in another
process may punch holes (fallocate), which no seal that leaves RAM writable forbids. It reads as zeros then, and the
machine goes on (`_fill_hole`).

Units: RAM pages, unless a name says bytes.
"""

from __future__ import annotations

import functools
import os
import select
import threading
import time
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Callable, Sequence

from kvmdp.abi import userfaultfd as abi
from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import PAGE_SIZE, REGION
from kvmdp.memory.mapping import Mapping
from kvmdp.paging.fault import PagingError
from kvmdp.paging.trap.base import Presence
from kvmdp.paging.trap.collapse import Regions, can_collapse
from kvmdp.paging.trap.picture import Picture
from kvmdp.paging.trap.slot_map import Kind
from kvmdp.paging.trap.slots import RamSlots
from kvmdp.paging.trap.uffd import Uffd, supported_features
from kvmdp.thread import JoinableThread

_BATCH = 32  # events taken with one read
_HELD_SECONDS = 0.001  # from one look whether there is room for a page to the next
_SETTLE_SECONDS = 0.0005  # from one look whether the readers are at work to the next


class UffdView(ABC):
    """A mapping of all of RAM whose faults on absent pages go to userfaultfd.

    `vmm` is the VMM view, `page_size` the bytes that can be mapped at the least: what is admitted, dropped or woken is
    whole units of that. `shards` descriptors share RAM out evenly; each has `readers` threads. Who derives from it
    says what an event means. `features` are of `UFFD_FEATURE_*`, `mode` is of `UFFDIO_REGISTER_MODE_*`.
    """

    def __init__(
        self,
        view: Mapping,
        vmm: Mapping,
        features: int,
        mode: int,
        *,
        kernel_faults: bool,
        page_size: int = PAGE_SIZE,
        readers: int = 1,
        shards: int = 1,
    ) -> None:
        self._view = view
        self._vmm = vmm
        self._mode = mode
        self._pages = view.length // PAGE_SIZE
        self._unit = page_size // PAGE_SIZE  # pages
        self._unit_bytes = page_size
        self._shard = -(-self._pages // (shards * self._unit)) * self._unit  # pages a descriptor has
        self._readers_each = readers
        self._readers: list[JoinableThread] = []
        self._at_work: set[int] = (
            set()
        )  # readers that are between an event and the next wait, by thread identifier
        self._wakeup = -1
        self._presence: Presence | None = None
        self._this_thread = threading.local()
        self._uffds: list[Uffd] = []
        try:
            for _ in range(-(-self._pages // self._shard)):
                self._uffds.append(Uffd(features, kernel_faults=kernel_faults, page_size=page_size))
                self._uffds[-1].on_again = self._make_way
                self._uffds[-1].on_hole = self._fill_hole
        except BaseException:
            self._close_descriptors()
            raise

    def arm(self, presence: Presence) -> None:
        """Register the view and start the readers."""
        self._presence = presence
        self.register()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        for shard, uffd in enumerate(self._uffds):
            for number in range(self._readers_each):
                name = f"uffd-reader-{shard}.{number}"
                self._readers.append(JoinableThread(functools.partial(self._read, uffd), name))
                self._readers[-1].start()

    def disarm(self) -> None:
        """Stop the readers and unregister the view."""
        self._stop_readers()
        self.unregister()

    def register(self) -> None:
        """Have faults on the view go to userfaultfd."""
        for first, count, uffd in self._pieces(0, self._pages):
            uffd.register(self._hva(first), count * PAGE_SIZE, self._mode)

    def unregister(self) -> None:
        """Make the view plain memory, which wakes whoever sleeps on it."""
        for first, count, uffd in self._pieces(0, self._pages):
            uffd.unregister(self._hva(first), count * PAGE_SIZE)

    def _hva(self, page: int) -> int:
        return self._view.hva + page * PAGE_SIZE

    def _page_of(self, hva: int) -> int:
        """Return the first page of the unit that an address is in."""
        page = (hva - self._view.hva) // PAGE_SIZE
        return page - page % self._unit

    def _fill_hole(self, hva: int) -> None:
        """Put a page of zeros where the memory file has none, though the page at `hva` is present.

        A peer that was handed the file can punch holes into it at any time, as it can write zeros. It must not be able
        to stop the machine with that. A load through the VMM view, which never traps, is enough; a store could undo
        somebody else's.
        """
        self._vmm.view[hva - self._view.hva]

    def _uffd_of(self, page: int) -> Uffd:
        return self._uffds[page // self._shard]

    def _pieces(self, first: int, count: int) -> list[tuple[int, int, Uffd]]:
        """Split a run of pages by the descriptors that have them: (first, count, descriptor)."""
        shard = self._shard
        if first // shard == (first + count - 1) // shard:  # always so with one descriptor
            return [(first, count, self._uffds[first // shard])]
        pieces = []
        end = first + count
        while first < end:
            border = min((first // shard + 1) * shard, end)
            pieces.append((first, border - first, self._uffds[first // shard]))
            first = border
        return pieces

    # The readers

    @abstractmethod
    def _reader(self) -> Callable[[int, int], None]:
        """Return what serves a fault at an address (hva) that was read at a time (ns), one a reader thread."""

    def _removed(self, start: int, end: int) -> None:  # noqa: B027 - most ask for no such event
        """Take note that the range (hva) is being discarded; only where that event was asked for."""

    def _read(self, uffd: Uffd) -> None:
        try:
            self._serve_until_stopped(uffd)
        except Exception as error:
            assert self._presence is not None
            self._presence.abort(PagingError(f"a userfaultfd reader broke: {error!r}"))
        finally:
            self._at_work.discard(threading.get_ident())

    def _serve_until_stopped(self, uffd: Uffd) -> None:
        messages = (abi.uffd_msg * _BATCH)()
        assert self._presence is not None
        presence, serve, reader = self._presence, self._reader(), threading.get_ident()
        is_present = presence.bitmap.test  # such a fault brings nothing in
        faults: deque[tuple[int, int]] = deque()  # address, when it was read

        def take() -> None:
            """Take what waits: note discards at once, keep faults for later."""
            count = uffd.read(messages)
            now = time.perf_counter_ns()
            for index in range(count):
                message = messages[index]
                if message.event == abi.UFFD_EVENT_PAGEFAULT:
                    faults.append((message.arg.pagefault.address, now))
                elif message.event == abi.UFFD_EVENT_REMOVE:
                    self._removed(message.arg.remove.start, message.arg.remove.end)

        self._this_thread.take = take
        with select.epoll(flags=select.EPOLL_CLOEXEC) as poll:
            # Of several readers of one descriptor the kernel wakes one.
            poll.register(uffd.fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            poll.register(self._wakeup, select.EPOLLIN)
            # Events are read in any case: who takes pages out to make room may wait until a discard has been read.
            while not any(fd == self._wakeup for fd, _ in poll.poll(_HELD_SECONDS if faults else None)):
                self._at_work.add(reader)
                take()
                while faults and (is_present(self._page_of(faults[0][0])) or presence.room(faults[0][1])):
                    serve(*faults.popleft())
                self._at_work.discard(reader)

    def _make_way(self) -> None:
        """Let a discard go on that the kernel wants finished before it maps anything (EAGAIN).

        Whoever discards sleeps until its event has been read. If the thread that is told to try again is the reader
        that has to read it, trying again is not enough.
        """
        take = getattr(self._this_thread, "take", None)
        if take is None:
            time.sleep(0)  # no reader: they will see to it
        else:
            take()

    def settle(self, timeout: float) -> bool:
        """Wait until no reader is at a fault whose sleeper it has woken; False after `timeout` seconds.

        A sleeper goes on before its reader has counted the fault, and can be done with everything by then.
        """
        deadline = time.monotonic() + timeout
        while self._at_work:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_SETTLE_SECONDS)
        return True

    def _stop_readers(self) -> None:
        if self._readers:
            os.eventfd_write(self._wakeup, 1)
            for reader in self._readers:
                reader.join()
            self._readers.clear()
            os.close(self._wakeup)

    def _close_descriptors(self) -> None:
        for uffd in self._uffds:
            uffd.close()

    def close(self) -> None:
        """Stop the readers and close the descriptors; the mapping belongs to whoever made it."""
        self._stop_readers()
        self._close_descriptors()


class UffdTrap(UffdView):
    """The guest view, registered; RAM has one plain memslot a region.

    With `minor`, which shared memory alone can have, pages are filled in the memory file and then mapped; without it
    in a staging area. `features` are what the trap needs beyond those of its memory.
    """

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
        self._staging: Mapping | None = None
        if not minor:
            try:
                # Of RAM's size, of which only what is on its way, or shut out, takes memory.
                self._staging = Mapping.anonymous(backing.size)
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
    def memslots(self) -> int:
        """How many memslots RAM takes now."""
        return self._slots.count

    def arm(self, presence: Presence) -> None:
        """Give RAM its memslots, register the guest view, start the readers."""
        if not self._slots.count:
            self._slots.map_plain()
        super().arm(presence)
        self._regions.registered()
        if self._staging is None and not self._hears_kernel:
            for first, count in presence.bitmap.present_runs().tolist():
                self._map(first, count)

    def _remap(self, first: int, count: int) -> None:
        """Map what is present of a region of shared memory, put markers on the rest; no vCPU is in KVM_RUN.

        What is not present is on its way out, by another thread, which drops and marks it once more. Should that come
        to nothing, because the page is in use, the marker is on a present page: `reassert` mends it at its first touch.
        """
        assert self._presence is not None
        self._view.drop(first * PAGE_SIZE, count * PAGE_SIZE)
        page, end = first, first + count
        while page < end:
            absent, number = self._presence.bitmap.next_absent_run(page, end) or (end, 0)
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
        """Put the pages of whole regions together into huge ones; see `kvmdp.paging.trap.collapse`.

        Plain memory from then on: who discards pages of it behind the pager's back is not noticed.
        """
        return self._regions.collapse(first, count)

    def admit(self, first: int, count: int) -> None:
        """Map pages whose content is in place, over nothing or over markers, and wake who sleeps on them."""
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
        if self._staging is not None or self._regions.is_plain(first):
            return False
        mapped = 0
        for start, number, uffd in self._pieces(first, count):
            mapped += uffd.continue_(self._hva(start), number * PAGE_SIZE)
        return mapped > 0

    def forget(self, first: int, count: int) -> None:
        """Give up the bytes of pages that were revoked, wherever they lie."""
        if self._staging is not None:
            self._staging.drop(first * PAGE_SIZE, count * PAGE_SIZE)
        else:
            self._backing.forget(first * PAGE_SIZE, count * PAGE_SIZE)

    def _stage(self, first: int, count: int) -> None:
        """Put aside the bytes of pages that are about to go, where there is a staging area: no vCPU is in KVM_RUN."""
        if self._staging is not None:
            start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
            self._staging.view[start:end] = self._backing.vmm.view[start:end]

    def picture(self) -> Picture:
        """All of RAM is in open memslots; what is absent is not mapped."""
        return Picture(self._slots.blocks(), frozenset((Kind.OPEN,)), self._view)

    def poison_absent(self) -> None:
        """Put markers on all that is absent: an access there is an exit.

        But for a page of a plain region whose revocation has only begun: it still lets the guest in.
        """
        assert self._presence is not None
        for first, count in self._presence.bitmap.absent_runs().tolist():
            for start, number, uffd in self._pieces(first, count):
                with self._regions.unless_plain(start, number):
                    uffd.poison(self._hva(start), number * PAGE_SIZE)

    def close(self) -> None:
        """Stop the readers, close the descriptors, give back the staging area."""
        super().close()
        if self._staging is not None:
            self._staging.close()
        self._slots.close()
