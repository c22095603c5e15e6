"""Real threads and processes at the wait queue: time-outs, cancellations, revocations and the end, all at once.

Here nobody says who comes first; what is checked is that each wait ends, for a reason that somebody gave.
"""

import concurrent.futures
import contextlib
import functools
import json
import queue
import random
import threading
import time

import pytest
from device_process import bench
from effort import by_effort
from fakes import PAGES, content, fill, in_threads, page_of, pager_of, source_error, switching_often

from kvmdp.errors import BusyError
from kvmdp.page import Access, Outcome, PageFault
from kvmdp.paging.cancellation import Cancellation
from kvmdp.paging.claim import Claim, Waiter, Wake
from kvmdp.peers.requests import FaultRequests, PeerCounters

SECONDS = by_effort(0.2, 1, 30)  # of hammering, for each test
ROUNDS = 200
STUCK = 20  # seconds that nothing here takes
HOT = 6  # pages that everybody wants


@pytest.fixture(autouse=True)
def in_the_thick_of_it():
    with switching_often():
        yield


class Parked(Waiter):
    """A waiter without a thread, which keeps count."""

    def __init__(self, tally):
        self.notified = threading.Semaphore(0)
        self._tally = tally
        super().__init__(self._woken)

    def _woken(self):
        self._tally.append((self, self.reason))
        self.notified.release()


class Hammer:
    """Actors at the hot pages of one pager, until `stop`; `seen` is what each kind of wait ended with."""

    def __init__(self, pager, seed):
        self.pager = pager
        self.seed = seed
        self.stop = threading.Event()
        self.seen = {name: set() for name in ("patient", "impatient", "called off", "parked", "marker")}
        self.notified = []  # (waiter, reason), appended by whoever notifies
        self.parked = []

    def until_stopped(self, act, number):
        chance = random.Random(1000 * self.seed + number)
        while not self.stop.is_set():
            act(chance)

    def patient(self, chance):
        self.seen["patient"].add(self.pager.resolve(PageFault(chance.randrange(HOT))))

    def impatient(self, chance):
        fault = PageFault(chance.randrange(HOT))
        self.seen["impatient"].add(self.pager.resolve(fault, timeout=chance.choice((0, 0.0002, 0.002))))

    def called_off(self, chance):
        cancellation = Cancellation(self.pager)
        timer = threading.Thread(target=lambda: (time.sleep(chance.random() / 1000), cancellation.cancel()))
        timer.start()
        try:
            outcome = self.pager.resolve(PageFault(chance.randrange(HOT)), cancellation=cancellation)
        finally:
            timer.join()
        self.seen["called off"].add(outcome)

    def park(self, chance):
        waiter = Parked(self.notified)
        if self.pager.resolve_or_park(PageFault(chance.randrange(HOT)), waiter) is not None:
            return
        self.parked.append(waiter)
        withdrew = False
        if chance.random() < 0.5:
            time.sleep(chance.random() / 2000)
            withdrew = self.pager.withdraw(waiter)
        assert waiter.notified.acquire(timeout=STUCK), "a parked waiter is never woken"
        assert not withdrew or waiter.reason is Wake.CANCELLED
        self.seen["parked"].add(waiter.reason)

    def mark_nonpresent(self, chance):
        first = chance.randrange(HOT)
        try:
            self.pager.mark_nonpresent(
                first, chance.randint(1, HOT - first), timeout=chance.choice((0, 0.001, None))
            )
        except BusyError:
            time.sleep(0)

    def mark_present(self, chance):
        self.seen["marker"].add(self.pager.mark_present(0, HOT))

    def hold(self, chance):
        page = chance.randrange(HOT)
        if self.pager.hold(page):
            time.sleep(chance.random() / 1000)
            self.pager.release(page)

    def reassert(self, chance):
        self.pager.reassert(chance.randrange(HOT))

    def run(self, end, enough=lambda: True):
        """Hammer for a time, and on until it is `enough`; then `end`, and then see everybody off."""
        acts = [self.patient, self.impatient, self.called_off, self.park, self.park]
        acts += [self.mark_nonpresent, self.mark_nonpresent, self.mark_present, self.hold, self.reassert]
        errors = []

        def guarded(act, number):
            try:
                self.until_stopped(act, number)
            except BaseException as error:
                errors.append(error)
                self.stop.set()

        threads = [
            threading.Thread(target=guarded, args=(act, number), daemon=True)
            for number, act in enumerate(acts)
        ]
        for thread in threads:
            thread.start()
        self.stop.wait(SECONDS)
        deadline = time.monotonic() + STUCK
        while not enough() and time.monotonic() < deadline:
            self.stop.wait(0.05)
        end()
        time.sleep(0.05)  # they go on at a pager that has ended
        self.stop.set()
        deadline = time.monotonic() + STUCK
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        if errors:
            raise errors[0]
        assert [acts[number].__name__ for number, each in enumerate(threads) if each.is_alive()] == []


