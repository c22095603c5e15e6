"""A source that cannot deliver: what needs it is held until `resume`, all else goes on; or fails, as `holds` says."""

import contextlib
import functools
import queue
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
from test_access import memory_of

from kvmdp.errors import BusyError, CancelledError, PagingError
from kvmdp.page import PAGE_SIZE, Outcome, PageFault
from kvmdp.paging.cancellation import Cancellation
from kvmdp.paging.claim import State, Waiter, Wake
from kvmdp.shortage import ShortageError
from kvmdp.source.base import SourceError

LONG = 30  # seconds that nothing here takes
LOST = 40  # the page whose fetch fails first
CUT = (
    f"paused: the page at gpa {LOST * PAGE_SIZE:#x} cannot be fetched: cannot read 4096 bytes at offset "
    f"{LOST * PAGE_SIZE:#x} of the fake source: the wire is cut"
)
ZERO_AT = PAGES - 1  # a hole of the source


class Line:
    """The way to the source, which can be cut and mended; `failed` are the runs that did not come."""

    def __init__(self, pager):
        self.is_cut = False
        self.failed = []
        self.pager = pager
        pager.source.before = self.before

    def before(self, first, count):
        if self.is_cut:
            self.failed.append((first, count))
            raise source_error(first, count)

    def mend(self):
        self.is_cut = False
        self.pager.resume()


@contextlib.contextmanager
def held_pager(*, holds=True, **options):
    """A pager and its line; pages 0 to 3 are present, 4 to 7 are in RAM and shut off."""
    with pager_of(extents=[(0, ZERO_AT)], **options) as pager:
        pager.holds = holds
        pager.mark_present(0, 8)
        pager.mark_nonpresent(4, 4)
        yield pager, Line(pager)


def held_now(pager):
    """How many wait for the end of the pause."""
    with pager.mutex:
        return 0 if pager.ledger.pause is None else len(pager.ledger.pause.waiters)


def wait_until(condition):
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Held:
    """Threads that ask for absent pages while the line is cut, each in another way, and what they end with."""

    def __init__(self, pager, line):
        self.pager = pager
        self.notified = queue.SimpleQueue()
        self.waiter = Waiter(lambda: self.notified.put(self.waiter.reason))
        self.ends = {}
        self.cancellation = Cancellation(pager)
        memory = memory_of(pager)
        asks = {
            "vcpu": lambda: pager.resolve(PageFault(LOST)),
            "another": lambda: pager.resolve(PageFault(LOST)),
            "with a timeout": lambda: pager.resolve(PageFault(LOST + 1), timeout=LONG),
            "with a cancellation": lambda: pager.resolve(PageFault(LOST + 2), cancellation=self.cancellation),
            "marker": lambda: pager.mark_present(LOST + 3, 20),
            "reader": lambda: memory.read((LOST + 30) * PAGE_SIZE - 8, 16),
            "zeros": lambda: memory.read(ZERO_AT * PAGE_SIZE, 8),
            "holder": self.hold,
        }
        line.is_cut = True
        self.threads = {}
        for number, (name, ask) in enumerate(asks.items()):
            self.threads[name] = started(functools.partial(self.ask, name, ask))
            wait_until(lambda number=number: held_now(pager) == number + 1)
        assert pager.resolve_or_park(PageFault(LOST + 33), self.waiter) is None
        self.count = len(asks) + 1
        assert held_now(pager) == self.count

    def hold(self):
        with self.pager.held(PageFault(LOST + 32)) as outcome:
            return outcome

    def ask(self, name, ask):
        try:
            self.ends[name] = ask()
        except (PagingError, RuntimeError) as error:
            self.ends[name] = type(error)

    def join(self):
        for name, thread in self.threads.items():
            thread.join(LONG)
            assert not thread.is_alive(), f"{name} is held for ever"
        return self.ends


