"""What a trap has set up, to be checked against the states of the pages (`kvmdp.lab.invariants`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvmdp.memory.mapping import Mapping
from kvmdp.paging.ports import Trap
from kvmdp.trap.slots.slot_map import Block, Kind
from kvmdp.trap.uffd.device_view import DeviceView


@dataclass(frozen=True, slots=True)
class Picture:
    """The memslots of RAM, and what absent pages are to be in.

    `absent` are the kinds of memslots that an absent page may lie in, None standing for no memslot. `view`, where the
    trap works by page table too, is the guest view: an absent page in an open memslot is not mapped there, and with
    `markers` it has one. With `is_only_copy` a present page is mapped there, for nothing else has its bytes, but for
    what is in the regions of 2 MiB (numbers) that are `plain` memory. `file` is a mapping of the memory file, where an
    absent page has to be a hole of that, and a present one none.
    """

    blocks: list[Block]
    absent: frozenset[Kind | None]
    view: Mapping | None = None
    markers: bool = False
    is_only_copy: bool = False
    plain: frozenset[int] = frozenset()
    file: Mapping | None = None


class InspectedTrap(Trap, Protocol):
    """A trap that says what it has set up, as all of this package do."""

    @property
    def device_view(self) -> DeviceView | None:
        """Guest RAM for threads of this process, by plain loads and stores; None if it was made without."""
        ...

    def picture(self) -> Picture:
        """Return what is set up now, to be checked; no other thread is active."""
        ...
