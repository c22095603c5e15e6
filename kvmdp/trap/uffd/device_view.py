"""The device view: a third mapping of guest RAM, on which user space makes plain loads and stores, present or not.

An access to an absent page sleeps in the kernel; a reader thread takes the fault from userfaultfd, resolves it through
the same pager as all others (`Origin.DEVICE`), and maps the page. User-mode faults are all it needs, so no privilege;
with none, a system call that is given an address of this view fails with EFAULT on an absent page.

Pages are mapped here when they are touched, not when they are admitted to the guest: a page that only vCPUs use costs
nothing here. A thread that maps holds a pin, and gets one only while the page is present and unclaimed. So what is
mapped has the source's bytes, and a revocation, which drains the pins first and then drops the page, leaves it
unmapped. A device that stores meanwhile faults after the drop, and what it stored before is in the memory file.

No wait in a circle: a vCPU never sleeps in userfaultfd, for neither memslots nor KVM's own accesses use this view.
So a memslot change, which waits for vCPUs that are inside KVM (`kvm->srcu`), never waits for a reader; and a reader
never waits for another's claim, because a fault on a claimed page is parked until the claim's end.

Units: RAM pages, unless a name says bytes.
"""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Callable, Sequence

from kvmdp.abi import userfaultfd as abi
from kvmdp.abi.libc import libc
from kvmdp.abi.mman import MADV_DONTDUMP, MADV_DONTFORK, MADV_NOHUGEPAGE
from kvmdp.errors import PagingError
from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import GuestLayout
from kvmdp.memory.mapping import Mapping
from kvmdp.memory.ram_map import RamMap
from kvmdp.page import PAGE_SIZE, Origin, Outcome, PageFault
from kvmdp.paging.claim import Waiter
from kvmdp.paging.ports import ForReaders
from kvmdp.trap.uffd.registered_view import UffdView
from kvmdp.waiting import Condition

_UNKNOWN = -1  # userfaultfd does not say which thread it was
_MODE = abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_MINOR
_FEATURES = abi.UFFD_FEATURE_MISSING_SHMEM | abi.UFFD_FEATURE_MINOR_SHMEM


