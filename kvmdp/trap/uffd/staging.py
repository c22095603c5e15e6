"""The staging area: where the bytes of absent pages lie that must not lie in guest memory itself.

Units: bytes; offsets are into RAM, in the order of the RAM file.
"""

from __future__ import annotations

import errno
import os

from kvmdp.memory.backing import Backing
from kvmdp.memory.mapping import Mapping


class Staging:
    """Memory of RAM's size, of which only what is on its way, or shut out, takes any. The rest reads as zeros.

    `view` and `hva` are those of its mapping.
    """

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._mapping = Mapping.anonymous(backing.size)
        self.view, self.hva = self._mapping.view, self._mapping.hva
        self._memory = -1  # this process's memory as a file
        if not backing.shared:
            try:
                self._memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
            except BaseException:
                self._mapping.close()
                raise

    def save(self, offset: int, length: int) -> None:
        """Copy pages of RAM that are present, or were discarded just now, into which no thread stores meanwhile.

        What has been discarded is not there, and is left as zeros. A load from it would sleep in userfaultfd until the
        claim on it has ended. A read of private memory by way of a file does not: it fails (EIO), as on a marker.
        """
        end = offset + length
        if self._backing.shared:
            self.view[offset:end] = self._backing.vmm.view[offset:end]
            return
        while offset < end:
            try:
                offset += os.preadv(self._memory, [self.view[offset:end]], self._backing.guest.hva + offset)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                offset += self._backing.page_size

    def drop(self, offset: int, length: int) -> None:
        """Forget pages: they read as zeros from now on, and take no memory."""
        self._mapping.drop(offset, length)

    def close(self) -> None:
        """Give all back; a second call does nothing."""
        self._mapping.close()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
