"""A limit on the pages of RAM that are in memory: a guest runs in less memory than it has.

Second chance, in the manner of an active and an inactive list. Pages are *aged* in the order of a hand that goes round
RAM: shut off softly (BACKED), their bytes kept, so that the next access traps and brings them back without a fetch.
That access is the reference bit. Aged pages wait in a queue; when one's turn comes, it is evicted if nobody has come
for it, and passed over if somebody has.

Whoever has brought a page in over the limit takes others out again before it goes on. So the limit is exceeded by no
more than what is being brought in at that moment. A userfaultfd reader cannot do that: taking pages out can mean to
wait until a reader has taken note. A thread does it for those, and they slow down while it falls behind.

Units: RAM pages, seconds.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from kvmdp.memory.layout import PAGE_SIZE
from kvmdp.memory.size import format_size
from kvmdp.paging.fault import BusyError, PagingError
from kvmdp.paging.pager import DemandPager
from kvmdp.thread import JoinableThread

_BATCH = 32  # aged or evicted at once: bounds how long vCPUs are kept out of KVM_RUN
_AGED_SHARE = 4  # a quarter of the limit is aged and waits
_PATIENCE_SECONDS = 0.2  # for a view that is open
_SLOW_DOWN_SECONDS = 0.001  # a fault, for who cannot wait
# What one instruction can need at once: its own bytes and two operands, each across the border of two pages.
_PAGES_OF_AN_INSTRUCTION = 6


def check_limit(limit: int, vcpus: int, pages_a_fault: int, retained: int) -> None:
    """Raise ValueError unless every vCPU can get an instruction done within the limit, with something left to age.

    `pages_a_fault` come in at once; `retained` never leave.
    """
    least = retained + vcpus * _PAGES_OF_AN_INSTRUCTION * pages_a_fault + 2 * _BATCH
    if limit < least:
        raise ValueError(
            f"a resident limit of {format_size(limit * PAGE_SIZE)} is less than this guest can run in: give "
            f"{format_size(least * PAGE_SIZE)} or more"
        )


class ResidentLimit:
    """Keeps at most `limit` pages of the pager's in memory, from now until `close`.

    `peak` is the most that was resident after a fault.
    """

    def __init__(self, pager: DemandPager, limit: int) -> None:
        self.limit = limit
        self.peak = 0
        self._pager = pager
        self._mutex = threading.Lock()  # guards what follows
        self._hand = 0
        self._aged: deque[tuple[int, int]] = deque()
        self._waiting = 0  # pages in the queue
        self._exceeded = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._closing = False
        self._thread = JoinableThread(self._keep, "resident-limit")
        self._thread.start()
        pager.housekeeping.append(self._keep_to_it)
        pager.reminders.append(self._remind)

    def close(self) -> None:
        """Let everybody go on without a limit; a second call does nothing."""
        self._closing = True
        self._exceeded.set()
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

    def _remind(self) -> None:
        """Have the thread take pages out."""
        if self._is_exceeded():
            self._exceeded.set()
            if self._pager.ledger.resident > self.limit + _BATCH:
                time.sleep(_SLOW_DOWN_SECONDS)

    def _keep(self) -> None:
        while not self._closing:
            self._exceeded.wait()
            self._idle.clear()
            self._exceeded.clear()
            try:
                self._keep_to_it()
            except PagingError as error:
                self._pager.abort(error)
                return
            except Exception as error:  # the machine must hear of it: nobody joins this thread before its end
                self._pager.abort(PagingError(f"the resident limit cannot be kept: {error!r}"))
                return
            finally:
                self._idle.set()

    def _keep_to_it(self) -> None:
        """Take pages out until the limit is kept, or nothing can be taken. Raises PagingError if the sink is full."""
        ledger = self._pager.ledger
        if not self._is_exceeded():
            return
        idle = 0
        while (
            ledger.resident > self.limit
            and not self._closing
            and idle < 2 * (self._pager.layout.pages // _BATCH + 1)
        ):
            idle = 0 if self._step() else idle + 1

    def _step(self) -> bool:
        """Age a few pages, or evict those that have waited longest; False if that changed nothing."""
        pager = self._pager
        with self._mutex:
            run = None
            if self._waiting < self.limit // _AGED_SHARE or not self._aged:
                run = self._next_present()
            evict = run is None
            if run is None:
                if not self._aged:
                    run = 0, pager.layout.pages  # shut off by others
                else:
                    run = self._aged.popleft()
                    self._waiting -= run[1]
        try:
            if evict:
                return pager.evict_shut_off(*run) > 0
            taken = pager.mark_nonpresent(*run, timeout=_PATIENCE_SECONDS)
        except BusyError:
            return False
        with self._mutex:
            self._aged.append(run)
            self._waiting += run[1]
        return taken > 0

    def _next_present(self) -> tuple[int, int] | None:
        """Return the next run of present pages at the hand, and move the hand behind it."""
        pages = self._pager.layout.pages
        for start, end in ((self._hand, pages), (0, self._hand)):
            run = self._pager.bitmap.next_present_run(start, end) if start < end else None
            if run is not None:
                first, count = run[0], min(run[1], _BATCH)
                self._hand = (first + count) % pages
                return first, count
        return None
