"""`GuestMemory` on a pager without a kernel: what an access returns, what it waits for, what keeps it out."""

import contextlib
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import PAGES, content, in_threads, page_of, pager_of, source_error, started

from kvmdp.errors import BusyError, CancelledError, FrozenError, PagingError
from kvmdp.page import PAGE_SIZE, Access, Origin
from kvmdp.paging.access import GuestMemory
from kvmdp.paging.cancellation import Cancellation
from kvmdp.paging.jobs import Observer

RAM = PAGES * PAGE_SIZE
SOON = 0.02  # seconds until a wait in vain is over
TIMEOUT = 60
LONG = 30  # seconds: only a broken test waits so long


def memory_of(pager, origin=Origin.DEVICE, number=3, *, shared=True, on_disk=False, **options):
    vmm = SimpleNamespace(view=pager.trap.fill_view, populate=lambda offset, length, write: None)
    backing = SimpleNamespace(vmm=vmm, shared=shared, on_disk=on_disk)
    return GuestMemory(pager.layout, backing, pager, origin, number, **options)


@contextlib.contextmanager
def memory(**options):
    """A pager, and a device's access to its RAM."""
    with pager_of() as pager:
        yield pager, memory_of(pager, **options)


def image():
    return b"".join(content(page) for page in range(PAGES))


def await_waiters(pager, count=1):
    """Return once that many have waited for a page."""
    deadline = time.monotonic() + LONG
    while pager.counters.waits < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextlib.contextmanager
def fetching(pager, page):
    """For the time of the block somebody else fetches a page, and does not get done."""
    asked, go_on = threading.Event(), threading.Event()

    def before(first, count):
        if first == page:
            asked.set()
            assert go_on.wait(LONG)

    pager.source.before = before
    other = started(lambda: pager.mark_present(page, 1))
    assert asked.wait(LONG)
    try:
        yield
    finally:
        go_on.set()
        other.join()


# Reading and writing


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (0, 1),
        (8, 8),
        (PAGE_SIZE, PAGE_SIZE),
        (PAGE_SIZE - 1, 2),
        (PAGE_SIZE - 3, 2 * PAGE_SIZE + 5),
        (0, RAM),
        (RAM - 1, 1),
        (5, 0),
    ],
)
def test_a_read_returns_what_the_source_has(gpa, length, present):
    with memory() as (pager, ram):
        if present:
            pager.mark_present(0, PAGES)
        assert ram.read(gpa, length) == image()[gpa : gpa + length]
        assert ram.read(gpa, length, nowait=True) == image()[gpa : gpa + length]
        assert ram.readv([(gpa, length)]) == image()[gpa : gpa + length]


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize(("gpa", "length"), [(7, 9), (PAGE_SIZE - 4, 8), (PAGE_SIZE, 3 * PAGE_SIZE), (9, 0)])
def test_a_write_changes_its_bytes_and_no_others(gpa, length, kind, present):
    data = bytes(number % 255 for number in range(length))
    expected = bytearray(image())
    expected[gpa : gpa + length] = data
    with memory() as (pager, ram):
        if present:
            pager.mark_present(0, PAGES)
        ram.write(gpa, kind(data))
        assert ram.read(0, RAM) == expected


def test_a_scatter_list_is_one_stream_of_bytes():
    segments = [(3 * PAGE_SIZE - 2, 4), (100, 0), (16, 3), (9 * PAGE_SIZE, PAGE_SIZE + 1), (16, 3)]
    with memory() as (_, ram):
        whole = image()
        assert ram.readv(segments) == b"".join(whole[gpa : gpa + length] for gpa, length in segments)
        data = bytes(number % 253 for number in range(sum(length for _, length in segments[:-1])))
        ram.writev(segments[:-1], data)
        assert ram.readv(segments[:-1]) == data


def test_an_access_beyond_what_is_held_at_once_is_complete():
    with pager_of(2048) as pager:
        ram = memory_of(pager)
        data = np.random.default_rng(1).bytes(6 << 20)
        ram.writev([(4096, 1 << 20), (2 << 20, 5 << 20)], data)
        assert ram.readv([(4096, 1 << 20), (2 << 20, 5 << 20)]) == data
        assert ram.read(2 << 20, 5 << 20) == data[1 << 20 :]


def test_data_of_another_length_than_its_segments_is_refused_and_writes_nothing():
    with memory() as (_, ram):
        with pytest.raises(ValueError, match="7 bytes for segments of 8"):
            ram.writev([(0, 4), (4096, 4)], bytes(7))
        assert ram.read(0, RAM) == image()


