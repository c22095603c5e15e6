"""Small pages that are all present, put together into huge ones in the guest view (MADV_COLLAPSE, Linux 6.1).

The kernel refuses to put pages together whose faults go to userfaultfd, and is free to lose markers where it is not
refused. So a *region* of 2 MiB is collapsed in one order only: all of its pages are present and claimed; it is
unregistered; then its pages are put together, through the guest view. From there it is plain memory: nothing of it
traps or is told to a reader, and nothing need be, until one of its pages is to go. Both unsafe orders are in
tests/machine/test_collapse_orders.py, with what is lost by them.

Before a page of a plain region goes it is registered again (`Regions.reopen`), which leaves the huge mapping in place.
What the trap does next to that one page (MADV_DONTNEED) has the kernel split the mapping. Exact while vCPUs run:

- Registering takes the mmap lock for writing, so no fault spans it. One that ended before has mapped what was present;
  one that begins after finds the page mapped, or goes to the reader.
- Shared memory's huge mapping is not split but taken out as a whole: the present pages around become MINOR faults, and
  the reader maps them one by one (it finds them present). So does it with what is absent: it finds that not present,
  and leaves it to the marker or to the claim's end. Private memory is split in place, and no vCPU runs meanwhile.
- Two threads that revoke pages of one region: the first registers it, the other waits for that, not for more. After it
  each drop and each marker is about its own page only: neither can undo what the other did. (Were the whole region
  dropped, a marker set by the faster thread would go with it.)
- A reader may hold an event from before a region was unregistered, and then finds nothing registered there (ENOENT).
  Unregistering has woken whoever slept, who has looked again since: the event is of no use (`unless_plain`).

Units: RAM pages. A region's number is its first page divided by 512.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator

from kvmdp.abi.mman import MADV_COLLAPSE, MADV_HUGEPAGE, MADV_NOHUGEPAGE
from kvmdp.memory.layout import PAGE_SIZE
from kvmdp.memory.mapping import HUGE_PAGE, Mapping

REGION = HUGE_PAGE // PAGE_SIZE
# The kernel says "again" while somebody looks at one of the pages, as KVM does for a moment at every fault.
_ATTEMPTS = 8


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


def put_together(view: Mapping, first: int, count: int) -> bool:
    """Put whole regions of pages, of which userfaultfd knows nothing, together; True if all of them are.

    False where the kernel has no huge page to spare, or a page stays in use: then some of the regions may be.
    """
    offset, length = first * PAGE_SIZE, count * PAGE_SIZE
    view.advise(MADV_HUGEPAGE, offset, length)
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

    `register` and `unregister` do that to a run of pages; `thp` is the backing's. `used` is True from the first
    collapse on: the view may consist of several mappings of the kernel's then, with borders between regions, and no
    call of userfaultfd's that maps or marks may reach over one.
    """

    def __init__(
        self,
        view: Mapping,
        register: Callable[[int, int], None],
        unregister: Callable[[int, int], None],
        *,
        shared: bool,
        thp: bool,
    ) -> None:
        self.used = False
        self._thp = thp
        self._view = view
        self._register = register
        self._unregister = unregister
        self._shared = shared
        self._changed = threading.Condition()  # guards what follows; never held across a call of the kernel's
        self._plain: set[int] = set()
        self._huge: set[int] = set()  # those of them that have been put together
        self._reopening: set[int] = set()

    def collapse(self, first: int, count: int) -> bool:
        """Make whole regions plain memory and put their pages together; True if that has been done to any of them.

        Not so to one that is together already, or that the kernel has no huge page for.
        The caller has claimed every page, and all are present. Where it fails the region stays plain.
        """
        if first % REGION or count % REGION:
            raise ValueError(f"pages {first} to {first + count - 1} are not whole regions of {REGION}")
        done = [self._collapse(number) for number in range(first // REGION, (first + count) // REGION)]
        return any(done)

    def _collapse(self, number: int) -> bool:
        first = number * REGION
        self.used = True
        with self._changed:
            if number in self._huge:
                return False
            plain = number in self._plain
            # Before it is so: who finds a region plain that is still registered leaves undone what nobody needs.
            self._plain.add(number)
        if not plain:
            self._unregister(first, REGION)
            if self._shared:
                # A reader may have set a marker on a page that it found claimed. The bytes are in the file.
                self._view.drop(first * PAGE_SIZE, REGION * PAGE_SIZE)
        done = put_together(self._view, first, REGION)
        if done:
            with self._changed:
                self._huge.add(number)
        return done

    def is_plain(self, page: int) -> bool:
        """Return whether the page's region is plain memory, or is about to be or to have been."""
        return page // REGION in self._plain

    def reopen(self, first: int, count: int) -> None:
        """Have accesses to the regions that hold these pages, which the caller has claimed, go to userfaultfd again.

        Waits for another thread that is at the same region; that one waits for nobody.
        """
        if not self._plain:
            return
        for number in range(first // REGION, (first + count - 1) // REGION + 1):
            with self._changed:
                while number in self._reopening:
                    self._changed.wait()
                if number not in self._plain:
                    continue
                self._reopening.add(number)
            try:
                self._small_pages(number)
                self._register(number * REGION, REGION)
                with self._changed:
                    self._plain.discard(number)
                    self._huge.discard(number)
            finally:
                with self._changed:
                    self._reopening.discard(number)
                    self._changed.notify_all()

    def registered(self) -> None:
        """Take note that all of the view has been registered; no vCPU runs."""
        with self._changed:
            plain = sorted(self._plain)
            self._plain.clear()
            self._huge.clear()
        for number in plain:
            self._small_pages(number)

    def _small_pages(self, number: int) -> None:
        """Have the kernel put no huge page there by itself any more, unless it may everywhere."""
        if not self._thp:
            self._view.advise(MADV_NOHUGEPAGE, number * HUGE_PAGE, HUGE_PAGE)

    @contextlib.contextmanager
    def unless_plain(self) -> Iterator[None]:
        """Map or mark pages of one region in the block, which is passed over if that is plain memory.

        For whoever has no claim on the pages: only a claim keeps a region as it is.
        """
        try:
            yield
        except OSError as error:
            if error.errno != errno.ENOENT or not self.used:
                raise
