"""The present bitmap: one bit a RAM page, set while the page is present, in memory other processes can map.

The format is that of the `userfault_bitmap` of `KVM_MEM_USERFAULT` ("KVM: Introduce KVM Userfault", not
merged) with the opposite polarity: there a set bit means "fault", here it means "present".
`export_userfault_bitmap` and `import_userfault_bitmap` convert.

Units: pages. Bit n of the bitmap is RAM page n: bit n % 64 of the 64-bit little-endian word n // 64. A
*sparse bitmap* is an array of uint64 in the same order, with as many words as the bitmap has; its bits past
the last page are ignored in an argument and zero in a result.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

import numpy as np
import numpy.typing as npt

from kvmdp.abi import libc
from kvmdp.abi.mman import F_SEAL_FUTURE_WRITE
from kvmdp.closing import Closing

Words = npt.NDArray[np.uint64]

_ALL_BITS = (1 << 64) - 1
# Words that a search looks at in its first step beyond the word it starts in; each further step doubles it,
# so that a near hit stays cheap and a whole bitmap takes few steps.
_FIRST_SEARCH_STEP = 64


def words_for(pages: int) -> int:
    """Return how many 64-bit words a bitmap of `pages` bits has."""
    return (pages + 63) // 64


def bitmap_from_pages(pages: int, numbers: npt.NDArray[np.integer]) -> Words:
    """Return a sparse bitmap of `pages` bits in which the bits named by the array `numbers` are set.

    `numbers` may come in any order and repeat. Raises ValueError if one of them is not below `pages`.
    """
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < pages):
        raise ValueError(f"page numbers {numbers.min()} to {numbers.max()} are not all in the {pages} of RAM")
    bits = np.zeros(words_for(pages) * 64, dtype=np.bool_)
    bits[numbers] = True
    return np.packbits(bits, bitorder="little").view(np.uint64)


def runs_of(words: Words, pages: int) -> npt.NDArray[np.int64]:
    """Return the runs of set bits among the first `pages` bits: int64[n, 2] of (first, count), ascending."""
    words = _without_padding(words, pages)
    # A bit of `edges` is set where a bit of `words` differs from the one before: a run starts or just ended.
    edges = words << np.uint64(1)
    edges[1:] |= words[:-1] >> np.uint64(63)
    edges ^= words
    # Seen as bool, because flatnonzero takes several times as long on uint8 when many bits are set.
    borders = np.flatnonzero(np.unpackbits(edges.view(np.uint8), bitorder="little").view(np.bool_))
    if len(borders) % 2:  # the last run reaches the end of the last word
        borders = np.append(borders, pages)
    runs: npt.NDArray[np.int64] = borders.reshape(-1, 2)
    runs[:, 1] -= runs[:, 0]
    return runs


def _without_padding(words: Words, pages: int) -> Words:
    """Return `words` with the bits past the last page clear: itself if they are, else a copy."""
    used = pages % 64
    if used and int(words[-1]) >> used:
        words = words.copy()
        words[-1] &= np.uint64((1 << used) - 1)
    return words


def _lowest_bit(word: int) -> int:
    return (word & -word).bit_length() - 1


class PresentBitmapView(Closing):
    """The bitmap as a reader sees it; made with `attach`, or as the owner's `PresentBitmap`.

    Attributes: `pages`, the number of bits; `fd`, the memfd, open as long as this object.

    What is read may change at once if the owner is changing it: a reader that acts on a bit needs an order of
    its own with the owner. Ranges are (first, count), count at least 1; ValueError for any
    other, and for one that is not inside the bitmap.
    """

    # The same memory three ways. A numpy call costs more than a whole operation on one page, and those lie on
    # the path of a fault: single pages go by byte through `_mapping`, the borders of ranges by word through
    # `_quads`.
    __slots__ = ("_mapping", "_quads", "_words", "fd", "pages")

    def __init__(self, fd: int, pages: int, *, writable: bool) -> None:
        """Map `pages` bits of the memfd `fd`, which belongs to this object from now on."""
        self.fd = fd
        self.pages = pages
        length = words_for(pages) * 8
        self._mapping = mmap.mmap(
            fd, length, mmap.MAP_SHARED, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        )
        self._quads = memoryview(self._mapping).cast("Q")
        self._words: Words = np.frombuffer(self._mapping, dtype=np.uint64)

    @staticmethod
    def attach(fd: int, pages: int) -> PresentBitmapView:
        """Return a read-only view of another process's bitmap of `pages` bits, received as `fd`.

        The view works on a duplicate; `fd` stays the caller's. Raises ValueError if `fd` is too short for
        `pages`, or is not sealed against shrinking: its owner could then end this process with a SIGBUS.
        """
        length = os.fstat(fd).st_size
        if pages < 1 or length < words_for(pages) * 8:
            raise ValueError(f"a memfd of {length} bytes does not hold a bitmap of {pages} pages")
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except OSError:  # EINVAL: not a memfd
            sealed = 0
        if not sealed:
            raise ValueError(
                f"descriptor {fd} is no memfd sealed with F_SEAL_SHRINK: hand over the fd of a PresentBitmap"
            )
        duplicate = os.dup(fd)
        try:
            return PresentBitmapView(duplicate, pages, writable=False)
        except BaseException:
            os.close(duplicate)
            raise

    def close(self) -> None:
        """Unmap the bitmap and close `fd`; closing again does nothing, any other use afterwards raises."""
        if self.fd < 0:
            return
        # The mapping cannot go while anything exports its memory. An array may still be alive in a traceback, as of an
        # interruption: then it goes with that.
        self._quads.release()
        del self._words
        with contextlib.suppress(BufferError):
            self._mapping.close()
        os.close(self.fd)
        self.fd = -1

    @property
    def mapped_bytes(self) -> int:
        """How many bytes of memory the bitmap is."""
        return len(self._mapping)

    def test(self, page: int) -> bool:
        """Return whether `page` is present."""
        if not 0 <= page < self.pages:
            self._refuse(page, 1)
        return self._mapping[page >> 3] >> (page & 7) & 1 == 1

    def test_range(self, first: int, count: int) -> bool:
        """Return whether every page of the range is present."""
        return self._bits(first, count) == (1 << count) - 1

    def count(self) -> int:
        """Return how many pages are present."""
        return self.count_range(0, self.pages)

    def count_range(self, first: int, count: int) -> int:
        """Return how many pages of the range are present."""
        return self._bits(first, count).bit_count()

    def next_present_run(self, start: int, limit: int | None = None) -> tuple[int, int] | None:
        """Return the first run (first, count) of present pages in [start, limit), cut to it, or None.

        `limit` is the page to stop before, and by default the end of the bitmap.
        """
        return self._next_run(start, limit, present=True)

    def next_absent_run(self, start: int, limit: int | None = None) -> tuple[int, int] | None:
        """Return the first run (first, count) of absent pages in [start, limit), cut to it, or None.

        `limit` is the page to stop before, and by default the end of the bitmap.
        """
        return self._next_run(start, limit, present=False)

    def present_runs(self) -> npt.NDArray[np.int64]:
        """Return all runs of present pages: int64[n, 2] of (first, count), ascending."""
        return runs_of(self._words, self.pages)

    def absent_runs(self) -> npt.NDArray[np.int64]:
        """Return all runs of absent pages: int64[n, 2] of (first, count), ascending."""
        return runs_of(~self._words, self.pages)

    def export_userfault_bitmap(self) -> Words:
        """Return the content with the polarity of `userfault_bitmap`: a set bit is a page that faults."""
        return _without_padding(~self._words, self.pages)

    def _bits(self, first: int, count: int) -> int:
        """Return the bits of the range as one integer, page `first` in its lowest bit."""
        if first < 0 or count < 1 or first + count > self.pages:
            self._refuse(first, count)
        end = first + count
        bits = int.from_bytes(self._mapping[first >> 3 : (end + 7) >> 3], "little") >> (first & 7)
        return bits & ((1 << count) - 1)

    def _next_run(self, start: int, limit: int | None, *, present: bool) -> tuple[int, int] | None:
        limit = self.pages if limit is None else limit
        if not 0 <= start <= limit <= self.pages:
            raise ValueError(f"cannot search from page {start} up to {limit}: RAM has {self.pages} pages")
        first = self._next_page(start, limit, present=present)
        if first == limit:
            return None
        return first, self._next_page(first + 1, limit, present=not present) - first

    def _next_page(self, start: int, limit: int, *, present: bool) -> int:
        """Return the first page of [start, limit) that is present (or absent, as asked), or `limit`."""
        if start >= limit:
            return limit
        # A word equal to `nothing` has no bit that is looked for; in any other, those bits differ from it.
        nothing = 0 if present else _ALL_BITS
        index = start >> 6
        found = (self._quads[index] ^ nothing) >> (start & 63)
        if found:
            return min(start + _lowest_bit(found), limit)
        index += 1
        end = (limit + 63) >> 6
        step = _FIRST_SEARCH_STEP
        while index < end:
            differs = self._words[index : min(index + step, end)] != np.uint64(nothing)
            hit = int(differs.argmax())
            if not differs[hit]:
                index += len(differs)
                step *= 2
                continue
            index += hit
            found = self._quads[index] ^ nothing
            if found:
                return min((index << 6) + _lowest_bit(found), limit)
            index += 1  # the owner changed the word between the two looks
        return limit

    def _checked(self, words: Words) -> Words:
        """Return the sparse bitmap `words` without padding bits; ValueError if its type or shape is wrong."""
        if words.dtype != np.uint64 or words.shape != self._words.shape:
            raise ValueError(
                f"a bitmap of {self.pages} pages is uint64[{len(self._words)}], "
                f"not {words.dtype}{list(words.shape)}"
            )
        return _without_padding(words, self.pages)

    def _refuse(self, first: int, count: int) -> None:
        if count < 1:
            raise ValueError(f"a range of {count} pages: the least is 1")
        raise ValueError(f"pages {first} to {first + count - 1} are not all in the {self.pages} of RAM")


class PresentBitmap(PresentBitmapView):
    """The bitmap of the process that owns it, created with all of its `pages` absent.

    The memfd is sealed so that only this object's mapping can write: a process that receives `fd` can map it
    read-only (`PresentBitmap.attach`), and no process can change its size.

    There is one writer. Set and clear read a word, change it and write it back, which loses a change that
    another thread makes to the same word meanwhile: the caller holds a lock around them. Readers need none.

    Raises ValueError if `pages` is below 1, OSError if the kernel refuses. Needs Linux 5.1
    (F_SEAL_FUTURE_WRITE).
    """

    __slots__ = ()

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ValueError(f"a bitmap of {pages} pages: the least is 1")
        with libc.named_call("memfd_create"):
            fd = os.memfd_create("kvmdp-present", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, words_for(pages) * 8)
            super().__init__(fd, pages, writable=True)
            seals = F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        except BaseException:
            os.close(fd)
            raise

    def set_range(self, first: int, count: int) -> None:
        """Mark the pages of the range present."""
        if first < 0 or count < 1 or first + count > self.pages:
            self._refuse(first, count)
        if count == 1:
            self._mapping[first >> 3] |= 1 << (first & 7)
            return
        head, tail, head_mask, tail_mask = _split(first, count)
        if head == tail:
            self._quads[head] |= head_mask & tail_mask
            return
        self._quads[head] |= head_mask
        self._words[head + 1 : tail] = _ALL_BITS
        self._quads[tail] |= tail_mask

    def clear_range(self, first: int, count: int) -> None:
        """Mark the pages of the range absent."""
        if first < 0 or count < 1 or first + count > self.pages:
            self._refuse(first, count)
        if count == 1:
            self._mapping[first >> 3] &= ~(1 << (first & 7))
            return
        head, tail, head_mask, tail_mask = _split(first, count)
        if head == tail:
            self._quads[head] &= ~(head_mask & tail_mask)
            return
        self._quads[head] &= ~head_mask
        self._words[head + 1 : tail] = 0
        self._quads[tail] &= ~tail_mask

    def import_userfault_bitmap(self, words: Words) -> None:
        """Replace the whole content by `words`, in which a set bit is a page that faults."""
        self._checked(words)
        self._words[:] = _without_padding(~words, self.pages)


def _split(first: int, count: int) -> tuple[int, int, int, int]:
    """Return the first and the last word of the range, and masks of its first bit and up, its last and down.

    In a range inside one word, both masks apply to it.
    """
    last = first + count - 1
    return first >> 6, last >> 6, _ALL_BITS << (first & 63) & _ALL_BITS, _ALL_BITS >> (63 - (last & 63))
