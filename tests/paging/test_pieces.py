"""A long fetch that tells of its pieces: they are present before the rest is there, and stay so if that never comes."""

import contextlib
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

from kvmdp.page import PAGE_SIZE, Outcome, PageFault
from kvmdp.paging.claim import State, Waiter, Wake
from kvmdp.paging.jobs import Observer
from kvmdp.source.base import SourceError

LONG = 30  # seconds that nothing here takes
RUN = 16  # pages of the run that is fetched
PIECE = 4


@contextlib.contextmanager
def in_pieces(piece=PIECE, **options):
    """A pager that fetches runs of 16 pages, of which the source tells by pieces."""
    with pager_of(fault_around=RUN, **options) as pager:
        pager.source.pieces = piece
        yield pager


class Stop:
    """Stops the source before `page`, the first time; `go_on` lets it, or fails it with `error`."""

    def __init__(self, pager, page):
        self.there, self.may = threading.Event(), threading.Event()
        self.error = None
        self._page = page
        pager.source.between = self._between

    def _between(self, page):
        if page == self._page and not self.there.is_set():
            self.there.set()
            assert self.may.wait(LONG)
            if self.error is not None:
                raise self.error

    def go_on(self, error=None):
        self.error = error
        self.may.set()


@contextlib.contextmanager
def stopped(pager, page):
    """A thread fetches the first run and has got as far as `page`; yields the Stop and how the thread ends."""
    stop, ends = Stop(pager, page), []

    def fetch():
        try:
            ends.append(pager.resolve(PageFault(RUN - 1)))
        except RuntimeError as error:
            ends.append(error)

    thread = started(fetch)
    try:
        assert stop.there.wait(LONG)
        yield stop, ends
    finally:
        stop.go_on(stop.error)
        thread.join(LONG)
    assert ends
    assert not thread.is_alive()


def present(pager):
    return [page for page in range(PAGES) if pager.bitmap.test(page)]


def enters(pager):
    return [page for page in range(PAGES) if pager.trap.entered[page]]


def touch(pager, page):
    """The guest writes to a page that it may enter."""
    assert pager.trap.entered[page]
    pager.trap.ram_view[page * PAGE_SIZE] = 0xEE


def touched(page):
    return b"\xee" + content(page)[1:]


def test_who_waits_for_an_early_page_goes_on_before_the_last_byte_is_there():
    with in_pieces() as pager:
        outcomes, notified = {}, []
        stop = Stop(pager, PIECE)  # the first piece has landed by then
        asked, go_on = threading.Event(), threading.Event()

        def before(first, count):
            asked.set()
            assert go_on.wait(LONG)

        pager.source.before = before

        def resolve(page):
            outcomes[page] = pager.resolve(PageFault(page))

        threads = {RUN - 1: started(lambda: resolve(RUN - 1))}
        assert asked.wait(LONG)
        threads |= {page: started(functools.partial(resolve, page)) for page in (0, 3, 4)}
        waiters = {page: Waiter(functools.partial(notified.append, page)) for page in (2, 9)}
        for page, waiter in waiters.items():
            assert pager.resolve_or_park(PageFault(page), waiter) is None
        deadline = time.monotonic() + LONG
        while pager.counters.waits < 5:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        go_on.set()
        try:
            for page in (0, 3):
                threads[page].join(LONG)
            assert stop.there.wait(LONG)
            assert outcomes == {0: Outcome.PRESENT, 3: Outcome.PRESENT}
            assert present(pager) == enters(pager) == [0, 1, 2, 3]
            assert [page_of(pager, page) for page in range(4)] == [content(page) for page in range(4)]
            assert sorted(notified) == [2, 9]  # who waits for a later page looks again
            assert {waiter.reason for waiter in waiters.values()} == {Wake.COMMITTED}
            assert pager.resolve_or_park(PageFault(2), waiters[2]) is Outcome.PRESENT
            assert pager.resolve_or_park(PageFault(9), waiters[9]) is None
            assert pager.resolve(PageFault(4), timeout=0) is Outcome.TIMED_OUT
        finally:
            stop.go_on()
        for thread in threads.values():
            thread.join(LONG)
        assert outcomes == {
            0: Outcome.PRESENT,
            3: Outcome.PRESENT,
            4: Outcome.PRESENT,
            RUN - 1: Outcome.ADMITTED,
        }
        assert sorted(notified) == [2, 9, 9]
        assert pager.source.fills == [(0, RUN)]
        assert (pager.counters.pages_fetched, pager.counters.pages_admitted) == (RUN, RUN)
        assert pager.counters.claims == 1


