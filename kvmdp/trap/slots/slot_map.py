"""Which memslots RAM has: blocks of pages, each open or closed, and their slot ids. Pure: no call to the kernel.

`kvmdp.trap.slots.ram_slots` carries out in KVM what is noted here, and holds the mutex meanwhile. Blocks never overlap;
what no block covers has no memslot. An *open* block is ordinary memory, a *closed* one traps every access.

Units: RAM pages.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from typing import NamedTuple

from kvmdp.errors import KvmdpError


class Kind(enum.Enum):
    """What an access in a block does."""

    OPEN = "open"  # reaches memory
    CLOSED = "closed"  # exits KVM_RUN with KVM_EXIT_MEMORY_FAULT


class Piece(NamedTuple):
    """`pages` pages from `first` on that are, or are to become, one block."""

    first: int
    pages: int
    kind: Kind

    @property
    def end(self) -> int:
        """The page behind the last."""
        return self.first + self.pages


class Block(NamedTuple):
    """A memslot: its pages, its kind, its id in KVM."""

    first: int
    pages: int
    kind: Kind
    slot: int

    @property
    def end(self) -> int:
        """The page behind the last."""
        return self.first + self.pages

    def without(self, first: int, end: int) -> list[Piece]:
        """Return what is left of it, before and behind, once the pages [first, end) are cut out."""
        rest = ((self.first, min(first, self.end)), (max(end, self.first), self.end))
        return [Piece(low, high - low, self.kind) for low, high in rest if low < high]


class SlotsExhaustedError(KvmdpError):
    """Every slot id is in use."""


class SlotMap:
    """The blocks, sorted.

    Arguments: `ids`, the slot ids it may give out; `borders`, the pages that no block may reach over: RAM is not
    contiguous in guest-physical space there.
    """

    def __init__(self, ids: range, borders: Iterable[int] = ()) -> None:
        self._free = list(reversed(ids))
        self._borders = sorted(borders)
        self._firsts: list[int] = []  # ascending; a list of some ten thousand beats any tree
        self._blocks: dict[int, Block] = {}  # by first page

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(self._firsts)

    def blocks(self) -> list[Block]:
        """Return all blocks in the order of their pages."""
        return [self._blocks[first] for first in self._firsts]

    # Looking

    def at(self, page: int) -> Block | None:
        """Return the block that holds a page, or None where there is no slot."""
        index = bisect_right(self._firsts, page) - 1
        if index < 0:
            return None
        block = self._blocks[self._firsts[index]]
        return block if page < block.first + block.pages else None

    def overlapping(self, first: int, count: int) -> list[Block]:
        """Return the blocks that hold any of the pages [first, first + count), ascending."""
        index = bisect_right(self._firsts, first)
        stop = bisect_left(self._firsts, first + count, index)
        blocks = [self._blocks[each] for each in self._firsts[index:stop]]
        before = self.at(first)
        return blocks if before is None else [before, *blocks]

    def extent(self, first: int, count: int) -> tuple[int, int]:
        """Return [first, first + count) as (first, end), widened to the whole of the blocks at both ends."""
        low, high = self.at(first), self.at(first + count - 1)
        return (
            first if low is None else low.first,
            first + count if high is None else high.first + high.pages,
        )

    def blocks_in(self, first: int, count: int) -> int:
        """Return how many blocks hold pages of [first, first + count)."""
        begin_inside = bisect_left(self._firsts, first + count) - bisect_right(self._firsts, first)
        return begin_inside + (self.at(first) is not None)

    def is_open(self, first: int, count: int) -> bool:
        """Return whether open blocks hold every one of the pages."""
        page, end = first, first + count
        while page < end:
            block = self.at(page)
            if block is None or block.kind is not Kind.OPEN:
                return False
            page = block.first + block.pages
        return True

    def group(self, page: int, end: int, most: int, kind: Kind) -> list[Block]:
        """Return the next two or more, at most `most`, adjacent blocks of a kind.

        They begin in [page, end), or hold `page`. They could be one block. The list is empty if there are none.
        """
        found: list[Block] = []
        for block in self.overlapping(page, end - page):
            if (
                block.kind is kind
                and found
                and found[-1].end == block.first
                and not self._border(block.first)
            ):
                found.append(block)
                if len(found) == most:
                    break
                continue
            if len(found) > 1:
                break
            found = [block] if block.kind is kind else []
        return found if len(found) > 1 else []

    def _border(self, page: int) -> bool:
        index = bisect_left(self._borders, page)
        return index < len(self._borders) and self._borders[index] == page

    def pieces(self, first: int, count: int, kind: Kind, size: int | None = None) -> list[Piece]:
        """Cut a run into pieces at the borders, and at the multiples of `size` if that is given."""
        pieces, end = [], first + count
        while first < end:
            stop = end if size is None else min((first // size + 1) * size, end)
            index = bisect_right(self._borders, first)
            if index < len(self._borders):
                stop = min(stop, self._borders[index])
            pieces.append(Piece(first, stop - first, kind))
            first = stop
        return pieces

    # Changing

    def add(self, piece: Piece) -> Block:
        """Note a block where there is none. Raises ValueError for an overlap, SlotsExhaustedError."""
        if piece.pages < 1 or self.blocks_in(piece.first, piece.pages):
            raise ValueError(f"pages {piece.first} to {piece.end - 1} have a slot already, or are none")
        if bisect_left(self._borders, piece.end) != bisect_right(self._borders, piece.first):
            raise ValueError(
                f"pages {piece.first} to {piece.end - 1} are not contiguous in guest-physical space"
            )
        if not self._free:
            raise SlotsExhaustedError(f"all {self.count} memslots that KVM has for RAM are in use")
        block = Block(piece.first, piece.pages, piece.kind, self._free.pop())
        insort(self._firsts, block.first)
        self._blocks[block.first] = block
        return block

    def remove(self, block: Block) -> None:
        """Note that a block is gone; its slot id is free again. Raises KeyError if it is not one of the blocks."""
        if self._blocks.get(block.first) != block:
            raise KeyError(block)
        del self._blocks[block.first]
        del self._firsts[bisect_left(self._firsts, block.first)]
        self._free.append(block.slot)

    def flip(self, block: Block, kind: Kind) -> Block:
        """Note that a block is of another kind, under the same id. Raises KeyError if it is not one of the blocks."""
        if self._blocks.get(block.first) != block:
            raise KeyError(block)
        flipped = self._blocks[block.first] = block._replace(kind=kind)
        return flipped
