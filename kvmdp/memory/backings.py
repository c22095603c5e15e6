"""The kinds of memory that guest RAM can be made of, by the names users call them.

A new one is one module and one line here, or one `register`. Units: bytes.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmdp.memory.backing import (
    AnonymousBacking,
    Backing,
    BackingOptions,
    FileBacking,
    MemfdBacking,
    MemoryMaker,
    check_file,
)
from kvmdp.memory.guest_memfd import GuestMemfdBacking
from kvmdp.memory.hugepages import check_pages, give_back_what_is_left
from kvmdp.memory.hugetlb import (
    Hugetlb1gBacking,
    Hugetlb2mBacking,
    PrivateHugetlb1gBacking,
    PrivateHugetlb2mBacking,
)
from kvmdp.page import PAGE_SIZE
from kvmdp.size import format_size

BACKINGS: dict[str, type[Backing]] = {}


def register(backing: type[Backing]) -> None:
    """Add a kind, which is known by its `name` from then on. Raises ValueError if there is one of that name."""
    if backing.name in BACKINGS:
        raise ValueError(f"there is a backing {backing.name} already: give yours another name")
    BACKINGS[backing.name] = backing


register(MemfdBacking)
register(AnonymousBacking)
register(Hugetlb2mBacking)
register(Hugetlb1gBacking)
register(PrivateHugetlb2mBacking)
register(PrivateHugetlb1gBacking)
register(GuestMemfdBacking)
register(FileBacking)


def backing_class(name: str) -> type[Backing]:
    """Return the kind that `name` means. Raises ValueError, one sentence with the names there are."""
    if name not in BACKINGS:
        raise ValueError(f"there is no backing {name!r}: choose from {', '.join(BACKINGS)}")
    return BACKINGS[name]


def _named(has: Callable[[type[Backing]], bool]) -> list[str]:
    return [name for name, kind in BACKINGS.items() if has(kind)]


def check_backing_options(
    name: str, size: int, *, thp: bool = False, path: str | None = None, reserve: bool = False
) -> None:
    """Raise ValueError if there is no such backing, or if it cannot have this size or these options."""
    kind = backing_class(name)
    if size % kind.page_size:
        raise ValueError(
            f"{format_size(size)} of {name} memory is not whole huge pages: give a multiple of "
            f"{format_size(kind.page_size)}"
        )
    if thp and not kind.transparent:
        able = ", ".join(_named(lambda each: each.transparent))
        raise ValueError(f"{name} memory has no transparent huge pages: leave --thp out, or use {able}")
    if path is not None:
        if not kind.takes_path:
            able = _named(lambda each: each.takes_path)[0]
            raise ValueError(f"--backing-file is for the backing {able}: give --backing {able} with it")
        check_file(path)
    if reserve and not kind.reservable:
        able = _named(lambda each: each.reservable)[0]
        raise ValueError(f"{name} memory needs no reservation: leave --reserve-hugepages out, or use {able}")


def check_huge_pages(name: str, size: int) -> None:
    """Raise UnsupportedError if this backing takes huge pages and there are too few of them now."""
    kind = backing_class(name)
    if kind.page_size > PAGE_SIZE:
        check_pages(kind.page_size, size // kind.page_size)


def create_backing(
    name: str,
    size: int,
    vm: MemoryMaker,
    *,
    thp: bool = False,
    path: str | None = None,
    reserve: bool = False,
) -> Backing:
    """Make `size` bytes of guest RAM for `vm`.

    `thp`, `path` and `reserve` are `BackingOptions`. Raises what `check_backing_options` raises, UnsupportedError where
    the host lacks what the backing needs, OSError.
    """
    check_backing_options(name, size, thp=thp, path=path, reserve=reserve)
    give_back_what_is_left()
    return backing_class(name).make(size, vm, BackingOptions(thp, path, reserve))
