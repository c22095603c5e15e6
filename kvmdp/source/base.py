"""Where the bytes of guest memory come from: the protocol every source follows, and its error.

A source knows nothing of KVM or of guest-physical addresses. It speaks of offsets into guest RAM in the
order of the RAM file: offset 0 is RAM page 0, and the RAM above the hole of the guest-physical map follows
the RAM below it at once.

Units: bytes. Offsets and lengths are multiples of `PAGE_SIZE`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kvmdp.errors import KvmdpError
from kvmdp.page import PAGE_SIZE
from kvmdp.source.request import FetchRequest

WORDS_PER_PAGE = PAGE_SIZE // 8

_RETRY_SECONDS = (0.001, 0.004, 0.016, 0.064, 0.256)


class SourceError(KvmdpError):
    """A source could not deliver pages; whatever it wrote to the destination is not their content.

    Arguments, which are attributes too: `source` (the source's name), `offset` and `length` (bytes asked
    for), `reason` (what went wrong, and what to do), `transient` (True: the same request may succeed if it is
    made again).
    """

    def __init__(
        self, source: str, offset: int, length: int, reason: str, *, transient: bool = False
    ) -> None:
        super().__init__(source, offset, length, reason)
        self.source = source
        self.offset = offset
        self.length = length
        self.reason = reason
        self.transient = transient

    def __str__(self) -> str:
        return f"cannot read {self.length} bytes at offset {self.offset:#x} of {self.source}: {self.reason}"


class PageSource(Protocol):
    """Delivers the content of guest RAM, page by page, in any order.

    `fetch` is called from several threads at once, each with a destination of its own: an implementation keeps
    no state that one call writes and another reads, or guards it with a lock.
    """

    @property
    def name(self) -> str:
        """What to call this source in a message: a path, or a description."""
        ...

    @property
    def size(self) -> int:
        """Bytes of RAM this source covers from offset 0; RAM beyond that reads as zeros."""
        ...

    @property
    def concurrency(self) -> int:
        """How many fetches gain by being under way at the same time, at least 1."""
        ...

    def fetch(self, request: FetchRequest, destination: memoryview) -> None:
        """Write the pages from `request.offset` on over every byte of `destination`.

        `destination` is a writable, contiguous view of bytes, a whole number of pages long. The range lies inside
        `extents()`: holes are never asked for. A fetch that waits for anything but a local file ends soon after
        `request.cancel` is set. Raises SourceError if the source cannot deliver, or was called off; ValueError if the
        range is not whole pages inside `size`.
        """
        ...

    def extents(self) -> list[tuple[int, int]]:
        """Where the data lies: sorted (offset, length) ranges of whole pages that neither overlap nor touch.

        Everything outside them reads as zeros and is never asked for.
        """
        ...

    def close(self) -> None:
        """Give back what the source holds; closing it again does nothing."""
        ...


@runtime_checkable
class WritableSource(PageSource, Protocol):
    """A source that takes pages back, whose later `fetch` gives what was stored last."""

    def store(self, offset: int, content: memoryview) -> None:
        """Keep whole pages from `offset` on, inside `size`, holes too. Raises SourceError, OSError, ShortageError."""
        ...


@runtime_checkable
class RamSource(PageSource, Protocol):
    """A source whose pages another process writes into RAM, of which it is told first; it delivers nowhere else."""

    def bind(
        self, memory: memoryview, ram: int, bitmap: int, regions: Sequence[tuple[int, int, int]]
    ) -> None:
        """Take RAM: its mapping, its file, the present bitmap's file, and where its parts lie.

        `regions` are (gpa, bytes, offset in the file). Descriptors stay the caller's. Raises ValueError for RAM that
        other processes cannot map.
        """
        ...


def ram_source(source: PageSource) -> RamSource | None:
    """Return the `RamSource` in `source`, which may be wrapped (wrappers have it as `inner`), or None."""
    while not isinstance(source, RamSource):
        inner = getattr(source, "inner", None)
        if inner is None:
            return None
        source = inner
    return source


def check_range(source: PageSource, offset: int, length: int) -> None:
    """Raise ValueError unless [offset, offset + length) is whole pages, at least one, inside the source."""
    if offset < 0 or length <= 0 or (offset | length) % PAGE_SIZE or offset + length > source.size:
        raise ValueError(
            f"{length} bytes at offset {offset:#x} are not whole {PAGE_SIZE}-byte pages "
            f"inside the {source.size} bytes of {source.name}"
        )


def page_extents(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the pages that byte ranges (start, end) touch, in the form of `PageSource.extents`."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        first = start // PAGE_SIZE * PAGE_SIZE
        last = -(-end // PAGE_SIZE) * PAGE_SIZE
        if merged and first <= merged[-1][1]:
            first, before = merged.pop()
            last = max(last, before)
        merged.append((first, last))
    return [(first, last - first) for first, last in merged]


def _always() -> bool:
    return True


def fetch(
    source: PageSource,
    request: FetchRequest,
    destination: memoryview,
    may_retry: Callable[[], bool] = _always,
) -> None:
    """Fetch from a source as every reader of one does: again if the source says that this may help.

    `may_retry` is asked before each further attempt, the first a millisecond after the failure; there are five, a third
    of a second in all. What has landed is not fetched again. Raises what `source.fetch` raises.
    """
    try:
        source.fetch(request, destination)
    except SourceError as error:
        fetch_again(source, request, destination, error, may_retry)


def fetch_again(
    source: PageSource,
    request: FetchRequest,
    destination: memoryview,
    error: SourceError,
    may_retry: Callable[[], bool],
) -> None:
    """Go on as `fetch` does after a first attempt that has failed with `error`."""
    for pause in _RETRY_SECONDS:
        if not error.transient or not may_retry():
            break
        time.sleep(pause)
        done, request = request.done, request.rest()
        destination = destination[done:]
        try:
            return source.fetch(request, destination)
        except SourceError as again:
            error = again
    raise error


def read_pages(source: PageSource, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return the content of RAM pages as uint64[n, 512], one row a page, in the order asked for.

    `pages` holds n RAM page numbers (not negative; any order, repeats allowed). Holes, and pages beyond the
    source's size, are rows of zeros and are not asked of the source. Raises `SourceError`.
    """
    content = np.zeros((len(pages), WORDS_PER_PAGE), dtype=np.uint64)
    extents = np.array(source.extents(), dtype=np.int64).reshape(-1, 2) // PAGE_SIZE
    if not len(extents) or not len(pages):
        return content
    # The last extent that begins at or before each page; -1 where there is none.
    nearest = np.searchsorted(extents[:, 0], pages, side="right") - 1
    into_extent = pages - extents[nearest, 0]
    rows = np.flatnonzero((nearest >= 0) & (into_extent < extents[nearest, 1]))
    # One fetch a run of neighbouring rows that are neighbouring pages.
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(pages[rows]) != 1)) + 1
    for run in np.split(rows, breaks) if len(rows) else ():
        destination = content[run[0] : run[-1] + 1].data.cast("B")
        fetch(source, FetchRequest(int(pages[run[0]]) * PAGE_SIZE), destination)
    return content
