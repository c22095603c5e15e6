"""States of pages, claims on them, and waiters for their end. Plain data; `kvmdp.paging.ledger` gives it life.

Units: RAM pages.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence

from kvmdp.interruption import Uninterrupted
from kvmdp.waiting import Latch


class State(enum.IntEnum):
    """Where a page's bytes are; one byte a page."""

    SOURCE = 0  # at the source, never fetched
    INFLIGHT = 1  # being made present by the owner of a claim
    PRESENT = 2  # in RAM, the guest may enter
    BACKED = 3  # in RAM, the guest is shut out: admitted again without a fetch
    ZERO = 4  # a hole of the source: reads as zeros
    EVICTING = 5  # in RAM, being taken away by the owner of a claim
    ADMITTING = 6  # in RAM and its bit set, but the trap is still being told
    SINK = 7  # evicted: in the sink
    POISON = 8  # unusable, until a caller gives it new bytes


class Wake(enum.Enum):
    """Why a waiter was woken."""

    COMMITTED = "committed"  # the pages were admitted
    FAILED = "failed"  # they could not be had
    REVOKED = "revoked"  # they were taken away, or that was given up: look again
    CANCELLED = "cancelled"  # the waiter was withdrawn, or the machine is stopping
    TIMED_OUT = "timed out"


class Claim:
    """Pages [first, first + count) belong to one owner until it commits or fails.

    It is a claim from when the ledger lists it until that lists it no more, which is all that says so: its owner makes
    the object first, and so can end it however far it has got when an exception comes (`Admission.owning`).

    `before` holds the pages' states when they were claimed, a byte a page; `after` what they are if it ended now, None
    for as before. `is_filled`: bytes are in RAM and bits set, so that it can only be committed; `is_admitted`: the trap
    has been told. `began` is when its owner began to fetch (time.perf_counter_ns), 0 if no job asks. `discarded` are
    runs (first, count) whose bytes were thrown away since, of which the owner has dealt with `zeroed`. `waiters` is
    changed under the pager's mutex; `woken` are those of them that the owner has still to notify.
    """

    __slots__ = (
        "after",
        "before",
        "began",
        "count",
        "discarded",
        "first",
        "is_admitted",
        "is_filled",
        "waiters",
        "woken",
        "zeroed",
    )

    def __init__(self, first: int = 0, count: int = 0, before: bytes = b"") -> None:
        self.first = first
        self.count = count
        self.before = before
        self.after: bytes | None = None
        self.began = 0
        self.is_filled = self.is_admitted = False
        self.discarded: Sequence[tuple[int, int]] = ()
        self.zeroed = 0
        self.waiters: list[Waiter] = []
        self.woken: list[Waiter] = []

    def split(self, count: int) -> Claim:
        """Take the first `count` pages off a claim that is not filled, as a claim of their own with all its waiters."""
        border = self.first + count
        piece = Claim(self.first, count, self.before[:count])
        piece.began = self.began
        piece.discarded = _clipped(self.discarded, self.first, border)
        piece.waiters, self.waiters = self.waiters, []
        for waiter in piece.waiters:
            waiter.claim = piece
        self.discarded = _clipped(self.discarded, border, self.first + self.count)
        self.first, self.count, self.before = border, self.count - count, self.before[count:]
        return piece

    def wake(self, reason: Wake) -> list[Waiter]:
        """Empty the queue of a claim that goes on; returns what was in it."""
        woken, self.waiters = self.waiters, []
        for waiter in woken:
            waiter.claim, waiter.reason = None, reason
        return woken

    def end(self, reason: Wake) -> list[Waiter]:
        """Empty the queue of a claim that has ended, into `woken`; returns what was in it. Can be made again."""
        queue = self.waiters
        if queue:
            self.waiters, self.woken = [], [*self.woken, *queue]
        for waiter in self.woken:
            if waiter.claim is self:
                waiter.claim, waiter.reason = None, reason
        return queue


def _clipped(runs: Sequence[tuple[int, int]], low: int, high: int) -> tuple[tuple[int, int], ...]:
    """Return what of runs (first, count) lies in [low, high)."""
    ends = ((max(first, low), min(first + count, high)) for first, count in runs)
    return tuple((first, end - first) for first, end in ends if first < end)


def runs_of_states(states: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the runs of one state in [start, end) of `states`, a byte a page: (state, first, end)."""
    while start < end:
        state = states[start]
        stop = start + 1
        while stop < end and states[stop] == state:
            stop += 1
        yield state, start, stop
        start = stop


class Waiter:
    """Waits for the end of one claim, and is woken once: the waker sets `reason` and then calls `notify`.

    `notify` is called without the pager's mutex, from any thread, and must not block.
    """

    __slots__ = ("claim", "notify", "reason")

    def __init__(self, notify: Callable[[], None]) -> None:
        self.notify = notify
        self.claim: Claim | None = None  # while it is in that claim's queue
        self.reason: Wake | None = None


def notify(woken: list[Waiter]) -> None:
    """Notify all waiters of a list, whatever one of them raises, and take them off it. Then raises the first error."""
    if not woken:
        return
    failed: Exception | None = None
    with Uninterrupted():  # or what is notified could be left half-way
        while woken:
            try:
                woken[0].notify()
            except Exception as error:
                failed = failed or error
            del woken[0]
    if failed is not None:
        raise failed


class Wait(Waiter):
    """A thread that waits for a claim: another thread has the page."""

    __slots__ = ("_woken",)

    def __init__(self) -> None:
        self._woken = Latch()
        super().__init__(self._woken.set)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until woken; False if that has not happened after `timeout` seconds. For one thread."""
        return self._woken.wait(timeout)


class Counters:
    """What the pager has done so far; each is changed under its mutex only."""

    __slots__ = (
        "claims",
        "pages_admitted",
        "pages_backed",
        "pages_discarded",
        "pages_evicted",
        "pages_fetched",
        "pages_refetched",
        "pages_revoked",
        "pages_zeroed",
        "retries",
        "waits",
    )

    def __init__(self) -> None:
        self.claims = 0  # claims begun on account of a fault
        self.waits = 0  # times an access found the page claimed by another
        self.retries = 0  # transient errors of the source
        self.pages_fetched = 0  # read from the source
        self.pages_zeroed = 0  # holes of the source
        self.pages_backed = 0  # admitted again without a fetch
        self.pages_refetched = 0  # read from the sink
        self.pages_evicted = 0  # written to the sink, or back to the source
        self.pages_discarded = 0  # their bytes thrown away, wherever they were
        self.pages_admitted = 0
        self.pages_revoked = 0

    def __repr__(self) -> str:
        return f"Counters({', '.join(f'{name}={getattr(self, name)}' for name in self.__slots__)})"
