"""What several commands read from their command lines: lists, kinds of memory, the mode of userfaultfd."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from kvmdp.memory.backings import BACKINGS
from kvmdp.trap.uffd.options import UffdMode, parse_mode

T = TypeVar("T")

_MEMFD = "shmem"  # what demand_paging_test calls it


def parse_backing(kind: str) -> str:
    """Return the backing that `-s KIND` means. Raises ValueError, one sentence."""
    if kind == _MEMFD:
        return "memfd"
    if kind not in BACKINGS:
        raise ValueError(f"-s {kind}: there is {', '.join((_MEMFD, *BACKINGS))}")
    return kind


def given_mode(options: argparse.Namespace) -> UffdMode | None:
    """Return what --uffd-mode says, None if it was not given. Raises ValueError."""
    return None if options.uffd_mode is None else parse_mode(options.uffd_mode)


def parse_list(option: str, text: str, read: Callable[[str], T]) -> tuple[T, ...]:
    """Return what `read` makes of each part of "a,b,c". Raises ValueError, one sentence that names `option`."""
    found: list[T] = []
    for part in text.split(","):
        try:
            value = read(part.strip())
        except ValueError as error:
            reason = f"{part.strip()!r} is not a whole number" if read is int else str(error)
            raise ValueError(f"{option} {text}: {reason}") from None
        if value in found:
            raise ValueError(f"{option} {text}: {part.strip()} stands there twice")
        found.append(value)
    return tuple(found)
