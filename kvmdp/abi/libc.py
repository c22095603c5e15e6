"""The one place that calls C.

Two handles on the same library.  `libc` releases the GIL around each call: for anything that may
sleep (KVM_RUN, `read`, `poll`, memslot ioctls).  `libc_held` keeps it: for calls that never
sleep and are so short that giving the GIL away costs more than the call (`sigtimedwait` with a
zero timeout; which others earn it is measured, see `kvmdp.trap.uffd.descriptor`).

Errors become `OSError` with the kernel's errno and the name of the call.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import TypeAlias

from kvmdp.abi.ioctl import _IOC_SIZEMAX, _IOC_SIZESHIFT, FlexibleArgument
from kvmdp.abi.signal import siginfo_t, timespec

libc = ctypes.CDLL(None, use_errno=True)
libc_held = ctypes.PyDLL(None, use_errno=True)

for _handle in (libc, libc_held):
    _handle.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
    _handle.ioctl.restype = ctypes.c_int
    _handle.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _handle.madvise.restype = ctypes.c_int
    _handle.sigtimedwait.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(siginfo_t),
        ctypes.POINTER(timespec),
    ]
    _handle.sigtimedwait.restype = ctypes.c_int

libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.mmap.restype = ctypes.c_void_p
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.munmap.restype = ctypes.c_int
libc.memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
libc.memmove.restype = ctypes.c_void_p
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
libc.mincore.restype = ctypes.c_int
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
libc.fallocate.restype = ctypes.c_int
libc.syscall.restype = ctypes.c_long

_PAGE = os.sysconf("SC_PAGESIZE")
_MAP_FAILED = ctypes.c_void_p(-1).value


def os_error(what: str) -> OSError:
    """Return the `OSError` of the C call that has just failed; `what` names the call."""
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


@contextlib.contextmanager
def named_call(what: str) -> Iterator[None]:
    """Have the `OSError` of a system call that Python makes by itself name the call, as those that are made here do."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{what}: {error.strerror}") from None


Structured: TypeAlias = "ctypes.Structure | ctypes.Union | ctypes._SimpleCData[int]"
Argument: TypeAlias = "Structured | int | None"


def ioctl(fd: int, request: int, argument: Argument = 0, what: str = "ioctl") -> int:
    """Call `ioctl(fd, request, argument)` without the GIL.

    `argument` is what the request takes, which the kernel may change, or an integer; `what` names the call in errors.
    Returns the call's non-negative result; raises `OSError` with the kernel's errno, and TypeError if the argument has
    not the size that the request encodes (asm-generic/ioctl.h): the kernel would read or write that many bytes.
    """
    size = request >> _IOC_SIZESHIFT & _IOC_SIZEMAX
    if argument is None or isinstance(argument, int):
        if size:
            raise TypeError(f"{what} takes an argument of {size} bytes, not {argument!r}")
        result: int = libc.ioctl(fd, request, argument)
    else:
        # Requests from before there was the encoding say nothing of their argument: FIONREAD is one.
        if size and size != ctypes.sizeof(argument):
            _check_header(size, argument, what)
        result = libc.ioctl(fd, request, ctypes.byref(argument))
    if result < 0:
        raise os_error(what)
    return result


def _check_header(size: int, argument: Structured, what: str) -> None:
    """Raise TypeError unless `argument` is as long as its request says, but for the array at its end."""
    fixed = argument.header if isinstance(argument, FlexibleArgument) else argument
    if ctypes.sizeof(fixed) != size:
        name = type(fixed).__name__
        raise TypeError(f"{what} takes an argument of {size} bytes, and {name} has {ctypes.sizeof(fixed)}")


def mmap(length: int, prot: int, flags: int, fd: int = -1, offset: int = 0, address: int = 0) -> int:
    """Map `length` bytes and return the host virtual address (hva)."""
    hva: int | None = libc.mmap(address or None, length, prot, flags, fd, offset)
    if hva is None or hva == _MAP_FAILED:
        raise os_error(f"mmap of {length} bytes")
    return hva


def munmap(hva: int, length: int) -> None:
    """Unmap `length` bytes at `hva`."""
    if libc.munmap(hva, length) < 0:
        raise os_error(f"munmap of {length} bytes at {hva:#x}")


def madvise(hva: int, length: int, advice: int) -> None:
    """Give the kernel `advice` (`MADV_*`) on `length` bytes at `hva`."""
    if libc.madvise(hva, length, advice) < 0:
        raise os_error(f"madvise({advice}) of {length} bytes at {hva:#x}")


def mincore(hva: int, length: int) -> bytes:
    """Return a byte for each page of `length` bytes at `hva`: its bit 0 says whether it is in memory."""
    found = (ctypes.c_uint8 * (-(-length // _PAGE)))()
    if libc.mincore(hva, length, found) < 0:
        raise os_error(f"mincore of {length} bytes at {hva:#x}")
    return bytes(found)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate with a `mode` (`FALLOC_FL_*`), which Python's own cannot be given."""
    if libc.fallocate(fd, mode, offset, length) < 0:
        raise os_error(f"fallocate(mode {mode:#x}) of {length} bytes at {offset:#x}")


def syscall(number: int, *arguments: int, what: str) -> int:
    """Call a system call that has no libc wrapper; `what` names it in the error."""
    result: int = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(value) for value in arguments))
    if result < 0:
        raise os_error(what)
    return result