@pytest.mark.parametrize(("gpa", "length"), [(-1, 1), (RAM, 1), (RAM - 4, 8), (3 << 30, 4), (1 << 60, 8)])
def test_addresses_that_are_not_ram_are_refused_and_nothing_is_written(gpa, length):
    with memory() as (pager, ram):
        pager.mark_present(0, PAGES)
        calls = [
            lambda: ram.read(gpa, length),
            lambda: ram.write(gpa, bytes(length)),
            lambda: ram.readv([(0, 4), (gpa, length)]),
            lambda: ram.writev([(0, 4), (gpa, length)], bytes(4 + length)),
            lambda: ram.view(gpa, length).__enter__(),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="is not guest RAM"):
                call()
        assert ram.read(0, RAM) == image()


def test_a_negative_length_is_refused():
    with memory() as (_, ram):
        for call in (
            lambda: ram.read(0, -1),
            lambda: ram.readv([(0, -1)]),
            lambda: ram.view(0, -1).__enter__(),
        ):
            with pytest.raises(ValueError, match="negative"):
                call()


def test_aligned_words_are_loaded_and_stored():
    with memory() as (pager, ram):
        assert ram.load64(PAGE_SIZE) == int.from_bytes(content(1)[:8], "little")
        ram.store64(2 * PAGE_SIZE + 8, (1 << 64) - 2)
        assert ram.load64(2 * PAGE_SIZE + 8) == (1 << 64) - 2
        assert page_of(pager, 2)[8:16] == b"\xfe" + b"\xff" * 7
        assert page_of(pager, 2)[16:] == content(2)[16:]
        for gpa in (4, PAGE_SIZE - 4):
            with pytest.raises(ValueError, match="multiple of 8"):
                ram.load64(gpa)
            with pytest.raises(ValueError, match="multiple of 8"):
                ram.store64(gpa, 1)
        with pytest.raises(ValueError, match="not guest RAM"):
            ram.load64(RAM)
        with pytest.raises(ValueError, match=r"give a number below 2\^64"):
            ram.store64(0, 1 << 64)


def test_a_view_is_the_memory_itself_and_ends_with_its_block():
    with memory() as (pager, ram):
        with ram.view(PAGE_SIZE - 4, 8) as view:
            assert bytes(view) == content(0)[-4:] + content(1)[:4]
            view[:] = b"GUESTRAM"
        assert page_of(pager, 0)[-4:] + page_of(pager, 1)[:4] == b"GUESTRAM"
        with pytest.raises(ValueError, match="released"):
            view[0] = 1
        assert pager.mark_nonpresent(0, 2, SOON) == 2


def test_pages_are_read_by_number():
    with memory() as (_, ram):
        pages = np.array([5, 0, 400])
        rows = ram.read_pages(pages)
        assert rows.shape == (3, 512)
        assert rows.tobytes() == b"".join(content(page) for page in pages.tolist())


# What is asked of the pager


@pytest.mark.parametrize(
    ("call", "access"),
    [
        (lambda ram: ram.read(0, 8), Access.READ),
        (lambda ram: ram.write(0, b"x"), Access.WRITE),
        (lambda ram: ram.readv([(0, 8)]), Access.READ),
        (lambda ram: ram.writev([(0, 1)], b"x"), Access.WRITE),
        (lambda ram: ram.load64(0), Access.READ),
        (lambda ram: ram.store64(0, 1), Access.WRITE),
        (lambda ram: ram.view(0, 1).__enter__(), Access.WRITE),
    ],
)
def test_a_fault_says_who_wanted_the_page_and_what_for(call, access):
    with memory() as (pager, ram):
        faults = []
        pager.jobs.add(Observer(lambda fault, claim, began: faults.append(fault)))
        call(ram)
        assert faults == [(0, Origin.DEVICE, 3, access)]


def test_a_page_costs_one_fetch_whoever_wants_it():
    with memory() as (pager, ram):
        in_threads(*[lambda: [ram.read(page * PAGE_SIZE, PAGE_SIZE) for page in range(PAGES)]] * 4)
        assert pager.counters.pages_fetched == PAGES
        assert sorted(pager.source.fills) == [(page, 1) for page in range(PAGES)]


def test_a_page_that_cannot_be_had_ends_the_access_with_the_reason():
    with memory() as (pager, ram):

        def before(first, count):
            if first == 2:
                raise source_error(first)

        pager.source.before = before
        with pytest.raises(PagingError, match=r"gpa 0x2000 cannot be fetched.*the wire is cut"):
            ram.write(PAGE_SIZE, bytes(2 * PAGE_SIZE))
        assert page_of(pager, 1) == content(1)  # nothing of the write