@contextlib.contextmanager
def slow_pager(seed, **options):
    """A pager whose source and trap take a little, so that others have to wait."""
    with pager_of(**options) as pager:
        pause = random.Random(seed)

        def dawdle(first, count):
            time.sleep(pause.random() / 1000)

        pager.source.before = pager.trap.on_admit = pager.trap.on_revoke = dawdle
        yield pager


@pytest.mark.parametrize("seed", range(2))
def test_threads_that_wait_are_all_woken_for_a_right_reason_until_the_machine_is_cancelled(seed):
    with slow_pager(seed, granule=(4096, 16384)[seed]) as pager:
        hammer = Hammer(pager, seed)
        hammer.run(
            pager.cancel,
            lambda: (
                Outcome.TIMED_OUT in hammer.seen["impatient"]
                and hammer.seen["parked"] >= {Wake.COMMITTED, Wake.REVOKED}
            ),
        )
        good = {Outcome.PRESENT, Outcome.ADMITTED, Outcome.CANCELLED}
        assert hammer.seen["patient"] <= good
        assert hammer.seen["marker"] <= good
        assert hammer.seen["called off"] <= good
        assert hammer.seen["impatient"] <= good | {Outcome.TIMED_OUT}
        assert Outcome.TIMED_OUT in hammer.seen["impatient"]
        assert hammer.seen["parked"] >= {Wake.COMMITTED, Wake.REVOKED, Wake.CANCELLED}
        assert Wake.FAILED not in hammer.seen["parked"]
        check_end(hammer)
        assert pager.error is None


def test_threads_that_wait_are_all_woken_when_the_source_fails():
    with slow_pager(7) as pager:
        hammer = Hammer(pager, 7)

        def fail_at_a_new_page():
            def fail(first, count):
                time.sleep(0.001)
                raise source_error(first, count)

            pager.source.before = fail
            outcomes = []
            in_threads(*(lambda: outcomes.append(pager.resolve(PageFault(HOT))) for _ in range(8)))
            assert outcomes == [Outcome.FAILED] * 8

        hammer.run(fail_at_a_new_page)
        assert Outcome.CANCELLED not in hammer.seen["patient"] | hammer.seen["marker"]
        assert pager.error is not None
        check_end(hammer)


def test_who_gives_up_is_let_go_though_the_claim_goes_on():
    with pager_of() as pager:
        claim = pager.begin(PageFault(1))
        cancellations = queue.SimpleQueue()

        def call_off():
            while (cancellation := cancellations.get()) is not None:
                cancellation.cancel()

        def be_called_off(number):
            chance = random.Random(number)
            for _ in range(ROUNDS):
                cancellation = Cancellation(pager)
                cancellations.put(cancellation)
                if chance.random() < 0.5:
                    time.sleep(0)  # let it come first
                assert pager.resolve(PageFault(1), cancellation=cancellation) is Outcome.CANCELLED

        def run_out_of_time():
            chance = random.Random(3)
            for _ in range(ROUNDS):
                timeout = chance.choice((0, 0.0001, 0.001))
                assert pager.resolve(PageFault(1), timeout=timeout) is Outcome.TIMED_OUT

        callers = [threading.Thread(target=call_off, daemon=True) for _ in range(2)]
        waiting = [run_out_of_time] * 2 + [functools.partial(be_called_off, number) for number in range(3)]
        with concurrent.futures.ThreadPoolExecutor(len(waiting)) as pool:
            ends = [pool.submit(each) for each in waiting]
            for each in callers:
                each.start()
            done, stuck = concurrent.futures.wait(ends, STUCK)
            left = len(claim.waiters)
            fill(pager, claim)
            pager.commit(claim)  # which lets everybody go, if need be
        for _ in callers:
            cancellations.put(None)
        for each in callers:
            each.join(STUCK)
        for each in done:
            each.result()
        assert not stuck
        assert left == 0


