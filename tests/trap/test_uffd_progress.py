"""Ranged userfaultfd calls against a kernel that the test plays: with and without a word of progress."""

import ctypes
import errno

import pytest

from kvmdp.abi import userfaultfd as abi
from kvmdp.errors import PagingError, UnsupportedError
from kvmdp.trap.uffd import descriptor as uffd_module
from kvmdp.trap.uffd.descriptor import Uffd

PAGE = 4096
PAGES = 6
BASE = 0x7F0000000000
SOURCE = 0x6F0000000000

CALLS = {
    abi.UFFDIO_CONTINUE: (abi.uffdio_continue, "mapped"),
    abi.UFFDIO_POISON: (abi.uffdio_poison, "updated"),
    abi.UFFDIO_COPY: (abi.uffdio_copy, "copy"),
}
MAKE = {
    "UFFDIO_CONTINUE": lambda uffd: uffd.continue_(BASE, PAGES * PAGE),
    "UFFDIO_POISON": lambda uffd: uffd.poison(BASE, PAGES * PAGE),
    "UFFDIO_COPY": lambda uffd: uffd.copy(BASE, SOURCE, PAGES * PAGE),
}
every_call = pytest.mark.parametrize("call", list(MAKE))


class Kernel:
    """Takes each call as the next of `script` says, and from its end on as a whole; `done` are the pages it reached.

    An entry is how many pages it does before it says EAGAIN, and None to turn the call away with EAGAIN unlooked at:
    as kernels do that test for a discard under way before they read what they were given.
    """

    def __init__(self, *script):
        self.script = list(script)
        self.done = []
        self.calls = 0

    def __call__(self, _fd, number, argument):
        self.calls += 1
        kind, result = CALLS[number]
        request = ctypes.cast(argument, ctypes.POINTER(kind))[0]
        start, length = (
            (request.dst, request.len) if result == "copy" else (request.range.start, request.range.len)
        )
        if result == "copy":
            assert request.src - SOURCE == start - BASE
        step = self.script.pop(0) if self.script else length // PAGE
        if step is None:
            ctypes.set_errno(errno.EAGAIN)
            return -1
        first = (start - BASE) // PAGE
        self.done += range(first, first + step)
        setattr(request, result, step * PAGE or -errno.EAGAIN)
        if step * PAGE == length:
            return 0
        ctypes.set_errno(errno.EAGAIN)
        return -1


@pytest.fixture
def uffd():
    try:
        descriptor = Uffd(0, kernel_faults=False)
    except UnsupportedError as error:
        pytest.skip(str(error))
    yield descriptor
    descriptor.close()


@every_call
@pytest.mark.parametrize("script", [(2, None), (None, 2, None, None, 3, None), (0, 1, None, 0, None)])
def test_no_page_is_passed_over_where_a_call_is_turned_away_without_a_word_of_progress(uffd, call, script):
    uffd._ioctl = kernel = Kernel(*script)
    result = MAKE[call](uffd)
    assert kernel.done == list(range(PAGES))
    assert result in (PAGES * PAGE, True, None)


class Clock:
    """Time, which passes while a way is made, a second each time."""

    def __init__(self):
        self.now = 100.0
        self.ways = 0

    def make_way(self):
        self.now += 1
        self.ways += 1

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(uffd, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(uffd_module, "time", clock)
    uffd.on_again = clock.make_way
    return clock


@every_call
def test_a_call_that_is_told_to_try_again_for_ever_ends_in_a_sentence(uffd, clock, call):
    uffd._ioctl = kernel = Kernel(2, *[None] * 100)
    with pytest.raises(
        PagingError, match=f"{call} at {BASE + 2 * PAGE:#x} is told to try again for 30 seconds"
    ):
        MAKE[call](uffd)
    assert kernel.done == [0, 1]
    assert clock.ways == kernel.calls - 1  # before each new attempt, and the last


@every_call
def test_a_call_that_gets_on_has_patience_anew_with_every_page(uffd, clock, call):
    uffd._ioctl = kernel = Kernel(*[1, *[None] * 20] * (PAGES - 1))
    MAKE[call](uffd)
    assert clock.now > 160
    assert kernel.done == list(range(PAGES))
