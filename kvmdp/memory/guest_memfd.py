"""Guest RAM in a guest_memfd: memory that KVM maps by descriptor and offset, without looking at page tables.

It is a live one, made to be mapped (GUEST_MEMFD_FLAG_MMAP) and shared from the beginning: pages are filled through
the VMM view as ever, and present memslots are bound to it.

Source: `linux/kvm.h`, `Documentation/virt/kvm/api.rst`, KVM_CREATE_GUEST_MEMFD. Units: bytes.
"""

from __future__ import annotations

import contextlib
import os

from kvmdp.abi.kvm import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP
from kvmdp.abi.kvm_cap import Cap
from kvmdp.errors import UnsupportedError
from kvmdp.memory.backing import Backing, BackingOptions, MemoryMaker, map_twice, punch_hole


class GuestMemfdBacking(Backing):
    """RAM in a guest_memfd of `vm`. KVM_CAP_GUEST_MEMFD_FLAGS with GUEST_MEMFD_FLAG_MMAP, else UnsupportedError.

    `guest_memfd` is its descriptor, and no `fd`: only the VM it belongs to can use it as memory of a guest.
    """

    name = "guest-memfd"
    shared = True
    registrable = False

    @classmethod
    def make(cls, size: int, vm: MemoryMaker, _options: BackingOptions) -> Backing:
        """Make it, of this VM."""
        return cls(size, vm)

    def __init__(self, size: int, vm: MemoryMaker) -> None:
        flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
        if flags & ~vm.check_extension(Cap.GUEST_MEMFD_FLAGS):
            raise UnsupportedError(
                "the backing guest-memfd needs a guest_memfd that can be mapped (KVM_CAP_GUEST_MEMFD_FLAGS), which "
                "this kernel's KVM lacks: use Linux 6.18 or later, or the backing memfd"
            )
        with contextlib.ExitStack() as stack:
            fd = vm.create_guest_memfd(size, flags)
            stack.callback(os.close, fd)
            super().__init__(size, *map_twice(fd, size, stack), guest_memfd=fd)
            stack.pop_all()

    def forget(self, offset: int, length: int) -> None:
        """Punch a hole."""
        punch_hole(self.guest_memfd, offset, length)

    def close(self) -> None:
        """Unmap all views, close the guest_memfd; a second call does nothing."""
        super().close()
        if self.guest_memfd >= 0:
            os.close(self.guest_memfd)
            self.guest_memfd = -1
