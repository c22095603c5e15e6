"""The faults of one peer: resolved by threads of their own, so that the reader of the peer's notifier never waits.

As many threads as the source can use at once serve a peer's faults: those that wait for a network overlap. They are
made as faults come that no thread is free for, and answer in any order.

A fault on a page that has a claim is parked: the end of that claim puts it into the queue again. A fault of several
pages ends when each of them has been present once since it was asked for; what is taken away meanwhile is asked for
again by the peer, which looks at the bitmap.

Units: RAM pages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from kvmdp.page import Access, Origin, Outcome, PageFault
from kvmdp.paging.broken import broken
from kvmdp.paging.claim import Claim, Waiter
from kvmdp.paging.pager import Pager
from kvmdp.shortage import ShortageError
from kvmdp.thread import JoinableThread
from kvmdp.waiting import Latch

_MOST_AT_ONCE = 512  # pages in one claim: 2 MiB


class PeerCounters:
    """What has passed between a machine and its peers. The first two are equal whenever no fault is open."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # sessions count at the same time
        self.requests = 0  # FAULTs
        self.replies = 0  # DONEs, and FAULTs that ended with their session
        self.invalidates = 0  # INVALIDATEs and FREEZEs
        self.acks = 0

    def count(self, name: str, number: int = 1) -> None:
        """Add to one of them."""
        with self._mutex:
            setattr(self, name, getattr(self, name) + number)

    def __repr__(self) -> str:
        names = ("requests", "replies", "invalidates", "acks")
        return f"PeerCounters({', '.join(f'{name}={getattr(self, name)}' for name in names)})"


class _Request:
    """One FAULT for the pages [page, end), and how far it is. Changed by the one thread that has it in hand."""

    __slots__ = ("access", "asked", "end", "held", "number", "outcome", "page", "released", "token", "waiter")

    def __init__(self, token: int, first: int, count: int, access: Access, number: int) -> None:
        self.token = token
        self.page = first
        self.end = first + count
        self.access = access
        self.number = number
        self.asked = time.perf_counter_ns()  # for the page it is at
        self.outcome = Outcome.PRESENT
        self.released = False  # under the mutex
        self.waiter: Waiter | None = None  # of the last parking; under the mutex
        self.held: Latch | None = None  # what wakes the thread that holds it back; under the mutex


