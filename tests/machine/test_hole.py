"""A hole of the map wherever a machine wants it: guest and devices find RAM at the right addresses."""

import contextlib

import numpy as np
import pytest
from harness import SEED, TIMEOUT, every_trap, host_vectors, make_machine, plan, require_trap

from kvmdp.lab.experiment import run_workload, usable_memory
from kvmdp.machine.guest_abi import BOOT_BASE
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.page_tables import PageTables
from kvmdp.machine.workloads import WORKLOADS
from kvmdp.memory.layout import HIGH_RAM_BASE, LOW_RAM_END, MAX_LOW_RAM_END, GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.slots.ram_slots import check_granule

MiB, GiB = 1 << 20, 1 << 30
HOLE = 2 * MiB  # so early that a small machine has RAM on both sides
MEMORY = 4 * MiB
BORDER = HOLE // PAGE_SIZE  # the first page behind it


def prove(trap, workload, **options):
    require_trap(trap)
    machine = MachineOptions(
        workload.options.memory_bytes,
        trap,
        low_ram_end=workload.options.low_ram_end,
        vcpus=workload.options.vcpus,
        **options,
    )
    source = SyntheticSource(machine.memory_bytes, SEED)
    result = run_workload(machine, workload, source, timeout=TIMEOUT, collapse="end")
    assert result.wrong_pages == []
    assert result.ok
    assert result.pages_present >= len(workload.touched)


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("name", "ring"),
    # Some hosts emulate ring 0, without vector instructions.
    [(name, ring) for name in sorted(WORKLOADS) for ring in (3, 0) if (name, ring) != ("vector", 0)],
)
def test_each_workload_goes_over_the_hole(name, ring):
    # The share of one of the two vCPUs has the hole in it, away from its middle, where some workloads begin anew.
    workload = plan(
        name,
        memory=MEMORY,
        low_ram_end=HOLE,
        vcpus=2,
        ring=ring,
        pages=3 * BORDER // 2 if ring else BORDER + 8,
        vector=host_vectors() if ring else 0,
    )
    assert any(share.holds(np.array([BORDER - 1, BORDER])).all() for share in workload.shares)
    prove("marker", workload)


@pytest.mark.kvm
@every_trap
def test_each_trap_has_ram_on_both_sides(trap):
    workload = plan("atomic", memory=MEMORY, low_ram_end=HOLE, vcpus=2, pages=BORDER + 128)
    prove(trap, workload, fault_around=64)


@pytest.mark.kvm
@pytest.mark.parametrize("hole", [2 * GiB, LOW_RAM_END, MAX_LOW_RAM_END])
@pytest.mark.parametrize("trap", ["marker", "mmio"])
def test_the_holes_of_q35_pc_and_firecracker_with_their_page_tables_in_ram(trap, hole):
    memory = hole + 64 * MiB
    workload = plan(
        "touch",
        memory=usable_memory(memory, "paged", hole),
        low_ram_end=hole,
        order="strided",
        stride=8009,
        touches=110,
        write=True,
    )
    assert workload.touched[0] < hole // PAGE_SIZE <= workload.touched[-1]
    require_trap(trap)
    options = MachineOptions(memory, trap, low_ram_end=hole, page_tables="paged")
    result = run_workload(options, workload, SyntheticSource(memory, SEED), timeout=TIMEOUT)
    assert result.ok


@pytest.mark.parametrize("hole", [HOLE, 2 * GiB, LOW_RAM_END, MAX_LOW_RAM_END])
def test_paged_page_tables_take_the_end_of_ram_and_no_more(hole):
    memory = hole + 64 * MiB
    tables = PageTables(GuestLayout(memory, hole), paged=True)
    assert tables.first_page * PAGE_SIZE == usable_memory(memory, "paged", hole)
    assert tables.first_page + tables.pages == memory // PAGE_SIZE


def test_the_boot_slot_lies_in_the_hole_wherever_that_begins():
    assert MAX_LOW_RAM_END == BOOT_BASE
    largest = PageTables(GuestLayout(256 * GiB, MAX_LOW_RAM_END), paged=False)
    assert BOOT_BASE + largest.boot_size <= HIGH_RAM_BASE


@pytest.mark.kvm
def test_a_device_finds_ram_where_the_guest_does():
    source = SyntheticSource(MEMORY, SEED)
    with (
        contextlib.closing(source),
        make_machine("marker", source=source, memory_bytes=MEMORY, low_ram_end=HOLE) as machine,
    ):
        device = machine.memory_for_device(0)
        last, first = source.pages(np.array([BORDER - 1, BORDER]))
        assert device.read(HOLE - PAGE_SIZE, PAGE_SIZE) == last.tobytes()
        assert device.read(HIGH_RAM_BASE, PAGE_SIZE) == first.tobytes()
        for gpa in (HOLE, LOW_RAM_END, HIGH_RAM_BASE - 8, HIGH_RAM_BASE + MEMORY - HOLE):
            with pytest.raises(ValueError, match="is not guest RAM"):
                device.read(gpa, 8)


@pytest.mark.kvm
def test_a_workload_that_is_planned_for_another_hole_is_refused():
    options = MachineOptions(MEMORY, "mmio", low_ram_end=HOLE)
    with pytest.raises(
        ValueError, match="checksum is planned for a hole at 0xc0000000, and RAM has one at 0x200000"
    ):
        run_workload(options, plan("checksum", memory=MEMORY), SyntheticSource(MEMORY, SEED))


def test_a_granule_that_reaches_over_the_hole_is_refused_with_the_largest_that_does_not():
    sentence = "a granule of 512M reaches over RAM's hole at 3328M: give at most 256M"
    with pytest.raises(ValueError, match=sentence):
        check_granule(512 * MiB, GuestLayout(4 * GiB, MAX_LOW_RAM_END))
    check_granule(256 * MiB, GuestLayout(4 * GiB, MAX_LOW_RAM_END))
    check_granule(512 * MiB, GuestLayout(3 * GiB, MAX_LOW_RAM_END))  # RAM does not reach it
