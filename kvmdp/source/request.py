"""What a source is asked: where from, on whose account, how urgently, and how the asker calls it off.

Units: bytes, seconds.
"""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Callable, Iterator

from kvmdp.interruption import undone
from kvmdp.page import PageFault


class Urgency(enum.IntEnum):
    """Which of two requests a source serves first where it can choose."""

    DEMAND = 0  # a vCPU, a device or a caller waits for the pages
    BACKGROUND = 1  # nothing waits for them


class FetchCancel:
    """Calls off fetches that are under way, for good; one object serves as many fetches as its owner likes."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards what follows
        self._is_set = False
        self._wakers: list[
            tuple[Callable[[], None]]
        ] = []  # each is compared as itself: two may be the same call

    @property
    def is_set(self) -> bool:
        """Whether the fetches have been called off."""
        return self._is_set

    def set(self) -> None:
        """Call the fetches off; a second call does nothing. Callable from any thread; does not wait."""
        with self._mutex:
            self._is_set = True
            wakers, self._wakers = self._wakers, []
        for (wake,) in wakers:
            wake()

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Have `set` call `wake` during the block; call it at once if the fetches have been called off already.

        `wake` runs in the thread that calls `set` and must not block.
        """
        waker = (wake,)
        with undone(lambda: self._forget(waker)):
            with self._mutex:
                is_late = self._is_set
                if not is_late:
                    self._wakers.append(waker)
            if is_late:
                wake()
            yield

    def _forget(self, waker: tuple[Callable[[], None]]) -> None:
        with self._mutex:
            self._wakers = [each for each in self._wakers if each is not waker]

    def sleep(self, seconds: float) -> bool:
        """Sleep; returns False, early, if the fetches are called off."""
        woken = threading.Lock()
        woken.acquire()
        with self.waking(lambda: woken.release() if woken.locked() else None):
            return not woken.acquire(timeout=seconds)


NEVER = FetchCancel()  # of requests that the asker never calls off; nothing sets it


class FetchRequest:
    """A run of pages that a source is to deliver, from `offset` on; the destination says how many.

    `fault` is the access on whose account the pages are fetched, None if it is no access's. `cancel` calls the fetch
    off. `on_landed` is told of pieces: `landed` passes the word on.
    """

    __slots__ = ("cancel", "done", "fault", "offset", "on_landed", "urgency")

    def __init__(
        self,
        offset: int,
        fault: PageFault | None = None,
        cancel: FetchCancel = NEVER,
        urgency: Urgency = Urgency.DEMAND,
        on_landed: Callable[[int], None] | None = None,
    ) -> None:
        self.offset = offset
        self.fault = fault
        self.cancel = cancel
        self.urgency = urgency
        self.on_landed = on_landed
        self.done = 0

    def landed(self, length: int) -> None:
        """Say that the first `length` bytes of the destination, whole pages, are final; in the thread of the fetch.

        For a source that delivers a long run bit by bit: from then on it neither writes nor reads there, and the guest
        may go on with these pages. A source need not call this.
        """
        if self.on_landed is not None:
            self.on_landed(length)
            self.done = length

    def rest(self) -> FetchRequest:
        """Return the request for what has not landed yet."""
        done, on_landed = self.done, self.on_landed
        if on_landed is None:
            return self
        return FetchRequest(
            self.offset + done,
            self.fault,
            self.cancel,
            self.urgency,
            lambda length: on_landed(done + length),
        )

    def part(self, offset: int) -> FetchRequest:
        """Return a request like this for another place, that tells of no pieces: for sources that wrap others."""
        return FetchRequest(offset, self.fault, self.cancel, self.urgency)