def test_what_needs_the_source_is_held_and_goes_on_with_the_right_bytes_and_counts():
    with held_pager() as (pager, line):
        held = Held(pager, line)
        assert line.failed == [(LOST, 1)]  # and is not asked again before `resume`
        assert str(pager.paused) == CUT
        assert pager.error is None
        assert held.ends == {}
        line.mend()
        ends = held.join()
        assert pager.paused is None
        assert pager.error is None
        assert {ends.pop("vcpu"), ends.pop("another")} <= {Outcome.ADMITTED, Outcome.PRESENT}
        assert ends == {
            "with a timeout": Outcome.ADMITTED,
            "with a cancellation": Outcome.ADMITTED,
            "marker": Outcome.PRESENT,
            "reader": content(LOST + 29)[:8] + content(LOST + 30)[:8],
            "zeros": bytes(8),
            "holder": Outcome.PRESENT,
        }
        assert held.notified.get(timeout=LONG) is Wake.REVOKED
        assert held.notified.empty()
        assert pager.resolve_or_park(PageFault(LOST + 33), Waiter(lambda: None)) is Outcome.ADMITTED
        pages = [*range(LOST, LOST + 23), LOST + 29, LOST + 30, LOST + 32, LOST + 33]
        assert [page for page in range(8, ZERO_AT) if pager.bitmap.test(page)] == pages
        assert all(page_of(pager, page) == content(page) for page in pages)
        counters = pager.counters
        assert (counters.pages_fetched, counters.pages_zeroed, counters.pages_backed) == (
            8 + len(pages),
            1,
            0,
        )
        assert counters.pages_admitted == 9 + len(pages)
        assert pager.ledger.claims == []


def test_pages_in_ram_come_and_go_during_a_pause():
    with held_pager(fault_around=16) as (pager, line):
        held = Held(pager, line)
        memory = memory_of(pager)
        assert pager.resolve(PageFault(3)) is Outcome.PRESENT
        assert pager.resolve(PageFault(5)) is Outcome.ADMITTED
        assert not pager.bitmap.test(4)  # its neighbours are not asked for
        assert not pager.bitmap.test(8)
        assert memory.read(6 * PAGE_SIZE, 8) == content(6)[:8]
        assert pager.mark_present(0, 8) is Outcome.PRESENT
        assert pager.mark_nonpresent(0, 2) == 2
        assert pager.resolve(PageFault(1)) is Outcome.ADMITTED
        assert pager.evict(2, 2) == 2
        assert pager.resolve(PageFault(2), timeout=0) is Outcome.TIMED_OUT  # the sink's are held too
        assert pager.discard(4, 1) == 1
        with pager.held(PageFault(5)) as outcome:
            assert outcome is Outcome.PRESENT
        assert len(line.failed) == 1
        assert held_now(pager) == held.count
        line.mend()
        held.join()
        assert pager.resolve(PageFault(2)) is Outcome.ADMITTED
        assert pager.mark_present(4, 1) is Outcome.PRESENT
        assert [page_of(pager, page)[:1] for page in (1, 2, 4)] == [content(1)[:1], content(2)[:1], b"\0"]
        assert pager.counters.pages_refetched >= 1


def test_who_gives_up_during_a_pause_is_let_go():
    with held_pager() as (pager, line):
        held = Held(pager, line)
        assert pager.resolve(PageFault(LOST), timeout=0.001) is Outcome.TIMED_OUT
        with pytest.raises(BusyError, match="was not made present within"):
            memory_of(pager, timeout=0.001).read(LOST * PAGE_SIZE, 1)
        with pytest.raises(BusyError, match="is not to wait for it"):
            memory_of(pager).read(LOST * PAGE_SIZE, 1, nowait=True)
        held.cancellation.cancel()
        held.threads["with a cancellation"].join(LONG)
        assert held.ends == {"with a cancellation": Outcome.CANCELLED}
        assert pager.withdraw(held.waiter)
        assert not pager.withdraw(held.waiter)
        assert held.notified.get(timeout=LONG) is Wake.CANCELLED
        assert held_now(pager) == held.count - 2
        line.mend()
        held.join()
        assert held.notified.empty()


def test_a_second_failure_pauses_again_and_says_what_failed_then():
    with held_pager() as (pager, line):
        held = Held(pager, line)
        failed = len(line.failed)
        pager.resume()
        # All are held again, but for the one that was parked. Zeros need no source, and may have come before it failed.
        wait_until(lambda: len(line.failed) > failed)
        wait_until(lambda: held_now(pager) + len(held.ends) == held.count - 1)
        assert set(held.ends) <= {"zeros"}
        assert held.notified.get(timeout=LONG) is Wake.REVOKED
        assert "cannot be fetched" in str(pager.paused)
        line.mend()
        assert Outcome.FAILED not in held.join().values()
        assert pager.paused is None


