"""The faults of a peer: several fetches at once, each fault answered once, however they end."""

import contextlib
import queue
import random
import threading
import time

import pytest
from device_process import bench
from effort import by_effort
from fakes import PAGES, content, page_of, pager_of, source_error, started, switching_often

from kvmdp.errors import PagingError
from kvmdp.page import Access, Outcome, PageFault
from kvmdp.paging.jobs import Job
from kvmdp.peers.requests import FaultRequests, PeerCounters
from kvmdp.shortage import ShortageError
from kvmdp.thread import JoinableThread

LONG = 20  # seconds that nothing here takes
AT_ONCE = 4


class Faults:
    """A peer's faults on a pager; `answers` come as (token, outcome)."""

    def __init__(self, pager, most):
        self.answers, self.broke, self.counters = queue.SimpleQueue(), [], PeerCounters()
        self.requests = FaultRequests(
            pager, self.counters, lambda *answer: self.answers.put(answer), self.broke.append, "faults", most
        )

    def ask(self, token, first=None, count=1):
        self.requests.submit(token, token if first is None else first, count, Access.READ, 0)

    def answered(self, number):
        return dict(self.answers.get(timeout=LONG) for _ in range(number))


@contextlib.contextmanager
def faults(most=AT_ONCE, **options):
    with pager_of(**options) as pager:
        made = Faults(pager, most)
        made.requests.start()
        try:
            yield pager, made
        finally:
            made.requests.close()
            assert made.requests.join(LONG)
            assert made.requests.open == 0
            assert pager.ledger.claims == []


class Blocked:
    """A source that delivers once `go_on` is set; `under_way` counts the fetches that have begun."""

    def __init__(self, pager):
        self.under_way = threading.Semaphore(0)
        self.go_on = threading.Event()
        pager.source.before = self._before

    def _before(self, first, count):
        self.under_way.release()
        assert self.go_on.wait(LONG)

    def wait(self, number):
        for _ in range(number):
            assert self.under_way.acquire(timeout=LONG)


def only_together(pager, number, timeout=LONG):
    """Have the source deliver to `number` fetches at once only."""
    together = threading.Barrier(number)
    pager.source.before = lambda first, count: together.wait(timeout)


def wait_until(condition):
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("most", [1, 2, AT_ONCE, 16])
def test_as_many_fetches_are_under_way_as_the_source_can_use(most):
    with faults(most) as (pager, made):
        only_together(pager, most)
        for token in range(64):
            made.ask(token)
        assert made.answered(64) == dict.fromkeys(range(64), Outcome.ADMITTED)
        assert all(page_of(pager, page) == content(page) for page in range(64))
        assert made.counters.replies == 64
        assert pager.counters.pages_fetched == 64
        assert made.broke == []


def test_no_more_fetches_are_under_way_than_the_source_can_use():
    with faults(2) as (pager, made):
        source = Blocked(pager)
        for token in range(8):
            made.ask(token)
        source.wait(2)
        assert not source.under_way.acquire(timeout=0.05)
        source.go_on.set()
        assert made.answered(8) == dict.fromkeys(range(8), Outcome.ADMITTED)


class SlowToBegin:
    """The queue of the faults: the thread that takes the first is held before it can say that it has it."""

    def __init__(self):
        self._queue = queue.SimpleQueue()
        self.taken, self.go_on = threading.Event(), threading.Event()
        self.put, self.qsize = self._queue.put, self._queue.qsize

    def get(self):
        item = self._queue.get()
        if not self.taken.is_set():
            self.taken.set()
            assert self.go_on.wait(LONG)
        return item


def test_a_fault_does_not_wait_for_a_thread_that_has_another_in_hand():
    with pager_of() as pager:
        made = Faults(pager, 2)
        made.requests._todo = slow = SlowToBegin()
        made.requests.start()
        try:
            only_together(pager, 2, timeout=0.5)
            made.ask(1)
            assert slow.taken.wait(LONG)
            made.ask(2)
            slow.go_on.set()
            assert made.answered(2) == {1: Outcome.ADMITTED, 2: Outcome.ADMITTED}
        finally:
            made.requests.close()
            assert made.requests.join(LONG)


