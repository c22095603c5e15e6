"""`Pager.content`: the bytes of a range wherever they are, and its pages left in the states that they were in."""

import functools
import random
import threading
import time

import pytest
from effort import by_effort
from fakes import (
    PAGES,
    FakeSink,
    content,
    in_threads,
    page_of,
    pager_of,
    source_error,
    started,
    switching_often,
)

from kvmdp.errors import PagingError, PoisonedError
from kvmdp.page import PAGE_SIZE, Outcome, PageFault
from kvmdp.paging.claim import State
from kvmdp.source.base import SourceError

LONG = 30  # seconds that nothing here takes
LOW_PAGES = (3 << 30) // PAGE_SIZE
ZEROS = bytes(PAGE_SIZE)
HOLE = range(40, 44)
# Pages that are brought into each state by `in_every_state`; all others are at the source.
IN_SINK, BACKED, PRESENT = range(4, 9), range(11, 14), range(14, 20)


def touched(page):
    return b"\xee" + content(page)[1:]


def in_every_state(pager):
    """Bring pages into every state; what was in RAM has been written to."""
    for pages in (IN_SINK, BACKED, PRESENT):
        pager.mark_present(pages[0], len(pages))
        for page in pages:
            pager.trap.ram_view[page * PAGE_SIZE] = 0xEE
    pager.evict(IN_SINK[0], len(IN_SINK))
    pager.mark_nonpresent(BACKED[0], len(BACKED))
    pager.mark_present(HOLE[0], 2)  # zeros, in RAM
    del pager.source.fills[:]


def expected(page):
    if page in HOLE:
        return ZEROS
    return touched(page) if page in (*IN_SINK, *BACKED, *PRESENT) else content(page)


def some_states(**options):
    return pager_of(extents=[(0, 40), (44, PAGES - 44)], **options)


def read(pager, first, count):
    copy = bytearray(b"\xa5" * (count * PAGE_SIZE))
    pager.content(first, count, memoryview(copy))
    return bytes(copy)


def state_of(pager):
    """All that a look must not change."""
    counters = pager.counters
    return (
        bytes(pager.ledger.states),
        bytes(pager.trap.entered),
        [pager.bitmap.test(page) for page in range(PAGES)],
        pager.ledger.resident,
        [(name, getattr(counters, name)) for name in counters.__slots__ if name not in ("waits", "retries")],
        list(pager.trap.calls),
        list(pager.ledger.claims),
        pager.error,
        pager.paused,
    )


def test_it_is_the_bytes_of_every_page_and_changes_nothing():
    with some_states() as pager:
        in_every_state(pager)
        found = {State(state) for state in pager.ledger.states}
        assert found == {State.SOURCE, State.ZERO, State.SINK, State.BACKED, State.PRESENT}
        before = state_of(pager)
        assert read(pager, 0, PAGES) == b"".join(expected(page) for page in range(PAGES))
        assert state_of(pager) == before
        assert pager.source.fills == [(0, 4), (9, 2), (20, 20), (44, PAGES - 44)]
        assert pager.counters.waits == 0


def test_any_range_is_its_pages():
    with some_states() as pager:
        in_every_state(pager)
        before, chance = state_of(pager), random.Random(4)
        for _ in range(100):
            first = chance.randrange(50)
            count = chance.randint(1, 60 - first)
            wanted = b"".join(expected(page) for page in range(first, first + count))
            assert read(pager, first, count) == wanted
        assert state_of(pager) == before


def test_a_range_over_the_hole_of_the_map_is_read_as_one():
    with pager_of(LOW_PAGES + 1024) as pager:
        pager.mark_present(LOW_PAGES, 1)
        assert read(pager, LOW_PAGES - 2, 4) == b"".join(map(content, range(LOW_PAGES - 2, LOW_PAGES + 2)))
        assert pager.bitmap.count() == 1


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (PAGES, 1), (PAGES - 1, 2), (0, 0)])
def test_what_is_not_ram_is_refused(first, count):
    with pager_of() as pager, pytest.raises(ValueError, match=r"not all in the 512 of RAM|the least is 1"):
        pager.content(first, count, memoryview(bytearray(2 * PAGE_SIZE)))


