"""A source with a part left out: memory at its physical addresses, without the hole in which there is no RAM.

Units: bytes.
"""

from __future__ import annotations

from kvmdp.page import PAGE_SIZE
from kvmdp.source.base import PageSource, SourceError, check_range, page_extents
from kvmdp.source.request import FetchRequest
from kvmdp.source.wrapper import SourceWrapper


class WithoutHole(SourceWrapper):
    """`inner` without its bytes [start, end), whole pages; what lies behind them follows on what lies before them.

    If `end` is not before the end of `inner`, what is left ends at `start`. Raises ValueError for a hole that is none
    of `inner`'s pages.
    """

    def __init__(self, inner: PageSource, start: int, end: int) -> None:
        if (start | end) % PAGE_SIZE or not 0 < start < min(end, inner.size):
            raise ValueError(
                f"no hole from {start:#x} to {end:#x} is in the {inner.size} bytes of {inner.name}"
            )
        super().__init__(inner)
        self._start = start
        self._hole = min(end, inner.size) - start

    @property
    def size(self) -> int:
        """What the inner source has outside the hole."""
        return self.inner.size - self._hole

    def extents(self) -> list[tuple[int, int]]:
        """Return the inner source's extents, those behind the hole moved to where it begins."""
        start, end = self._start, self._start + self._hole
        ranges = [(first, first + length) for first, length in self.inner.extents()]
        below = [(first, min(last, start)) for first, last in ranges if first < start]
        above = [(max(first, end) - self._hole, last - self._hole) for first, last in ranges if last > end]
        return page_extents(below + above)

    def fetch(self, request: FetchRequest, destination: memoryview) -> None:
        """Fetch from the inner source, from both sides of the hole where the range goes over it. Raises what that does.

        The offset in a SourceError is one of this source; the reason names that in `inner`.
        """
        offset = request.offset
        check_range(self, offset, destination.nbytes)
        below = min(max(self._start - offset, 0), destination.nbytes)
        if below:
            self.inner.fetch(request.part(offset), destination[:below])
        if below < destination.nbytes:
            self._fetch_above(request, offset + below, destination[below:])

    def _fetch_above(self, request: FetchRequest, offset: int, destination: memoryview) -> None:
        place = offset + self._hole
        try:
            self.inner.fetch(request.part(place), destination)
        except SourceError as error:
            reason = f"{error.reason} (with its hole: offset {place:#x})"
            raise SourceError(
                error.source, offset, error.length, reason, transient=error.transient
            ) from error
