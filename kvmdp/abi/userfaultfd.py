"""`linux/userfaultfd.h`: the ioctls, structures and feature bits that this project uses.

API document: `Documentation/admin-guide/mm/userfaultfd.rst`.  Addresses and lengths are bytes
in the registering process (hva).  Comments give the first kernel with a feature.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_uint8, c_uint16, c_uint32, c_uint64

from kvmdp.abi.ioctl import _IO, _IOR, _IOWR

NR_userfaultfd = 323  # __NR_userfaultfd, asm/unistd_64.h

UFFD_API = 0xAA
UFFDIO = 0xAA

UFFD_USER_MODE_ONLY = 1  # flag of the system call: user-mode faults only, no privilege needed

# uffd_msg.event
UFFD_EVENT_PAGEFAULT = 0x12
UFFD_EVENT_FORK = 0x13
UFFD_EVENT_REMAP = 0x14
UFFD_EVENT_REMOVE = 0x15
UFFD_EVENT_UNMAP = 0x16

# uffd_msg.arg.pagefault.flags
UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
UFFD_PAGEFAULT_FLAG_WP = 1 << 1
UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2

# uffdio_api.features
UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
UFFD_FEATURE_EVENT_FORK = 1 << 1
UFFD_FEATURE_EVENT_REMAP = 1 << 2
UFFD_FEATURE_EVENT_REMOVE = 1 << 3
UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4
UFFD_FEATURE_MISSING_SHMEM = 1 << 5
UFFD_FEATURE_EVENT_UNMAP = 1 << 6
UFFD_FEATURE_SIGBUS = 1 << 7
UFFD_FEATURE_THREAD_ID = 1 << 8
UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9  # 5.13
UFFD_FEATURE_MINOR_SHMEM = 1 << 10  # 5.14
UFFD_FEATURE_EXACT_ADDRESS = 1 << 11  # 5.18
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12  # 5.19
UFFD_FEATURE_WP_UNPOPULATED = 1 << 13  # 6.4
UFFD_FEATURE_POISON = 1 << 14  # 6.6
UFFD_FEATURE_WP_ASYNC = 1 << 15  # 6.7
UFFD_FEATURE_MOVE = 1 << 16  # 6.8

# uffdio_register.mode
UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFDIO_REGISTER_MODE_WP = 1 << 1
UFFDIO_REGISTER_MODE_MINOR = 1 << 2

UFFDIO_COPY_MODE_DONTWAKE = 1 << 0
UFFDIO_CONTINUE_MODE_DONTWAKE = 1 << 0
UFFDIO_POISON_MODE_DONTWAKE = 1 << 0
UFFDIO_ZEROPAGE_MODE_DONTWAKE = 1 << 0


class uffdio_api(ctypes.Structure):
    """Handshake: features asked for, features and ioctls granted."""

    _fields_ = [("api", c_uint64), ("features", c_uint64), ("ioctls", c_uint64)]


class uffdio_range(ctypes.Structure):
    """A range of addresses."""

    _fields_ = [("start", c_uint64), ("len", c_uint64)]


class uffdio_register(ctypes.Structure):
    """Register a range; `ioctls` returns what may be done to it."""

    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("ioctls", c_uint64)]


class uffdio_copy(ctypes.Structure):
    """Fill absent pages from `src`; `copy` returns bytes done or a negative errno."""

    _fields_ = [
        ("dst", c_uint64),
        ("src", c_uint64),
        ("len", c_uint64),
        ("mode", c_uint64),
        ("copy", c_int64),
    ]


class uffdio_zeropage(ctypes.Structure):
    """Map zero pages; `zeropage` returns bytes done or a negative errno."""

    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("zeropage", c_int64)]


class uffdio_continue(ctypes.Structure):
    """Map what the page cache holds; `mapped` returns bytes done or a negative errno."""

    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("mapped", c_int64)]


class uffdio_poison(ctypes.Structure):
    """Put poison markers on absent pages; `updated` returns bytes done or a negative errno."""

    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("updated", c_int64)]


class _uffd_msg_pagefault(ctypes.Structure):
    _fields_ = [("flags", c_uint64), ("address", c_uint64), ("ptid", c_uint32)]


class _uffd_msg_remove(ctypes.Structure):
    _fields_ = [("start", c_uint64), ("end", c_uint64)]


class _uffd_msg_arg(ctypes.Union):
    _fields_ = [
        ("pagefault", _uffd_msg_pagefault),
        ("remove", _uffd_msg_remove),
        ("_reserved", c_uint64 * 3),
    ]


class uffd_msg(ctypes.Structure):
    """One event, 32 bytes, as `read` on the descriptor returns it."""

    _fields_ = [
        ("event", c_uint8),
        ("reserved1", c_uint8),
        ("reserved2", c_uint16),
        ("reserved3", c_uint32),
        ("arg", _uffd_msg_arg),
    ]


USERFAULTFD_IOC_NEW = _IO(0xAA, 0x00)  # on /dev/userfaultfd, 6.1

UFFDIO_API = _IOWR(UFFDIO, 0x3F, uffdio_api)
UFFDIO_REGISTER = _IOWR(UFFDIO, 0x00, uffdio_register)
UFFDIO_UNREGISTER = _IOR(UFFDIO, 0x01, uffdio_range)
UFFDIO_WAKE = _IOR(UFFDIO, 0x02, uffdio_range)
UFFDIO_COPY = _IOWR(UFFDIO, 0x03, uffdio_copy)
UFFDIO_ZEROPAGE = _IOWR(UFFDIO, 0x04, uffdio_zeropage)
UFFDIO_CONTINUE = _IOWR(UFFDIO, 0x07, uffdio_continue)
UFFDIO_POISON = _IOWR(UFFDIO, 0x08, uffdio_poison)
