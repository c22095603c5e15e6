"""RAM with more granules than memslots: regions are cut as pages come, merged when they are full, bounded in number.

Small guests are taken for large ones here: what makes the difference is how many granules get a memslot of their own.
"""

import itertools
import random

import numpy as np
import pytest
from harness import SEED, TIMEOUT, all_of_ram, make_machine, meanwhile, plan, program_machine, require_trap

from kvmdp.lab.invariants import violations
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.page import PAGE_SIZE, Outcome
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.slots import ram_slots as slots
from kvmdp.trap.slots.partial_slots import SLOT_BYTES

pytestmark = pytest.mark.kvm

TRAPS = ("memory-fault", "mmio")
REGION = 512
MEMORY = 8 << 20
PAGES = MEMORY // PAGE_SIZE

every_trap = pytest.mark.parametrize("trap", TRAPS)


@pytest.fixture
def in_regions(monkeypatch):
    """Let few granules have a memslot of their own."""
    monkeypatch.setattr(slots, "MAX_GRANULE_SLOTS", 64)


def machine_of(trap, *, memory_bytes=MEMORY, slot_memory=256 << 20, **options):
    options.setdefault("granule", PAGE_SIZE)
    return make_machine(trap, memory_bytes=memory_bytes, slot_memory=slot_memory, **options)


def fetched(machine):
    return machine.pager.counters.pages_fetched


def check_content(machine):
    """Every present page is the image's, and nothing contradicts anything."""
    assert violations(machine.pager) == []
    pages = np.flatnonzero([machine.pager.bitmap.test(page) for page in range(machine.layout.pages)])
    expected = SyntheticSource(machine.layout.memory_bytes, SEED).pages(pages)
    assert np.array_equal(machine.memory.read_pages(pages), expected)


def test_arming_makes_a_closed_memslot_a_region_and_a_touch_takes_one_page(in_regions):
    with machine_of("memory-fault") as machine:
        assert machine.pager.trap.memslots == PAGES // REGION
        machine.memory.read(1000 * PAGE_SIZE, 8)
        assert fetched(machine) == 1
        assert machine.pager.trap.memslots == PAGES // REGION + 2
        check_content(machine)


def test_mmio_has_memslots_for_what_is_present_alone(in_regions):
    with machine_of("mmio") as machine:
        assert machine.pager.trap.memslots == 0
        for page in (1000, 1002, 3):
            machine.memory.read(page * PAGE_SIZE, 8)
        assert machine.pager.trap.memslots == 3
        check_content(machine)