def test_a_stop_ends_a_pause_for_all():
    with held_pager() as (pager, line):
        held = Held(pager, line)
        pager.cancel()
        ends = held.join()
        assert held.notified.get(timeout=LONG) is Wake.CANCELLED
        assert ends.pop("reader") is ends.pop("zeros") is CancelledError
        assert set(ends.values()) == {Outcome.CANCELLED}
        assert pager.resolve_or_park(PageFault(LOST + 33), Waiter(lambda: None)) is Outcome.CANCELLED
        assert pager.resolve(PageFault(5)) is Outcome.CANCELLED
        assert len(line.failed) == 1
        assert str(pager.paused) == CUT  # what the machine may say when it is asked why


def test_a_machine_that_is_opened_again_is_paused_as_before():
    with held_pager() as (pager, line):
        held = Held(pager, line)
        pager.cancel()
        held.join()
        pager.reopen()
        assert pager.resolve(PageFault(LOST), timeout=0) is Outcome.TIMED_OUT
        assert pager.resolve(PageFault(5)) is Outcome.ADMITTED
        line.mend()
        assert pager.resolve(PageFault(LOST)) is Outcome.ADMITTED


@pytest.mark.parametrize("how", ["abort", "trap"])
def test_what_breaks_for_good_during_a_pause_fails_all(how):
    with held_pager() as (pager, line):
        held = Held(pager, line)
        if how == "abort":
            pager.abort(PagingError("the reader broke"))
        else:
            pager.trap.on_admit = break_down
            with pytest.raises(RuntimeError):
                pager.resolve(PageFault(5))
        ends = held.join()
        assert held.notified.get(timeout=LONG) is Wake.REVOKED
        assert pager.error is not None
        assert "wire" not in str(pager.error)
        assert ends.pop("reader") is ends.pop("zeros") is PagingError
        assert set(ends.values()) == {Outcome.FAILED}
        assert pager.resolve_or_park(PageFault(LOST + 33), Waiter(lambda: None)) is Outcome.FAILED
        assert len(line.failed) == 1
        line.mend()
        assert pager.resolve(PageFault(LOST)) is Outcome.FAILED  # a pause can be ended, this cannot
        assert pager.resolve(PageFault(1)) is Outcome.PRESENT


def break_down(*_):
    raise RuntimeError("a bug")


def test_a_source_that_breaks_after_a_resume_fails_all_who_were_held():
    with held_pager() as (pager, line):
        held = Held(pager, line)
        pager.source.before = break_down
        pager.resume()
        ends = held.join()
        assert ends.pop("zeros") in (bytes(8), PagingError)  # which need no source
        assert RuntimeError in ends.values()  # of who was the first
        assert ends.pop("reader") in (PagingError, RuntimeError)
        assert set(ends.values()) <= {Outcome.FAILED, RuntimeError}
        assert "broke: internal error: RuntimeError('a bug')" in str(pager.error)
        assert pager.ledger.claims == []


def test_without_holds_faults_fail_and_work_again_after_resume():
    with held_pager(holds=False) as (pager, line):
        line.is_cut = True
        assert pager.resolve(PageFault(LOST)) is Outcome.FAILED
        assert str(pager.error) == str(pager.paused) == CUT
        assert pager.resolve(PageFault(LOST + 1)) is Outcome.FAILED
        assert pager.resolve(PageFault(5)) is Outcome.FAILED
        assert pager.mark_present(0, 60) is Outcome.FAILED
        notified = []
        assert pager.resolve_or_park(PageFault(LOST), Waiter(lambda: notified.append(1))) is Outcome.FAILED
        with pytest.raises(PagingError, match="the wire is cut"):
            memory_of(pager).read(LOST * PAGE_SIZE, 1)
        assert line.failed == [(LOST, 1)]
        pager.resume()
        assert pager.error is pager.paused is None
        assert pager.resolve(PageFault(LOST + 2)) is Outcome.FAILED  # it is cut still
        assert f"gpa {(LOST + 2) * PAGE_SIZE:#x}" in str(pager.error)
        line.mend()
        assert pager.resolve(PageFault(LOST)) is Outcome.ADMITTED
        assert pager.mark_present(0, 60) is Outcome.PRESENT
        assert all(page_of(pager, page) == content(page) for page in range(60))
        assert notified == []
        assert pager.counters.pages_fetched == 60
        assert pager.counters.pages_backed == 4


