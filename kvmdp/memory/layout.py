"""Where guest RAM lies in guest-physical space: from 0, with the hole of a PC below 4 GiB.

The hole is where a PC has its devices, so the memory image of a real machine lies at its true addresses; where it
begins is the machine's choice. The boot slot sits in it, always at the same place, so no hole begins behind that. RAM
pages are numbered in the order of the RAM file, without the hole.

Units: gpa, sizes and offsets in bytes; RAM pages in pages of `PAGE_SIZE`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmdp.page import HUGE_PAGE, PAGE_SHIFT, PAGE_SIZE
from kvmdp.size import format_size

LOW_RAM_END = 3 << 30  # where the hole begins unless a machine is made with another map
MAX_LOW_RAM_END = 0xD000_0000  # 3.25 GiB: there is the boot slot
HIGH_RAM_BASE = 4 << 30

MIN_MEMORY = HUGE_PAGE  # the guest maps its RAM in units of that
# The boot slot holds the guest's page tables: a page directory of 4 KiB for each GiB, 1 MiB of them here.
MAX_MEMORY = 256 << 30

_HIGH_RAM_GFN = HIGH_RAM_BASE >> PAGE_SHIFT


def check_low_ram_end(low_ram_end: int) -> None:
    """Raise ValueError if no hole can begin at this gpa."""
    if low_ram_end % HUGE_PAGE or not MIN_MEMORY <= low_ram_end <= MAX_LOW_RAM_END:
        raise ValueError(
            f"RAM's hole cannot begin at {format_size(low_ram_end)}: give a multiple of {format_size(HUGE_PAGE)} up to "
            f"{format_size(MAX_LOW_RAM_END)}, where the guest's own code lies"
        )


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch of RAM that is contiguous both in guest-physical space and in the RAM file, in bytes."""

    gpa: int
    size: int
    offset: int


class GuestLayout:
    """The guest-physical map for `memory_bytes` of RAM, with a hole that begins at gpa `low_ram_end`.

    Attributes: these two; `pages`, the number of RAM pages; `regions`, by ascending gpa and offset: two if RAM reaches
    the hole, else one. Raises ValueError if `memory_bytes` is below 2 MiB, above 256 GiB or not a multiple of 4096, or
    if no hole can begin at `low_ram_end`.
    """

    __slots__ = ("_hole_pages", "_low_pages", "low_ram_end", "memory_bytes", "pages", "regions")

    def __init__(self, memory_bytes: int, low_ram_end: int = LOW_RAM_END) -> None:
        check_low_ram_end(low_ram_end)
        given = f"{format_size(memory_bytes)} of guest memory"
        if memory_bytes < MIN_MEMORY:
            raise ValueError(f"{given} is too little: the least is {format_size(MIN_MEMORY)}")
        if memory_bytes > MAX_MEMORY:
            raise ValueError(f"{given} is too much: the most is {format_size(MAX_MEMORY)}")
        if memory_bytes % PAGE_SIZE:
            raise ValueError(f"{given} is not whole pages: give a multiple of {PAGE_SIZE} bytes")
        low = min(memory_bytes, low_ram_end)
        regions = [Region(gpa=0, size=low, offset=0)]
        if memory_bytes > low:
            regions.append(Region(gpa=HIGH_RAM_BASE, size=memory_bytes - low, offset=low))
        self.memory_bytes = memory_bytes
        self.low_ram_end = low_ram_end
        self.pages = memory_bytes >> PAGE_SHIFT
        self.regions = tuple(regions)
        self._low_pages = low >> PAGE_SHIFT
        self._hole_pages = (HIGH_RAM_BASE - low_ram_end) >> PAGE_SHIFT

    def page_of_gpa(self, gpa: int) -> int | None:
        """Return the number of the RAM page that holds the byte at `gpa`, or None outside RAM."""
        gfn = gpa >> PAGE_SHIFT
        if gfn < _HIGH_RAM_GFN:
            return gfn if 0 <= gfn < self._low_pages else None
        page = gfn - self._hole_pages
        return page if page < self.pages else None

    def gpa_of_page(self, page: int) -> int:
        """Return the gpa of the first byte of RAM page `page`. Raises ValueError outside RAM."""
        self.check_pages(page, 1)
        return (page if page < self._low_pages else page + self._hole_pages) << PAGE_SHIFT

    def runs(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """Split `count` RAM pages from `first` on into runs contiguous in guest-physical space.

        Returns (gpa, first, count) by ascending gpa: two of them if the pages lie on both sides of the hole,
        else one. Raises ValueError unless there are pages, and all are RAM.
        """
        self.check_pages(first, count)
        above = first + count - self._low_pages
        if above <= 0 or first >= self._low_pages:
            return [(self.gpa_of_page(first), first, count)]
        return [(first << PAGE_SHIFT, first, count - above), (HIGH_RAM_BASE, self._low_pages, above)]

    def cuts(self, unit: int) -> bool:
        """Whether the hole lies in the middle of a block of RAM, where RAM is divided into blocks of `unit` bytes."""
        return any(region.offset % unit for region in self.regions)

    def check_pages(self, first: int, count: int) -> tuple[int, int]:
        """Return the (first, end) of a run of RAM pages. Raises ValueError unless it has pages, all of them of RAM."""
        if count < 1:
            raise ValueError(f"a run of {count} pages: the least is 1")
        if first < 0 or first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count - 1} are not all in the {self.pages} of RAM")
        return first, first + count
