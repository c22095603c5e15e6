"""Where other machines have the hole of their map."""

import re

import pytest
from qemu import pc

from kvmdp.memory.holes import HOLES, OUR_HOLE, parse_hole
from kvmdp.memory.layout import HIGH_RAM_BASE, LOW_RAM_END, MAX_LOW_RAM_END, GuestLayout, Region

MiB, GiB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("name", "memory", "begins"),
    [
        ("pc", 64 * MiB, 3 * GiB),
        ("pc", 3 * GiB, 3 * GiB),
        ("pc", 3200 * MiB, MAX_LOW_RAM_END),  # all of it lies below
        ("pc", 3584 * MiB, 3 * GiB),
        ("q35", 2 * GiB, 2 * GiB),
        ("q35", 2560 * MiB, 0xB000_0000),
        ("q35", 2816 * MiB, 2 * GiB),
        ("q35", 64 * GiB, 2 * GiB),
        ("3328M", 5 * GiB, 3328 * MiB),
        ("32M", 64 * MiB, 32 * MiB),
    ],
)
def test_the_hole_begins_where_it_does_in_such_a_machine(name, memory, begins):
    assert parse_hole(name).begins_at(memory) == begins
    GuestLayout(memory, begins)


def test_what_is_not_said_is_three_gib_whatever_the_size():
    for memory in (64 * MiB, 3200 * MiB, 5 * GiB):
        assert OUR_HOLE.begins_at(memory) == LOW_RAM_END


def test_a_machine_with_ram_where_ours_has_its_code_is_refused():
    with pytest.raises(
        ValueError, match="all of its 3400M below 4G, and from 3328M on lies the guest's own code"
    ):
        HOLES["pc"].begins_at(3400 * MiB)


def test_ram_that_ends_above_four_gib_tells_how_much_it_is():
    assert HOLES["pc"].memory_behind(6 * GiB) == 5 * GiB
    assert HOLES["q35"].memory_behind(6 * GiB) == 4 * GiB
    with pytest.raises(
        ValueError, match="RAM up to 4608M is 2560M in all, and such a machine has RAM above 4G only"
    ):
        HOLES["q35"].memory_behind(4608 * MiB)


@pytest.mark.parametrize("text", ["", "i440fx", "-1", "3.25G"])
def test_a_hole_that_is_none(text):
    with pytest.raises(
        ValueError, match=r"there is no hole '.*': give pc, q35 or where it begins, such as 3328M"
    ):
        parse_hole(text)


@pytest.mark.parametrize("text", ["0", "1M", "3M", "3330M", "4G"])
def test_a_hole_where_none_can_be(text):
    with pytest.raises(
        ValueError, match=f"RAM's hole cannot begin at {text}: give a multiple of 2M up to 3328M"
    ):
        parse_hole(text)


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("machine", "memory"),
    [("pc", 3200), ("pc", 3584), ("pc", 5120), ("q35", 2560), ("q35", 2816), ("q35", 5120)],
)
def test_qemu_lays_ram_out_like_that(machine, memory):
    with pc("-m", f"{memory}M", "-S", machine=machine) as monitor:
        tree = monitor("human-monitor-command", **{"command-line": "info mtree"})
    found = {}
    for start, end, name in re.findall(
        r"([0-9a-f]{16})-([0-9a-f]{16}) .*alias (ram-(?:below|above)-4g) ", tree
    ):
        found[name] = (int(start, 16), int(end, 16) + 1 - int(start, 16))
    layout = GuestLayout(memory * MiB, HOLES[machine].begins_at(memory * MiB))
    regions = {
        "ram-below-4g" if each.gpa < HIGH_RAM_BASE else "ram-above-4g": each for each in layout.regions
    }
    assert {name: Region(*place, regions[name].offset) for name, place in found.items()} == regions