def test_who_waits_for_a_fetch_that_fails_is_held_as_well():
    with held_pager() as (pager, line):
        asked, go_on = threading.Event(), threading.Event()

        def before(first, count):
            asked.set()
            assert go_on.wait(LONG)
            line.before(first, count)

        pager.source.before, line.is_cut, ends = before, True, []
        threads = [started(lambda: ends.append(pager.resolve(PageFault(LOST)))) for _ in range(5)]
        assert asked.wait(LONG)
        notified = queue.SimpleQueue()
        waiter = Waiter(lambda: notified.put(waiter.reason))
        assert pager.resolve_or_park(PageFault(LOST), waiter) is None
        wait_until(lambda: pager.counters.waits == 5)
        go_on.set()
        assert notified.get(timeout=LONG) is Wake.FAILED
        assert pager.resolve_or_park(PageFault(LOST), waiter) is None
        wait_until(lambda: held_now(pager) == 6)
        line.mend()
        assert notified.get(timeout=LONG) is Wake.REVOKED
        for thread in threads:
            thread.join(LONG)
        assert sorted(each.name for each in ends) == ["ADMITTED", *["PRESENT"] * 4]
        assert pager.source.fills[1:] == [(LOST, 1)] * 2


def test_memory_that_the_host_has_not_got_pauses_too():
    with held_pager() as (pager, line):

        def short(offset, length):
            raise ShortageError("no huge page is left")

        pager.contents._populate = short
        assert pager.resolve(PageFault(LOST), timeout=0) is Outcome.TIMED_OUT
        assert f"gpa {LOST * PAGE_SIZE:#x} cannot be fetched: no huge page is left" in str(pager.paused)
        pager.contents._populate = None
        line.mend()
        assert pager.resolve(PageFault(LOST)) is Outcome.ADMITTED


def test_a_resume_without_a_pause_changes_nothing():
    with held_pager() as (pager, line):
        pager.resume()
        assert pager.resolve(PageFault(LOST)) is Outcome.ADMITTED
        line.is_cut = True
        assert pager.resolve(PageFault(LOST + 1), timeout=0) is Outcome.TIMED_OUT
        line.mend()
        pager.resume()
        assert pager.resolve(PageFault(LOST + 1)) is Outcome.ADMITTED
        pager.abort(PagingError("the reader broke"))
        pager.resume()
        assert pager.resolve(PageFault(LOST + 2)) is Outcome.FAILED


def test_complete_waits_for_no_pause():
    with held_pager() as (pager, line):
        line.is_cut = True
        assert pager.resolve(PageFault(LOST), timeout=0) is Outcome.TIMED_OUT
        assert pager.complete(0, 60) is Outcome.PRESENT
        assert [page for page in range(60) if pager.bitmap.test(page)] == list(range(8))
        assert len(line.failed) == 1


def test_a_page_that_is_read_without_being_admitted_does_not_wait_for_the_end_of_a_pause():
    with held_pager() as (pager, line):
        held = Held(pager, line)
        copy = bytearray(2 * PAGE_SIZE)
        with pytest.raises(SourceError, match="the wire is cut"):
            pager.content(LOST, 1, memoryview(copy)[:PAGE_SIZE])
        pager.content(3, 2, memoryview(copy))
        assert copy == content(3) + content(4)
        assert held.ends == {}
        line.mend()
        held.join()


