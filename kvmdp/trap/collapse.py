"""Small pages that are all present, put together into huge ones in the guest view (MADV_COLLAPSE, Linux 6.1).

What the kernel does with pages that are registered with userfaultfd depends on how they are: it puts a full region
together that is registered for missing and minor faults, and refuses (EINVAL) shared memory that is registered for
write protection too, and a hole in either. So a *region* of 2 MiB is collapsed in one order, which works with all of
them: all of its pages are present and claimed; it is unregistered; then its pages are put together, through the guest
view. That is more than private memory needs, or a kernel without write protection of shared memory. It is kept there
too: a region that is all present need not trap, nothing of it is then told to a reader that would have to look into it,
and one order is easier to be sure of than two. Both unsafe orders are in tests/jobs/test_collapse_orders.py, with
what is lost by them.

From there the region is plain memory, until one of its pages is to go. Then it is registered again (`Regions.reopen`),
which leaves the huge mapping in place. What the trap does next to that one page (MADV_DONTNEED) has the kernel split
the mapping. Exact while vCPUs run:

- Registering takes the mmap lock for writing, and the lock of each mapping (VMA) that it changes. A fault holds one of
  the two, for reading, from when it looks whether the mapping is registered until it has entered the page; if it lets
  go of it between it looks again. So none spans the registering: one that ended before has mapped what was present; one
  that begins after finds the page mapped, or goes to the reader.
- What KVM took from the page table without a fault it has to give back when the page is dropped (MMU notifier), as at
  every revocation.
- Shared memory's huge mapping is not split but taken out as a whole: the present pages around become MINOR faults, and
  the reader maps them one by one (it finds them present). So does it with what is absent: it finds that not present,
  and leaves it to the marker or to the claim's end. Private memory is split in place, and no vCPU runs meanwhile.
- Where userfaultfd is not told of the kernel's own faults there are no such events: a hole fails KVM_RUN (EFAULT).
  There no vCPU runs while a page is revoked, and before one does the whole region is made anew (`remap`): its present
  pages are mapped, the others under markers.
- Two threads that revoke pages of one region: the first registers it, the other waits for that, not for more. After it
  each drop and each marker is about its own page only: neither can undo what the other did. (Were the whole region
  dropped later than that, a marker set by the faster thread would go with it.)
- The kernel may refuse to unregister a region, and has done so for a part of it: then all of it is registered again.
  Nothing had been taken out of the page table, so nothing was missed.
- A reader may hold an event from before a region was unregistered, and then finds nothing registered there (ENOENT).
  Unregistering has woken the sleeper, which has looked again since: the event is of no use (`unless_plain`).

Where plain regions and registered ones alternate the view is as many mappings (VMAs) of the kernel's: two more for each
plain region, at the most, of which a process may have 65,530 in all (vm.max_map_count). What may be refused for want of
them is the collapse, never the registering of a region out of which a page has to go. So there are no more plain
regions than half of what is left: whichever of them are registered again, the mappings suffice.

Units: RAM pages. A region's number is its first page divided by 512.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections import Counter
from collections.abc import Callable, Iterator

from kvmdp.abi.mman import MADV_COLLAPSE, MADV_HUGEPAGE, MADV_NOHUGEPAGE
from kvmdp.errors import PagingError
from kvmdp.memory.mapping import Mapping, mappings_left
from kvmdp.page import HUGE_PAGE, PAGE_SIZE, REGION
from kvmdp.waiting import Condition

# The kernel says "again" while a thread looks at one of the pages, as KVM does for a moment at every fault.
_ATTEMPTS = 8
_SPARE_MAPPINGS = 1024  # for threads, and whatever else this process comes to need


def can_collapse(view: Mapping) -> bool:
    """Return whether a view can have huge pages, and this kernel has MADV_COLLAPSE."""
    if view.length < HUGE_PAGE:
        return False
    try:
        view.advise(MADV_COLLAPSE, 0, 0)  # of nothing: says only whether it is known
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def put_together(view: Mapping, first: int, count: int, *, thp: bool) -> bool:
    """Put whole regions of pages, of which userfaultfd knows nothing, together; True if all of them are.

    False where the kernel has no huge page to spare, or no mapping, or a page stays in use: then some of them may be.
    Without `thp` the kernel makes no huge page there by itself afterwards, as before.
    """
    offset, length = first * PAGE_SIZE, count * PAGE_SIZE
    try:
        view.advise(MADV_HUGEPAGE, offset, length)  # or MADV_NOHUGEPAGE, from the start, would forbid it
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.ENOMEM):  # both say that there are too many mappings
            raise
        return False
    try:
        return _collapse(view, offset, length)
    finally:
        if not thp:
            view.advise(MADV_NOHUGEPAGE, offset, length)  # leaves alone what has been put together


def _collapse(view: Mapping, offset: int, length: int) -> bool:
    for attempt in range(_ATTEMPTS):
        try:
            view.advise(MADV_COLLAPSE, offset, length)
            return True
        except OSError as error:
            # EAGAIN, EBUSY: a page is in use; ENOMEM: no huge page; EINVAL: pages that cannot be put together.
            if error.errno not in (errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EINVAL):
                raise
            if error.errno in (errno.ENOMEM, errno.EINVAL) or attempt == _ATTEMPTS - 1:
                break
    return False


class Regions:
    """Which regions of a guest view are plain memory for the time being.

    `register` and `unregister` do that to a run of pages; `thp` is the backing's. `remap`, if there is one, is called
    for a region that has just been registered again: no vCPU is in KVM_RUN then. `used` is True from the first collapse
    on: the view may consist of several mappings of the kernel's then, with borders between regions, and no call of
    userfaultfd's that maps or marks may reach over one.
    """

    def __init__(
        self,
        view: Mapping,
        register: Callable[[int, int], None],
        unregister: Callable[[int, int], None],
        *,
        remap: Callable[[int, int], None] | None,
        shared: bool,
        thp: bool,
    ) -> None:
        self.used = False
        self._thp = thp
        self._view = view
        self._register = register
        self._unregister = unregister
        self._remap = remap
        self._shared = shared
        self._mutex = threading.RLock()  # guards what follows; never held across a call of the kernel's
        self._changed = Condition(self._mutex)
        self._plain: set[int] = set()
        self._huge: set[int] = set()  # those of them that have been put together
        self._reopening: set[int] = set()
        self._reopened: Counter[int] = Counter()  # how often each has been
        self._most_plain: int | None = None  # known from the first collapse on

    def collapse(self, first: int, count: int) -> bool:
        """Make whole regions plain memory and put their pages together; True if that has been done to any of them.

        Not so to one that is together already, or that the kernel has no huge page or no mapping for.
        The caller has claimed every page, and all are present. Where it fails the region stays plain, or registered.
        """
        if first % REGION or count % REGION:
            raise ValueError(f"pages {first} to {first + count - 1} are not whole regions of {REGION}")
        done = [self._collapse(number) for number in range(first // REGION, (first + count) // REGION)]
        return any(done)

    def _collapse(self, number: int) -> bool:
        first = number * REGION
        self.used = True
        most = self._most_plain_regions()
        with self._mutex:
            if number in self._huge:
                return False
            plain = number in self._plain
            if not plain and len(self._plain) >= most:
                return False
            # Before it is so: a thread that finds a region plain, still registered, leaves out what is of no use.
            self._plain.add(number)
        if not plain:
            if not self._make_plain(number):
                return False
            if self._shared:
                # A reader may have set a marker on a page that it found claimed. The bytes are in the file.
                self._view.drop(first * PAGE_SIZE, REGION * PAGE_SIZE)
        done = put_together(self._view, first, REGION, thp=self._thp)
        if done:
            with self._mutex:
                self._huge.add(number)
        return done

    def _most_plain_regions(self) -> int:
        """Return how many regions may be plain at the same time."""
        if self._most_plain is None:
            self._most_plain = max(mappings_left() - _SPARE_MAPPINGS, 0) // 2
        return self._most_plain

    def _make_plain(self, number: int) -> bool:
        """Unregister a region; False if the kernel has no mapping for that, and it is registered as before."""
        first = number * REGION
        try:
            self._unregister(first, REGION)
        except OSError as error:
            self._register(first, REGION)
            self._note_registered(number)
            if error.errno != errno.ENOMEM:
                raise
            return False
        return True

    def _note_registered(self, number: int) -> None:
        with self._mutex:
            self._plain.discard(number)
            self._huge.discard(number)
            self._reopened[number] += 1

    def is_plain(self, page: int) -> bool:
        """Return whether the page's region is plain memory, or is about to be or to have been."""
        return page // REGION in self._plain

    def plain(self) -> frozenset[int]:
        """Return the regions that are plain memory."""
        with self._mutex:
            return frozenset(self._plain)

    def reopen(self, first: int, count: int) -> None:
        """Have accesses to the regions that hold these pages, which the caller has claimed, go to userfaultfd again.

        Waits for another thread that is at the same region; that one waits for no thread. Raises PagingError if the
        kernel has no mapping for it.
        """
        if not self._plain:
            return
        for number in range(first // REGION, (first + count - 1) // REGION + 1):
            with self._mutex:
                while number in self._reopening:
                    self._changed.wait()
                if number not in self._plain:
                    continue
                self._reopening.add(number)
            try:
                if not self._shared:
                    # What was discarded while it was plain memory is a hole, which reads as zeros.
                    self._view.populate(number * REGION * PAGE_SIZE, REGION * PAGE_SIZE)
                self._register(number * REGION, REGION)
                if self._remap is not None:
                    self._remap(number * REGION, REGION)
                self._note_registered(number)
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                raise PagingError(
                    f"no page of the 2 MiB from page {number * REGION} on can be taken away: they have been put "
                    "together, and this process may have no mapping more: raise the limit (sysctl "
                    "vm.max_map_count=262144), or put no pages together"
                ) from error
            finally:
                with self._mutex:
                    self._reopening.discard(number)
                    self._changed.notify_all()

    def registered(self) -> None:
        """Take note that all of the view has been registered; no vCPU runs."""
        with self._mutex:
            self._reopened.update(self._plain)
            self._plain.clear()
            self._huge.clear()

    @contextlib.contextmanager
    def unless_plain(self, first: int, count: int) -> Iterator[None]:
        """Map or mark these pages in the block, which is passed over if a region of theirs proves to be plain memory.

        For a thread without a claim on the pages: only a claim keeps a region as it is. One that was plain when the
        call failed either still is, or has been reopened since the block began.
        """
        numbers = range(first // REGION, (first + count - 1) // REGION + 1)
        with self._mutex:
            before = [self._reopened[number] for number in numbers] if self.used else [0] * len(numbers)
        try:
            yield
        except OSError as error:
            if error.errno != errno.ENOENT or not self._were_plain(numbers, before):
                raise

    def _were_plain(self, numbers: range, before: list[int]) -> bool:
        with self._mutex:
            return any(
                number in self._plain or self._reopened[number] != turns
                for number, turns in zip(numbers, before, strict=True)
            )
