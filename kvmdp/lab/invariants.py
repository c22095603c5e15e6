"""What must hold between the states of the pages, the bitmap, the memslots and the guest view, whatever the trap.

For tests, and for a reader in doubt. No other thread may be active. The page table is the kernel's own, read in
/proc/self/pagemap: bit 63 is a mapped page, bit 62 a marker (an entry that is no page; memory that was swapped out
looks the same). The memslots are our own record of what KVM was told and did not refuse
(`kvmdp.trap.slots.slot_map`): KVM has no call that lists them. That it has them so is shown by what guests find.

Units: RAM pages.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from kvmdp.abi import pagemap
from kvmdp.abi.libc import mincore
from kvmdp.memory.layout import GuestLayout
from kvmdp.memory.mapping import Mapping
from kvmdp.page import PAGE_SIZE, REGION
from kvmdp.paging.claim import State
from kvmdp.paging.pager import Pager
from kvmdp.trap.inspect import InspectedTrap, Picture
from kvmdp.trap.slots.slot_map import Block, Kind

_NO_SLOT, _OPEN, _CLOSED = 0, 1, 2
_CODES = {None: _NO_SLOT, Kind.OPEN: _OPEN, Kind.CLOSED: _CLOSED}
_MOST = 8  # pages named in one sentence

_Flags = npt.NDArray[np.bool_]


def violations(pager: Pager) -> list[str]:
    """Return a sentence for each rule that does not hold; the list is empty if all is well."""
    states = np.frombuffer(bytes(pager.ledger.states), dtype=np.uint8)
    present = states == State.PRESENT
    picture = cast(InspectedTrap, pager.trap).picture()  # as every trap of this package is
    found = _claims(pager, states)
    found += _named("the bit does not say whether the page is present", _bits(pager) != present)
    found += _blocks(pager.layout, picture.blocks)
    kinds = _kinds(picture.blocks, pager.layout.pages)
    if not pager.enabled:
        return found + _named("demand paging is off, and there is no open memslot", kinds != _OPEN)
    allowed = np.isin(kinds, [_CODES[kind] for kind in picture.absent])
    found += _named("present, and in no open memslot", present & (kinds != _OPEN))
    found += _named("absent, and in a memslot that does not trap", ~present & ~allowed)
    if picture.view is not None:
        found += _page_table(picture, picture.view, present, kinds)
    return found


def _claims(pager: Pager, states: npt.NDArray[np.uint8]) -> list[str]:
    passing = np.isin(states, (State.INFLIGHT, State.EVICTING, State.ADMITTING))
    found = _named("claimed, though no thread is active", passing)
    return found + [
        f"a claim on {each.count} pages from {each.first} on is left" for each in pager.ledger.claims
    ]


def _bits(pager: Pager) -> _Flags:
    bits = np.zeros(pager.layout.pages, dtype=np.bool_)
    for first, count in pager.bitmap.present_runs().tolist():
        bits[first : first + count] = True
    return bits


def _blocks(layout: GuestLayout, blocks: list[Block]) -> list[str]:
    """Check the memslots among themselves."""
    found, end = [], 0
    borders = [region.offset // PAGE_SIZE for region in layout.regions]
    for block in blocks:
        if block.first < end or block.pages < 1 or block.end > layout.pages:
            found.append(f"memslot {block.slot} overlaps the one before it, or RAM's end")
        if any(block.first < border < block.end for border in borders):
            found.append(f"memslot {block.slot} reaches over the hole in guest-physical space")
        end = block.end
    if len({block.slot for block in blocks}) < len(blocks):
        found.append("two memslots have the same id")
    return found


def _kinds(blocks: list[Block], pages: int) -> npt.NDArray[np.uint8]:
    kinds = np.full(pages, _NO_SLOT, dtype=np.uint8)
    for block in blocks:
        kinds[block.first : block.end] = _CODES[block.kind]
    return kinds


def _page_table(picture: Picture, view: Mapping, present: _Flags, kinds: npt.NDArray[np.uint8]) -> list[str]:
    entries = pagemap.entries(view.hva, len(present))
    mapped, marker = (entries & pagemap.MAPPED) != 0, (entries & pagemap.SWAPPED) != 0
    found = _named("absent, and mapped in the guest view", ~present & mapped)
    if picture.markers:
        found += _named("absent, and without a marker", ~present & ~marker & (kinds == _OPEN))
        found += _named("present, and under a marker", present & marker)
    if picture.is_only_copy:
        plain = np.isin(np.arange(len(present)) // REGION, list(picture.plain))
        found += _named("present, and not mapped in the guest view", present & ~mapped & ~marker & ~plain)
    if picture.file is not None:
        core = mincore(picture.file.hva, picture.file.length)
        in_file = (np.frombuffer(core, dtype=np.uint8) & 1) != 0
        found += _named("absent, and no hole of the memory file", ~present & in_file)
        found += _named("present, and a hole of the memory file", present & ~in_file)
    return found


def _named(what: str, pages: _Flags) -> list[str]:
    numbers = np.flatnonzero(pages)
    if not len(numbers):
        return []
    named = ", ".join(map(str, numbers[:_MOST].tolist())) + (" ..." if len(numbers) > _MOST else "")
    return [f"{what}: {len(numbers)} pages ({named})"]
