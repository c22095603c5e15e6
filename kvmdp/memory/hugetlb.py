"""Guest RAM in HugeTLB pages, of a memory file or private.

The host has such memory in whole pages of 2 MiB or 1 GiB, and so has userfaultfd. Memslots do not: a memslot of
4 KiB in a huge page maps 4 KiB of it.

All pages are set aside when RAM is mapped, so that too few are an error then, and not at some later fault. For the same
reason none is given up before the end: a page that went back to the pool could be another process's by the time it
is needed. A control group can refuse a page all the same, at its first touch: so it is populated before it is filled. A
peer that was handed the memory file can punch holes into it, and so return pages to the pool: if another process takes
them from there, the next access to a page that was present ends this process with a SIGBUS.

Units: bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

from kvmdp.abi import libc
from kvmdp.abi.mman import MAP_HUGE_SHIFT, MFD_HUGETLB
from kvmdp.memory.backing import Backing, BackingOptions, MemoryMaker
from kvmdp.memory.hugepages import Reservation, check_pool, populate, too_few
from kvmdp.memory.mapping import Mapping


class HugetlbBacking(Backing):
    """RAM in huge pages; `reserve` has the pool enlarged for as long as it lives (`kvmdp.memory.hugepages`).

    Raises UnsupportedError where the kernel has no such pages, or too few of them.
    """

    frees = False
    refusable = True
    reservable = True

    @classmethod
    def make(cls, size: int, _vm: MemoryMaker, options: BackingOptions) -> Backing:
        """Make it, of whichever VM."""
        return cls(size, reserve=options.reserve)

    def __init__(self, size: int, *, reserve: bool = False) -> None:
        check_pool(self.page_size)
        count = -(-size // self.page_size)
        with contextlib.ExitStack() as stack:
            # Left last: pages are given back once they are unmapped.
            self._reservation = stack.enter_context(contextlib.ExitStack())
            reservation = Reservation(self.page_size, count) if reserve else None
            if reservation is not None:
                self._reservation.enter_context(reservation)
            try:
                guest, vmm, fd = self._map(size, stack)
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                raise too_few(self.page_size, count, reserved=reserve) from None
            if reservation is not None:
                reservation.settle()
            super().__init__(size, guest, vmm, fd)
            stack.pop_all()

    def _map(self, size: int, stack: contextlib.ExitStack) -> tuple[Mapping, Mapping, int]:
        """Return guest view, VMM view and memory file; `stack` undoes it all."""
        if not self.shared:
            mapping = stack.enter_context(Mapping.anonymous_huge(size, self.page_size))
            return mapping, mapping, -1
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | MFD_HUGETLB
        with libc.named_call("memfd_create"):
            fd = os.memfd_create("kvmdp-ram", flags | (self.page_size.bit_length() - 1) << MAP_HUGE_SHIFT)
        stack.callback(os.close, fd)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        guest = stack.enter_context(Mapping.shared_huge(fd, size))
        # The file has its pages set aside already: the second mapping takes no more.
        return guest, stack.enter_context(Mapping.shared_huge(fd, size)), fd

    def forget(self, offset: int, length: int) -> None:
        """Do nothing: part of a huge page cannot be freed, and a whole one is kept (see above)."""

    def populate(self, offset: int, length: int) -> None:
        """Have the huge pages that hold a range. Raises HugePageRefusedError."""
        populate(self.vmm, offset, length, self.page_size)

    def close(self) -> None:
        """Unmap, then give back what was reserved; a second call does nothing."""
        super().close()
        self._reservation.close()


class Hugetlb2mBacking(HugetlbBacking):
    """RAM in a memfd of 2 MiB pages."""

    name = "hugetlb-2m"
    shared = True
    sealed = True
    page_size = 2 << 20


class Hugetlb1gBacking(Hugetlb2mBacking):
    """RAM in a memfd of 1 GiB pages."""

    name = "hugetlb-1g"
    page_size = 1 << 30


class PrivateHugetlb2mBacking(HugetlbBacking):
    """RAM in private memory of 2 MiB pages."""

    name = "private-hugetlb-2m"
    shared = False
    page_size = 2 << 20


class PrivateHugetlb1gBacking(PrivateHugetlb2mBacking):
    """RAM in private memory of 1 GiB pages."""

    name = "private-hugetlb-1g"
    page_size = 1 << 30
