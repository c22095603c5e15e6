"""A limit on the pages of RAM that are in memory: a guest runs in less memory than it has.

Second chance, by a clock with two hands that go round RAM. Pages that the first one passes are *aged*: shut off softly
(BACKED), their bytes kept, so that the next access traps and brings them back without a fetch. That access is the
reference bit. The second hand follows where a quarter of the limit is aged. It evicts what it finds shut off, by the
first hand or by another thread; a page that was accessed meanwhile is present again, and the hand passes it over.

A thread that has brought a page in over the limit takes others out again before it goes on. So the limit is exceeded by
no more than what is being brought in at that moment, as long as pages can be taken out. The thread may be a vCPU's, in
the middle of its work, or hold a view of pages itself. So it waits for no other thread that is at a page, and gives up
after a while. Then the limit is exceeded for the time being, and the job's own thread, which has the patience, goes on;
it does not keep others from pages while it waits. A userfaultfd reader takes nothing out: that can mean to wait until a
reader has taken note. Nor does a thread that serves another process. The job's thread does it for those, and they hold
a fault back until there is room, for a while.

Units: RAM pages, seconds.
"""

from __future__ import annotations

import threading
import time

from kvmdp.errors import BusyError, SwitchedOffError
from kvmdp.page import PAGE_SIZE, Origin, PageFault
from kvmdp.paging.broken import broken
from kvmdp.paging.claim import Claim, State
from kvmdp.paging.jobs import Job
from kvmdp.paging.marking import ANSWER_SECONDS
from kvmdp.paging.pager import Pager
from kvmdp.size import format_size
from kvmdp.thread import JoinableThread

_BACKED = int(State.BACKED)
_BATCH = 32  # aged or evicted at once: bounds how long vCPUs are kept out of KVM_RUN
_AGED_SHARE = 4  # a quarter of the limit is aged and waits
_ROOM_SHARE = 16  # the job's thread makes room for a sixteenth of the limit: faults are held back less often
# What a thread on its way from a fault tries before it goes on: batches in all, and those that another thread was at.
_MOST_STEPS, _MOST_BUSY = 256, 8
_PATIENCE_SECONDS = 0.2  # of the thread, for a device in another process
_PAUSE_SECONDS = 0.01  # of the thread, when another was at what it wanted, or nothing can be taken out
# How long a fault is held back, and how long while a thread waits for the vCPUs to come out of KVM_RUN: before Linux
# 6.2 one that sleeps there on a page is not interrupted, and has to be given it.
_HOLD_NS, _HOLD_CLOSED_NS = 100_000_000, 2_000_000
# What one instruction can need at once: its own bytes and two operands, each across the border of two pages.
_PAGES_OF_AN_INSTRUCTION = 6
# What is retained for a vCPU because KVM writes there by itself (`kvmdp.machine.pv_msrs`): kvmclock, which may lie
# across a border, steal time, which cannot, and what replaces one of them before that is let go.
_PAGES_OF_KVM = 2 + 1 + 2


def check_limit(limit: int, vcpus: int, fault_around: int, unit: int, retained: int) -> None:
    """Raise ValueError unless every vCPU can get an instruction done within the limit, with something left to age.

    `limit` is in bytes, as the user gave it; all else is pages. `fault_around` pages come in at once; `unit` pages come
    and go as one. What never leaves is `retained` pages in a row (page tables), and what KVM writes to by itself while
    the guest has it switched on: in whole units, all of it.
    """
    tables = (retained + unit - 2) // unit + 1 if retained else 0  # units they can touch, wherever they begin
    of_a_vcpu = _PAGES_OF_AN_INSTRUCTION * max(fault_around, unit) + _PAGES_OF_KVM * unit
    least = tables * unit + vcpus * of_a_vcpu + 2 * _BATCH
    if limit // PAGE_SIZE < least:
        raise ValueError(
            f"a resident limit of {format_size(limit)} is less than this guest can run in: give "
            f"{format_size(least * PAGE_SIZE)} or more"
        )