def test_each_piece_is_admitted_once_and_the_last_with_the_claim():
    with in_pieces() as pager:
        pager.resolve(PageFault(5))
        assert pager.trap.calls == [("admit", first, PIECE) for first in range(0, RUN, PIECE)]
        assert pager.ledger.claims == []
        assert pager.ledger.resident == RUN


def test_jobs_are_told_of_each_page_that_comes_once():
    with in_pieces() as pager:
        told = []
        pager.jobs.add(
            Observer(lambda _fault, claim, _began: told.extend(range(claim.first, claim.first + claim.count)))
        )
        pager.resolve(PageFault(5))
        assert sorted(told) == list(range(RUN))


@pytest.mark.parametrize("holds", [False, True])
def test_what_has_landed_stays_when_the_rest_fails_and_only_the_rest_is_fetched_again(holds):
    with in_pieces() as pager:
        pager.holds = holds
        with stopped(pager, 8) as (stop, ends):
            touch(pager, 1)
            assert pager.mark_nonpresent(4, 2) == 2
            stop.error = source_error(8)
            if holds:
                stop.go_on(stop.error)
                deadline = time.monotonic() + LONG
                while pager.paused is None:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                assert present(pager) == [0, 1, 2, 3, 6, 7]
                assert pager.resolve(PageFault(4)) is Outcome.ADMITTED
                assert pager.resolve(PageFault(8), timeout=0) is Outcome.TIMED_OUT
                pager.resume()
        if not holds:
            assert ends == [Outcome.FAILED]
            assert present(pager) == enters(pager) == [0, 1, 2, 3, 6, 7]
            assert pager.resolve(PageFault(4)) is Outcome.FAILED
            assert f"gpa {8 * PAGE_SIZE:#x}" in str(pager.error)
            assert pager.ledger.states[:RUN].count(State.SOURCE) == 8
            pager.resume()
            assert pager.resolve(PageFault(9)) is Outcome.ADMITTED
        assert pager.mark_present(0, RUN) is Outcome.PRESENT
        assert pager.source.fills == [(0, RUN), (8, 8)]
        assert page_of(pager, 1) == touched(1)
        assert [page_of(pager, page) for page in range(2, RUN)] == [content(page) for page in range(2, RUN)]
        counters = pager.counters
        assert (counters.pages_fetched, counters.pages_backed, counters.pages_admitted) == (RUN, 2, RUN + 2)


def test_a_second_attempt_fetches_the_rest_and_never_writes_to_what_has_landed():
    with in_pieces() as pager:
        failures = {4: 1, 12: 1}

        def between(page):
            for landed in range(page):
                touch(pager, landed)
            if failures.get(page):
                failures[page] -= 1
                raise source_error(page, transient=True)

        pager.source.between = between
        assert pager.resolve(PageFault(0)) is Outcome.ADMITTED
        assert pager.source.fills == [(0, 16), (4, 12), (12, 4)]
        assert failures == {4: 0, 12: 0}
        assert pager.counters.retries == 2
        assert [page_of(pager, page) for page in range(12)] == [touched(page) for page in range(12)]
        assert pager.counters.pages_fetched == RUN


