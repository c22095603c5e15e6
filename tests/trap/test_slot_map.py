"""The map of memslots alone: whatever is cut and merged, each page is in the block that a plain array says."""

import random

import pytest

from kvmdp.trap.slots.slot_map import Block, Kind, Piece, SlotMap, SlotsExhaustedError

PAGES = 400
BORDER = 150
IDS = range(8, 8 + PAGES)


def check(slot_map, model):
    """Compare with the model: for each page None, or the kind of its block."""
    blocks = slot_map.blocks()
    assert blocks == sorted(blocks)
    assert slot_map.count == len(blocks)
    assert len({block.slot for block in blocks}) == len(blocks)
    assert all(block.slot in IDS for block in blocks)
    seen = [None] * PAGES
    for block in blocks:
        assert block.end <= BORDER or block.first >= BORDER
        for page in range(block.first, block.end):
            assert seen[page] is None
            seen[page] = block.kind
            assert slot_map.at(page) == block
    assert seen == model
    assert [slot_map.at(page) is None for page in range(PAGES)] == [kind is None for kind in model]


def check_looks(slot_map, model, chooser):
    first = chooser.randrange(PAGES)
    count = chooser.randint(1, PAGES - first)
    touched = [block for block in slot_map.blocks() if block.first < first + count and first < block.end]
    assert slot_map.overlapping(first, count) == touched
    assert slot_map.blocks_in(first, count) == len(touched)
    assert slot_map.is_open(first, count) == all(kind is Kind.OPEN for kind in model[first : first + count])
    low, high = slot_map.extent(first, count)
    assert low == min([first, *(block.first for block in touched)])
    assert high == max([first + count, *(block.end for block in touched)])


def take_out(slot_map, first, end):
    for block in slot_map.overlapping(first, end - first):
        slot_map.remove(block)
        for left in block.without(first, end):
            slot_map.add(left)


@pytest.mark.parametrize("seed", range(5))
def test_random_cuts_flips_and_merges_agree_with_an_array(seed):
    chooser = random.Random(seed)
    slot_map, model = SlotMap(IDS, [0, BORDER]), [None] * PAGES
    for _ in range(300):
        first = chooser.randrange(PAGES)
        end = min(first + chooser.choice((1, 1, 3, 32, 200)), PAGES)
        step = chooser.random()
        if step < 0.5:
            take_out(slot_map, first, end)
            kind = chooser.choice((Kind.OPEN, Kind.CLOSED, None))
            if kind is not None:
                for piece in slot_map.pieces(first, end - first, kind, chooser.choice((1, 16, None))):
                    slot_map.add(piece)
            model[first:end] = [kind] * (end - first)
        elif step < 0.8:
            kind = chooser.choice((Kind.OPEN, Kind.CLOSED))
            while group := slot_map.group(first, end, 8, kind):
                assert 2 <= len(group) <= 8
                for block in group:
                    slot_map.remove(block)
                slot_map.add(Piece(group[0].first, group[-1].end - group[0].first, kind))
        elif (block := slot_map.at(first)) is not None:
            kind = chooser.choice((Kind.OPEN, Kind.CLOSED))
            assert slot_map.flip(block, kind).slot == block.slot
            model[block.first : block.end] = [kind] * block.pages
        check(slot_map, model)
        check_looks(slot_map, model, chooser)


def test_what_cannot_be_a_block_is_refused():
    slot_map = SlotMap(range(2), [0, BORDER])
    slot_map.add(Piece(10, 10, Kind.CLOSED))
    for piece in (Piece(19, 1, Kind.OPEN), Piece(5, 6, Kind.OPEN), Piece(30, 0, Kind.OPEN)):
        with pytest.raises(ValueError, match="have a slot already, or are none"):
            slot_map.add(piece)
    with pytest.raises(ValueError, match="not contiguous"):
        slot_map.add(Piece(BORDER - 1, 2, Kind.OPEN))
    with pytest.raises(KeyError):
        slot_map.remove(Block(10, 10, Kind.OPEN, 0))
    slot_map.add(Piece(0, 10, Kind.OPEN))
    with pytest.raises(SlotsExhaustedError, match="all 2 memslots"):
        slot_map.add(Piece(50, 1, Kind.OPEN))
    slot_map.remove(slot_map.blocks()[0])
    slot_map.add(Piece(50, 1, Kind.OPEN))
    assert [block.slot for block in slot_map.blocks()] == [0, 1]