def test_a_release_that_comes_just_before_its_fault_is_parked_is_not_forgotten():
    with pager_of() as pager:
        claim = pager.begin(PageFault(1))
        park, answers, broken = pager.resolve_or_park, queue.SimpleQueue(), []

        def released_before(*arguments):
            requests.release(7)
            return park(*arguments)

        pager.resolve_or_park = released_before
        requests = FaultRequests(
            pager, PeerCounters(), lambda *answer: answers.put(answer), broken.append, "faults"
        )
        requests.start()
        try:
            requests.submit(7, 1, 1, Access.READ, 0)
            assert answers.get(timeout=STUCK) == (7, Outcome.CANCELLED)
            assert claim.waiters == broken == []
        finally:
            requests.close()
            assert requests.join(STUCK)


def test_processes_that_give_up_are_let_go_though_the_claim_goes_on():
    with bench() as here:
        claim = here.pager.begin(PageFault(1))
        child = here.child(
            f"""
def give_up(worker):
    chance = random.Random(worker)
    for _ in range({ROUNDS}):
        try:
            memory.read(4096, 8)
            say("read")
        except BusyError:
            memory._timeout = chance.choice((0, 0, 0.0001, 0.001))
def wait():
    try:
        memory.read(4096, 8)
    except CancelledError:
        called_off.append(1)
memory._timeout, called_off = 0, []
def in_threads(*bodies):
    threads = [threading.Thread(target=body, args=args, daemon=True) for body, *args in bodies]
    [each.start() for each in threads]
    return threads
threads = in_threads(*((give_up, worker) for worker in range(4)))
[each.join(20) for each in threads]
say(sum(each.is_alive() for each in threads))
memory._timeout = None
threads = in_threads((wait,), (wait,), (wait,))
heard()
memory.cancel()
[each.join(20) for each in threads]
say(len(called_off))
heard()
memory.close()
"""
        )
        assert child.hear() == 0
        wait_for(lambda: len(claim.waiters) == 3)  # of those who have given up none is left
        child.tell("cancel")
        assert child.hear() == 3
        wait_for(lambda: here.balanced() and not claim.waiters)
        child.tell("close")
        child.done()
        assert here.server.counters.requests > 3
        assert here.sentences == []
        fill(here.pager, claim)
        here.pager.commit(claim)


def wait_for(condition):
    deadline = time.monotonic() + STUCK
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


DEVICE = """
number, how, seconds = json.loads(heard())
added, seen, stop = [0] * 4, set(), threading.Event()
memory._timeout = {"patient": None}.get(how, 0.002)

def access(worker, chance):
    page, what = chance.randrange(6), chance.random()
    own = page * 4096 + 8 * (4 * number + worker)
    if what < 0.5:
        with memory.view(own, 8) as view:
            words = view.cast("Q")
            words[0] += 1
            words.release()
            if what < 0.25:
                time.sleep(0.001)
        added[worker] += 1
    elif what < 0.6:
        memory.read(own, 8, nowait=True)
    elif what < 0.8:
        memory.store64(own, memory.load64(own))
    else:
        memory.readv([(page * 4096, 8), ((page + 1) % 6 * 4096, 8192)])

def work(worker):
    chance = random.Random(10 * number + worker)
    while not stop.is_set():
        try:
            access(worker, chance)
            seen.add("done")
        except BusyError as error:
            seen.add("nowait" if "is not present" in str(error) else "timed out")
        except CancelledError as error:
            seen.add("stopping" if "the machine is stopping" in str(error) else "called off")
            return

threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in range(4)]
[each.start() for each in threads]
say("begun")
stop.wait(seconds)
if how == "cancels":
    memory.cancel()
else:
    heard()
    stop.set()
[each.join(20) for each in threads]
stuck = sum(each.is_alive() for each in threads)
if not stuck:
    memory.close()
say([sum(added), sorted(seen), stuck])
"""
HOWS = ("patient", "impatient", "cancels")