def test_a_stop_between_a_failure_and_the_wait_for_its_end_is_a_stop():
    with held_pager() as (pager, line):
        asked, ends = threading.Event(), []
        go_on = threading.Event()

        def before(first, count):
            asked.set()
            assert go_on.wait(LONG)
            line.before(first, count)

        pager.source.before, line.is_cut = before, True
        thread = started(lambda: ends.append(pager.resolve(PageFault(LOST))))
        assert asked.wait(LONG)
        assert pager.resolve_or_park(PageFault(LOST), Waiter(pager.cancel)) is None
        go_on.set()
        thread.join(LONG)
        assert ends == [Outcome.CANCELLED]


@pytest.mark.parametrize("around", [1, 8])
@pytest.mark.parametrize("unit", [1, 4])
def test_whatever_fails_and_is_resumed_at_random_no_byte_is_lost_and_the_counts_are_exact(unit, around):
    hot, pieces = 64, 3
    rounds = by_effort(100, 1000, 30_000)
    with pager_of(
        granule=unit * PAGE_SIZE, fault_around=around, extents=[(0, 40), (44, PAGES - 44)]
    ) as pager:
        pager.holds, pager.source.pieces = True, pieces
        view, writes = pager.trap.fill_view, [0] * hot
        guards = [threading.Lock() for _ in range(hot)]
        chance, calm = random.Random(unit + around), threading.Event()

        def fail_sometimes(page, count=1):
            if not calm.is_set() and chance.random() < 0.2:
                failed.append(page)
                raise source_error(page, count)

        sink = pager.sink = FakeSink(PAGES)
        sink.pieces = pieces
        pager.source.before = pager.source.between = sink.before = sink.between = fail_sometimes
        memory = [memory_of(pager, number=number) for number in range(6)]
        failed, parked, seen = [], [], set()

        def act(number):
            chance = random.Random(10 * number + unit)
            for _ in range(rounds):
                page, what = chance.randrange(hot), chance.random()
                if what < 0.1:
                    pager.mark_nonpresent(page, min(chance.randint(1, 20), hot - page))
                elif what < 0.2:
                    pager.evict(page, min(chance.randint(1, 20), hot - page))
                elif what < 0.3:
                    assert pager.mark_present(page, min(chance.randint(1, 30), hot - page)) is Outcome.PRESENT
                elif what < 0.4:
                    seen.add(pager.resolve(PageFault(page), timeout=chance.random() / 1000))
                elif what < 0.5:
                    notified = threading.Semaphore(0)
                    if pager.resolve_or_park(PageFault(page), Waiter(notified.release)) is None:
                        assert notified.acquire(timeout=LONG)
                        assert not notified.acquire(blocking=False)
                        parked.append(page)
                elif what < 0.7:
                    assert len(memory[number].read(page * PAGE_SIZE, 100)) == 100
                else:
                    with pager.held(PageFault(page)) as outcome, guards[page]:
                        assert outcome is Outcome.PRESENT
                        writes[page] += 1
                        view[page * PAGE_SIZE] = (view[page * PAGE_SIZE] + 1) % 256

        def operate():
            while not done.wait(0.0005):
                if pager.paused is not None:
                    pager.resume()

        done = threading.Event()
        operator = started(operate)
        try:
            with switching_often():
                in_threads(*(functools.partial(act, number) for number in range(6)))
            calm.set()
            pager.resume()
            assert pager.mark_present(0, hot) is Outcome.PRESENT
        finally:
            done.set()
            operator.join(LONG)
        assert pager.error is pager.paused is None
        assert seen <= {Outcome.TIMED_OUT, Outcome.PRESENT, Outcome.ADMITTED}
        for page in range(hot):
            was = bytes(PAGE_SIZE) if 40 <= page < 44 else content(page)
            assert page_of(pager, page) == bytes([(was[0] + writes[page]) % 256]) + was[1:]
        assert [pager.bitmap.test(page) for page in range(PAGES)] == [
            each == 1 for each in pager.trap.entered
        ]
        counters = pager.counters
        assert (counters.pages_fetched, counters.pages_zeroed) == (hot - 4, 4)  # each once
        assert counters.pages_admitted == hot + counters.pages_backed + counters.pages_refetched
        assert pager.bitmap.count() == counters.pages_admitted - counters.pages_revoked
        assert pager.ledger.claims == []
        assert pager.ledger.resident == pager.bitmap.count() + pager.ledger.states.count(State.BACKED)
        assert len(failed) > 10
        assert parked
