"""When present pages are put together into huge ones: as a region fills, in the background, or only when asked.

What that means is the trap's (`Trap.collapse`); how it is made exact is `Pager.collapse`'s.

Units: RAM pages, seconds.
"""

from __future__ import annotations

import queue
import threading
import time
from types import TracebackType
from typing import Literal, Self, get_args

from kvmdp.page import REGION, PageFault
from kvmdp.paging.broken import broken
from kvmdp.paging.claim import Claim
from kvmdp.paging.jobs import Job
from kvmdp.paging.pager import Pager
from kvmdp.thread import JoinableThread

CollapsePolicy = Literal["off", "full", "background", "end"]
POLICIES: tuple[CollapsePolicy, ...] = get_args(CollapsePolicy)

_ROUND_SECONDS = 0.1  # from one look of the background thread at all of RAM to the next
_ROUND_REGIONS = 16  # what it puts together at most before it pauses
_ATTEMPTS = 5  # at a region that has filled; a round's time lies between two


class Collapser(Job):
    """Collapses what a machine's pager has made present, by a policy, for the time of a `with` block.

    "full": a thread collapses a region as soon as its last page has been admitted, and tries a few times more if
    a page of it had a claim. No vCPU and no reader does it: the kernel moves 2 MiB for it. "background": a thread
    looks ten times a second for full regions, and takes 16 at most each time. "end" and "off": nothing happens by
    itself; its user calls `collapse_all`.

    `pages` have been put together in `seconds` of work.
    """

    def __init__(self, pager: Pager, policy: CollapsePolicy) -> None:
        if policy not in POLICIES:
            raise ValueError(
                f"there is no policy {policy!r} to collapse by: choose from {', '.join(POLICIES)}"
            )
        self.policy = policy
        self.pages = 0
        self.seconds = 0.0
        self._pager = pager
        self._filled: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # regions; None ends the thread
        self._stopped = threading.Event()
        work = {"full": self._collapse_filled, "background": self._look_again}.get(policy)
        self._thread = (
            None
            if work is None
            else JoinableThread(
                work, "collapse", lambda error: pager.abort(broken("pages could not be put together", error))
            )
        )

    def __enter__(self) -> Self:
        if self.policy == "full":
            self._pager.jobs.add(self)
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pager.jobs.remove(self)
        self._stopped.set()
        self._filled.put(None)
        if self._thread is not None:
            self._thread.join()

    def collapse_all(self) -> None:
        """Collapse all regions that are full."""
        self._collapse(0, self._pager.layout.pages)

    def _collapse(self, first: int, count: int) -> bool:
        began = time.perf_counter()
        pages = self._pager.collapse(first, count)
        self.seconds += time.perf_counter() - began
        self.pages += pages
        return pages > 0

    # As a region fills

    def admitted(self, fault: PageFault, claim: Claim, began: int) -> None:
        """Take note of regions that a claim, which has been committed, has filled.

        Two claims may fill a region at the same time, and the first to end finds the bits of the other set, whose
        pages are only being admitted: then the thread finds a page claimed. The second to end notes the region again.
        A claim for another reason (`Pager.reassert`) notes nothing: the thread tries again by itself.
        """
        bitmap, pages = self._pager.bitmap, self._pager.layout.pages
        for number in range(claim.first // REGION, (claim.first + claim.count - 1) // REGION + 1):
            if (number + 1) * REGION <= pages and bitmap.test_range(number * REGION, REGION):
                self._filled.put(number)

    def _collapse_filled(self) -> None:
        attempts: dict[int, int] = {}  # left, at regions that could not be had
        while not self._stopped.is_set():
            try:
                number = self._filled.get(timeout=_ROUND_SECONDS if attempts else None)
            except queue.Empty:
                for region in list(attempts):
                    self._attempt(region, attempts)
                continue
            if number is not None:
                attempts[number] = _ATTEMPTS
                self._attempt(number, attempts)

    def _attempt(self, number: int, attempts: dict[int, int]) -> None:
        """Collapse a region, and take note of how many attempts are left; none if it need not be tried again."""
        attempts[number] -= 1
        is_full = self._pager.bitmap.test_range(number * REGION, REGION)
        if not is_full or self._collapse(number * REGION, REGION) or not attempts[number]:
            del attempts[number]

    # In the background

    def _look_again(self) -> None:
        done: set[int] = (
            set()
        )  # as far as this thread knows; a region that fills again between two looks stays small
        bitmap, regions = self._pager.bitmap, self._pager.layout.pages // REGION
        after = -1  # the last region that was tried
        while not self._stopped.wait(_ROUND_SECONDS):
            full = {number for number in range(regions) if bitmap.test_range(number * REGION, REGION)}
            done &= full
            # Round and round, lest the same few that cannot be had now keep the others waiting.
            left = sorted(full - done, key=lambda number: (number <= after, number))
            for number in left[:_ROUND_REGIONS]:
                after = number
                if self._collapse(number * REGION, REGION):
                    done.add(number)
