"""`MemoryAccess` and `GuestMemory`: the only way for user space to touch guest RAM, present or not.

Every access makes its pages present first and keeps them so while it lasts: it sees what the guest would see, and no
revocation takes a page away under it. It goes to the VMM view, never to the guest view, where absent pages trap.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvmdp.errors import BusyError, CancelledError, PagingError, PoisonedError
from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import GuestLayout
from kvmdp.memory.mapping import Mapping
from kvmdp.page import PAGE_SHIFT, PAGE_SIZE, Access, Origin, Outcome, PageFault
from kvmdp.paging.cancellation import Cancellation
from kvmdp.paging.pager import Pager
from kvmdp.paging.pins import Pin

BytesLike = bytes | bytearray | memoryview

_IN_PAGE = PAGE_SIZE - 1
_AT_ONCE = 2 << 20  # bytes that are pinned and copied as one


class MemoryAccess(Protocol):
    """Access to guest RAM by guest-physical address, in the machine's process and in a device's alike.

    `gpa` and lengths are bytes. Every method makes the pages present that are absent, by asking for them and waiting.
    With `nowait` it does neither: BusyError, and nothing was read or written. All raise ValueError for addresses that
    are not RAM, and so for a range that reaches into the hole of the map or over it, FrozenError while accesses are
    frozen, and PagingError if a page cannot be had.
    """

    def read(self, gpa: int, length: int, *, nowait: bool = False) -> bytes:
        """Return `length` bytes at `gpa`."""
        ...

    def write(self, gpa: int, data: BytesLike, *, nowait: bool = False) -> None:
        """Write `data` at `gpa`."""
        ...

    def view(self, gpa: int, length: int) -> AbstractContextManager[memoryview]:
        """Give the bytes themselves, writable, for the time of a `with` block: none can become absent meanwhile."""
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
        """Store 8 bytes at `gpa`, a multiple of 8, as one store: no reader sees half of it."""
        ...


class GuestMemory:
    """`MemoryAccess` in the machine's own process, on its pager.

    Arguments: where RAM lies; its memory; the pager; `origin` and `number`, which accesses memory here, as faults tell
    it (a device has one of its own); `timeout`, how many seconds an access may wait for others to make
    its pages present before it raises BusyError (None: for ever; a fetch of its own it waits for in any case);
    `cancellation`, which makes accesses that wait raise CancelledError: it serves one thread, so with one so does
    this object; `cancelled`, what its owner says then of the page that was waited for. All go with the accessor and not
    with each access, because they belong to the device or the caller that waits.

    A vCPU's own accesses (`Origin.VCPU`), as for decoding an instruction, are never frozen.

    An access is whole: it is made with all its pages present and held, or raises and has touched nothing. One of more
    than 2 MiB, or of more pages than half a resident limit, is done as several of at most that; a view cannot be.
    A thread that holds a view does not wait for another page: a revocation of both would wait for the view.
    """

    # Why a copy never meets a revocation, without a pin. The test of the page's state and the copy are made under the
    # pager's mutex, for a page at the most. A revocation begins by changing that state under the same mutex, and
    # touches bytes or trap after that only. So the copy comes wholly before it, or finds the page no longer present.
    # PRESENT, not the bit: the bit is set while the trap is still admitting, and until that is done private memory,
    # which has no view that never traps, may still hold a marker, on which this process would die.
    #
    # A read of shared memory does without the mutex, which costs more than the copy: its view never traps, so a copy
    # that meets a revocation is only wrong, and is thrown away. `departures` grows after a page's state has changed
    # and before its bytes do. A read that found the page PRESENT, copied, and finds the number it had before, was over
    # before any byte went; with another number it is made again under the mutex. The order of these loads is the
    # program's: x86 does not move a load before an earlier one, nor a store before an earlier one.
    #
    # Where the bytes may be on a disk (`Backing.on_disk`) a copy could sleep, with the mutex and with the GIL. There
    # every access pins its pages and has the kernel bring them in, with neither, before it copies. Should one leave
    # again between, the copy waits for it with the GIL, not with the mutex.

    def __init__(
        self,
        layout: GuestLayout,
        backing: Backing,
        pager: Pager,
        origin: Origin = Origin.HOST,
        number: int = 0,
        *,
        timeout: float | None = None,
        cancellation: Cancellation | None = None,
        cancelled: str = "is no longer waited for: the machine stops, or the access was called off",
    ) -> None:
        self._layout = layout
        self._pager = pager
        self._origin = origin
        self._number = number
        self._timeout = timeout
        self._cancellation = cancellation
        self._cancelled = cancelled
        self._gate = pager.accesses if origin is not Origin.VCPU else pager.vcpu_accesses
        # For the way of an access to one present page: the less it has to look up the better.
        self._view = backing.vmm.view
        self._mutex = pager.mutex
        self._ledger = pager.ledger
        self._states = pager.ledger.states
        self._shared = backing.shared
        self._low_end = layout.regions[0].size  # below it a gpa is its own offset in RAM
        # How much of a page may be copied under the mutex, or with nothing held.
        self._at_once = 0 if backing.on_disk else PAGE_SIZE
        self._disk_view = backing.vmm if backing.on_disk else None

    def read(self, gpa: int, length: int, *, nowait: bool = False) -> bytes:
        """Return `length` bytes at `gpa`."""
        offset = gpa if 0 <= gpa < self._low_end else self._offset(gpa)
        if 0 < length <= self._at_once - (offset & _IN_PAGE):
            if self._shared:
                departures = self._ledger.departures
                if self._states[offset >> PAGE_SHIFT] == self._gate.accepted:
                    data = self._view[offset : offset + length].tobytes()
                    if departures == self._ledger.departures:
                        return data
            with self._mutex:
                if self._states[offset >> PAGE_SHIFT] == self._gate.accepted:
                    return self._view[offset : offset + length].tobytes()
        return self._readv(((gpa, length),), nowait)

    def write(self, gpa: int, data: BytesLike, *, nowait: bool = False) -> None:
        """Write `data` (one-dimensional, of single bytes) at `gpa`."""
        offset = gpa if 0 <= gpa < self._low_end else self._offset(gpa)
        length = len(data)
        if 0 < length <= self._at_once - (offset & _IN_PAGE):
            with self._mutex:
                if self._states[offset >> PAGE_SHIFT] == self._gate.accepted:
                    self._view[offset : offset + length] = data
                    return
        self._writev(((gpa, length),), data, nowait)

    # One load or store. A memoryview of format Q moves an element with a memcpy whose size the compiler knows to be 8
    # (CPython, Objects/memoryobject.c, UNPACK_SINGLE and PACK_SINGLE): one mov of 8 bytes, which the CPU makes
    # atomically because the address is a multiple of 8 (Intel SDM volume 3, "Guaranteed Atomic Operations"). A vCPU
    # sees all of it or nothing, and so do other processes. Cast at each access: a cast kept for later would survive
    # `Mapping.close`, and point into nothing.

    def load64(self, gpa: int) -> int:
        """Return the 8 bytes at `gpa`, a multiple of 8, as one load."""
        offset = gpa if 0 <= gpa < self._low_end else self._offset(gpa)
        _check_aligned(gpa)
        if self._at_once:
            with self._mutex:
                if self._states[offset >> PAGE_SHIFT] == self._gate.accepted:
                    return self._view[offset : offset + 8].cast("Q")[0]
        with self._held([(offset, 8)], Access.READ):
            return self._view[offset : offset + 8].cast("Q")[0]

    def store64(self, gpa: int, value: int) -> None:
        """Store 8 bytes at `gpa`, a multiple of 8, as one store. Raises ValueError if `value` has more."""
        offset = gpa if 0 <= gpa < self._low_end else self._offset(gpa)
        _check_aligned(gpa)
        if not 0 <= value < 1 << 64:
            raise ValueError(
                f"{value:#x} is stored at gpa {gpa:#x}, where 8 bytes are: give a number below 2^64"
            )
        if self._at_once:
            with self._mutex:
                if self._states[offset >> PAGE_SHIFT] == self._gate.accepted:
                    self._view[offset : offset + 8].cast("Q")[0] = value
                    return
        with self._held([(offset, 8)], Access.WRITE):
            self._view[offset : offset + 8].cast("Q")[0] = value

    def readv(self, segments: Sequence[tuple[int, int]]) -> bytes:
        """Return the bytes of all `segments`, (gpa, length) each, one after the other."""
        return self._readv(segments, nowait=False)

    def writev(self, segments: Sequence[tuple[int, int]], data: BytesLike) -> None:
        """Write `data` into all `segments`. Raises ValueError if it is not as long as they are together."""
        self._writev(segments, data, nowait=False)

    @contextlib.contextmanager
    def view(self, gpa: int, length: int) -> Iterator[memoryview]:
        """Give the bytes themselves for the time of a `with` block, in which none of them can become absent.

        The block keeps nothing that looks into it, no slice and no array.
        """
        offset, length = stretch = self._stretch(gpa, length)
        most = self._pager.jobs.most_at_once
        if most is not None and length and _pages_of(offset, length) > most:
            raise PagingError(
                f"a view of {length} bytes at gpa {gpa:#x} needs more than the {most} pages that the resident limit "
                "lets one access have at once: take a smaller one, or raise the limit"
            )
        with (
            self._held([stretch], Access.WRITE, copied=False),
            self._view[offset : offset + length] as bytes_themselves,
        ):
            yield bytes_themselves

    def read_pages(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Return the content of RAM pages (numbers, order of the RAM file) as uint64[n, 512]."""
        content = np.empty((len(pages), PAGE_SIZE // 8), dtype=np.uint64)
        rows = content.data.cast("B")
        for row, page in enumerate(pages.tolist()):
            rows[row * PAGE_SIZE : (row + 1) * PAGE_SIZE] = self.read(
                self._layout.gpa_of_page(page), PAGE_SIZE
            )
        return content

    # Many pages, or absent ones

    def _readv(self, segments: Sequence[tuple[int, int]], nowait: bool) -> bytes:
        view, parts = self._view, []
        for batch in self._batches(segments):
            with self._held(batch, Access.READ, nowait):
                parts += [view[offset : offset + length].tobytes() for offset, length in batch]
        return b"".join(parts)

    def _writev(self, segments: Sequence[tuple[int, int]], data: BytesLike, nowait: bool) -> None:
        view, done = self._view, 0
        batches = self._batches(segments)
        if len(data) != (wanted := sum(length for _, length in segments)):
            raise ValueError(f"{len(data)} bytes for segments of {wanted}")
        with memoryview(data) as whole:
            for batch in batches:
                with self._held(batch, Access.WRITE, nowait):
                    for offset, length in batch:
                        view[offset : offset + length] = whole[done : done + length]
                        done += length

    def _batches(self, segments: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Return the stretches of RAM (offset, bytes) of all segments, in batches of at most `_AT_ONCE` bytes."""
        batches: list[list[tuple[int, int]]] = [[]]
        room, pages = _AT_ONCE, self._pager.jobs.most_at_once
        for gpa, length in segments:
            offset, left = self._stretch(gpa, length)
            while left:
                if not room or pages == 0:
                    batches.append([])
                    room, pages = _AT_ONCE, self._pager.jobs.most_at_once
                part = min(left, room)
                if pages is not None:
                    part = min(part, pages * PAGE_SIZE - (offset & _IN_PAGE))
                    pages -= _pages_of(offset, part)
                batches[-1].append((offset, part))
                offset, left, room = offset + part, left - part, room - part
        return batches

    def _stretch(self, gpa: int, length: int) -> tuple[int, int]:
        """Return where the bytes lie in RAM, (offset, bytes): in one piece, for a range over the hole is not RAM.

        Raises ValueError.
        """
        if length < 0:
            raise ValueError(f"{length} bytes at gpa {gpa:#x}: a length cannot be negative")
        offset = self._offset(gpa)
        region = next(each for each in self._layout.regions if offset < each.offset + each.size)
        if offset + length > (end := region.offset + region.size):
            raise ValueError(f"gpa {gpa + end - offset:#x} is not guest RAM")
        return offset, length

    def _offset(self, gpa: int) -> int:
        """Return where in RAM the byte at `gpa` is. Raises ValueError outside RAM."""
        page = self._layout.page_of_gpa(gpa)
        if page is None:
            raise ValueError(f"gpa {gpa:#x} is not guest RAM")
        return page << PAGE_SHIFT | gpa & _IN_PAGE

    @contextlib.contextmanager
    def _held(
        self,
        stretches: Sequence[tuple[int, int]],
        access: Access,
        nowait: bool = False,
        *,
        copied: bool = True,
    ) -> Iterator[None]:
        """Make all pages of the stretches present, and hold them for the time of the block.

        They are in memory at its beginning if they are to be `copied`; else a look into them may wait for a disk.
        """
        runs = [(offset >> PAGE_SHIFT, _pages_of(offset, length)) for offset, length in stretches if length]
        pin = Pin(runs, self._gate)
        # What `kvmdp.interruption.undone` does, without the price of one more context manager.
        try:
            try:
                self._enter(pin, access, nowait)
                if copied:
                    self._bring_all_in(stretches, access)
                yield
            finally:
                self._gate.leave(pin)
        except BaseException:
            self._gate.leave(pin)
            raise

    def _enter(self, pin: Pin, access: Access, nowait: bool) -> None:
        deadline = None
        had: set[int] = set()
        # One page is waited for at a time, with nothing held: see AccessGate.enter.
        while (page := self._gate.enter(pin)) is not None:
            if nowait:
                gpa = self._layout.gpa_of_page(page)
                raise BusyError(f"the page at gpa {gpa:#x} is absent, and the access is not to wait for it")
            if self._timeout is not None and deadline is None:
                deadline = time.monotonic() + self._timeout
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            if page in had:
                self._gate.insist(pin)
            had.add(page)
            self._check(
                self._pager.resolve(
                    PageFault(page, self._origin, self._number, access), left, self._cancellation
                ),
                page,
            )

    def _bring_all_in(self, stretches: Sequence[tuple[int, int]], access: Access) -> None:
        if self._disk_view is None:
            return
        for offset, length in stretches:
            if length:
                self._bring_in(self._disk_view, offset, length, access)

    def _bring_in(self, view: Mapping, offset: int, length: int, access: Access) -> None:
        start = offset & ~_IN_PAGE
        try:
            view.populate(start, _pages_of(offset, length) * PAGE_SIZE, write=access is Access.WRITE)
        except OSError as error:
            gpa = self._layout.gpa_of_page(offset >> PAGE_SHIFT) + (offset & _IN_PAGE)
            raise PagingError(
                f"{length} bytes at gpa {gpa:#x} cannot be brought into memory from the disk that RAM is on: "
                f"{error.strerror}"
            ) from error

    def _check(self, outcome: Outcome, page: int) -> None:
        """Raise what an outcome means that is not the page's presence."""
        if outcome in (Outcome.PRESENT, Outcome.ADMITTED):
            return
        where = f"the page at gpa {self._layout.gpa_of_page(page):#x}"
        if outcome is Outcome.TIMED_OUT:
            raise BusyError(f"{where} was not made present within {self._timeout:g} seconds")
        if outcome is Outcome.CANCELLED:
            # A machine that stops for an error of its own says that one.
            raise self._pager.error or CancelledError(f"{where} {self._cancelled}")
        if outcome is Outcome.POISONED:
            raise PoisonedError(f"{where} is poisoned: what was in it is lost")
        raise self._pager.error or PagingError(f"{where} cannot be made present: {outcome.name.lower()}")


def _pages_of(offset: int, length: int) -> int:
    """Return how many pages a stretch of one byte or more touches."""
    return (offset + length - 1 >> PAGE_SHIFT) - (offset >> PAGE_SHIFT) + 1


def _check_aligned(gpa: int) -> None:
    if gpa & 7:
        raise ValueError(
            f"gpa {gpa:#x} is not a multiple of 8: such an access would not be one load or store"
        )
