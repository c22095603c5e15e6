"""The kinds of memory that guest RAM can be made of, by the names users call them.

Units: bytes.
"""

from __future__ import annotations

from kvmdp.memory.backing import AnonymousBacking, Backing, FileBacking, MemfdBacking, check_file
from kvmdp.memory.guest_memfd import GuestMemfdBacking, MemoryMaker
from kvmdp.memory.hugepages import check_pages, give_back_what_is_left
from kvmdp.memory.hugetlb import (
    Hugetlb1gBacking,
    Hugetlb2mBacking,
    HugetlbBacking,
    PrivateHugetlb1gBacking,
    PrivateHugetlb2mBacking,
)
from kvmdp.size import format_size

_HUGETLB: tuple[type[HugetlbBacking], ...] = (
    Hugetlb2mBacking,
    Hugetlb1gBacking,
    PrivateHugetlb2mBacking,
    PrivateHugetlb1gBacking,
)

_KINDS: tuple[type[Backing], ...] = (
    MemfdBacking,
    AnonymousBacking,
    *_HUGETLB,
    GuestMemfdBacking,
    FileBacking,
)
BACKINGS = {kind.name: kind for kind in _KINDS}


def check_backing_options(
    name: str, size: int, *, thp: bool = False, path: str | None = None, reserve: bool = False
) -> None:
    """Raise ValueError if there is no such backing, or if it cannot have this size or these options."""
    if name not in BACKINGS:
        raise ValueError(f"there is no backing {name!r}: choose from {', '.join(BACKINGS)}")
    kind = BACKINGS[name]
    if size % kind.page_size:
        raise ValueError(
            f"{format_size(size)} of {name} memory is not whole huge pages: give a multiple of "
            f"{format_size(kind.page_size)}"
        )
    if thp and not kind.transparent:
        able = ", ".join(each.name for each in BACKINGS.values() if each.transparent)
        raise ValueError(f"{name} memory has no transparent huge pages: leave --thp out, or use {able}")
    if path is not None:
        if kind is not FileBacking:
            raise ValueError(
                f"--backing-file is for the backing file: give --backing {FileBacking.name} with it"
            )
        check_file(path)
    if reserve and not issubclass(kind, HugetlbBacking):
        raise ValueError(
            f"{name} memory needs no reservation: leave --reserve-hugepages out, or use {_HUGETLB[0].name}"
        )


def check_huge_pages(name: str, size: int) -> None:
    """Raise UnsupportedError if this backing takes huge pages and there are too few of them now."""
    kind = BACKINGS[name]
    if issubclass(kind, HugetlbBacking):
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

    `thp` lets the kernel put pages together into huge ones; `path` is the file of the backing file; `reserve` has huge
    pages reserved, and given back at its close. Raises what `check_backing_options` raises, UnsupportedError where the
    host lacks what the backing needs, OSError.
    """
    check_backing_options(name, size, thp=thp, path=path, reserve=reserve)
    give_back_what_is_left()
    kind = BACKINGS[name]
    if issubclass(kind, HugetlbBacking):
        return kind(size, reserve=reserve)
    if kind is GuestMemfdBacking:
        return GuestMemfdBacking(size, vm)
    if kind is FileBacking:
        return FileBacking(size, path, thp=thp)
    if kind is AnonymousBacking:
        return AnonymousBacking(size, thp=thp)
    return MemfdBacking(size, thp=thp)