def test_faults_that_were_held_by_a_pause_are_fetched_at_once_after_it():
    with faults() as (pager, made):
        pager.holds = True

        def fail(first, count):
            raise source_error(first, count)

        pager.source.before = fail
        for token in range(AT_ONCE):
            made.ask(token)
            wait_until(lambda: pager.ledger.pause is not None and made.requests._pending == 0)
            wait_until(lambda number=token + 1: len(pager.ledger.pause.waiters) == number)
        only_together(pager, AT_ONCE, timeout=0.5)
        pager.resume()
        assert made.answered(AT_ONCE) == dict.fromkeys(range(AT_ONCE), Outcome.ADMITTED)


def test_faults_are_held_by_a_pause_and_answered_after_it():
    with faults() as (pager, made):
        pager.holds = True

        def fail(first, count):
            raise source_error(first, count)

        pager.source.before = fail
        for token in range(20):
            made.ask(token)
        wait_until(lambda: pager.ledger.pause is not None and len(pager.ledger.pause.waiters) == 20)
        made.requests.release(7)
        assert made.answered(1) == {7: Outcome.CANCELLED}
        assert made.requests.open == 19
        pager.source.before = lambda first, count: None
        pager.resume()
        assert made.answered(19) == {token: Outcome.ADMITTED for token in range(20) if token != 7}


@pytest.mark.parametrize("end", ["abort", "cancel"])
def test_faults_that_are_held_end_with_the_machine(end):
    with faults() as (pager, made):
        pager.holds = True

        def fail(first, count):
            raise source_error(first, count)

        pager.source.before = fail
        for token in range(20):
            made.ask(token)
        wait_until(lambda: pager.ledger.pause is not None and len(pager.ledger.pause.waiters) == 20)
        if end == "abort":
            pager.abort(PagingError("the reader broke"))
        else:
            pager.cancel()
        outcome = Outcome.FAILED if end == "abort" else Outcome.CANCELLED
        assert made.answered(20) == dict.fromkeys(range(20), outcome)
        assert made.counters.replies == 20


def test_an_abort_ends_what_has_not_begun_and_what_is_parked():
    with faults(2) as (pager, made):
        claim = pager.begin(PageFault(100))
        source = Blocked(pager)
        made.ask(100)
        wait_until(lambda: claim.waiters)
        for token in range(6):
            made.ask(token)
        source.wait(2)
        pager.abort(PagingError("the reader broke"))
        pager.fail(claim, PagingError("and so did this"))
        source.go_on.set()
        ends = made.answered(7)
        assert ends.pop(100) is Outcome.FAILED
        assert sorted(each.name for each in ends.values()) == ["ADMITTED"] * 2 + ["FAILED"] * 4


def test_a_fault_of_many_pages_is_one_fetch():
    with faults() as (pager, made):
        made.ask(1, 100, 64)
        assert made.answered(1) == {1: Outcome.ADMITTED}
        assert pager.source.fills == [(100, 64)]
        assert pager.trap.calls == [("admit", 100, 64)]
        assert (pager.counters.claims, pager.counters.pages_fetched) == (1, 64)
        assert made.counters.replies == 1
        made.ask(2, 100, 64)
        assert made.answered(1) == {2: Outcome.PRESENT}
        made.ask(3, 0, PAGES)
        assert made.answered(1) == {3: Outcome.ADMITTED}
        assert pager.source.fills == [(100, 64), (0, 100), (164, PAGES - 164)]


