"""A pager without a kernel: a trap that only remembers, and a source whose failures are the test's."""

import contextlib
import errno
import sys
import threading

from kvmdp.memory.layout import GuestLayout
from kvmdp.memory.mapping import Mapping
from kvmdp.page import PAGE_SIZE, PageFault
from kvmdp.paging.pager import Pager
from kvmdp.paging.policy import FaultAround
from kvmdp.source.base import SourceError, check_range
from kvmdp.vcpu.gate import VcpuGate

PAGES = 512  # the least memory there is


def content(page):
    """What the source has for a page."""
    return bytes((page % 251 + 1,)) * PAGE_SIZE


class FakeSource:
    """`fills` are the runs asked for; `before(first, count)` is called ahead of each and may raise.

    A long run lands by `pieces` pages, if that is not 0; `between(page)` is called before each piece but the first.
    """

    name = "the fake source"
    concurrency = 4
    pieces = 0

    def __init__(self, pages, extents=None):
        self.size = pages * PAGE_SIZE
        self._extents = [(0, pages)] if extents is None else extents
        self.fills = []
        self.before = lambda first, count: None
        self.between = lambda page: None

    def extents(self):
        return [(first * PAGE_SIZE, count * PAGE_SIZE) for first, count in self._extents]

    def fetch(self, request, destination):
        offset = request.offset
        check_range(self, offset, destination.nbytes)
        first, count = offset // PAGE_SIZE, destination.nbytes // PAGE_SIZE
        self.fills.append((first, count))
        self.before(first, count)
        for done, page in enumerate(range(first, first + count)):
            if self.pieces and done and done % self.pieces == 0:
                request.landed(done * PAGE_SIZE)
                self.between(page)
            destination[done * PAGE_SIZE : (done + 1) * PAGE_SIZE] = self.page(page)

    def page(self, page):
        return content(page)

    def close(self):
        pass


class FakeSink(FakeSource):
    """A source that takes pages, and gives them back as a FakeSource does; `full` is from which page on it refuses."""

    name = "the fake sink"
    full = None

    def __init__(self, pages):
        super().__init__(pages)
        self.stored = {}

    def page(self, page):
        return self.stored[page]

    def store(self, offset, content):
        for done in range(0, content.nbytes, PAGE_SIZE):
            page = (offset + done) // PAGE_SIZE
            if self.full is not None and page >= self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.stored[page] = bytes(content[done : done + PAGE_SIZE])


def source_error(first, count=1, *, transient=False):
    return SourceError(
        "the fake source", first * PAGE_SIZE, count * PAGE_SIZE, "the wire is cut", transient=transient
    )


class FakeTrap:
    """Knows which pages the guest may enter; calls that no trap could follow fail the test.

    `on_admit` and `on_revoke` are called in the middle of the call.
    """

    name = "fake"
    needs_quiesce = False
    memslots = 0
    latencies = ()
    collapses = True

    def __init__(self, pages, granule, memory):
        self.granule = granule
        self.fill_view = self.ram_view = memory.view
        self.populate = None
        self.entered = bytearray(pages)  # 1: the guest may enter
        self.calls = []
        self.armed = False
        self.on_admit = self.on_revoke = lambda first, count: None
        self._mutex = threading.Lock()

    def arm(self, presence):
        self.armed = True
        for page in range(len(self.entered)):
            self.entered[page] = presence.bitmap.test(page)

    def disarm(self):
        self.armed = False

    def _set(self, call, first, count, value):
        unit = self.granule // PAGE_SIZE
        assert self.armed
        assert first % unit == 0, "half a unit"
        assert count % unit == 0 or first + count == len(self.entered), "half a unit"
        with self._mutex:
            self.calls.append((call, first, count))
            assert set(self.entered[first : first + count]) == {1 - value}, (
                f"{call} of pages that are so already"
            )
            self.entered[first : first + count] = bytes([value]) * count

    def admit(self, first, count):
        self.on_admit(first, count)
        self._set("admit", first, count, 1)

    def revoke(self, first, count):
        self._set("revoke", first, count, 0)
        self.on_revoke(first, count)

    def reassert(self, first, count):
        self.calls.append(("reassert", first, count))
        return False

    def collapse(self, first, count):
        assert set(self.entered[first : first + count]) == {1}
        self.calls.append(("collapse", first, count))
        return True

    def forget(self, first, count):
        assert set(self.entered[first : first + count]) == {0}
        self.fill_view[first * PAGE_SIZE : (first + count) * PAGE_SIZE] = b"\xfe" * (count * PAGE_SIZE)

    def settle(self, timeout):
        return True

    def hold_sleepers(self, absent):
        assert all(set(self.entered[first : first + count]) == {0} for first, count in absent)

    def release_sleepers(self):
        pass

    def close(self):
        pass


@contextlib.contextmanager
def pager_of(
    pages=PAGES,
    *,
    granule=PAGE_SIZE,
    fault_around=1,
    extents=None,
    needs_quiesce=False,
    states=None,
    policy=None,
):
    """Make an enabled pager; its trap is `pager.trap`, its source `pager.source`."""
    source = FakeSource(pages, extents)
    with Mapping.anonymous(pages * PAGE_SIZE) as memory:
        trap = FakeTrap(pages, granule, memory)
        trap.needs_quiesce = needs_quiesce
        policy = policy or FaultAround(fault_around)
        pager = Pager(GuestLayout(pages * PAGE_SIZE), trap, source, policy, VcpuGate(), states)
        pager.source = source
        pager.enable()
        try:
            yield pager
        finally:
            pager.close()


def fill(pager, claim):
    """Put the bytes of a claim's pages in place, as its owner does."""
    pager.contents.fill(claim, PageFault(claim.first), lambda _claim, _fault, _page: None)


def page_of(pager, page):
    """The bytes of a page as they lie in RAM."""
    return bytes(pager.trap.fill_view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])


@contextlib.contextmanager
def switching_often():
    """Have Python change threads as often as it can, and not every few milliseconds only."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(*bodies):
    """Run the bodies at the same time; the first error comes out."""
    errors = []

    def guarded(body):
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def started(body):
    """Start `body` in a thread; join it with `finish`."""
    thread = threading.Thread(target=body)
    thread.start()
    return thread
