"""A mapping of memory with an owner: address, length, and a view that cannot outlive it unseen.

Python's own `mmap` object does not tell its address, which is what KVM and userfaultfd want.
"""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path
from typing import Self

from kvmdp.abi import libc
from kvmdp.abi.mman import (
    MADV_DONTNEED,
    MADV_POPULATE_READ,
    MADV_POPULATE_WRITE,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_HUGE_SHIFT,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
)
from kvmdp.closing import Closing
from kvmdp.page import HUGE_PAGE, PAGE_SIZE


def _reserve_aligned(length: int) -> int:
    """Return the address of `length` bytes, reserved, at which a huge page can be mapped.

    The kernel aligns by itself only where it would put huge pages by itself.
    """
    whole = length + HUGE_PAGE
    hva = libc.mmap(whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
    aligned = -(-hva // HUGE_PAGE) * HUGE_PAGE
    if aligned > hva:
        libc.munmap(hva, aligned - hva)
    end = -(-(aligned + length) // PAGE_SIZE) * PAGE_SIZE
    if hva + whole > end:
        libc.munmap(end, hva + whole - end)
    return aligned


def mappings_left() -> int:
    """Return how many more mappings the kernel lets this process have (vm.max_map_count)."""
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    with open("/proc/self/maps", "rb") as maps:
        return most - sum(1 for _ in maps)


class Mapping(Closing):
    """`length` bytes of this process's address space; 2 MiB or more of usable memory begin at a multiple of 2 MiB.

    Attributes: `hva`, the address; `length`, bytes; `view`, a writable memoryview of the bytes. A caller
    that slices `view`, or makes an array on it, gives that up before `close`: what is left would point into nothing.
    """

    def __init__(self, length: int, *, prot: int, flags: int, fd: int = -1, offset: int = 0) -> None:
        self.length = length
        if length < HUGE_PAGE or prot == PROT_NONE or not flags & MAP_NORESERVE:
            self.hva = libc.mmap(
                length, prot, flags, fd, offset
            )  # the kernel aligns HugeTLB memory by itself
        else:
            hva = _reserve_aligned(length)
            try:
                self.hva = libc.mmap(length, prot, flags | MAP_FIXED, fd, offset, hva)
            except BaseException:
                libc.munmap(hva, length)
                raise
        self.view = memoryview((ctypes.c_char * length).from_address(self.hva)).cast("B")

    @classmethod
    def shared(cls, fd: int, length: int) -> Self:
        """Map `length` bytes of the file `fd`, for reading and writing, seen by all who map it."""
        return cls(length, prot=PROT_READ | PROT_WRITE, flags=MAP_SHARED | MAP_NORESERVE, fd=fd)

    @classmethod
    def shared_huge(cls, fd: int, length: int) -> Self:
        """Map a HugeTLB file, with pages set aside for all of it: without, a fault that finds none is a SIGBUS.

        Raises OSError, ENOMEM where the pool has too few.
        """
        return cls(length, prot=PROT_READ | PROT_WRITE, flags=MAP_SHARED, fd=fd)

    @classmethod
    def anonymous(cls, length: int) -> Self:
        """Map `length` bytes of private memory that reads as zeros and takes none until it is written."""
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        return cls(length, prot=PROT_READ | PROT_WRITE, flags=flags)

    @classmethod
    def anonymous_huge(cls, length: int, page_size: int) -> Self:
        """Map private HugeTLB memory, with pages of `page_size` bytes set aside for all of it; as `shared_huge`."""
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (page_size.bit_length() - 1) << MAP_HUGE_SHIFT
        return cls(length, prot=PROT_READ | PROT_WRITE, flags=flags)

    @classmethod
    def reserved(cls, length: int) -> Self:
        """Reserve `length` bytes of addresses at which every access fails."""
        return cls(length, prot=PROT_NONE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)

    def advise(self, advice: int, offset: int = 0, length: int | None = None) -> None:
        """Call madvise(`advice`) for `length` bytes at `offset`, by default for all."""
        libc.madvise(self.hva + offset, self.length - offset if length is None else length, advice)

    def drop(self, offset: int, length: int) -> None:
        """Unmap the pages of a range from the page table: private ones lose their bytes, shared ones do not."""
        self.advise(MADV_DONTNEED, offset, length)

    def populate(self, offset: int, length: int, *, write: bool = True) -> None:
        """Enter a range into the page table, in one call instead of a fault a page, to be read or written too.

        A kernel that cannot (before Linux 5.14) leaves it to the faults.
        """
        try:
            self.advise(MADV_POPULATE_WRITE if write else MADV_POPULATE_READ, offset, length)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    def detach(self) -> None:
        """Put private memory that reads as zeros in place of what is mapped, for later accesses to the addresses."""
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        libc.mmap(self.length, PROT_READ | PROT_WRITE, flags, address=self.hva)

    def close(self) -> None:
        """Unmap; a second call does nothing."""
        if self.hva:
            self.view.release()
            libc.munmap(self.hva, self.length)
            self.hva = 0
