"""Pins: a present page that is pinned stays present, a poisoned one poisoned, until the pin is undone.

An access that needs several pages at once makes them present one after the other and then pins them all. Threads that
take pages away all the time could take one of them again before it has the last, without end. So an access to which
that has happened *insists*: from then on a revocation of its pages waits until it has pinned them, or given up. What
is completed for a vCPU insists from its first absent page on.

Used under the pager's mutex, and part of the ledger.

Units: RAM pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kvmdp.page import Outcome
from kvmdp.paging.claim import Claim, State

_PRESENT = bytes((State.PRESENT,))
_PRESENT_BYTE, _POISON_BYTE = int(State.PRESENT), int(State.POISON)


class Pin:
    """Runs of pages, (first, count) each, that stay as they are as long as the ledger lists it.

    An object, so that its owner can undo it whether or not it has come to be listed. `accessor` is the gate that it
    has come in by, None if by none.
    """

    __slots__ = ("accessor", "runs")

    def __init__(self, runs: Sequence[tuple[int, int]], accessor: object = None) -> None:
        self.runs = runs
        self.accessor = accessor


class Pins:
    """The pins on pages whose `states`, a byte each, others change.

    A thread that may be interrupted pins with a `Pin`. Threads that never are (readers, vCPUs) count: each pin is
    undone once.
    """

    def __init__(self, states: bytearray) -> None:
        self._states = states
        self._listed: list[Pin] = []
        self._insisting: list[Pin] = []  # of accesses that have not got their pages yet
        self._counted: dict[tuple[int, int], int] = {}  # how often each run is pinned without a `Pin`

    def add(self, pin: Pin) -> int | None:
        """List a pin if every page of its runs is present and admitted; returns None, or a page that is not."""
        for first, count in pin.runs:
            if self._states.count(_PRESENT, first, first + count) != count:
                return next(
                    page for page in range(first, first + count) if self._states[page] != _PRESENT_BYTE
                )
        self._listed.append(pin)
        return None

    def add_settled(self, pin: Pin) -> Outcome | None:
        """List a pin of one page if that is PRESENT or POISONED; returns which it stays, None if it is neither."""
        state = self._states[pin.runs[0][0]]
        if state not in (_PRESENT_BYTE, _POISON_BYTE):
            return None
        self._listed.append(pin)
        return Outcome.PRESENT if state == _PRESENT_BYTE else Outcome.POISONED

    def remove(self, pin: Pin) -> None:
        """Take a pin off the list, if it is there; it does not insist either."""
        self.relent(pin)
        if pin in self._listed:
            self._listed.remove(pin)

    def insist(self, pin: Pin) -> None:
        """Have the pages of a pin that cannot be listed yet stay present, once they are, until `relent`."""
        if pin not in self._insisting:
            self._insisting.append(pin)

    def relent(self, pin: Pin) -> bool:
        """Undo `insist`; False if there was none."""
        if pin not in self._insisting:
            return False
        self._insisting.remove(pin)
        return True

    def first_insisted(self, page: int, end: int) -> int | None:
        """Return the first page of [page, end) that an access insists on."""
        runs = (run for pin in self._insisting for run in pin.runs)
        return min(
            (max(first, page) for first, count in runs if first < end and page < first + count), default=None
        )

    def of(self, accessor: object) -> list[Pin]:
        """Return the pins of an accessor."""
        return [pin for pin in self._listed if pin.accessor is accessor]

    def pin(self, first: int, count: int = 1) -> bool:
        """Pin a run of pages if every one is present and admitted; False, and none is pinned, if not."""
        if self._states.count(_PRESENT, first, first + count) != count:
            return False
        run = first, count
        self._counted[run] = self._counted.get(run, 0) + 1
        return True

    def unpin(self, first: int, count: int = 1) -> bool:
        """Undo one `pin` of the same run; True if it was the run's last."""
        run = first, count
        left = self._counted[run] - 1
        if left:
            self._counted[run] = left
            return False
        del self._counted[run]
        return True

    def hold(self, claim: Claim) -> bool:
        """Whether a page of the claim is pinned."""
        first, end = claim.first, claim.first + claim.count
        runs = itertools.chain(self._counted, *(pin.runs for pin in self._listed))
        return any(page < end and first < page + count for page, count in runs)


class Retained:
    """Runs of pages that stay present once they are: a revocation passes them over. There are few."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int]] = []  # (first, end)

    def add(self, run: tuple[int, int]) -> None:
        """Retain the pages (first, end); the same may be retained twice."""
        self._runs.append(run)

    def remove(self, run: tuple[int, int]) -> None:
        """Undo one `add` of the same pages."""
        self._runs.remove(run)

    def first_between(self, first: int, end: int) -> int:
        """Return the first retained page of [first, end), or `end`."""
        return min((max(low, first) for low, high in self._runs if low < end and first < high), default=end)

    def end_at(self, page: int) -> int:
        """Return where a retained run ends that holds `page`."""
        return next(high for low, high in self._runs if low <= page < high)
