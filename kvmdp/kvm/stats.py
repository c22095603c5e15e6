"""KVM's statistics of a VM or vCPU, by name.

A statistics descriptor (KVM_GET_STATS_FD, KVM_CAP_BINARY_STATS_FD) describes itself: a header, an
identifier, a block of descriptors with names, a block of 64-bit values.  Section 4.134 of the API
document.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass

from kvmdp.abi.kvm import KVM_GET_STATS_FD, kvm_stats_desc, kvm_stats_header
from kvmdp.abi.kvm_cap import Cap
from kvmdp.closing import Closing
from kvmdp.kvm.errors import KvmError, failed
from kvmdp.kvm.handle import Handle


@dataclass(frozen=True, slots=True)
class _Statistic:
    offset: int
    count: int


class Statistics(Closing):
    """The statistics of one VM or vCPU; owns the descriptor `fd`.

    The layout is read once; each `read` is one `pread` of the values. Raises KvmError if the descriptor cannot be read.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        try:
            header = kvm_stats_header.from_buffer_copy(self._pread(ctypes.sizeof(kvm_stats_header), 0))
            self.id = self._pread(header.name_size, header.id_offset).rstrip(b"\0").decode()
            self._data_offset = header.data_offset
            self._statistics = self._read_descriptors(header)
            self._data_size = max(
                (entry.offset + 8 * entry.count for entry in self._statistics.values()), default=0
            )
        except BaseException:
            os.close(fd)
            raise

    def _read_descriptors(self, header: kvm_stats_header) -> dict[str, _Statistic]:
        fixed = ctypes.sizeof(kvm_stats_desc)
        stride = fixed + header.name_size
        block = self._pread(stride * header.num_desc, header.desc_offset)
        statistics = {}
        for start in range(0, len(block), stride):
            desc = kvm_stats_desc.from_buffer_copy(block, start)
            name = block[start + fixed : start + stride].split(b"\0", 1)[0].decode()
            statistics[name] = _Statistic(desc.offset, desc.size)
        return statistics

    def _pread(self, size: int, offset: int) -> bytes:
        try:
            data = os.pread(self.fd, size, offset)
        except OSError as error:
            raise failed(error, "reading KVM's statistics") from None
        if len(data) != size:
            raise KvmError(
                errno.EIO,
                "reading KVM's statistics",
                f"they ended after {len(data)} of {size} bytes at {offset}",
            )
        return data

    @property
    def names(self) -> list[str]:
        """Names of all statistics, in the kernel's order."""
        return list(self._statistics)

    def read(self) -> dict[str, int | tuple[int, ...]]:
        """Return the present value of each statistic; histograms are tuples of bucket counts.

        Raises KvmError if closed.
        """
        block = memoryview(self._pread(self._data_size, self._data_offset)).cast("Q")
        values: dict[str, int | tuple[int, ...]] = {}
        for name, entry in self._statistics.items():
            first = entry.offset // 8
            values[name] = block[first] if entry.count == 1 else tuple(block[first : first + entry.count])
        return values

    def get(self, name: str) -> int:
        """Return one plain value. Raises KeyError if this kernel has no such statistic, KvmError if closed."""
        entry = self._statistics[name]
        return int.from_bytes(self._pread(8, self._data_offset + entry.offset), "little")

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_statistics(handle: Handle) -> Statistics:
    """Open the statistics of the VM or vCPU behind `handle`; the caller closes them.

    Raises KvmError; UnsupportedError without KVM_CAP_BINARY_STATS_FD.
    """
    return Statistics(handle.call(KVM_GET_STATS_FD, "KVM_GET_STATS_FD", needs=Cap.BINARY_STATS_FD))