def test_what_is_discarded_between_pieces_reads_as_zeros():
    with in_pieces() as pager:
        with stopped(pager, 8) as (stop, ends):
            pager.note_discarded(2, 1)  # has landed
            pager.note_discarded(9, 1)  # is of the next piece
            pager.note_discarded(14, 2)  # is of the last
            assert present(pager) == [0, 1, 3, 4, 5, 6, 7]
            stop.go_on()
        assert ends == [Outcome.ADMITTED]
        assert present(pager) == [page for page in range(RUN) if page != 2]
        assert pager.counters.pages_fetched == RUN
        pager.trap.entered[2] = 0  # as the trap of memory that is gone finds it
        assert pager.resolve(PageFault(2)) is Outcome.ADMITTED
        gone = (2, 9, 14, 15)
        for page in range(RUN):
            assert page_of(pager, page) == (bytes(PAGE_SIZE) if page in gone else content(page))
        assert pager.counters.pages_zeroed == 1
        assert pager.ledger.resident == RUN


def test_what_is_discarded_over_the_border_of_a_piece_and_then_fails_is_fetched_no_more():
    with in_pieces() as pager:
        with stopped(pager, 4) as (stop, ends):
            pager.note_discarded(6, 4)  # half of it lands, half of it never comes
            stop.go_on(None)
            pager.source.between = lambda page: (
                (_ for _ in ()).throw(source_error(page)) if page == 8 else None
            )
        assert ends == [Outcome.FAILED]
        assert present(pager) == list(range(8))
        assert list(pager.ledger.states[8:12]) == [State.ZERO, State.ZERO, State.SOURCE, State.SOURCE]
        pager.source.between = lambda page: None
        pager.resume()
        assert pager.mark_present(0, RUN) is Outcome.PRESENT
        assert pager.source.fills == [(0, 16), (10, 6)]
        for page in range(RUN):
            assert page_of(pager, page) == (bytes(PAGE_SIZE) if 6 <= page < 10 else content(page))
        assert (pager.counters.pages_fetched, pager.counters.pages_zeroed) == (14, 2)


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7])
def test_pieces_are_cut_to_whole_units(piece):
    with in_pieces(piece, granule=4 * PAGE_SIZE) as pager:
        seen = []
        pager.source.between = lambda page: seen.append((page, len(present(pager))))
        assert pager.resolve(PageFault(6)) is Outcome.ADMITTED
        assert all(count == min(page, RUN - 1) // 4 * 4 for page, count in seen)
        assert {first % 4 or count % 4 for _, first, count in pager.trap.calls} == {0}
        assert sum(count for _, _, count in pager.trap.calls) == pager.counters.pages_fetched == RUN
        assert [page_of(pager, page) for page in range(RUN)] == [content(page) for page in range(RUN)]


def test_a_unit_that_has_landed_in_part_is_fetched_again_as_a_whole():
    with in_pieces(2, granule=4 * PAGE_SIZE) as pager:
        with stopped(pager, 6) as (stop, ends):
            assert present(pager) == [0, 1, 2, 3]
            stop.go_on(source_error(6))
        assert ends == [Outcome.FAILED]
        assert present(pager) == [0, 1, 2, 3]
        pager.resume()
        assert pager.resolve(PageFault(RUN - 1)) is Outcome.ADMITTED
        assert pager.source.fills == [(0, 16), (4, 12)]
        assert pager.counters.pages_fetched == RUN


def test_an_exception_in_the_middle_leaves_what_has_landed():
    with in_pieces() as pager:
        with stopped(pager, 8) as (stop, ends):
            touch(pager, 7)
            stop.go_on(RuntimeError("a bug"))
        assert [str(each) for each in ends] == ["a bug"]
        assert "filling page 8 broke: internal error: RuntimeError('a bug')" in str(pager.error)
        assert present(pager) == enters(pager) == list(range(8))
        assert page_of(pager, 7) == touched(7)
        assert pager.ledger.claims == []
        assert pager.resolve(PageFault(8)) is Outcome.FAILED
        assert pager.resolve(PageFault(7)) is Outcome.PRESENT
        assert pager.counters.pages_fetched == 8


def test_a_trap_that_cannot_admit_a_piece_ends_the_rest_as_well():
    with in_pieces() as pager:

        def refuse(first, count):
            if first == 4:
                raise OSError(12, "no memory for a memslot")

        pager.trap.on_admit = refuse
        with pytest.raises(OSError, match="no memory for a memslot"):
            pager.resolve(PageFault(0))
        assert "pages could not be admitted" in str(pager.error)
        assert present(pager) == enters(pager) == [0, 1, 2, 3]
        assert list(pager.ledger.states[4:8]) == [State.BACKED] * 4
        assert list(pager.ledger.states[8:RUN]) == [State.SOURCE] * 8
        assert pager.ledger.claims == []


def test_what_has_landed_can_be_taken_away_and_held_while_the_rest_is_fetched():
    with in_pieces() as pager:
        with stopped(pager, 8) as (_stop, _ends):
            touch(pager, 5)
            assert pager.hold(6)
            assert pager.mark_nonpresent(0, 4) == 4
            assert pager.evict(4, 2) == 2
            assert pager.resolve(PageFault(5), timeout=LONG) is Outcome.ADMITTED
            assert page_of(pager, 5) == touched(5)
            pager.release(6)
            assert pager.mark_present(0, 8) is Outcome.PRESENT
        assert pager.counters.pages_fetched == RUN
        assert pager.mark_present(0, RUN) is Outcome.PRESENT
        assert pager.source.fills == [(0, RUN)]


def test_a_stop_between_pieces_leaves_what_has_landed():
    with in_pieces() as pager:
        with stopped(pager, 8) as (stop, ends):
            pager.cancel()
            assert pager.resolve(PageFault(7)) is Outcome.PRESENT
            assert pager.resolve(PageFault(8)) is Outcome.CANCELLED
            stop.go_on(SourceError("the fake source", 0, PAGE_SIZE, "the fetch was called off"))
        assert ends == [Outcome.CANCELLED]
        assert present(pager) == list(range(8))
        assert pager.error is pager.paused is None
        pager.reopen()
        assert pager.resolve(PageFault(8)) is Outcome.ADMITTED
        assert pager.source.fills == [(0, 16), (8, 8)]


def test_a_run_of_pages_from_everywhere_lands_in_order():
    with in_pieces(extents=[(0, 10), (11, PAGES - 11)]) as pager:
        pager.sink = FakeSink(PAGES)
        pager.sink.pieces = 1
        pager.source.pieces = 0
        pager.mark_present(3, 4)
        for page in range(3, 7):
            touch(pager, page)
        pager.evict(3, 3)
        pager.mark_nonpresent(6, 1)
        seen = []
        pager.sink.between = lambda page: seen.append((page, present(pager)))
        assert pager.resolve(PageFault(0)) is Outcome.ADMITTED
        assert seen == [(4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4])]
        for page in range(RUN):
            was = touched(page) if 3 <= page < 7 else bytes(PAGE_SIZE) if page == 10 else content(page)
            assert page_of(pager, page) == was
        counters = pager.counters
        assert (counters.pages_fetched, counters.pages_zeroed) == (RUN - 1, 1)
        assert (counters.pages_refetched, counters.pages_backed) == (3, 1)
        assert pager.ledger.resident == RUN