class FaultRequests:
    """The open faults of one peer, and the threads that resolve them, at most `most`.

    `answer(token, outcome)` is called from those threads when a fault has ended, `broke(error)` if the pager raised;
    neither may block.
    """

    def __init__(
        self,
        pager: Pager,
        counters: PeerCounters,
        answer: Callable[[int, Outcome], None],
        broke: Callable[[Exception], None],
        name: str,
        most: int = 1,
    ) -> None:
        self._pager = pager
        self._counters = counters
        self._answer = answer
        self._broke = broke
        self._name = name
        self._most = most
        self._todo: SimpleQueue[_Request | None] = SimpleQueue()
        self._mutex = threading.Lock()  # guards what follows
        self._open: dict[int, _Request] = {}
        self._closed = False
        self._threads: list[JoinableThread] = []
        self._pending = 0  # faults that a thread has in hand, or is to take

    def start(self) -> None:
        """Begin to resolve."""
        self._add_thread()

    def _add_thread(self) -> None:
        name = self._name
        thread = JoinableThread(
            self._work, name, lambda error: self._pager.abort(broken(f"the thread {name} broke", error))
        )
        with self._mutex:
            if self._closed or (self._threads and not self._is_short()):
                return
            self._threads.append(thread)
        try:
            thread.start()
        except ShortageError:  # an interruption is none: the thread runs
            with self._mutex:
                self._threads.remove(thread)
            raise

    def _is_short(self) -> bool:
        return len(self._threads) < min(self._pending, self._most)

    @property
    def open(self) -> int:
        """How many faults have not been answered."""
        return len(self._open)

    @property
    def oldest(self) -> int | None:
        """Since when the oldest unanswered fault has waited for its page, in perf_counter_ns; None if there is none."""
        with self._mutex:
            request = next(iter(self._open.values()), None)
        return None if request is None else request.asked

    def is_open(self, token: int) -> bool:
        """Whether there is an unanswered fault `token`."""
        return token in self._open

    def submit(self, token: int, first: int, count: int, access: Access, number: int) -> None:
        """Have a fault resolved."""
        request = _Request(token, first, count, access, number)
        with self._mutex:
            self._open[token] = request
        self._enqueue(request)

    def _enqueue(self, request: _Request) -> None:
        """Have a thread take a fault, for the first time or because it may go on; does not block."""
        with self._mutex:
            self._pending += 1
        self._todo.put(request)

    def release(self, token: int) -> None:
        """End a fault as CANCELLED, unless it has been answered; a fetch of its own that is under way ends first."""
        with self._mutex:
            request = self._open.get(token)
            if request is None:
                return
            request.released = True
            waiter, held = request.waiter, request.held
        if held is not None:
            held.set()
        if waiter is not None:
            self._pager.withdraw(waiter)

    def close(self) -> None:
        """Answer nothing more and withdraw all; does not wait."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            left = list(self._open)
            threads = len(self._threads)
        for token in left:
            self.release(token)
        for _ in range(threads):
            self._todo.put(None)
        self._counters.count("replies", self._abandon())

    def _abandon(self) -> int:
        with self._mutex:
            count = len(self._open)
            self._open.clear()
        return count

    def join(self, timeout: float) -> bool:
        """Wait for the threads' end; False if a fetch holds one of them for longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        return all(thread.join(max(deadline - time.monotonic(), 0)) for thread in self._threads)

    def _work(self) -> None:
        while (request := self._todo.get()) is not None:
            # By the thread that takes a fault, not by the one that brings it, which must not block.
            self._add_thread_if_short()
            try:
                outcome = self._resolve(request)
                if outcome is not None:
                    self._end(request, outcome)
            finally:
                with self._mutex:
                    self._pending -= 1

    def _add_thread_if_short(self) -> None:
        """Make one more thread, if there are fewer than faults for them; that one makes the next."""
        with self._mutex:
            is_short = self._is_short()
        if is_short:
            try:
                self._add_thread()
            except ShortageError:
                self._most = 0  # the threads that there are will do

    def _end(self, request: _Request, outcome: Outcome) -> None:
        with self._mutex:
            # The peer's credit is given back before the answer: it may ask again the moment it has that.
            if self._open.pop(request.token, None) is None:
                return
        self._counters.count("replies")
        self._answer(request.token, outcome)

    def _resolve(self, request: _Request) -> Outcome | None:
        """Go on with a request; returns how it ended, or None if it is parked."""
        absent = self._pager.bitmap.next_absent_run
        while (run := absent(request.page, request.end)) is not None:
            request.page = run[0]
            if not self._may_begin(request):
                self._await_room(request)
            waiter = Waiter(lambda: self._enqueue(request))
            with self._mutex:
                request.waiter = waiter
            if self._released(request):
                return Outcome.CANCELLED
            fault = PageFault(request.page, Origin.DEVICE, request.number, request.access)
            claim = Claim()
            try:
                outcome = self._pager.resolve_or_park(fault, waiter, min(run[1], _MOST_AT_ONCE), claim)
            except Exception as error:  # the pager has failed by now; the machine must not lose this thread
                self._broke(error)
                return Outcome.FAILED
            if outcome is None:
                # `release` may have come before there was anything to withdraw. The later of the two finds the other's
                # mark; if both withdraw, the pager lets one of them.
                if self._released(request):
                    self._pager.withdraw(waiter)
                return None
            if outcome not in (Outcome.PRESENT, Outcome.ADMITTED):
                return outcome
            request.page += 1
            if outcome is Outcome.ADMITTED:
                request.page = max(request.page, claim.first + claim.count)
                request.outcome = outcome
                request.asked = time.perf_counter_ns()
        return request.outcome

    def _await_room(self, request: _Request) -> None:
        """Hold a request back until its page may come, is there already, or is asked for no more.

        Each turn looks after the thread is listed and its latch is in place, so a word that comes after the look sets
        that latch. A page that another thread brings in meanwhile is no such word: the job's thread, which is at work
        while a fault is held back, gives one soon.
        """
        jobs = self._pager.jobs
        while True:
            held = Latch()
            ask = held.set
            with self._mutex:
                request.held = held
            jobs.tell(ask)
            try:
                if self._may_begin(request) or self._released(request):
                    return
                held.wait(jobs.seconds_held(request.asked))
            finally:
                jobs.tell_no_more(ask)

    def _may_begin(self, request: _Request) -> bool:
        return self._pager.bitmap.test(request.page) or self._pager.jobs.may_admit(request.asked)

    def _released(self, request: _Request) -> bool:
        with self._mutex:
            return request.released
