"""A machine whose guest never has demand paging, unless it is switched on after all."""

import pytest
from harness import BACKINGS, MEMORY, SEED, TIMEOUT, make_machine, plan

from kvmdp.lab.invariants import violations
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.page import PAGE_SIZE
from kvmdp.source.base import read_pages
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize("backing", BACKINGS)
def test_the_guest_finds_all_of_its_memory_and_takes_no_fault(backing):
    workload = plan("checksum", vcpus=2)
    with make_machine("mmio", backing, workload=workload, demand_paging=False) as machine:
        machine.run(TIMEOUT)
        assert machine.pager.counters.claims == 0
        assert machine.pager.bitmap.count() == MEMORY // PAGE_SIZE
        assert (machine.pager.trap.memslots, violations(machine.pager)) == (1, [])
        image = SyntheticSource(MEMORY, SEED)
        expected = workload.expected_checksums(lambda pages: read_pages(image, pages))
        assert [thread.parameters.checksum for thread in machine.threads] == expected


def test_it_can_be_switched_on():
    with make_machine("mmio", demand_paging=False) as machine:
        content = machine.memory.read(7 * PAGE_SIZE, PAGE_SIZE)
        machine.pager.enable()
        assert machine.pager.evict(7, 1) == 1
        assert violations(machine.pager) == []
        assert machine.memory.read(7 * PAGE_SIZE, PAGE_SIZE) == content


def test_a_trap_that_is_not_by_memslot_is_refused():
    with pytest.raises(ValueError, match="without demand paging has plain memslots"):
        Machine(MachineOptions(MEMORY, "marker", demand_paging=False), SyntheticSource(MEMORY))
