"""The gate of those who touch RAM without a vCPU: devices and the VMM itself. Shut, it freezes them.

Two ways lead through it. A copy within a page tests the page's state against `accepted` and copies, all under the
pager's mutex: shutting the gate changes `accepted` to what no state is, so the copy still pays for one test only. What
takes longer, a view or a copy of many pages, *enters*: its pages are pinned and it is counted until it *leaves*.
Pins that others hold, for ever perhaps, are not counted.

Units: RAM pages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from kvmdp.paging.claim import State
from kvmdp.paging.fault import BusyError, FrozenError, PagingError
from kvmdp.paging.ledger import Ledger

_PRESENT = int(State.PRESENT)
_NO_STATE = -1


class AccessGate:
    """Lets accesses to present pages through, or nobody.

    `accepted` is the state a page must be in to be touched; read it under the pager's mutex. `changed` is a condition
    on that mutex, notified when a pin is undone.
    """

    def __init__(self, ledger: Ledger, changed: threading.Condition) -> None:
        self.accepted = _PRESENT
        self._ledger = ledger
        self._changed = changed
        self._inside = 0

    @property
    def frozen(self) -> bool:
        """Whether the gate is shut."""
        return self.accepted == _NO_STATE

    def enter(self, runs: Sequence[tuple[int, int]]) -> int | None:
        """Pin runs of pages, (first, count) each, if every page is present, and go in until `leave`.

        Returns None, or a page that is not present: then nothing is pinned. All or none, because whoever waited for
        a page with others pinned might wait for a revocation of them all, which waits for its pins. Raises
        FrozenError.
        """
        ledger = self._ledger
        with self._changed:
            if self.frozen:
                raise FrozenError("accesses to guest memory are frozen: try again when they are thawed")
            for number, (first, count) in enumerate(runs):
                if not ledger.pin(first, count):
                    for run in runs[:number]:
                        ledger.unpin(*run)
                    return next(page for page in range(first, first + count) if not self._is_present(page))
            self._inside += 1
        return None

    def _is_present(self, page: int) -> bool:
        return self._ledger.states[page] == _PRESENT

    def leave(self, runs: Sequence[tuple[int, int]]) -> None:
        """Undo one `enter` of the same runs."""
        with self._changed:
            for run in runs:
                self._ledger.unpin(*run)
            self._inside -= 1
            self._changed.notify_all()

    def shut(self, deadline: float | None) -> None:
        """Let nobody in any more, and return once nobody is inside.

        Raises BusyError, with the gate open, if that has not happened by `deadline` (time.monotonic); PagingError if
        it is shut.
        """
        with self._changed:
            if self.frozen:
                raise PagingError("accesses to guest memory are frozen already: thaw them first")
            # Copies within a page are over: they are made under this mutex, and the next one finds this. A read that
            # is copying without it finds that pages have left, and is made again.
            self.accepted = _NO_STATE
            self._ledger.departures += 1
            try:
                while self._inside:
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        raise BusyError(
                            f"guest memory cannot be frozen: {self._inside} accesses are under way, or views open"
                        )
                    self._changed.wait(left)
            except BaseException:
                self.accepted = _PRESENT
                raise

    def open(self) -> None:
        """Let accesses through again."""
        with self._changed:
            self.accepted = _PRESENT
