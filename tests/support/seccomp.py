"""A container's seccomp profile, for the calling process and its children: system calls that are refused with an errno.

A test's child calls `refuse` before it does what is tested; nothing has to be undone. The filter is made here, so that
no compiler is needed. Sources: seccomp(2), `linux/filter.h`, `linux/seccomp.h`, `asm/unistd_64.h`.
"""

import ctypes
import errno
import struct

# Those that tests refuse, by their numbers on x86-64.
NUMBERS = {
    "mmap": 9,
    "munmap": 11,
    "ioctl": 16,
    "mincore": 27,
    "madvise": 28,
    "socket": 41,
    "clone": 56,
    "fcntl": 72,
    "ftruncate": 77,
    "prctl": 157,
    "sched_setaffinity": 203,
    "sched_getaffinity": 204,
    "mbind": 237,
    "get_mempolicy": 239,
    "unshare": 272,
    "fallocate": 285,
    "eventfd2": 290,
    "epoll_create1": 291,
    "pipe2": 293,
    "preadv": 295,
    "perf_event_open": 298,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "memfd_create": 319,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "pidfd_send_signal": 424,
    "pidfd_open": 434,
    "close_range": 436,
    "pidfd_getfd": 438,
    "process_madvise": 440,
}

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_ERRNO, _ALLOW = 0x00050000, 0x7FFF0000
_NUMBER, _ARGUMENTS = 0, 16  # offsets in struct seccomp_data; an argument has 8 bytes, the low half first


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _statement(code, value, equal=0, otherwise=0):
    """A `struct sock_filter`: an instruction with its jumps."""
    return struct.pack("HBBI", code, equal, otherwise, value)


def refuse(*calls, number=errno.EPERM):
    """Have these system calls fail with the errno `number` from now on.

    A call is a name of `NUMBERS`, or that with the value of one of its arguments: ("madvise", 2, advice).
    """
    instructions = []
    for call in calls:
        name, index, value = (call, None, None) if isinstance(call, str) else call
        instructions.append(_statement(_LOAD, _NUMBER))
        if index is None:
            instructions.append(_statement(_EQUAL, NUMBERS[name], 0, 1))
        else:
            instructions.append(_statement(_EQUAL, NUMBERS[name], 0, 3))
            instructions.append(_statement(_LOAD, _ARGUMENTS + 8 * index))
            instructions.append(_statement(_EQUAL, value & 0xFFFFFFFF, 0, 1))
        instructions.append(_statement(_RETURN, _ERRNO | number))
    instructions.append(_statement(_RETURN, _ALLOW))
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(instructions), b"".join(instructions))
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _check(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program)), "the seccomp filter")


def _check(result, what):
    if result:
        raise OSError(ctypes.get_errno(), f"{what} cannot be set")