def test_a_fault_of_many_pages_waits_for_those_that_another_fetches():
    with faults() as (pager, made):
        claim = pager.begin(PageFault(110))
        made.ask(1, 100, 20)
        wait_until(lambda: claim.waiters)
        assert [page for page in range(PAGES) if pager.bitmap.test(page)] == list(range(100, 110))
        assert made.answers.empty()
        pager.contents.fill(claim, PageFault(110), lambda _claim, _page: None)
        pager.commit(claim)
        assert made.answered(1) == {1: Outcome.ADMITTED}
        assert sorted(pager.source.fills) == [(100, 10), (110, 1), (111, 9)]


def test_a_poisoned_page_ends_a_fault_that_holds_it():
    with faults() as (pager, made):
        pager.poison(5)
        made.ask(1, 3, 4)
        assert made.answered(1) == {1: Outcome.POISONED}
        assert pager.source.fills == [(3, 2)]


def test_a_fault_that_is_released_before_it_begins_fetches_nothing():
    with faults(1) as (pager, made):
        source = Blocked(pager)
        made.ask(1)
        source.wait(1)
        made.ask(2)
        made.requests.release(2)
        made.requests.release(2)
        made.requests.release(99)  # which is unknown, or answered
        source.go_on.set()
        assert made.answered(2) == {1: Outcome.ADMITTED, 2: Outcome.CANCELLED}
        made.requests.release(1)
        assert pager.source.fills == [(1, 1)]
        assert made.answers.empty()


def test_a_fault_that_is_released_while_it_is_fetched_ends_after_that():
    with faults() as (pager, made):
        source = Blocked(pager)
        made.ask(1)
        source.wait(1)
        made.requests.release(1)
        assert made.requests.is_open(1)
        assert made.answers.empty()
        source.go_on.set()
        assert made.answered(1)[1] in (Outcome.ADMITTED, Outcome.CANCELLED)
        assert page_of(pager, 1) == content(1)  # nothing is left half-way


def test_a_fault_that_is_released_between_its_pages_goes_on_no_further():
    with faults() as (pager, made):
        claim = pager.begin(PageFault(3))
        made.ask(1, 2, 4)
        wait_until(lambda: claim.waiters)
        made.requests.release(1)
        assert made.answered(1) == {1: Outcome.CANCELLED}
        assert claim.waiters == []
        pager.fail(claim, PagingError("test"))
        assert pager.source.fills == [(2, 1)]


def test_after_the_close_nothing_is_answered_and_all_are_counted():
    with pager_of() as pager:
        made = Faults(pager, 2)
        made.requests.start()
        claim, source = pager.begin(PageFault(100)), Blocked(pager)
        made.ask(100)
        wait_until(lambda: claim.waiters)
        for token in range(6):
            made.ask(token)
        source.wait(2)
        made.requests.close()
        made.requests.close()
        assert (made.requests.open, made.requests.oldest) == (0, None)
        assert made.counters.replies == 7
        assert claim.waiters == []
        assert not made.requests.join(0.01)  # two fetches hold the threads
        source.go_on.set()
        assert made.requests.join(LONG)
        assert made.answers.empty()
        assert sorted(pager.source.fills) == [(0, 1), (1, 1)]
        pager.fail(claim, PagingError("test"))


def test_the_oldest_fault_is_the_one_that_waits_longest_for_a_page():
    with faults(2) as (pager, made):
        assert made.requests.oldest is None
        source, before = Blocked(pager), time.perf_counter_ns()
        made.ask(1)
        source.wait(1)
        between = time.perf_counter_ns()
        made.ask(2)
        assert before <= made.requests.oldest <= between
        assert made.requests.open == 2
        source.go_on.set()
        made.answered(2)
        assert made.requests.oldest is None
        assert not made.requests.is_open(1)


def test_a_source_that_breaks_ends_each_fault_and_is_told_of():
    with faults() as (pager, made):

        def fail(first, count):
            raise RuntimeError("a bug")

        pager.source.before = fail
        for token in range(10):
            made.ask(token)
        assert made.answered(10) == dict.fromkeys(range(10), Outcome.FAILED)
        assert {str(error) for error in made.broke} == {"a bug"}
        assert 1 <= len(made.broke) <= AT_ONCE
        assert "RuntimeError('a bug')" in str(pager.error)