class ResidentLimit(Job):
    """Keeps at most `limit` pages of the pager's in memory, from now until `close`, as far as they can be taken out.

    `peak` is the most that was resident after a fault. A page of which there is a view cannot be taken out: a caller
    that keeps views of all but a few of `limit` pages leaves the others to take out each other's pages again and again.
    """

    def __init__(self, pager: Pager, limit: int) -> None:
        self.limit = limit
        self.peak = 0
        self._pager = pager
        self._room = max(_BATCH, limit // _ROOM_SHARE)
        self._mutex = threading.Lock()  # guards what follows
        self._age_hand = 0
        self._evict_hand = 0
        self._exceeded = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._closing = threading.Event()
        self._thread = JoinableThread(
            self._keep,
            "resident-limit",
            lambda error: pager.abort(broken("the resident limit cannot be kept", error)),
        )
        self._thread.start()
        # An access that needs more pages at once would lose the first to the limit before it had the last.
        self.most_at_once = max(limit // 2, 1)
        pager.jobs.add(self)

    def close(self) -> None:
        """Let all threads go on without a limit; a second call does nothing."""
        self._closing.set()
        self._exceeded.set()
        self._pager.jobs.remove(self)
        self._pager.jobs.ask_again()
        self._thread.join()

    def settle(self, timeout: float) -> bool:
        """Wait until the thread takes nothing away, once the pager is cancelled; False after `timeout` seconds.

        A cancelled pager lets no claim begin, so what the thread begins after this changes nothing.
        """
        return self._idle.wait(timeout)

    def _is_exceeded(self) -> bool:
        resident = self._pager.ledger.resident
        if resident > self.peak:
            self.peak = resident
        return resident > self.limit

    # On the way from a fault

    def after_fault(self) -> None:
        """Take out what can go at once; leave the rest to the thread. Raises PagingError if the sink is full."""
        if not self._is_exceeded():
            if self._pager.jobs.told:
                self._pager.jobs.ask_again()  # pages may have gone that a caller has taken away
            return
        steps = busy = 0
        while self._pager.ledger.resident > self.limit and not self._closing.is_set():
            if steps == _MOST_STEPS or busy == _MOST_BUSY:
                self._remind()
                return
            try:
                self._step(ANSWER_SECONDS)
            except BusyError:
                busy += 1
            except SwitchedOffError:
                return  # all of RAM is to be present
            steps += 1

    def admitted(self, fault: PageFault, claim: Claim, began: int) -> None:
        """Have the thread take pages out for a fault after which its own thread does not: a reader's, or a peer's."""
        if fault.number < 0 or fault.origin is Origin.DEVICE:
            self._remind()

    def _remind(self) -> None:
        """Have the thread take pages out, if there are too many."""
        if self._is_exceeded():
            self._exceeded.set()

    def seconds_held(self, since: int) -> float:
        """Return for how long a fault of time `since`, which takes no pages out itself, is held back at the most.

        A thread that was held back asks again when pages have gone, the thread has tried, the gate closes, or the pager
        is cancelled or fails.
        """
        pager = self._pager
        if pager.ledger.resident <= self.limit or self._is_over():
            return 0
        self._exceeded.set()
        until = since + (_HOLD_CLOSED_NS if pager.gate.is_closed else _HOLD_NS)
        return max(until - time.perf_counter_ns(), 0) / 1e9

    def _is_over(self) -> bool:
        pager = self._pager
        return pager.ledger.cancelled or pager.error is not None or self._closing.is_set()

    # The thread

    def _keep(self) -> None:
        while not self._closing.is_set():
            self._exceeded.wait()
            self._idle.clear()
            self._exceeded.clear()
            try:
                self._keep_to_it()
            except SwitchedOffError:
                continue  # all of RAM is to be present; the first to bring a page in once it is on again says so
            finally:
                self._idle.set()
                self._pager.jobs.ask_again()

    def _keep_to_it(self) -> None:
        """Take pages out until there is some room, or nothing can be taken. Raises PagingError if the sink is full."""
        idle = 0
        while (
            self._pager.ledger.resident > self.limit - self._room
            and not self._closing.is_set()
            and idle < 2 * (self._pager.layout.pages // _BATCH + 1)
        ):
            try:
                idle = 0 if self._step(_PATIENCE_SECONDS) else idle + 1
            except BusyError:
                idle += 1
                self._closing.wait(_PAUSE_SECONDS)
        if self._is_exceeded():
            self._closing.wait(
                _PAUSE_SECONDS
            )  # a thread that holds a fault back asks for more as soon as this ends

    # Taking out

    def _step(self, patience: float) -> bool:
        """Age a few pages, or evict some that have been aged; False if that changed nothing.

        Raises BusyError if another thread is at one of them: at once, or after `patience` seconds if that can be a
        device in another process.
        """
        pager = self._pager
        timeout = 0 if pager.peers is None else patience
        with self._mutex:
            run = None
            if pager.ledger.resident - pager.bitmap.count() < self.limit // _AGED_SHARE:
                run = self._next_present()
            evict = run is None
            if run is None:
                run = self._next_shut_off()
        if run is None:
            return False
        if not evict:
            return pager.mark_nonpresent(*run, timeout=timeout) > 0
        evicted = pager.evict_shut_off(*run, timeout=timeout)
        if evicted and pager.jobs.told:
            pager.jobs.ask_again()
        return evicted > 0

    def _next_present(self) -> tuple[int, int] | None:
        """Return the next run of present pages at the hand, and move the hand behind it."""
        pages = self._pager.layout.pages
        for start, end in ((self._age_hand, pages), (0, self._age_hand)):
            run = self._pager.bitmap.next_present_run(start, end) if start < end else None
            if run is not None:
                first, count = run[0], min(run[1], _BATCH)
                self._age_hand = (first + count) % pages
                return first, count
        return None

    def _next_shut_off(self) -> tuple[int, int] | None:
        """Return where the next pages are that are shut off, and move the hand behind them."""
        pager = self._pager
        with pager.mutex:
            states, hand = pager.ledger.states, self._evict_hand
            first = states.find(_BACKED, hand)
            if first < 0:
                first = states.find(_BACKED, 0, hand)
            if first < 0:
                return None
            count = min(_BATCH, pager.layout.pages - first)
            self._evict_hand = (first + count) % pager.layout.pages
            return first, count
