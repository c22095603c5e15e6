"""Making ranges of RAM present, and shutting the guest out of them: by ranges, and by bitmaps.

Units: RAM pages, seconds.
"""

from __future__ import annotations

import contextlib

import numpy as np

from kvmdp.errors import BusyError, SwitchedOffError
from kvmdp.memory.bitmap import Words, runs_of
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import Outcome, PageFault
from kvmdp.paging.admission import Admission
from kvmdp.paging.claim import Wait
from kvmdp.paging.removal import Removal

ANSWER_SECONDS = 0.005  # for a device in another process to answer, by a thread that waits for nothing else
_MAX_CLAIM = 512  # pages claimed at once when a range is made present: 2 MiB


class Marking:
    """Marks ranges present and non-present, page by page as far as claims allow."""

    def __init__(self, layout: GuestLayout, admission: Admission, removal: Removal) -> None:
        self._layout = layout
        self._admission = admission
        self._removal = removal
        self._ledger = admission.ledger

    def mark_present(self, first: int, count: int) -> Outcome:
        """Make a range present, fetching what has to be fetched; vCPUs may run meanwhile.

        Returns PRESENT once each page of it has been present since, or the outcome that ended it. What is taken away
        meanwhile, as by a resident limit of fewer pages, is absent again.
        """
        page, end = self._layout.check_pages(first, count)
        while (run := self._ledger.bitmap.next_absent_run(page, end)) is not None:
            outcome, page = self._make_present(run[0], min(run[1], _MAX_CLAIM))
            if outcome is Outcome.ADMITTED:
                self._admission.jobs.work()
            elif outcome is not Outcome.PRESENT and not (
                outcome is Outcome.FAILED and self._admission.is_held()
            ):
                return outcome
        return Outcome.PRESENT

    def _make_present(self, page: int, count: int) -> tuple[Outcome, int]:
        """Make at least the first page of a run present, as much of it as one claim can have.

        Returns ADMITTED, PRESENT if another thread may have done it, or why not; and the page to go on at.
        """
        with self._admission.owning() as claim:
            with self._admission.mutex:
                step = self._ledger.obstacle(page)
                if isinstance(step, Outcome):
                    return step, page
                if step is None:
                    if self._admission.error is not None:
                        return Outcome.FAILED, page
                    self._ledger.claim(page, page, count, claim)
                else:
                    wait = Wait()
                    self._ledger.queue(step, wait)
            if step is None:
                end = min(claim.first + claim.count, page + count)
                outcome = self._admission.carry_out(claim, PageFault(page))
                return outcome, page if outcome is Outcome.FAILED else end
        return self._admission.sleep(wait, None) or Outcome.PRESENT, page

    def shut_off(self, first: int, count: int) -> None:
        """Shut the guest out of a range, up to the first page that has a claim or a pin.

        Waits for a device in another process alone, and for that a moment.
        """
        with contextlib.suppress(BusyError, SwitchedOffError):
            self._removal.mark_nonpresent(
                first, count, timeout=0 if self._removal.peers is None else ANSWER_SECONDS
            )

    def complete(self, first: int, count: int) -> Outcome:
        """Make the unclaimed pages of a range present, and pass over the rest: waits for no claim.

        Returns PRESENT, or FAILED or CANCELLED if that ended it.
        """
        page, end = self._layout.check_pages(first, count)
        while (run := self._ledger.bitmap.next_absent_run(page, end)) is not None:
            page = run[0]
            with self._admission.owning() as claim:
                with self._admission.mutex:
                    step = self._ledger.obstacle(page)
                    if step is None and self._admission.error is not None:
                        step = Outcome.FAILED
                    if step is None:
                        self._ledger.claim(page, page, min(run[1], _MAX_CLAIM), claim)
                if step is None:
                    end_of_claim = claim.first + claim.count
                    step, page = self._admission.carry_out(claim, PageFault(page)), end_of_claim
                else:
                    page += 1
            if step is Outcome.FAILED or step is Outcome.CANCELLED:
                return step
        return Outcome.PRESENT

    def mark_bitmap_present(self, words: Words) -> Outcome:
        """Make the pages of a sparse bitmap (`kvmdp.memory.bitmap`) present."""
        for first, count in self._runs(words):
            outcome = self.mark_present(first, count)
            if outcome is not Outcome.PRESENT:
                return outcome
        return Outcome.PRESENT

    def mark_bitmap_nonpresent(self, words: Words) -> int:
        """Shut the guest out of the pages of a sparse bitmap; returns how many were present."""
        return sum(self._removal.mark_nonpresent(first, count) for first, count in self._runs(words))

    def _runs(self, words: Words) -> list[tuple[int, int]]:
        if words.dtype != np.uint64 or words.shape != ((self._layout.pages + 63) // 64,):
            raise ValueError(
                f"a bitmap of {self._layout.pages} pages is uint64[{(self._layout.pages + 63) // 64}], "
                f"not {words.dtype}{list(words.shape)}"
            )
        return [(int(first), int(count)) for first, count in runs_of(words, self._layout.pages)]
