"""`/proc/self/pagemap`: what this process's page table has for each of its pages.

Source: Documentation/admin-guide/mm/pagemap.rst. Looking touches no page. Addresses (hva) in bytes.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

MAPPED = np.uint64(1 << 63)
# An entry that is no page: a marker, or memory that was swapped out.
SWAPPED = np.uint64(1 << 62)

_ENTRY = 8
_PAGE = os.sysconf("SC_PAGESIZE")


def entries(hva: int, pages: int) -> npt.NDArray[np.uint64]:
    """Return the entries of `pages` pages from `hva` on."""
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = bytearray(pages * _ENTRY)
        done = 0
        while done < len(data):
            done += os.preadv(descriptor, [memoryview(data)[done:]], hva // _PAGE * _ENTRY + done)
    finally:
        os.close(descriptor)
    return np.frombuffer(data, dtype=np.uint64)
