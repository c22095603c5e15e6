"""What guest RAM is made of, and how it is mapped.

Shared memory is mapped twice. The *guest view* is what memslots point to and what may trap. The *VMM view*
never traps: pages are filled through it, in place, and user space reads and writes there. Private anonymous
memory has one mapping only, so both names mean the same one, and whoever makes pages of it trap must know that
an access of our own to such a page would trap too.

Units: bytes; offsets are into RAM, in the order of the RAM file.
"""

from __future__ import annotations

import fcntl
import os
from types import TracebackType
from typing import Self

from kvmdp.abi.mman import (
    MADV_DONTDUMP,
    MADV_DONTFORK,
    MADV_NOHUGEPAGE,
    MADV_REMOVE,
)
from kvmdp.memory.mapping import Mapping


class Backing:
    """Guest RAM of `size` bytes; owns its mappings.

    Attributes: `name`; `size`; `shared` (whether there are two views of the same pages); `fd` (the memory file,
    -1 where there is none); `guest` and `vmm`, the mappings.
    """

    name: str
    shared: bool

    def __init__(self, size: int, guest: Mapping, vmm: Mapping, fd: int) -> None:
        self.size = size
        self.guest = guest
        self.vmm = vmm
        self.fd = fd
        # A child would have a copy of the guest view without its traps.
        guest.advise(MADV_DONTFORK)
        guest.advise(MADV_DONTDUMP)
        # A huge page that the kernel puts together by itself would make absent pages present.
        guest.advise(MADV_NOHUGEPAGE)

    def forget(self, offset: int, length: int) -> None:
        """Give up the bytes of a range that no view has mapped for anybody's use, and free their memory."""
        if self.shared:
            self.vmm.advise(MADV_REMOVE, offset, length)
        else:
            self.vmm.drop(offset, length)

    def close(self) -> None:
        """Unmap all views; a second call does nothing."""
        self.guest.close()
        self.vmm.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MemfdBacking(Backing):
    """RAM in a memfd (tmpfs), sealed so that nobody it is handed to can change its size."""

    name = "memfd"
    shared = True

    def __init__(self, size: int) -> None:
        fd = os.memfd_create("kvmdp-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            guest = Mapping.shared(fd, size)
            super().__init__(size, guest, Mapping.shared(fd, size), fd)
        except BaseException:
            os.close(fd)
            raise


class AnonymousBacking(Backing):
    """RAM in private anonymous memory: one mapping, nothing that another process could be handed."""

    name = "anonymous"
    shared = False

    def __init__(self, size: int) -> None:
        mapping = Mapping.anonymous(size)
        super().__init__(size, mapping, mapping, -1)


BACKINGS: dict[str, type[MemfdBacking] | type[AnonymousBacking]] = {
    MemfdBacking.name: MemfdBacking,
    AnonymousBacking.name: AnonymousBacking,
}