def test_a_poisoned_page_in_the_range_is_said_and_nothing_stays_claimed():
    with some_states() as pager:
        in_every_state(pager)
        pager.poison(16)
        before = state_of(pager)
        with pytest.raises(
            PoisonedError, match=r"the page at gpa 0x10000 is poisoned: what was in it is lost"
        ):
            read(pager, 10, 20)
        with pytest.raises(PoisonedError):
            read(pager, 16, 1)
        assert read(pager, 10, 6) == b"".join(expected(page) for page in range(10, 16))
        assert read(pager, 17, 3) == b"".join(expected(page) for page in range(17, 20))
        assert state_of(pager) == before
        pager.unpoison(16, b"\1" * PAGE_SIZE)
        assert read(pager, 16, 1) == b"\1" * PAGE_SIZE


@pytest.mark.parametrize("end", ["cancelled", "aborted", "paused"])
def test_it_works_when_no_fault_does(end):
    with some_states() as pager:
        in_every_state(pager)
        if end == "cancelled":
            pager.cancel()
        elif end == "aborted":
            pager.abort(PagingError("the reader broke"))
        else:
            pager.holds = True
            pager.source.before = lambda first, count: (_ for _ in ()).throw(source_error(first, count))
            assert pager.resolve(PageFault(30), timeout=0) is Outcome.TIMED_OUT
            pager.source.before = lambda first, count: None
        before = state_of(pager)
        assert read(pager, 0, PAGES) == b"".join(expected(page) for page in range(PAGES))
        assert state_of(pager) == before


def test_it_works_while_demand_paging_is_switched_off():
    with some_states() as pager:
        pager.mark_present(0, PAGES)
        pager.disable()
        assert read(pager, 0, 50) == b"".join(ZEROS if page in HOLE else content(page) for page in range(50))
        pager.enable()
        assert pager.resolve(PageFault(3)) is Outcome.PRESENT


def test_a_source_that_fails_is_told_to_the_caller_alone():
    with some_states() as pager:
        in_every_state(pager)
        before = state_of(pager)
        pager.source.before = lambda first, count: (_ for _ in ()).throw(source_error(first, count))
        with pytest.raises(SourceError, match="the wire is cut"):
            read(pager, 0, PAGES)
        assert read(pager, 4, 5) == b"".join(expected(page) for page in range(4, 9))
        assert state_of(pager) == before
        pager.source.before = lambda first, count: None
        assert pager.resolve(PageFault(0)) is Outcome.ADMITTED


def test_a_transient_failure_is_tried_again():
    with pager_of() as pager:
        failures = iter((True, True, False))

        def before(first, count):
            if next(failures):
                raise source_error(first, count, transient=True)

        pager.source.before = before
        assert read(pager, 3, 2) == content(3) + content(4)


class Stopped:
    """The source stops at `page` until `go_on` is set."""

    def __init__(self, pager, page):
        self.there, self.go_on = threading.Event(), threading.Event()
        self._page = page
        pager.source.before = self._before

    def _before(self, first, count):
        if first <= self._page < first + count and not self.there.is_set():
            self.there.set()
            assert self.go_on.wait(LONG)


def test_it_waits_for_a_page_that_is_being_fetched_and_does_not_fetch_it_again():
    with pager_of() as pager:
        stop, copies = Stopped(pager, 3), []
        fault = started(lambda: pager.resolve(PageFault(3)))
        assert stop.there.wait(LONG)
        reader = started(lambda: copies.append(read(pager, 2, 3)))
        deadline = time.monotonic() + LONG
        while pager.counters.waits < 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert copies == []
        stop.go_on.set()
        for thread in (fault, reader):
            thread.join(LONG)
        assert copies == [content(2) + content(3) + content(4)]
        assert sorted(pager.source.fills) == [(2, 1), (3, 1), (4, 1)]
        assert pager.counters.pages_fetched == 1


def test_it_waits_for_a_page_that_is_being_taken_away():
    with pager_of() as pager:
        pager.mark_present(3, 1)
        pager.trap.ram_view[3 * PAGE_SIZE] = 0xEE
        there, go_on, copies = threading.Event(), threading.Event(), []

        def revoke(first, count):
            there.set()
            assert go_on.wait(LONG)

        pager.trap.on_revoke = revoke
        evictor = started(lambda: pager.evict(3, 1))
        assert there.wait(LONG)
        reader = started(lambda: copies.append(read(pager, 3, 1)))
        deadline = time.monotonic() + LONG
        while pager.counters.waits < 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        go_on.set()
        for thread in (evictor, reader):
            thread.join(LONG)
        assert copies == [touched(3)]
        assert pager.ledger.states[3] == State.SINK


