"""States of pages, claims on them, and who waits for claims. Plain data; `kvmdp.paging.ledger` gives it life.

Units: RAM pages.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable


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
    POISON = 8  # unusable, until somebody gives it new bytes


class Wake(enum.Enum):
    """Why a waiter was woken."""

    COMMITTED = "committed"  # the pages were admitted
    FAILED = "failed"  # they could not be had
    REVOKED = "revoked"  # they were taken away, or that was given up: look again
    CANCELLED = "cancelled"  # the waiter was withdrawn, or the machine is stopping
    TIMED_OUT = "timed out"


class Claim:
    """Pages [first, first + count) belong to one owner until it commits or fails.

    `before` holds their states when they were claimed, a byte a page. `waiters` is changed under the pager's mutex.
    """

    __slots__ = ("before", "count", "first", "waiters")

    def __init__(self, first: int, count: int, before: bytes) -> None:
        self.first = first
        self.count = count
        self.before = before
        self.waiters: list[Waiter] = []


class Waiter:
    """Waits for the end of one claim, and is woken once: `reason` is set, then `notify` called, by whoever woke it.

    `notify` is called without the pager's mutex, from any thread, and must not block.
    """

    __slots__ = ("claim", "notify", "reason")

    def __init__(self, notify: Callable[[], None]) -> None:
        self.notify = notify
        self.claim: Claim | None = None  # while it is in that claim's queue
        self.reason: Wake | None = None


class Wait(Waiter):
    """A thread that waits for a claim: somebody else has the page."""

    __slots__ = ("_woken",)

    def __init__(self) -> None:
        self._woken = threading.Event()
        super().__init__(self._woken.set)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until woken; False if that has not happened after `timeout` seconds."""
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
