"""Pages that go away: evicted ones come back as they were, discarded ones as zeros, poisoned ones not at all."""

import contextlib
import ctypes
import threading

import numpy as np
import pytest
from harness import MEMORY, SEED, TIMEOUT, every_trap, every_trap_and_backing, make_machine

from kvmdp.errors import BusyError, PagingError, PoisonedError
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.claim import State
from kvmdp.source.base import read_pages
from kvmdp.source.image import WritableImageSource
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

IMAGE = read_pages(SyntheticSource(MEMORY, SEED), np.arange(MEMORY // PAGE_SIZE)).tobytes()
ZEROS = bytes(PAGE_SIZE)


def page_of_image(page):
    return IMAGE[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


@every_trap_and_backing
def test_evicted_pages_come_back_as_they_were(trap, backing):
    with make_machine(trap, backing) as machine:
        machine.memory.write(5 * PAGE_SIZE + 100, b"written")
        machine.memory.read(0, 8 * PAGE_SIZE)
        resident = machine.pager.ledger.resident
        assert machine.pager.evict(4, 8) == 4
        assert machine.pager.ledger.resident == resident - 4
        assert not machine.pager.bitmap.test(5)
        assert machine.memory.read(5 * PAGE_SIZE + 100, 7) == b"written"
        assert machine.memory.read(6 * PAGE_SIZE, PAGE_SIZE) == page_of_image(6)
        counters = machine.pager.counters
        assert (counters.pages_evicted, counters.pages_refetched, counters.pages_fetched) == (4, 2, 8)


@every_trap
def test_pages_that_are_only_shut_off_can_be_evicted(trap):
    with make_machine(trap) as machine:
        machine.memory.write(3 * PAGE_SIZE, b"kept")
        machine.pager.mark_nonpresent(3, 1)
        assert machine.pager.evict(3, 1) == 1
        assert machine.memory.read(3 * PAGE_SIZE, 4) == b"kept"


@every_trap_and_backing
def test_discarded_pages_read_as_zeros_whatever_they_were(trap, backing):
    with make_machine(trap, backing) as machine:
        for page in (0, 1, 2):
            machine.memory.read(page * PAGE_SIZE, 8)
        machine.pager.mark_nonpresent(1, 1)
        machine.pager.evict(2, 1)
        assert machine.pager.discard(0, 4) == 4
        assert machine.memory.read(0, 4 * PAGE_SIZE) == bytes(4 * PAGE_SIZE)
        assert machine.memory.read(4 * PAGE_SIZE, PAGE_SIZE) == page_of_image(4)
        assert machine.pager.discard(3, 1) == 1
        assert machine.pager.discard(3, 1) == 0


@every_trap
def test_what_has_been_come_for_since_it_was_shut_off_is_not_evicted(trap):
    with make_machine(trap) as machine:
        machine.memory.read(0, 8 * PAGE_SIZE)
        machine.pager.mark_nonpresent(1, 4)
        machine.memory.write(2 * PAGE_SIZE, b"kept")
        assert machine.pager.evict_shut_off(0, 8) == 3
        states = machine.pager.ledger.states[:8]
        assert [page for page in range(8) if states[page] == State.SINK] == [1, 3, 4]
        assert states.count(State.PRESENT) == 5
        assert machine.memory.read(2 * PAGE_SIZE, 4, nowait=True) == b"kept"


@pytest.mark.parametrize(
    ("trap", "backing"),
    [
        *((trap, "memfd") for trap in ("memory-fault", "marker", "layered")),
        *(
            (trap, backing)
            for trap in ("memory-fault", "mmio")
            for backing in ("anonymous", "guest-memfd", "file")
        ),
    ],
)
def test_the_memory_of_evicted_pages_is_freed(trap, backing):
    with make_machine(trap, backing) as machine:
        machine.memory.read(0, 64 * PAGE_SIZE)
        assert in_memory(machine)[:64] == b"\1" * 64
        machine.pager.evict(0, 32)
        machine.pager.discard(32, 16)
        assert in_memory(machine)[:64] == bytes(48) + b"\1" * 16


def in_memory(machine):
    """A byte for each page of RAM that says whether the host has memory for it."""
    found = (ctypes.c_ubyte * machine.layout.pages)()
    view = machine.backing.vmm
    if ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(view.hva), ctypes.c_size_t(view.length), found
    ):
        raise OSError(ctypes.get_errno(), "mincore")
    return bytes(each & 1 for each in found)


@every_trap
def test_pages_go_back_to_an_image_that_takes_them(trap, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(IMAGE)
    with (
        contextlib.closing(WritableImageSource(path)) as source,
        make_machine(trap, source=source) as machine,
    ):
        machine.memory.write(7 * PAGE_SIZE, b"back")
        assert machine.pager.write_back(7, 1) == 1
        assert path.read_bytes() == IMAGE[: 7 * PAGE_SIZE] + b"back" + IMAGE[7 * PAGE_SIZE + 4 :]
        assert machine.pager.ledger.states[7] == State.SOURCE
        assert machine.memory.read(7 * PAGE_SIZE, 4) == b"back"


def test_a_source_that_takes_no_pages_says_so():
    with make_machine("mmio") as machine, pytest.raises(PagingError, match="takes no pages back"):
        machine.pager.write_back(0, 1)


def test_pages_behind_the_end_of_the_image_cannot_go_back(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(IMAGE[: 100 * PAGE_SIZE])
    with (
        contextlib.closing(WritableImageSource(path)) as source,
        make_machine("mmio", source=source) as machine,
    ):
        machine.memory.write(100 * PAGE_SIZE, b"kept")
        machine.memory.write(99 * PAGE_SIZE, b"back")
        with pytest.raises(PagingError, match="ends at 0x64000, before page 100 of RAM"):
            machine.pager.write_back(99, 2)
        assert machine.pager.write_back(99, 1) == 1
        assert machine.memory.read(99 * PAGE_SIZE, PAGE_SIZE + 4).endswith(b"kept")
        assert path.stat().st_size == 100 * PAGE_SIZE


@every_trap_and_backing
def test_poison(trap, backing):
    with make_machine(trap, backing) as machine:
        machine.memory.read(0, 2 * PAGE_SIZE)
        assert machine.pager.poison(1) == (1, 1)
        assert machine.pager.poison(9) == (9, 1)
        for page in (1, 9):
            with pytest.raises(PoisonedError, match=f"{page * PAGE_SIZE:#x} is poisoned"):
                machine.memory.read(page * PAGE_SIZE, 8)
        with pytest.raises(PagingError, match="poisoned already"):
            machine.pager.poison(1)
        assert machine.memory.read(2 * PAGE_SIZE, 8) == page_of_image(2)[:8]
        machine.pager.unpoison(1, b"new!" * 1024)
        assert machine.memory.read(PAGE_SIZE, PAGE_SIZE) == b"new!" * 1024
        with pytest.raises(PagingError, match="not poisoned"):
            machine.pager.unpoison(1, ZEROS)


def test_what_cannot_be_taken_away():
    with make_machine("marker") as machine:
        with pytest.raises(ValueError, match="of RAM"):
            machine.pager.evict(MEMORY // PAGE_SIZE - 1, 2)
        with machine.memory.view(0, 8):
            for take in (machine.pager.evict, machine.pager.discard):
                with pytest.raises(BusyError):
                    take(0, 1, timeout=0.05)
            with pytest.raises(BusyError):
                machine.pager.poison(0, timeout=0.05)
        assert machine.memory.read(0, PAGE_SIZE) == page_of_image(0)


class FullSink:
    """Takes nothing."""

    def store(self, offset, content):
        raise OSError(28, "No space left on device")

    def close(self):
        pass


@every_trap_and_backing
def test_a_sink_that_is_full_loses_nothing(trap, backing):
    with make_machine(trap, backing) as machine:
        machine.pager.sink = FullSink()
        machine.memory.write(0, b"kept")
        with pytest.raises(PagingError, match="stay in RAM"):
            machine.pager.evict(0, 1)
        assert machine.pager.error is None
        assert machine.memory.read(0, 4) == b"kept"


class Held(SyntheticSource):
    """Holds the fetch of page 3 until it is let go."""

    def __init__(self):
        super().__init__(MEMORY, SEED)
        self.asked, self.released = threading.Event(), threading.Event()

    def fetch(self, request, destination):
        offset = request.offset
        if offset == 3 * PAGE_SIZE:
            self.asked.set()
            assert self.released.wait(TIMEOUT)
        super().fetch(request, destination)


@every_trap
def test_who_takes_pages_that_are_in_ram_does_not_wait_for_one_that_is_being_fetched(trap):
    source = Held()
    with make_machine(trap, source=source) as machine:
        machine.memory.read(0, 2 * PAGE_SIZE)
        reader = threading.Thread(target=machine.memory.read, args=(3 * PAGE_SIZE, 8))
        reader.start()
        try:
            assert source.asked.wait(TIMEOUT)
            assert machine.pager.mark_nonpresent(0, 8, timeout=5) == 2
            assert machine.pager.evict(0, 8, timeout=5) == 2
            # But bytes that are on their way are not to survive a discard.
            with pytest.raises(BusyError, match="gpa 0x3000 is being fetched"):
                machine.pager.discard(0, 8, timeout=0.05)
        finally:
            source.released.set()
            reader.join()
        assert machine.memory.read(3 * PAGE_SIZE, PAGE_SIZE) == page_of_image(3)
