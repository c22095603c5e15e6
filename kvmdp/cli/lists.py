"""What several commands read from their command lines: lists, and kinds of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kvmdp.memory.backings import BACKINGS

T = TypeVar("T")

# What demand_paging_test calls a kind of memory -> ours
_MEMORY_KINDS = {"shmem": "memfd", "anonymous": "anonymous"} | {name: name for name in BACKINGS}


def parse_backing(kind: str) -> str:
    """Return the backing that `-s KIND` means. Raises ValueError, one sentence."""
    if kind not in _MEMORY_KINDS:
        raise ValueError(f"-s {kind}: there is {', '.join(_MEMORY_KINDS)}")
    return _MEMORY_KINDS[kind]


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