@every_trap
def test_a_full_region_becomes_one_memslot_and_full_neighbours_one_together(in_regions, trap):
    closed = trap == "memory-fault"
    with machine_of(trap) as machine:
        pages = list(range(REGION, 2 * REGION))
        random.Random(1).shuffle(pages)
        for page in pages:
            machine.memory.read(page * PAGE_SIZE, 8)
        assert machine.pager.trap.memslots == 1 + closed * (PAGES // REGION - 1)
        check_content(machine)
        for page in itertools.chain(range(REGION), range(2 * REGION, PAGES)):
            machine.memory.read(page * PAGE_SIZE, 8)
        assert machine.pager.trap.memslots == 1
        assert fetched(machine) == PAGES
        check_content(machine)


@every_trap
@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_random_touches_of_vcpus_are_exact_and_fetch_what_they_touch(in_regions, trap, vcpus):
    workload = plan(
        "touch", vcpus=vcpus, memory=MEMORY, order="random", touches=600, write=True, overlap=True
    )
    with machine_of(trap, workload=workload) as machine:
        machine.run(TIMEOUT)
        assert fetched(machine) == len(workload.touched)
        assert violations(machine.pager) == []
        expected = workload.expected_pages(SyntheticSource(MEMORY, SEED).pages, workload.touched)
        assert np.array_equal(all_of_ram(machine)[workload.touched], expected)


@every_trap
@pytest.mark.parametrize("vcpus", [2, 4])
def test_no_increment_is_lost_while_regions_are_cut_and_merged(in_regions, trap, vcpus):
    memory = 4 << 20
    workload = plan("atomic", vcpus=vcpus, memory=memory, pages=2 * REGION, iterations=2)
    with machine_of(trap, workload=workload) as machine:
        chooser = random.Random(3)

        def take_some_away(_):
            first = chooser.randrange(2 * REGION)
            machine.pager.mark_nonpresent(first, min(chooser.choice((1, 7, 100)), 2 * REGION - first))

        def put_together(_):
            machine.pager.mark_present(chooser.randrange(2) * REGION, REGION)

        with meanwhile(take_some_away, put_together):
            machine.run(TIMEOUT)
        assert violations(machine.pager) == []
        machine.pager.cancel()
        pages = np.arange(2 * REGION)
        expected = workload.expected_pages(SyntheticSource(memory, SEED).pages, pages)
        assert np.array_equal(all_of_ram(machine)[pages], expected)
        assert fetched(machine) == 2 * REGION


# xor eax, eax; mov esi, 0x5000; 1: lock inc qword [rsi]; inc rax; cmp dword [rsi + 8], 0; je 1b; ret
COUNT_UNTIL_TOLD = bytes.fromhex("31c0 be00500000 f048ff06 48ffc0 837e0800 74f3 c3")


@every_trap
@pytest.mark.parametrize("ring", [3, 0])
def test_no_increment_is_lost_on_what_is_present_beside_a_page_that_is_cut_out(in_regions, trap, ring):
    # What vCPUs add to is present all the time. KVM does a LOCK-prefixed access that finds no memslot as a load and a
    # plain store: were the rest of a merged memslot missing for a moment, one vCPU would undo what the other has done.
    patches = [(0x5000, bytes(16))]
    options = {"memory_bytes": MEMORY // 4, "granule": PAGE_SIZE}
    with program_machine(trap, COUNT_UNTIL_TOLD, ring=ring, vcpus=2, patches=patches, **options) as machine:
        pager = machine.pager
        pager.mark_present(0, REGION)
        pager.collapse(0, REGION)

        def cut_out_and_put_back(number):
            assert pager.trap.memslots == 1
            assert pager.mark_nonpresent(100 + number, 1) == 1
            machine.memory.read((100 + number) * PAGE_SIZE, 8)  # the region is full again, and is merged
            if number == 300:
                machine.memory.write(0x5008, b"\1")
                return False
            return None

        with meanwhile(cut_out_and_put_back):
            machine.run(TIMEOUT)
        counted = [thread.parameters.checksum for thread in machine.threads]
        assert min(counted) > 0
        assert int(all_of_ram(machine)[5][0]) == sum(counted)


@every_trap
def test_the_fullest_regions_are_completed_when_the_pieces_take_too_much_memory(in_regions, trap):
    least = 2 * REGION
    pages = 2 * PAGES
    with machine_of(trap, memory_bytes=2 * MEMORY, slot_memory=least * SLOT_BYTES) as machine:
        for page in range(0, pages, 2):
            machine.memory.read(page * PAGE_SIZE, 8)
            assert machine.pager.trap.memslots <= least + pages // REGION + 2
        assert fetched(machine) > pages // 2
        check_content(machine)


@every_trap
def test_pages_that_go_here_and_there_do_not_use_up_the_memslots_that_kvm_has(in_regions, monkeypatch, trap):
    memory, spare = 24 << 20, 3000
    monkeypatch.setattr(slots, "_FIRST_RAM_SLOT", 32764 - spare)
    with machine_of(trap, memory_bytes=memory, slot_memory=1 << 30) as machine:
        pages = machine.layout.pages
        assert machine.pager.mark_present(0, pages) is Outcome.PRESENT
        machine.pager.collapse(0, pages)
        for page in range(0, pages, 2):
            machine.pager.evict(page, 1)
            assert machine.pager.trap.memslots <= spare
        assert machine.pager.counters.pages_evicted == pages // 2
        check_content(machine)


@every_trap
def test_a_page_taken_out_of_a_merged_block_leaves_the_rest_in_two(in_regions, trap):
    closed = trap == "memory-fault"
    with machine_of(trap) as machine:
        assert machine.pager.mark_present(0, PAGES) is Outcome.PRESENT
        machine.pager.collapse(0, PAGES)
        assert machine.pager.trap.memslots == 1
        machine.pager.mark_nonpresent(700, 1)
        assert machine.pager.trap.memslots == 2 + closed
        machine.pager.mark_nonpresent(701, 9)
        assert machine.pager.trap.memslots == 2 + closed
        check_content(machine)
        for page in range(700, 710):
            machine.memory.read(page * PAGE_SIZE, 8)
        assert machine.pager.trap.memslots == 1
        assert fetched(machine) == PAGES
        check_content(machine)


@every_trap
def test_demand_paging_can_be_switched_off_and_on(in_regions, trap):
    with machine_of(trap) as machine:
        machine.pager.mark_present(0, PAGES)
        machine.pager.disable()
        assert (machine.pager.trap.memslots, violations(machine.pager)) == (1, [])
        machine.pager.enable()
        assert (machine.pager.trap.memslots, violations(machine.pager)) == (1, [])
        machine.pager.mark_nonpresent(5, 1500)
        machine.memory.read(100 * PAGE_SIZE, 8)
        check_content(machine)


@pytest.mark.parametrize("trap", [*TRAPS, "layered"])
@pytest.mark.parametrize("granules", [64, 16384])
def test_memslots_agree_with_the_pages_after_every_step_of_a_random_sequence(monkeypatch, trap, granules):
    monkeypatch.setattr(slots, "MAX_GRANULE_SLOTS", granules)
    memory = 6 << 20
    pages = memory // PAGE_SIZE
    chooser = random.Random(granules)
    with make_machine(trap, memory_bytes=memory) as machine:
        pager = machine.pager
        steps = {
            "touch": lambda first, _: machine.memory.read(first * PAGE_SIZE, 8),
            "present": pager.mark_present,
            "nonpresent": pager.mark_nonpresent,
            "evict": pager.evict,
            "discard": pager.discard,
            "collapse": pager.collapse,
        }
        for _ in range(200):
            name = chooser.choice(list(steps))
            first = chooser.randrange(pages)
            count = min(chooser.choice((1, 1, 5, 300, 1024)), pages - first)
            steps[name](first, count)
            assert violations(pager) == [], (name, first, count)
        pager.mark_present(0, pages)
        pager.collapse(0, pages)
        assert pager.trap.memslots == 1


def test_2_gib_at_4_kib_fetch_what_is_touched_within_regions():
    require_trap("memory-fault")
    memory = 2 << 30
    source = SyntheticSource(memory, SEED)
    with Machine(MachineOptions(memory, "memory-fault", granule=PAGE_SIZE), source) as machine:
        chooser = random.Random(7)
        regions = chooser.sample(range(memory // (REGION * PAGE_SIZE)), 16)
        pages = np.array(
            sorted({chooser.choice(regions) * REGION + chooser.randrange(REGION) for _ in range(500)})
        )
        for page in pages.tolist():
            machine.memory.read(page * PAGE_SIZE, 8)
        assert fetched(machine) == machine.pager.bitmap.count() == len(pages)
        assert np.array_equal(machine.memory.read_pages(pages), source.pages(pages))
        assert violations(machine.pager) == []
