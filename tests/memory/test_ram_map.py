"""Guest-physical addresses and offsets in RAM, over the hole between two regions."""

import pytest

from kvmdp.memory.ram_map import RamMap

MAP = RamMap([(0, 0x3000, 0), (0x10000, 0x2000, 0x3000)])


def test_a_range_is_cut_at_the_border_of_regions_that_touch():
    adjacent = RamMap([(0, 0x1000, 0x5000), (0x1000, 0x1000, 0)])
    assert list(adjacent.pieces(0xFF0, 0x20)) == [(0x5FF0, 0x10), (0, 0x10)]


@pytest.mark.parametrize(("gpa", "length"), [(0x3000, 1), (0x2FFF, 2), (0xFFFF, 1), (0x11FFF, 2), (0, -1)])
def test_what_is_not_ram_is_refused(gpa, length):
    with pytest.raises(ValueError, match=f"gpa {gpa:#x}|is not guest RAM"):
        list(MAP.pieces(gpa, length))


def test_batches_hold_no_more_than_they_may_and_lose_nothing():
    batches = list(MAP.batches([(0x2F00, 0x100), (0x10000, 0x250), (0x11000, 0)], 0x100))
    assert batches == [[(0x2F00, 0x100)], [(0x3000, 0x100)], [(0x3100, 0x100)], [(0x3200, 0x50)]]


def test_a_segment_that_is_not_ram_spoils_all_before_any_is_given():
    with pytest.raises(ValueError, match="gpa 0x3000"):
        next(MAP.batches([(0, 0x10), (0x3000, 0x10)], 0x100))


@pytest.mark.parametrize(("offset", "gpa"), [(0, 0), (0x2FFF, 0x2FFF), (0x3000, 0x10000), (0x4FFF, 0x11FFF)])
def test_the_way_back(offset, gpa):
    assert MAP.gpa_at(offset) == gpa