HOT = 96


@pytest.mark.parametrize("unit", [1, 4])
def test_whatever_threads_do_while_pieces_land_no_byte_is_lost_and_the_counts_are_exact(unit):
    rounds = by_effort(100, 1000, 30_000)
    with pager_of(granule=unit * PAGE_SIZE, fault_around=32) as pager:
        pager.source.pieces, pager.sink = 3, FakeSink(PAGES)
        pager.sink.pieces = 5
        chance = random.Random(unit)

        def fail_sometimes(page):
            if chance.random() < 0.05:
                raise source_error(page, transient=True)
            if chance.random() < 0.3:
                time.sleep(0)

        pager.source.between = pager.sink.between = fail_sometimes
        view, writes, guards = pager.trap.fill_view, [0] * HOT, [threading.Lock() for _ in range(HOT)]
        outcomes = {Outcome.PRESENT, Outcome.ADMITTED}

        def act(number):
            chance = random.Random(10 * number + unit)
            for _ in range(rounds):
                page, what = chance.randrange(HOT), chance.random()
                if what < 0.1:
                    pager.mark_nonpresent(page, min(chance.randint(1, 40), HOT - page))
                elif what < 0.25:
                    pager.evict(page, min(chance.randint(1, 60), HOT - page))
                elif what < 0.35:
                    assert pager.mark_present(page, min(chance.randint(1, 60), HOT - page)) is Outcome.PRESENT
                elif what < 0.45:
                    assert pager.resolve(PageFault(page)) in outcomes
                elif what < 0.55:
                    notified = threading.Semaphore(0)
                    if pager.resolve_or_park(PageFault(page), Waiter(notified.release), 20) is None:
                        assert notified.acquire(timeout=LONG)
                else:
                    with pager.held(PageFault(page)) as outcome, guards[page]:
                        assert outcome is Outcome.PRESENT
                        assert pager.trap.entered[page]
                        writes[page] += 1
                        view[page * PAGE_SIZE] = (view[page * PAGE_SIZE] + 1) % 256

        with switching_often():
            in_threads(*(functools.partial(act, number) for number in range(6)))
        assert pager.mark_present(0, HOT) is Outcome.PRESENT
        assert pager.error is pager.paused is None
        for page in range(HOT):
            was = content(page)
            assert page_of(pager, page) == bytes([(was[0] + writes[page]) % 256]) + was[1:]
        assert present(pager) == enters(pager)
        counters = pager.counters
        assert counters.pages_fetched == pager.bitmap.count()  # each page once
        assert (
            counters.pages_admitted
            == counters.pages_fetched + counters.pages_backed + counters.pages_refetched
            == counters.pages_revoked + pager.bitmap.count()
        )
        assert counters.pages_refetched > 0
        assert pager.ledger.claims == []
        assert pager.ledger.resident == pager.bitmap.count() + pager.ledger.states.count(State.BACKED)


