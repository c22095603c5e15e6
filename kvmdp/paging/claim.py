"""States of pages, and claims: who owns pages that are changing state. Plain data; `DemandPager` gives it life.

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


class Claim:
    """Pages [first, first + count) belong to one owner until it commits or fails.

    `before` holds their states when they were claimed, a byte a page.
    """

    __slots__ = ("_done", "_parked", "before", "count", "first")

    def __init__(self, first: int, count: int, before: bytes) -> None:
        self.first = first
        self.count = count
        self.before = before
        self._done: threading.Event | None = None  # made by the first who waits, under the pager's mutex
        self._parked: list[Callable[[], None]] = []

    def event(self) -> threading.Event:
        """Return the event set when the claim ends; only under the pager's mutex."""
        if self._done is None:
            self._done = threading.Event()
        return self._done

    def park(self, wake: Callable[[], None]) -> None:
        """Have `wake` called when the claim ends; only under the pager's mutex."""
        self._parked.append(wake)

    def wake(self) -> None:
        """Wake all who wait or are parked; the claim is no longer listed, so nobody can begin to."""
        if self._done is not None:
            self._done.set()
        for wake in self._parked:
            wake()


class Wait:
    """Somebody else has the page: wait for the end of `claim`, then begin again. Made under the pager's mutex."""

    __slots__ = ("_event", "claim")

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self._event = claim.event()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until the claim has ended; False after `timeout` seconds."""
        return self._event.wait(timeout)


class Counters:
    """What the pager has done so far; each is changed under its mutex only."""

    __slots__ = (
        "claims",
        "pages_admitted",
        "pages_backed",
        "pages_fetched",
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
        self.pages_admitted = 0
        self.pages_revoked = 0
