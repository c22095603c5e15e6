"""Limits for the calling process and its children; a command's prelude calls them. Nothing has to be undone.

Root is above the limit on threads, so for that a process counts as another user's, whose number nobody else has, and
has lost the capabilities that lift it. It still opens what root may open.
"""

import ctypes
import os
import resource
import struct
from pathlib import Path

_SYS_CAPGET, _SYS_CAPSET = 125, 126
_CAPABILITIES_V3 = 0x20080522
_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 21, 24
_PR_CAPBSET_DROP = 24

_libc = ctypes.CDLL(None, use_errno=True)


def user_of_ones_own():
    """The number of a user who has no process."""
    return 1_000_000 + os.getpid()


def limit_threads(most, user):
    """Be a process of `user`, who may have so many threads and processes."""
    for capability in (_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE):
        _check(_libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0))
    os.setresuid(user, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITIES_V3, 0))
    sets = ctypes.create_string_buffer(24)
    _check(_libc.syscall(_SYS_CAPGET, header, sets))
    effective, *rest = struct.unpack("6I", sets)
    effective &= ~(1 << _CAP_SYS_ADMIN | 1 << _CAP_SYS_RESOURCE)
    _check(_libc.syscall(_SYS_CAPSET, header, struct.pack("6I", effective, *rest)))
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))


def limit_data(spare):
    """Have no more data from now on than there is, and `spare` bytes."""
    status = Path("/proc/self/status").read_text()
    now = int(status.partition("VmData:")[2].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (now + spare, now + spare))


def _check(result):
    if result:
        raise OSError(ctypes.get_errno(), "cannot be limited")