def test_faults_are_served_by_the_threads_that_there_are(monkeypatch):
    with faults() as (pager, made):
        failed = []

        def refuse(thread):
            failed.append(thread)
            raise ShortageError("no more threads")

        monkeypatch.setattr(JoinableThread, "start", refuse)
        source = Blocked(pager)
        for token in range(10):
            made.ask(token)
        source.wait(1)
        source.go_on.set()
        assert made.answered(10) == dict.fromkeys(range(10), Outcome.ADMITTED)
        assert len(failed) == 1


class NoRoom(Job):
    def __init__(self):
        self.asked, self.has_room = threading.Semaphore(0), threading.Event()

    def seconds_held(self, since):
        self.asked.release()
        return 0 if self.has_room.is_set() else LONG


def test_a_fault_waits_for_room_unless_its_page_is_there_or_it_is_released():
    with faults() as (pager, made):
        pager.mark_present(1, 1)
        job = NoRoom()
        pager.jobs.add(job)
        for token in (1, 2, 3):
            made.ask(token)
        for _ in range(3):
            assert job.asked.acquire(timeout=LONG)
        assert made.answered(1) == {1: Outcome.PRESENT}
        made.requests.release(2)
        assert made.answered(1) == {2: Outcome.CANCELLED}
        job.has_room.set()
        pager.jobs.ask_again()
        assert made.answered(1) == {3: Outcome.ADMITTED}


def test_each_of_many_faults_that_come_are_released_and_lose_their_pages_is_answered_once():
    rounds = by_effort(200, 2000, 50_000)
    with faults() as (pager, made):
        pager.source.before = lambda first, count: time.sleep(0)
        stop, chance = threading.Event(), random.Random(3)

        def revoke():
            chance = random.Random(4)
            while not stop.is_set():
                first = chance.randrange(32)
                pager.mark_nonpresent(first, 40 - first)
                time.sleep(0)

        def release():
            chance = random.Random(5)
            while not stop.is_set():
                made.requests.release(chance.randrange(rounds))
                if asked:
                    made.requests.release(asked[-1])
                time.sleep(0)

        asked, tally = [], {}
        others = [started(each) for each in (revoke, revoke, release)]
        try:
            with switching_often():
                for token in range(rounds):
                    asked.append(token)
                    made.ask(token, chance.randrange(32), chance.randint(1, 8))
                    if made.requests.open > 16:
                        token, outcome = made.answers.get(timeout=LONG)
                        assert token not in tally
                        tally[token] = outcome
                for token, outcome in made.answered(rounds - len(tally)).items():
                    assert token not in tally
                    tally[token] = outcome
        finally:
            stop.set()
            for thread in others:
                thread.join(LONG)
        assert sorted(tally) == list(range(rounds))
        assert set(tally.values()) <= {Outcome.PRESENT, Outcome.ADMITTED, Outcome.CANCELLED}
        assert made.counters.replies == rounds
        assert made.broke == []


def test_the_faults_of_a_device_overlap_and_its_credits_are_counted():
    with bench() as here:
        here.source.concurrency = 8
        together = threading.Barrier(8)
        here.source.before = lambda first, count: together.wait(LONG)
        child = here.child(
            """
for token in range(1, 65):
    send(Record(Kind.FAULT, token, (token % 32) * 2 * 4096 + (token // 32) * 4096 * 100, 4096))
answers = sorted((answer.token, answer.outcome.name) for answer in (receive() for _ in range(64)))
say([[token for token, _ in answers], sorted({outcome for _, outcome in answers})])
heard()
""",
            raw=True,
        )
        tokens, outcomes = child.hear()
        assert tokens == list(range(1, 65))
        assert outcomes == ["ADMITTED"]
        assert here.balanced()
        assert here.server.counters.requests == here.server.counters.replies == 64
        assert here.pager.counters.pages_fetched == 64
        child.tell("end")