class DeviceView:
    """Reads and writes guest RAM by guest-physical address, as a device in a thread of this process would.

    The copies are memmove on the view itself, called without the GIL. Nothing else will do: an access through a
    memoryview would sleep in the page fault with the GIL, which the reader needs to bring the page. A page that
    is mapped costs no look at the bitmap and no claim.

    Raises ValueError for addresses that are not RAM, PagingError once the machine is stopping; a write that raises
    that may have been done in part. An access sleeps as long as its page takes, also on a source that has failed, and
    until then no signal handler of Python's runs in its thread.
    """

    def __init__(self, layout: GuestLayout, view: Mapping) -> None:
        self._map = RamMap((each.gpa, each.size, each.offset) for each in layout.regions)
        self._view = view
        # Guards what follows; held for a few statements only.
        self._mutex = threading.RLock()
        self._changed = Condition(self._mutex)
        self._users: list[object] = []  # one of each access that is under way
        self._ended = False

    def read(self, gpa: int, length: int) -> bytes:
        """Return `length` bytes at `gpa`."""
        pieces = self._pieces(gpa, length)
        data = (ctypes.c_char * length)()
        self._copy([(ctypes.addressof(data) + start, hva, count) for hva, start, count in pieces])
        return data.raw

    def write(self, gpa: int, data: bytes) -> None:
        """Write `data` at `gpa`."""
        pieces = self._pieces(gpa, len(data))
        copy = (ctypes.c_char * len(data)).from_buffer_copy(data)
        self._copy([(hva, ctypes.addressof(copy) + start, count) for hva, start, count in pieces])

    def _pieces(self, gpa: int, length: int) -> list[tuple[int, int, int]]:
        """Cut a range at the ends of regions: (hva, offset in the range, bytes) each."""
        pieces, start = [], 0
        for offset, count in self._map.pieces(gpa, length):
            pieces.append((self._view.hva + offset, start, count))
            start += count
        return pieces

    def _copy(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Make copies, (to, from, bytes) each, while the view stays mapped.

        Raises PagingError if it ended before or meanwhile.
        """
        user = object()
        # What `kvmdp.interruption.undone` does. Not as a context manager: the traceback of an interruption at its exit
        # would keep it, and with it the user that `close` waits for.
        try:
            try:
                self._begin(user)
                for destination, source, count in moves:
                    libc.memmove(destination, source, count)
                ended = self._ended
            finally:
                self._leave(user)
        except BaseException:
            self._leave(user)
            raise
        if ended:
            raise PagingError("the device view ended during an access: the machine is stopping")

    def _begin(self, user: object) -> None:
        with self._mutex:
            if self._ended:
                raise PagingError("the device view has ended: the machine is stopping")
            self._users.append(user)

    def _leave(self, user: object) -> None:
        """Undo `_begin`, if it came to that; a second call does nothing."""
        with self._mutex:
            if user in self._users:
                self._users.remove(user)
                self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """Whether accesses raise PagingError from now on."""
        return self._ended

    def end(self) -> bool:
        """Let accesses go on in private memory, to an end that raises; wake the sleepers after this.

        Returns False, and does nothing, if it has been called before.
        """
        with self._mutex:
            if self._ended:
                return False
            # First: an access that finds it unset after its copy has copied from and to RAM.
            self._ended = True
        self._view.detach()
        return True

    def close(self) -> None:
        """Wait until no thread is in an access any more, and unmap; only after `end`."""
        with self._mutex:
            self._changed.wait_for(lambda: not self._users)
        self._view.close()


class DeviceFaults(UffdView):
    """Resolves the faults on a device view of its own making, `view`.

    Raises UnsupportedError where userfaultfd lacks minor faults on shared memory (Linux 5.14).
    """

    def __init__(self, layout: GuestLayout, backing: Backing, *, readers: int, shards: int) -> None:
        mapping = Mapping.shared(backing.fd, backing.size)
        try:
            for advice in (MADV_DONTFORK, MADV_DONTDUMP, MADV_NOHUGEPAGE):  # as the guest view
                mapping.advise(advice)
            super().__init__(
                mapping, backing.vmm, _FEATURES, _MODE, kernel_faults=False, readers=readers, shards=shards
            )
        except BaseException:
            mapping.close()
            raise
        self.view = DeviceView(layout, mapping)
        self._released = threading.Event()

    def arm(self, pager: ForReaders) -> None:
        """Register the view and start the readers; nothing is mapped from then on but by them."""
        super().arm(pager)
        self.drop(0, self._pages)

    def drop(self, first: int, count: int) -> None:
        """Take pages out of the view: the next access faults."""
        self._view.drop(first * PAGE_SIZE, count * PAGE_SIZE)

    def release(self) -> None:
        """End the view and wake the threads that sleep on it; a second call waits until the first has done so.

        Not by unregistering: an access woken so would find the hole of an absent page in the memory file and fill it
        with zeros, or store into a page that is being fetched. Not by markers: their SIGBUS would kill this process.
        """
        try:
            if not self.view.end():
                self._released.wait()
                return
            for first, count, uffd in self._pieces(0, self._pages):
                uffd.wake(self._hva(first), count * PAGE_SIZE)
        finally:
            self._released.set()

    def close(self) -> None:
        """Release, stop the readers, close the descriptors, unmap."""
        self.release()
        super().close()
        self.view.close()

    def _reader(self) -> Callable[[int, int], None]:
        return self._serve

    def _serve(self, address: int, _read: int) -> None:
        """Resolve a fault and map the page, or park it."""
        assert self._pager is not None
        page = (address - self._view.hva) // PAGE_SIZE
        uffd, hva = self._uffd_of(page), self._hva(page)
        outcome = self._pager.resolve_or_park(
            PageFault(page, Origin.DEVICE, _UNKNOWN), Waiter(lambda: uffd.wake(hva, PAGE_SIZE))
        )
        if outcome not in (Outcome.PRESENT, Outcome.ADMITTED):
            return  # parked, or never to come: then it sleeps until the machine stops
        if not self._pager.hold(page):
            uffd.wake(hva, PAGE_SIZE)  # claimed since: it faults again, and finds the claim
            return
        try:
            uffd.continue_(hva, PAGE_SIZE)
        except OSError as error:
            # The view has ended since, which has woken the sleeper: nothing registered lies there any more.
            if error.errno != errno.ENOENT or not self.view.ended:
                raise
        finally:
            self._pager.release(page)
