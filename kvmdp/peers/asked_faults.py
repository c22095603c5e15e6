"""FAULTs that a device has sent to the machine, until their DONE has come; and what an outcome means to an access."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence

from kvmdp.errors import CancelledError, FrozenError, PagingError, PoisonedError
from kvmdp.memory.bitmap import PresentBitmapView
from kvmdp.page import Outcome
from kvmdp.peers.wire.records import RecordError
from kvmdp.waiting import Latch

_MOST_PAGES = 512  # of one FAULT
_MOST_RUNS = 64  # that one access asks for at once


class AskedFault:
    """One of them. `done` is set when it has ended, or it is time to look again: then `outcome` is still None."""

    __slots__ = ("done", "outcome", "token")

    def __init__(self, token: int) -> None:
        self.token = token
        self.done = Latch()
        self.outcome: Outcome | None = None


class AskedFaults:
    """At most `credits` at the same time. The owner's mutex guards it, but for the wait for a credit."""

    def __init__(self, credits: int) -> None:
        # No Semaphore: an interruption of a thread that waits can leave its lock taken.
        self._credits: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(credits):
            self.give_back()
        self._open: dict[int, AskedFault] = {}
        self._last_token = 0

    def wait_credit(self, timeout: float | None) -> bool:
        """Wait for a credit, without the mutex; False after `timeout` seconds."""
        try:
            self._credits.get(timeout=timeout)
        except queue.Empty:
            return False
        return True

    def give_back(self) -> None:
        """Give a credit to a thread that waits for one."""
        self._credits.put(None)

    def begin(self) -> AskedFault:
        """Return a new one, for a credit that was waited for."""
        self._last_token += 1
        fault = self._open[self._last_token] = AskedFault(self._last_token)
        return fault

    def end(self, token: int, outcome: Outcome) -> None:
        """Take a DONE; its credit comes back. Raises RecordError if nothing was asked with that token."""
        fault = self._open.pop(token, None)
        if fault is None:
            raise RecordError(f"a DONE of {token}, which was not asked")
        fault.outcome = outcome
        fault.done.set()
        self.give_back()

    def wake_all(self) -> None:
        """Have all threads that wait for a DONE look again; their FAULTs stay open until they are answered."""
        for fault in self._open.values():
            fault.done.set()

    def turn_away(self) -> None:
        """Have all threads that wait, for a DONE or a credit, look again: nothing is asked for any more."""
        self.wake_all()
        # No DONE may come to give credits back. The thread that gets this one is turned away, and hands it to the next.
        self.give_back()


def seconds_left(deadline: float | None) -> float | None:
    """Return how long to wait until `deadline`, of time.monotonic; None, for ever, if there is none."""
    return None if deadline is None else max(deadline - time.monotonic(), 0)


def check_outcome(outcome: Outcome, where: str) -> None:
    """Raise what the outcome of a fault means if it is not the presence of the page; `where` names the page."""
    if outcome is Outcome.CANCELLED:
        raise CancelledError(f"{where} cannot be had: the machine is stopping")
    if outcome is Outcome.POISONED:
        raise PoisonedError(f"{where} is poisoned: what was in it is lost")
    if outcome is Outcome.FROZEN:
        raise FrozenError("accesses to guest memory are frozen: try again when they are thawed")
    if outcome not in (Outcome.PRESENT, Outcome.ADMITTED):
        raise PagingError(f"{where} cannot be made present: {outcome.name.lower()}")


def absent_runs(bitmap: PresentBitmapView, runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what is absent of runs (first page, end), as (page, count) each: as much as one access asks for at once.

    Empty if every page was present when it was looked at.
    """
    absent: list[tuple[int, int]] = []
    for first, end in runs:
        if end - first == 1:
            if not bitmap.test(first):
                absent.append((first, 1))
        elif not bitmap.test_range(first, end - first):
            # The machine may set bits meanwhile: then it is looked at again.
            found = bitmap.next_absent_run(first, end)
            absent.append((found[0], min(found[1], _MOST_PAGES)) if found else (first, 1))
        if len(absent) == _MOST_RUNS:
            break
    return absent
