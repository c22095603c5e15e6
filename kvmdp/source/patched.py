"""A source with some of its bytes replaced: code or page tables that a workload needs inside paged RAM.

Units: bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from kvmdp.source.base import PageSource, check_range, page_extents
from kvmdp.source.request import FetchRequest


class PatchedSource:
    """`inner` with `patches` applied, a sequence of (offset, bytes) in any order; a `PageSource`.

    A patch may lie in a hole of `inner` or beyond its size: its pages are data from then on, and zeros where
    no patch has bytes. Attributes: `inner`; `name`, the name of `inner`; `size`. `inner` is closed with this object.

    Raises ValueError if a patch is empty, has a negative offset or overlaps another.
    """

    def __init__(self, inner: PageSource, patches: Sequence[tuple[int, bytes]]) -> None:
        self.inner = inner
        self._patches = sorted(patches)
        self._ends = _ends(self._patches)
        self._inner_extents = inner.extents()
        self._inner_ends = [offset + length for offset, length in self._inner_extents]
        inner_ranges = [(offset, offset + length) for offset, length in self._inner_extents]
        patched_ranges = [(offset, offset + len(data)) for offset, data in self._patches]
        self._extents = page_extents(inner_ranges + patched_ranges)
        self.name = inner.name
        self.size = max(inner.size, sum(self._extents[-1]) if self._extents else 0)

    @property
    def concurrency(self) -> int:
        """The inner source's."""
        return self.inner.concurrency

    def fetch(self, request: FetchRequest, destination: memoryview) -> None:
        """Write the pages over `destination`, patches included.

        Raises what the inner source's `fetch` raises.
        """
        offset = request.offset
        end = offset + destination.nbytes
        index = bisect_right(self._ends, offset)
        if index == len(self._patches) or self._patches[index][0] >= end:
            # Nearly every fault: no patch here, so what is in our extents is in the inner source's too.
            self.inner.fetch(request, destination)
            return
        check_range(self, offset, destination.nbytes)
        self._fetch_from_inner(request, destination)
        while index < len(self._patches) and self._patches[index][0] < end:
            at, data = self._patches[index]
            first, last = max(at, offset), min(at + len(data), end)
            destination[first - offset : last - offset] = data[first - at : last - at]
            index += 1

    def extents(self) -> list[tuple[int, int]]:
        """Return the inner source's extents, grown by the pages that have patches."""
        return list(self._extents)

    def close(self) -> None:
        """Close the inner source."""
        self.inner.close()

    def _fetch_from_inner(self, request: FetchRequest, destination: memoryview) -> None:
        """Fetch the range from the inner source where that has data, and write zeros elsewhere."""
        offset = request.offset
        position, end = offset, offset + destination.nbytes
        index = bisect_right(self._inner_ends, offset)
        while position < end:
            start, stop = end, end
            if index < len(self._inner_extents):
                start = min(max(self._inner_extents[index][0], position), end)
                stop = min(self._inner_ends[index], end)
            destination[position - offset : start - offset] = bytes(start - position)
            if start < stop:
                self.inner.fetch(request.part(start), destination[start - offset : stop - offset])
            position = stop
            index += 1


def _ends(patches: list[tuple[int, bytes]]) -> list[int]:
    """Return where each of the sorted patches ends; ValueError if one is unusable."""
    ends: list[int] = []
    for offset, data in patches:
        if offset < 0 or not data:
            raise ValueError(f"a patch of {len(data)} bytes at offset {offset} replaces no byte of RAM")
        if ends and offset < ends[-1]:
            raise ValueError(f"the patch at offset {offset:#x} overlaps the one that ends at {ends[-1]:#x}")
        ends.append(offset + len(data))
    return ends
