"""ioctl request numbers, after `asm-generic/ioctl.h` (x86-64 uses the generic encoding).

A request is 32 bits: direction (2), size of the argument in bytes (14), type (8), number (8).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_IOC_NRSHIFT = 0
_IOC_TYPESHIFT = 8
_IOC_SIZESHIFT = 16
_IOC_DIRSHIFT = 30
_IOC_SIZEMAX = (1 << 14) - 1

_IOC_NONE = 0
_IOC_WRITE = 1
_IOC_READ = 2

CType = type[ctypes.Structure] | type[ctypes.Union] | type["ctypes._SimpleCData[int]"]


def _ioc(direction: int, type_: int, number: int, size: int) -> int:
    if size > _IOC_SIZEMAX:
        raise ValueError(f"an ioctl argument of {size} bytes does not fit the 14-bit size field")
    return (
        direction << _IOC_DIRSHIFT | size << _IOC_SIZESHIFT | type_ << _IOC_TYPESHIFT | number << _IOC_NRSHIFT
    )


def _IO(type_: int, number: int) -> int:  # noqa: N802 - the header's name
    """Request without an argument structure."""
    return _ioc(_IOC_NONE, type_, number, 0)


def _IOR(type_: int, number: int, argument: CType) -> int:  # noqa: N802
    """Request whose argument the kernel writes (user space reads it)."""
    return _ioc(_IOC_READ, type_, number, ctypes.sizeof(argument))


def _IOW(type_: int, number: int, argument: CType) -> int:  # noqa: N802
    """Request whose argument the kernel reads (user space writes it)."""
    return _ioc(_IOC_WRITE, type_, number, ctypes.sizeof(argument))


def _IOWR(type_: int, number: int, argument: CType) -> int:  # noqa: N802
    """Request whose argument goes both ways."""
    return _ioc(_IOC_READ | _IOC_WRITE, type_, number, ctypes.sizeof(argument))


class FlexibleArgument(ctypes.Structure):
    """An argument that ends in an array of any length: `header`, whose size alone the request has, then `entries`."""

    header: Any
    entries: Any


@functools.lru_cache(maxsize=64)
def flexible(header: type[ctypes.Structure], entry: Any, count: int) -> type[FlexibleArgument]:
    """Return the type of an argument of `count` entries of a C type behind a header."""
    fields = [("header", header), ("entries", entry * count)]
    return type(f"{header.__name__}_{count}", (FlexibleArgument,), {"_fields_": fields})
