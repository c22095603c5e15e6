"""The guest's page tables: what is in each, and where it lies.

RAM and the boot slot are mapped one to one (linear address = gpa) with 2 MiB pages: a PML4, a PDPT, a page
directory for each GiB. All of them lie in the boot slot; or, *paged*, all but the directory that maps the boot slot
are RAM's last pages, and their bytes patches on the source. There they start as an operating system makes them, with
accessed and dirty bits clear, so that the CPU's walks write to them.

Source: Intel SDM volume 3, chapter 4. Units: bytes, unless a name says pages.
"""

from __future__ import annotations

import numpy as np

from kvmdp.machine.guest_abi import BOOT_BASE, PAGE_TABLES_BASE
from kvmdp.machine.workloads.arithmetic import Pages, Words
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE

LARGE_PAGE = 2 << 20

_PRESENT, _WRITE, _USER, _ACCESSED, _DIRTY, _LARGE = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7
_LINK = _PRESENT | _WRITE | _USER
_ENTRIES = PAGE_SIZE // 8
_BOOT_DIRECTORY = BOOT_BASE >> 30


def page_table_bytes(layout: GuestLayout) -> int:
    """Return how much of RAM's end paged page tables take."""
    return len(_numbers(layout) - {_BOOT_DIRECTORY}) * PAGE_SIZE


def _numbers(layout: GuestLayout) -> set[int]:
    """Return the tables there are: the PML4 is number -2, the PDPT -1, a directory has that of its GiB."""
    directories = (range(each.gpa >> 30, -(-(each.gpa + each.size) >> 30)) for each in layout.regions)
    return {-2, -1, _BOOT_DIRECTORY}.union(*directories)


class PageTables:
    """The page tables for `layout`, in the boot slot or `paged`.

    `root` is the gpa of the PML4; `boot_tables` are those in the boot slot, from PAGE_TABLES_BASE on, and `boot_size`
    is how large that makes the slot. `first_page` and `pages` say which RAM pages hold tables (none: 0 pages), and
    `patches` their bytes, as (offset in RAM, bytes).
    """

    def __init__(self, layout: GuestLayout, *, paged: bool) -> None:
        numbers = sorted(_numbers(layout))
        in_boot = [_BOOT_DIRECTORY] if paged else numbers
        in_ram = [number for number in numbers if number not in in_boot]
        self.first_page = layout.pages - len(in_ram)
        self.pages = len(in_ram)
        place = {number: PAGE_TABLES_BASE + PAGE_SIZE * index for index, number in enumerate(in_boot)}
        place |= {number: layout.gpa_of_page(self.first_page + i) for i, number in enumerate(in_ram)}
        self.root = place[-2]
        used = PAGE_TABLES_BASE - BOOT_BASE + len(in_boot) * PAGE_SIZE
        self.boot_size = -(-used // LARGE_PAGE) * LARGE_PAGE
        tables = self._fill(layout, place, 0 if paged else _ACCESSED | _DIRTY)
        self.boot_tables = b"".join(tables[number].tobytes() for number in in_boot)
        self.patches = [
            ((self.first_page + index) * PAGE_SIZE, tables[number].tobytes())
            for index, number in enumerate(in_ram)
        ]

    def _fill(self, layout: GuestLayout, place: dict[int, int], used: int) -> dict[int, Words]:
        """Return the entries of each table; `used` are the accessed and dirty bits to begin with."""
        leaves = np.zeros((max(place) + 1) * _ENTRIES, dtype=np.uint64)
        for gpa, size in [*((each.gpa, each.size) for each in layout.regions), (BOOT_BASE, self.boot_size)]:
            large = np.arange(gpa // LARGE_PAGE, -(-(gpa + size) // LARGE_PAGE), dtype=np.uint64)
            leaves[large] = large * np.uint64(LARGE_PAGE) | np.uint64(_LINK | _LARGE | used)
        tables = dict(enumerate(leaves.reshape(-1, _ENTRIES)))
        root, directories = np.zeros((2, _ENTRIES), dtype=np.uint64)
        link = _LINK | used & _ACCESSED
        root[0] = place[-1] | link
        for number, gpa in place.items():
            if number >= 0:
                directories[number] = gpa | link
        return tables | {-2: root, -1: directories}

    def ignore_walks(self, pages: Pages, difference: Words) -> None:
        """Clear what the CPU may have changed by walking the tables, the accessed and dirty bits.

        `difference` is uint64[n, 512], set where the content of `pages` is not as it was.
        """
        rows = (pages >= self.first_page) & (pages < self.first_page + self.pages)
        difference[rows] &= np.uint64(~(_ACCESSED | _DIRTY) & (1 << 64) - 1)
