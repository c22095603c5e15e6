"""`GuestMemory`: the way user space touches guest RAM, present or not.

Every access makes its pages present first and pins them while it copies, so it sees what the guest would see and
no revocation can take a page away under it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import PAGE_SIZE, GuestLayout
from kvmdp.paging.fault import Origin, Outcome, PageFault, PagingError
from kvmdp.paging.pager import DemandPager

BytesLike = bytes | bytearray | memoryview


class MemoryAccess(Protocol):
    """Access to guest RAM by guest-physical address, in the machine's process and in a device's alike.

    `gpa` and lengths are bytes. Every method makes the pages present that are absent, by asking for them and waiting.
    With `nowait` it does neither: BusyError, and nothing was read or written. All raise ValueError for addresses that
    are not RAM, FrozenError while accesses are frozen, and PagingError if a page cannot be had.
    """

    def read(self, gpa: int, length: int, *, nowait: bool = False) -> bytes:
        """Return `length` bytes at `gpa`."""
        ...

    def write(self, gpa: int, data: BytesLike, *, nowait: bool = False) -> None:
        """Write `data` at `gpa`."""
        ...

    def view(self, gpa: int, length: int) -> AbstractContextManager[memoryview]:
        """Give the bytes themselves, writable, for the time of a `with` block: none can become absent meanwhile.

        Raises ValueError if they are not contiguous in the RAM file: on both sides of the hole in the map.
        """
        ...

    def readv(self, segments: Sequence[tuple[int, int]]) -> bytes:
        """Return the bytes of all `segments`, (gpa, length) each, one after the other."""
        ...

    def writev(self, segments: Sequence[tuple[int, int]], data: BytesLike) -> None:
        """Write `data`, as long as the `segments` together, into them one after the other."""
        ...

    def load64(self, gpa: int) -> int:
        """Return the 8 bytes at `gpa`, a multiple of 8, as one load: never half of a store."""
        ...

    def store64(self, gpa: int, value: int) -> None:
        """Store 8 bytes at `gpa`, a multiple of 8, as one store: nobody sees half of it."""
        ...


class GuestMemory:
    """Reads and writes guest RAM by guest-physical address (gpa, bytes).

    All methods raise ValueError for addresses that are not RAM and PagingError if a page cannot be made
    present.
    """

    def __init__(self, layout: GuestLayout, backing: Backing, pager: DemandPager) -> None:
        self._layout = layout
        self._pager = pager
        self._view = backing.vmm.view

    def read(self, gpa: int, length: int) -> bytes:
        """Return `length` bytes at `gpa`."""
        data = bytearray(length)
        for page, offset, start, count in self._pieces(gpa, length):
            with self._pager.held(PageFault(page, Origin.HOST)) as outcome:
                self._check(outcome, page)
                data[start : start + count] = self._view[offset : offset + count]
        return bytes(data)

    def write(self, gpa: int, data: bytes) -> None:
        """Write `data` at `gpa`."""
        for page, offset, start, count in self._pieces(gpa, len(data)):
            with self._pager.held(PageFault(page, Origin.HOST)) as outcome:
                self._check(outcome, page)
                self._view[offset : offset + count] = data[start : start + count]

    def read_pages(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Return the content of RAM pages (numbers, order of the RAM file) as uint64[n, 512]."""
        content = np.empty((len(pages), PAGE_SIZE // 8), dtype=np.uint64)
        rows = content.data.cast("B")
        for row, page in enumerate(pages.tolist()):
            with self._pager.held(PageFault(page, Origin.HOST)) as outcome:
                self._check(outcome, page)
                offset = page * PAGE_SIZE
                rows[row * PAGE_SIZE : (row + 1) * PAGE_SIZE] = self._view[offset : offset + PAGE_SIZE]
        return content

    def _pieces(self, gpa: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """Cut a range at page borders: yields (page, offset in RAM, offset in the range, bytes)."""
        start = 0
        while start < length:
            page = self._layout.page_of_gpa(gpa + start)
            if page is None:
                raise ValueError(f"gpa {gpa + start:#x} is not guest RAM")
            within = (gpa + start) % PAGE_SIZE
            count = min(PAGE_SIZE - within, length - start)
            yield page, page * PAGE_SIZE + within, start, count
            start += count

    def _check(self, outcome: Outcome, page: int) -> None:
        if outcome is not Outcome.PRESENT:
            raise self._pager.error or PagingError(
                f"the page at gpa {self._layout.gpa_of_page(page):#x} cannot be made present: {outcome.name.lower()}"
            )
