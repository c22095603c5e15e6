"""The gate of accesses to RAM that no vCPU makes, but devices and the VMM itself. Shut, it freezes them.

Two ways lead through it. A copy within a page tests the page's state against `accepted` and copies, all under the
pager's mutex: shutting the gate changes `accepted` to what no state is, so the copy still pays for one test only. What
takes longer, a view or a copy of many pages, *enters*: its pages are pinned and it is counted until it *leaves*.
Pins that others hold, for ever perhaps, are not counted.

Units: RAM pages.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from kvmdp.errors import BusyError, FrozenError, PagingError
from kvmdp.interruption import undone
from kvmdp.paging.claim import State
from kvmdp.paging.ledger import Ledger
from kvmdp.paging.pins import Pin
from kvmdp.waiting import Condition

_PRESENT = int(State.PRESENT)
_NO_STATE = -1


class AccessGate:
    """Lets accesses to present pages through, or none.

    `accepted` is the state a page must be in to be touched; read it under `mutex`, the pager's. `changed` is a
    condition on that, notified when a pin is undone and when the gate opens.
    """

    def __init__(self, ledger: Ledger, mutex: threading.RLock, changed: Condition) -> None:
        self.accepted = _PRESENT
        self._ledger = ledger
        # Taken as itself: a Condition's `__exit__` is Python, and an interruption at its entry would leave it locked.
        self._mutex = mutex
        self._changed = changed
        self._shutter: object = None  # what `shut` was given

    @property
    def frozen(self) -> bool:
        """Whether the gate is shut."""
        return self.accepted == _NO_STATE

    @property
    def _inside(self) -> list[Pin]:
        return self._ledger.pins.of(self)

    def enter(self, pin: Pin) -> int | None:
        """Pin runs of pages, if every page is present, and go in until `leave`; `pin` is an accessor's of this gate.

        Returns None, or a page that is not present: then nothing is pinned. All or none, because a thread that waited
        for a page with others pinned might wait for a revocation of them all, which waits for its pins. Raises
        FrozenError.
        """
        with self._mutex:
            if self.frozen:
                raise FrozenError("accesses to guest memory are frozen: try again when they are thawed")
            page = self._ledger.pins.add(pin)
            if page is None and self._ledger.pins.relent(pin):
                self._changed.notify_all()
            return page

    def insist(self, pin: Pin) -> None:
        """Have no page of a pin taken away any more before it has been in, or `leave`: it has lost one again."""
        with self._mutex:
            self._ledger.pins.insist(pin)

    def leave(self, pin: Pin) -> None:
        """Undo one `enter`, if it came to that."""
        with self._mutex:
            self._ledger.pins.remove(pin)
            self._changed.notify_all()

    @contextlib.contextmanager
    def visiting(self, pages: Sequence[int]) -> Iterator[Pin]:
        """Yield a pin of pages that is to `enter`; it has left when the block is."""
        pin = Pin([(page, 1) for page in pages], self)
        with undone(lambda: self.leave(pin)):
            yield pin

    def shut(self, shutter: object, deadline: float | None) -> None:
        """Let no access in any more, and return once none is inside. `shutter` is for `is_shut_by`.

        Raises BusyError if that has not happened by `deadline` (time.monotonic), PagingError if it is shut. If it
        `is_shut_by` this shutter then, `open` follows.
        """
        with self._mutex:
            if self.frozen:
                raise PagingError("accesses to guest memory are frozen already: thaw them first")
            self._shutter = shutter
            # Copies within a page are over: they are made under this mutex, and the next one finds this. A read that
            # is copying without it finds that pages have left, and is made again.
            self.accepted = _NO_STATE
            self._ledger.departures += 1
            while inside := self._inside:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise BusyError(
                        f"guest memory cannot be frozen: {len(inside)} accesses are under way, or views open"
                    )
                self._changed.wait(left)

    def is_shut_by(self, shutter: object) -> bool:
        """Whether it is that which has shut the gate."""
        return self._shutter is shutter

    def open(self) -> None:
        """Let accesses through again."""
        with self._mutex:
            self.accepted = _PRESENT
            self._changed.notify_all()
            self._shutter = None  # last: until then an interrupted thread does all of it again

    def await_open(self, is_over: Callable[[], bool]) -> None:
        """Sleep while the gate is shut; until `is_over`, too, which is asked with the mutex held at each `wake`."""
        with self._mutex:
            self._changed.wait_for(lambda: not self.frozen or is_over())

    def wake(self) -> None:
        """Have the threads in `await_open` ask whether it is over."""
        with self._mutex:
            self._changed.notify_all()