@pytest.mark.parametrize("end", ["in order", "machine cancelled"])
def test_processes_that_wait_are_all_answered(end):
    pause = random.Random(5)
    stop = threading.Event()
    with bench() as here:
        pager = here.pager

        def dawdle(first, count):
            time.sleep(pause.random() / 1000)

        here.source.before = here.trap.on_admit = here.trap.on_revoke = dawdle

        def revoke():
            chance = random.Random(6)
            while not stop.is_set():
                first = chance.randrange(HOT)
                with contextlib.suppress(BusyError):
                    pager.mark_nonpresent(first, HOT - first, timeout=chance.choice((0, 0.001, None)))
                time.sleep(chance.random() / 1000)

        revokers = [threading.Thread(target=revoke, daemon=True) for _ in range(2)]
        children = [here.child(DEVICE) for _ in HOWS]
        for number, (child, how) in enumerate(zip(children, HOWS, strict=True)):
            child.tell(json.dumps([number, how, SECONDS]))
        for revoker in revokers:
            revoker.start()
        assert [child.hear() for child in children] == ["begun"] * len(children)
        time.sleep(SECONDS)
        if end == "machine cancelled":
            pager.cancel()
        heard = listen(children)
        stop.set()
        for revoker in revokers:
            revoker.join(STUCK)
            assert not revoker.is_alive()
        check_devices(here, children, heard, cancelled=end == "machine cancelled")


def listen(children):
    for child in children[:2]:
        child.tell("stop")
    heard = [child.hear() for child in children]
    for child in children:
        child.done()
        assert child.session.wait_ended(STUCK)
    return heard


def check_devices(here, children, heard, *, cancelled):
    assert [stuck for _, _, stuck in heard] == [0] * len(heard)
    allowed = {"done", "nowait"} | ({"stopping"} if cancelled else set())
    assert set(heard[0][1]) <= allowed
    assert set(heard[1][1]) <= allowed | {"timed out"}
    assert "timed out" in heard[1][1]
    assert set(heard[2][1]) <= allowed | {"timed out", "called off"}
    for number, (added, _, _) in enumerate(heard):  # no write is lost, whatever else was called off
        words = [8 * (4 * number + worker) for worker in range(4)]
        total = sum(
            int.from_bytes(page_of(here.pager, page)[at : at + 8], "little")
            - int.from_bytes(content(page)[:8], "little")
            for page in {page for first, count in here.source.fills for page in range(first, first + count)}
            for at in words
        )
        assert total == added > 0
    for child in children:
        child.session.end()
        assert child.session.join(time.monotonic() + STUCK)
    counters = here.server.counters
    assert counters.requests == counters.replies > 0
    assert here.nobody_waits()
    assert here.pager.ledger.claims == []
    assert here.sentences == []
    assert here.pager.counters.pages_revoked > 0


def check_end(hammer):
    pager = hammer.pager
    assert pager.ledger.claims == []
    # Each was notified once: nobody twice, nobody never.
    assert sorted(id(waiter) for waiter, _ in hammer.notified) == sorted(map(id, hammer.parked))
    assert all(reason is waiter.reason for waiter, reason in hammer.notified)
    assert [pager.bitmap.test(page) for page in range(PAGES)] == [each == 1 for each in pager.trap.entered]
    assert not pager.ledger.pins.hold(Claim(0, PAGES, b""))