# Not waiting


@pytest.mark.parametrize(
    "call",
    [
        lambda ram: ram.read(PAGE_SIZE, 8, nowait=True),
        lambda ram: ram.read(0, 2 * PAGE_SIZE, nowait=True),
        lambda ram: ram.write(PAGE_SIZE, bytes(8), nowait=True),
        lambda ram: ram.write(0, bytes(2 * PAGE_SIZE), nowait=True),
    ],
)
def test_nowait_on_an_absent_page_is_busy_and_touches_and_fetches_nothing(call):
    with memory() as (pager, ram):
        pager.mark_present(0, 1)
        with pytest.raises(BusyError, match="gpa 0x1000 is absent"):
            call(ram)
        assert pager.counters.pages_fetched == 1
        assert page_of(pager, 0) == content(0)
        pager.mark_present(1, 1)
        call(ram)


def test_nowait_on_a_page_that_is_being_admitted_is_busy():
    # The bit is set, the trap has not been told: private memory may still hold its marker there.
    with memory() as (pager, ram):
        seen = []

        def on_admit(first, count):
            assert pager.bitmap.test(first)
            with pytest.raises(BusyError):
                ram.read(0, 8, nowait=True)
            seen.append(first)

        pager.trap.on_admit = on_admit
        ram.read(0, 8)
        assert seen == [0]