@pytest.mark.parametrize("unit", [1, 4])
def test_what_is_discarded_while_pieces_land_is_zeros_and_stays_so(unit):
    with pager_of(granule=unit * PAGE_SIZE, fault_around=32) as pager:
        pager.source.pieces = 3
        gone = sorted(random.Random(unit).sample(range(0, PAGES, unit), PAGES // unit // 3))
        pager.source.between = lambda page: time.sleep(0)
        entered, mutex = pager.trap.entered, threading.Lock()

        def admit(first, count):
            with mutex:  # what was discarded is entered no more: the trap finds nothing there
                entered[first : first + count] = bytes(count)

        pager.trap.on_admit = admit

        def discard():
            pages = list(gone)
            random.Random(9).shuffle(pages)
            for page in pages:
                pager.note_discarded(page, unit)
                at = slice(page * PAGE_SIZE, (page + unit) * PAGE_SIZE)
                pager.trap.ram_view[at] = bytes(unit * PAGE_SIZE)
                time.sleep(0)

        def touch_all(number):
            chance = random.Random(number)
            for _ in range(400):
                page = chance.randrange(PAGES)
                assert pager.resolve(PageFault(page)) in (Outcome.PRESENT, Outcome.ADMITTED)

        with switching_often():
            in_threads(discard, *(functools.partial(touch_all, number) for number in range(4)))
        assert pager.mark_present(0, PAGES) is Outcome.PRESENT
        zeros = {page + each for page in gone for each in range(unit)}
        wrong = [
            page
            for page in range(PAGES)
            if page_of(pager, page) != (bytes(PAGE_SIZE) if page in zeros else content(page))
        ]
        assert wrong == []
        assert pager.ledger.resident == pager.bitmap.count() == PAGES
        assert pager.ledger.claims == []
