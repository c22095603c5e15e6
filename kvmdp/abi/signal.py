"""The parts of `asm-generic/siginfo.h` that Python's `signal` does not hand out.

Python reports a signal's number and code but not `si_addr`, which is all a poison marker says
of where the access was.
"""

from __future__ import annotations

import ctypes

SI_MAX_SIZE = 128

BUS_ADRALN = 1
BUS_ADRERR = 2
BUS_OBJERR = 3
BUS_MCEERR_AR = 4  # a poisoned page was accessed: action required
BUS_MCEERR_AO = 5  # poison was found in a page that is not accessed: action optional

_NSIG_BYTES = 8  # the kernel's sigset_t: 64 signals


class siginfo_t(ctypes.Structure):
    """`siginfo_t` as far as `_sigfault`; padded to the kernel's 128 bytes."""

    _fields_ = [
        ("si_signo", ctypes.c_int),
        ("si_errno", ctypes.c_int),
        ("si_code", ctypes.c_int),
        ("_pad0", ctypes.c_int),
        ("si_addr", ctypes.c_uint64),
        ("si_addr_lsb", ctypes.c_short),
        ("_pad", ctypes.c_uint8 * (SI_MAX_SIZE - 26)),
    ]

    @property
    def si_pid(self) -> int:
        """Which process sent the signal, of one that a process sent (`_kill`): it lies where `si_addr` does."""
        return int(self.si_addr & 0xFFFF_FFFF)


class timespec(ctypes.Structure):
    """`struct timespec` of the 64-bit ABI."""

    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


def sigset_mask(signals: set[int]) -> int:
    """Return the kernel's 64-bit `sigset_t` for `signals` (numbers from 1)."""
    mask = 0
    for number in signals:
        if not 1 <= number <= _NSIG_BYTES * 8:
            raise ValueError(f"signal {number} does not exist: Linux has 1 to {_NSIG_BYTES * 8}")
        mask |= 1 << (number - 1)
    return mask