def test_a_fault_on_a_page_that_is_being_read_waits_and_is_then_served():
    with pager_of() as pager:
        stop, outcomes, copies = Stopped(pager, 3), [], []
        reader = started(lambda: copies.append(read(pager, 2, 3)))
        assert stop.there.wait(LONG)
        assert pager.resolve(PageFault(3), timeout=0) is Outcome.TIMED_OUT
        fault = started(lambda: outcomes.append(pager.resolve(PageFault(4))))
        deadline = time.monotonic() + LONG
        while pager.counters.waits < 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert outcomes == []
        stop.go_on.set()
        for thread in (fault, reader):
            thread.join(LONG)
        assert outcomes == [Outcome.ADMITTED]
        assert copies == [content(2) + content(3) + content(4)]
        assert page_of(pager, 4) == content(4)
        assert pager.counters.pages_fetched == 1


def test_what_is_discarded_while_it_is_read_stays_discarded():
    with pager_of() as pager:
        stop = Stopped(pager, 3)
        reader = started(lambda: read(pager, 2, 3))
        assert stop.there.wait(LONG)
        pager.note_discarded(3, 1)
        stop.go_on.set()
        reader.join(LONG)
        assert list(pager.ledger.states[2:5]) == [State.SOURCE, State.ZERO, State.SOURCE]
        assert read(pager, 2, 3) == content(2) + ZEROS + content(4)


def test_pages_that_are_pinned_are_read_without_a_wait():
    with pager_of() as pager:
        with pager.held(PageFault(3)) as outcome:
            assert outcome is Outcome.PRESENT
            assert read(pager, 3, 1) == content(3)
        pager.poison(5)
        with pager.held(PageFault(5)), pytest.raises(PoisonedError):
            read(pager, 5, 1)


HOT = 48


def test_a_copy_beside_faults_and_evictions_has_no_byte_that_was_never_there():
    rounds = by_effort(100, 600, 20_000)
    with some_states() as pager:
        pager.sink = FakeSink(PAGES)
        view, writes, guards = pager.trap.fill_view, [0] * HOT, [threading.Lock() for _ in range(HOT)]

        def was(page):
            return ZEROS if page in HOLE else content(page)

        def act(number):
            chance = random.Random(number)
            for _ in range(rounds):
                page, what = chance.randrange(HOT), chance.random()
                if what < 0.15:
                    pager.mark_nonpresent(page, min(chance.randint(1, 20), HOT - page))
                elif what < 0.3:
                    pager.evict(page, min(chance.randint(1, 20), HOT - page))
                else:
                    with pager.held(PageFault(page)) as outcome, guards[page]:
                        assert outcome is Outcome.PRESENT
                        writes[page] += 1
                        view[page * PAGE_SIZE] = (was(page)[0] + writes[page]) % 256

        def look(number):
            chance = random.Random(number)
            for _ in range(rounds // 4):
                first = chance.randrange(HOT)
                count = chance.randint(1, HOT - first)
                before = list(writes)
                copy = read(pager, first, count)
                after = list(writes)
                for page in range(first, first + count):
                    found = copy[(page - first) * PAGE_SIZE :][:PAGE_SIZE]
                    assert found[1:] == was(page)[1:]
                    # A store that is being made is counted before it is made.
                    stores = (found[0] - was(page)[0] - before[page] + 1) % 256
                    assert stores <= after[page] - before[page] + 1

        with switching_often():
            in_threads(
                *(functools.partial(act, number) for number in range(4)),
                *(functools.partial(look, number) for number in (10, 11)),
            )
        assert read(pager, 0, HOT) == b"".join(
            bytes([(was(page)[0] + writes[page]) % 256]) + was(page)[1:] for page in range(HOT)
        )
        assert pager.ledger.claims == []
        assert pager.error is None
        assert [pager.bitmap.test(page) for page in range(PAGES)] == [
            each == 1 for each in pager.trap.entered
        ]
        counters = pager.counters
        assert counters.pages_fetched + counters.pages_zeroed <= HOT  # a look counts no page as fetched