def test_a_wait_ends_after_the_time_its_owner_gave():
    with pager_of() as pager:
        ram = memory_of(pager, timeout=SOON)
        with (
            fetching(pager, 7),
            pytest.raises(BusyError, match=r"gpa 0x7000 was not made present within 0\.02"),
        ):
            ram.read(6 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert ram.read(7 * PAGE_SIZE, 8) == content(7)[:8]


def test_a_wait_ends_when_its_owner_calls_it_off():
    with pager_of() as pager:
        cancellation = Cancellation(pager)
        ram = memory_of(pager, cancellation=cancellation)
        errors = []

        def read():
            try:
                ram.read(7 * PAGE_SIZE, 8)
            except CancelledError as error:
                errors.append(str(error))

        with fetching(pager, 7):
            reader = started(read)
            await_waiters(pager)
            cancellation.cancel()
            reader.join()
        assert len(errors) == 1
        assert "no longer waited for" in errors[0]


def test_a_machine_that_stops_lets_go_of_who_waits_but_present_pages_stay_readable():
    with memory() as (pager, ram):
        pager.mark_present(0, 1)
        pager.cancel()
        assert ram.read(0, 8) == content(0)[:8]
        with pytest.raises(CancelledError, match="gpa 0x1000"):
            ram.read(PAGE_SIZE, 8)


# Revocation


def test_a_page_under_a_view_is_not_taken_away():
    with memory() as (pager, ram):
        with ram.view(5 * PAGE_SIZE, 2 * PAGE_SIZE) as view:
            view[:4] = b"mine"
            for first, count in ((5, 1), (6, 1), (0, 12)):
                with pytest.raises(BusyError, match="a view of them is open"):
                    pager.mark_nonpresent(first, count, SOON)
            assert pager.mark_nonpresent(7, 4, SOON) == 0
            assert bytes(view[:4]) == b"mine"
        assert pager.mark_nonpresent(5, 2, SOON) == 2
        assert ram.read(5 * PAGE_SIZE, 5) == b"mine" + content(5)[:1]


def test_taking_a_page_away_waits_for_its_view():
    with memory() as (pager, ram):
        revoked = []
        with ram.view(5 * PAGE_SIZE, 8) as view:
            revoker = started(lambda: revoked.append(pager.mark_nonpresent(5, 1)))
            while pager.bitmap.test(5):
                time.sleep(0.001)
            view[:] = b"still me"
            assert revoked == []
            assert not any(call == "revoke" for call, _, _ in pager.trap.calls)
        revoker.join()
        assert revoked == [1]
        assert ram.read(5 * PAGE_SIZE, 8) == b"still me"


def test_an_access_waits_for_a_page_that_is_being_taken_away_and_has_it_back_without_a_fetch():
    with memory() as (pager, ram):
        ram.write(0, b"before")
        read = []

        def on_revoke(first, count):
            reader = started(lambda: read.append(ram.read(0, 6)))
            readers.append(reader)
            await_waiters(pager)

        readers = []
        pager.trap.on_revoke = on_revoke
        pager.mark_nonpresent(0, 1)
        readers[0].join()
        assert read == [b"before"]
        assert pager.counters.pages_fetched == 1


def test_an_access_to_two_pages_holds_neither_while_it_waits_for_the_other():
    # A revocation of both would wait for the one that is held, and the access for the revocation.
    with memory() as (pager, ram):
        pager.mark_present(0, 1)
        with fetching(pager, 1):
            reader = started(lambda: ram.read(0, 2 * PAGE_SIZE))
            await_waiters(pager)
            assert pager.mark_nonpresent(0, 1, SOON) == 1
        reader.join()
        assert pager.counters.pages_backed == 1


# Freezing


def accesses(ram):
    return [
        lambda: ram.read(0, 8),
        lambda: ram.read(0, 2 * PAGE_SIZE),
        lambda: ram.read(300 * PAGE_SIZE, 8),  # absent
        lambda: ram.read(0, 8, nowait=True),
        lambda: ram.write(0, b"x"),
        lambda: ram.write(0, bytes(2 * PAGE_SIZE)),
        lambda: ram.load64(0),
        lambda: ram.store64(0, 1),
        lambda: ram.readv([(0, 8)]),
        lambda: ram.writev([(0, 1)], b"x"),
        lambda: ram.view(0, 1).__enter__(),
    ]


@pytest.mark.parametrize("origin", [Origin.DEVICE, Origin.HOST])
def test_frozen_accesses_fail_and_touch_nothing_until_they_are_thawed(origin):
    with pager_of() as pager:
        ram = memory_of(pager, origin)
        pager.mark_present(0, 2)
        with pager.frozen(SOON):
            for access in accesses(ram):
                with pytest.raises(FrozenError, match="frozen"):
                    access()
            assert page_of(pager, 0) == content(0)
            assert pager.counters.pages_fetched == 2
        for access in accesses(ram):
            access()
        assert ram.load64(0) == ord("x")


def test_vcpus_go_on_while_accesses_are_frozen():
    with pager_of() as pager, pager.frozen():
        assert memory_of(pager, Origin.VCPU).read(0, 8) == content(0)[:8]
        assert pager.mark_nonpresent(0, 1) == 1
        assert memory_of(pager, Origin.VCPU).read(0, 8) == content(0)[:8]


def test_freezing_waits_for_a_view_or_gives_up_and_is_as_before():
    with memory() as (pager, ram):
        with ram.view(0, 8) as view:
            with pytest.raises(BusyError, match="cannot be frozen: 1 accesses"), pager.frozen(SOON):
                pass
            ram.write(PAGE_SIZE, b"not frozen")
            frozen, thaw = threading.Event(), threading.Event()

            def freeze():
                with pager.frozen():
                    frozen.set()
                    thaw.wait()

            freezer = started(freeze)
            while not pager.accesses.frozen:
                time.sleep(0.001)
            assert not frozen.is_set()
            with pytest.raises(FrozenError):
                ram.read(0, 8)
            view[:] = b"in time!"
        assert frozen.wait(TIMEOUT)
        with pytest.raises(FrozenError):
            ram.read(0, 8)
        thaw.set()
        freezer.join()
        assert ram.read(0, 8) == b"in time!"


def test_pages_that_others_pin_for_ever_hold_up_a_revocation_but_no_freeze():
    with memory() as (pager, ram):
        pager.mark_present(0, 2)
        assert pager.hold(0)
        with pager.frozen(SOON), pytest.raises(BusyError):
            pager.mark_nonpresent(0, 2, SOON)
        assert ram.read(0, 2 * PAGE_SIZE) == content(0) + content(1)
        pager.release(0)
        assert pager.mark_nonpresent(0, 2, SOON) == 2


def test_an_access_that_waits_for_its_page_does_not_hold_up_a_freeze_and_then_finds_it():
    with memory() as (pager, ram):
        errors = []

        def read():
            try:
                ram.read(7 * PAGE_SIZE, 8)
            except FrozenError as error:
                errors.append(error)

        with contextlib.ExitStack() as frozen:
            with fetching(pager, 7):
                reader = started(read)
                await_waiters(pager)
                frozen.enter_context(pager.frozen(SOON))
            reader.join()
            assert len(errors) == 1


def test_freezing_twice_is_refused_and_changes_nothing():
    with memory() as (pager, ram):
        pager.peers = FakePeers()
        with pager.frozen():
            with pytest.raises(PagingError, match="frozen already"), pager.frozen():
                pass
            assert pager.accesses.frozen
            assert pager.peers.told == ["freeze"]
        assert ram.read(0, 1)


class FakePeers:
    def __init__(self, busy=False):
        self.busy = busy
        self.told = []

    def invalidate(self, first, count, deadline):
        self.told.append("invalidate")

    def freeze(self, deadline):
        self.told.append("freeze")
        if self.busy:
            raise BusyError("the peer does not let go")

    def thaw(self):
        self.told.append("thaw")


def test_peers_are_frozen_and_thawed_with_the_rest():
    with memory() as (pager, _):
        pager.peers = FakePeers()
        with pager.frozen(SOON):
            assert pager.peers.told == ["freeze"]
        assert pager.peers.told == ["freeze", "thaw"]


def test_a_peer_that_does_not_let_go_leaves_nothing_frozen():
    with memory() as (pager, ram):
        pager.peers = FakePeers(busy=True)
        with pytest.raises(BusyError, match="does not let go"), pager.frozen(SOON):
            pass
        assert pager.peers.told == ["freeze", "thaw"]
        assert ram.read(0, 8) == content(0)[:8]


# Threads


# A read of shared memory takes no lock; of what may be on a disk every access pins its pages.
@pytest.mark.parametrize(("shared", "on_disk"), [(True, False), (False, False), (True, True)])
def test_accesses_under_revocation_and_freezes_lose_nothing_and_are_never_torn(shared, on_disk):
    rounds, words = 3000, 8
    with memory(shared=shared, on_disk=on_disk) as (pager, ram):
        done = threading.Event()
        size = 3 * PAGE_SIZE  # an access of several pages, and one within a page

        def take_away_and_bring_back(first, count):
            """Pages that are taken away hold nothing for a while: a read that does not notice sees it."""
            taken = pager.trap.fill_view[first * PAGE_SIZE : (first + count) * PAGE_SIZE]
            kept = bytes(taken)
            taken[:] = b"\xee" * len(kept)
            time.sleep(0)
            taken[:] = kept

        pager.trap.on_revoke = take_away_and_bring_back

        def writer(number):
            base = number * 8 * PAGE_SIZE
            for turn in range(1, rounds + 1):
                mark = bytes((turn % 0xEE,))
                retried(ram.write, base, mark * size)
                retried(ram.write, base + 4 * PAGE_SIZE, mark * PAGE_SIZE)
                retried(ram.store64, base + 5 * PAGE_SIZE, turn * words)
                with contextlib.suppress(FrozenError), ram.view(base, size) as view:
                    assert bytes(view) == mark * size
                assert retried(ram.read, base, size) == mark * size
                assert retried(ram.read, base + 4 * PAGE_SIZE, PAGE_SIZE) == mark * PAGE_SIZE
                assert retried(ram.load64, base + 5 * PAGE_SIZE) == turn * words

        def retried(access, *arguments):
            while True:
                try:
                    return access(*arguments)
                except FrozenError:
                    time.sleep(0)

        def revoker():
            turn = 0
            while not done.is_set():
                turn += 1
                pager.mark_nonpresent(turn % 24, 1 + turn % 9)

        def assert_nobody_writes():
            # Pages on their way out hold nothing of theirs; those that stay must stay as they are.
            before = [page_of(pager, page) for page in range(24)]
            time.sleep(0.0002)
            for page, content in enumerate(before):
                if b"\xee" not in content:
                    assert page_of(pager, page) in (content, b"\xee" * PAGE_SIZE)

        def freezer():
            while not done.is_set():
                with pager.frozen():
                    assert_nobody_writes()
                time.sleep(0.001)

        pager.mark_present(0, 24)  # a fetch that began before a freeze goes on in it, and is no access
        others = [threading.Thread(target=revoker), threading.Thread(target=freezer)]
        for other in others:
            other.start()
        try:
            in_threads(*[lambda number=number: writer(number) for number in range(2)])
        finally:
            done.set()
            for other in others:
                other.join()
        assert pager.counters.pages_revoked > 0
        assert not pager.accesses.frozen
        assert pager.mark_nonpresent(0, PAGES, SOON) >= 0  # no pin is left


def test_a_read_without_the_lock_does_not_return_what_it_copied_while_the_page_was_taken_away():
    with memory() as (pager, ram):
        assert ram.read(0, PAGE_SIZE) == content(0)
        copies = []

        class TakenAwayMeanwhile:
            def __getitem__(self, wanted):
                copies.append(pager.bitmap.test(0))
                if len(copies) == 1:
                    assert pager.mark_nonpresent(0, 1) == 1
                    return memoryview(b"\xee" * PAGE_SIZE)
                return pager.trap.fill_view[wanted]

        ram._view = TakenAwayMeanwhile()
        assert ram.read(0, PAGE_SIZE) == content(0)
        assert copies == [True, True]
