"""The trap layered: closed memslots by region, markers inside a region that has been touched."""

import random
import time
from collections import Counter

import numpy as np
import pytest
from harness import SEED, TIMEOUT, all_of_ram, make_machine, meanwhile, plan, prove, require_trap

from kvmdp.kvm import BadAddress
from kvmdp.lab.invariants import violations
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.page import PAGE_SIZE
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.slots.ram_slots import RamSlots
from kvmdp.trap.uffd.marker import MarkerTrap

pytestmark = pytest.mark.kvm

REGION = 512
MEMORY = 8 << 20
PAGES = MEMORY // PAGE_SIZE


def layered(**options):
    return make_machine("layered", memory_bytes=MEMORY, **options)


@pytest.mark.parametrize("vcpus", [1, 4])
@pytest.mark.parametrize("workload", ["touch", "fill", "checksum", "atomic", "execute", "string", "copy"])
def test_every_workload_is_exact(workload, vcpus):
    prove("layered", "memfd", plan(workload, vcpus=vcpus, memory=4 << 20))


def test_an_untouched_region_costs_a_closed_memslot_and_no_page_table():
    with layered() as machine:
        picture = machine.pager.trap.picture()
        assert [block.kind.value for block in picture.blocks] == ["closed"] * 4
        machine.memory.read(700 * PAGE_SIZE, 8)
        picture = machine.pager.trap.picture()
        assert [block.kind.value for block in picture.blocks] == ["closed", "open", "closed", "closed"]
        assert machine.pager.counters.pages_fetched == 1
        assert violations(machine.pager) == []


@pytest.mark.parametrize("vcpus", [2, 4])
def test_vcpus_that_touch_regions_for_the_first_time_together_fetch_each_page_once(vcpus):
    workload = plan(
        "touch", vcpus=vcpus, memory=MEMORY, order="random", touches=1500, write=True, overlap=True
    )
    with layered(workload=workload) as machine:
        machine.run(TIMEOUT)
        assert machine.pager.counters.pages_fetched == machine.pager.bitmap.count() == len(workload.touched)
        regions = len({page // REGION for page in workload.touched.tolist()})
        assert 1 <= machine.gate.stops <= 1 + regions  # to arm, and for the first touch of each region
        expected = workload.expected_pages(SyntheticSource(MEMORY, SEED).pages, workload.touched)
        assert np.array_equal(all_of_ram(machine)[workload.touched], expected)
        assert violations(machine.pager) == []


@pytest.mark.parametrize("vcpus", [2, 4])
def test_no_increment_is_lost_while_pages_go_and_memslots_are_merged(vcpus):
    workload = plan("atomic", vcpus=vcpus, memory=MEMORY, pages=2 * REGION, iterations=1)
    with layered(workload=workload) as machine:
        chooser = random.Random(3)
        pager = machine.pager

        def take_some_away(_):
            first = chooser.randrange(2 * REGION)
            pager.mark_nonpresent(first, min(chooser.choice((1, 7, 100)), 2 * REGION - first))

        def put_together(_):
            pager.collapse(0, 2 * REGION)

        with meanwhile(take_some_away, put_together):
            machine.run(TIMEOUT)
        assert violations(pager) == []
        pages = np.arange(2 * REGION)
        expected = workload.expected_pages(SyntheticSource(MEMORY, SEED).pages, pages)
        assert np.array_equal(all_of_ram(machine)[pages], expected)


def test_a_region_is_under_markers_before_its_memslot_is_an_ordinary_one(monkeypatch):
    workload = plan(
        "touch", vcpus=2, memory=MEMORY, order="random", touches=500, write=True, overlap=True, pages=PAGES
    )
    flip, serve, faults = RamSlots.flip, MarkerTrap._serve, []

    def flip_and_linger(slots, block):
        flip(slots, block)
        time.sleep(0.02)  # the other vCPU comes by

    def note(trap, address, read):
        faults.append(address)
        serve(trap, address, read)

    monkeypatch.setattr(RamSlots, "flip", flip_and_linger)
    monkeypatch.setattr(MarkerTrap, "_serve", note)
    with layered(workload=workload) as machine:
        machine.run(TIMEOUT)
        exits = sum((thread.exits for thread in machine.threads), Counter())
        assert (faults, exits[BadAddress]) == ([], 0)


def test_it_can_be_switched_off_and_on():
    with layered() as machine:
        machine.pager.mark_present(0, PAGES)
        assert machine.pager.trap.memslots == 4
        machine.pager.disable()
        assert (machine.pager.trap.memslots, violations(machine.pager)) == (1, [])
        machine.pager.enable()
        assert (machine.pager.trap.memslots, violations(machine.pager)) == (1, [])
        machine.pager.mark_nonpresent(500, 100)
        assert violations(machine.pager) == []
        machine.memory.read(0, MEMORY)
        machine.pager.collapse(0, PAGES)
        assert (machine.pager.trap.memslots, violations(machine.pager)) == (1, [])


def test_private_memory_is_refused():
    options = MachineOptions(MEMORY, "layered", "anonymous")
    with pytest.raises(ValueError, match="which anonymous memory has not: use the backing memfd"):
        Machine(options, SyntheticSource(MEMORY, SEED))


def test_8_gib_fetch_what_is_touched_and_nothing_beyond():
    require_trap("layered")
    memory, touches = 8 << 30, 3000
    result = prove(
        "layered", "memfd", plan("touch", memory=memory, order="random", touches=touches, write=True)
    )
    assert result.memslots == 512
    assert result.counters.pages_fetched == result.pages_present <= touches
    assert result.pages_present == result.pages_checked
