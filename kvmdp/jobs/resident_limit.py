"""A limit on the pages of RAM that are in memory: a guest runs in less memory than it has.

Second chance, by a clock with two hands that go round RAM. Pages that the first one passes are *aged*: shut off softly
(BACKED), their bytes kept, so that the next access traps and brings them back without a fetch. That access is the
reference bit. The second hand follows where a quarter of the limit is aged: what it finds shut off, by the first or by
anybody else, is evicted; what somebody has come for is present again and passed over.

Whoever has brought a page in over the limit takes others out again before it goes on. So the limit is exceeded by no
more than what is being brought in at that moment, as long as there are pages to be had. It may be a vCPU in the middle
of its work, or hold a view of pages itself: it waits for nobody who is at a page, and gives up after a while. Then the
limit is exceeded for the time being, and a thread, which has the patience, goes on; it does not keep others from pages
while it waits. A userfaultfd reader takes nothing out: that can mean to wait until a reader has taken note. Nor does
who serves another process. The thread does it for those, and they hold a fault back until there is room, for a while.

Units: RAM pages, seconds.
"""

from __future__ import annotations

import threading
import time

from kvmdp.errors import BusyError, SwitchedOffError
from kvmdp.memory.backing import Backing
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.broken import broken
from kvmdp.paging.claim import State
from kvmdp.paging.jobs import Job
from kvmdp.paging.marking import ANSWER_SECONDS
from kvmdp.paging.pager import Pager
from kvmdp.size import format_size
from kvmdp.thread import JoinableThread

_BACKED = int(State.BACKED)
_BATCH = 32  # aged or evicted at once: bounds how long vCPUs are kept out of KVM_RUN
_AGED_SHARE = 4  # a quarter of the limit is aged and waits
_ROOM_SHARE = (
    16  # the thread makes room for a sixteenth of the limit, so that who leaves it to that waits less often
)
# What a thread on its way from a fault tries before it goes on: batches in all, and those that somebody was at.
_MOST_STEPS, _MOST_BUSY = 256, 8
_PATIENCE_SECONDS = 0.2  # of the thread, for a device in another process
_PAUSE_SECONDS = 0.01  # of the thread, when somebody was at what it wanted, or nothing can be had
# How long a fault is held back, and how long while somebody waits for the vCPUs to come out of KVM_RUN: before Linux
# 6.2 one that sleeps there on a page is not interrupted, and has to be given it.
_HOLD_NS, _HOLD_CLOSED_NS = 100_000_000, 2_000_000
# What one instruction can need at once: its own bytes and two operands, each across the border of two pages.
_PAGES_OF_AN_INSTRUCTION = 6
# What is retained for a vCPU because KVM writes there by itself (`kvmdp.machine.pv_msrs`): kvmclock, which may lie
# across a border, steal time, which cannot, and what replaces one of them before that is let go.
_PAGES_OF_KVM = 2 + 1 + 2


def check_frees(backing: Backing | type[Backing]) -> None:
    """Raise ValueError if evicting pages of such RAM frees nothing."""
    if not backing.frees:
        raise ValueError(
            f"{backing.name} memory is held to the end, and evicting pages frees none of it: leave --resident-limit "
            "out, or use the backing memfd"
        )


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
    """Keeps at most `limit` pages of the pager's in memory, from now until `close`, as far as they can be had.

    `peak` is the most that was resident after a fault. A page that somebody has a view of cannot be had: whoever keeps
    views of all but a few of `limit` pages leaves the others to take out each other's pages again and again.
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
        # Who needs more pages at once would lose the first to the limit before it had the last.
        self.most_at_once = max(limit // 2, 1)
        pager.jobs.add(self)

    def close(self) -> None:
        """Let everybody go on without a limit; a second call does nothing."""
        self._closing.set()
        self._exceeded.set()
        self._pager.jobs.remove(self)
        self._thread.join()

    def settle(self, timeout: float) -> bool:
        """Wait until the thread takes nothing away, once the pager is cancelled; False after `timeout` seconds.

        A cancelled pager lets nobody begin, so what the thread begins after this changes nothing.
        """
        return self._idle.wait(timeout)

    def _is_exceeded(self) -> bool:
        resident = self._pager.ledger.resident
        if resident > self.peak:
            self.peak = resident
        return resident > self.limit

    # On the way from a fault

    def after_fault(self) -> None:
        """Take out what can be had at once; leave the rest to the thread. Raises PagingError if the sink is full."""
        if not self._is_exceeded():
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

    def _remind(self) -> None:
        """Have the thread take pages out."""
        if self._is_exceeded():
            self._exceeded.set()

    def may_admit(self, since: int) -> bool:
        """Return whether a fault of time `since` may bring pages in without taking others out itself.

        Half of the room that the thread makes is for those, so that the limit holds although nothing follows them.
        """
        pager = self._pager
        resident = pager.ledger.resident
        if resident > self.limit - self._room // 2:
            self._remind()
        if resident <= self.limit or pager.ledger.cancelled or self._closing.is_set():
            return True
        self._exceeded.set()
        held = time.perf_counter_ns() - since
        return held > (_HOLD_CLOSED_NS if pager.gate.is_closed else _HOLD_NS)

    # The thread

    def _keep(self) -> None:
        while not self._closing.is_set():
            self._exceeded.wait()
            self._idle.clear()
            self._exceeded.clear()
            try:
                self._keep_to_it()
            except SwitchedOffError:
                continue  # all of RAM is to be present; who brings a page in once it is on again says so
            finally:
                self._idle.set()

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
            self._closing.wait(_PAUSE_SECONDS)  # for who holds a fault back asks all the time

    # Taking out

    def _step(self, patience: float) -> bool:
        """Age a few pages, or evict some that have been aged; False if that changed nothing.

        Raises BusyError if somebody is at one of them: at once, or after `patience` seconds if that can be a device in
        another process.
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
        if evict:
            return pager.evict_shut_off(*run, timeout=timeout) > 0
        return pager.mark_nonpresent(*run, timeout=timeout) > 0

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
