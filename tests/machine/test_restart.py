"""Running the guest again on the same machine: from its entry, with RAM as it is, and absent pages that still trap."""

import numpy as np
import pytest
from harness import (
    ALL_TRAPS,
    BACKINGS,
    LOOP_FOREVER,
    MEMORY,
    SEED,
    TIMEOUT,
    WITH_DEVICE_VIEW,
    all_of_ram,
    make_machine,
    plan,
    program_machine,
)

from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.registry import TRAPS

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]

SOURCE = SyntheticSource(MEMORY, SEED)
PAGES = MEMORY // 4096
WAYS = [
    (trap, backing)
    for trap in ALL_TRAPS
    for backing in BACKINGS
    if backing == "memfd" or not (trap in WITH_DEVICE_VIEW or TRAPS[trap].needs_shared)
]


@pytest.mark.parametrize(("trap", "backing"), WAYS)
def test_a_second_run_goes_on_with_memory_as_it_is_and_fetches_only_what_is_absent(trap, backing):
    half = plan("atomic", vcpus=2, pages=PAGES // 2)
    whole = plan("atomic", vcpus=2, pages=PAGES)
    with make_machine(trap, backing, workload=half) as machine:
        machine.run(TIMEOUT)
        assert machine.pager.counters.pages_fetched == PAGES // 2
        machine.restart(whole.blocks)
        assert machine.pager.mark_nonpresent(0, 32) == 32
        machine.run(TIMEOUT)
        assert [each.parameters.checksum for each in machine.threads] == whole.expected_checksums(
            SOURCE.pages
        )
        assert machine.pager.counters.pages_fetched == PAGES
        assert machine.pager.counters.pages_backed == 32
        pages = np.arange(PAGES)
        expected = whole.expected_pages(lambda wanted: half.expected_pages(SOURCE.pages, wanted), pages)
        assert np.array_equal(all_of_ram(machine), expected)


@pytest.mark.parametrize("name", ["clock", "execute", "vector"])
def test_the_guest_finds_its_vcpus_as_at_boot(name):
    first, second = plan(name, vcpus=2), plan("checksum", vcpus=2, ring=0)
    with make_machine("marker", workload=first) as machine:
        for blocks in (second.blocks, first.blocks):
            machine.run(TIMEOUT)
            machine.restart(blocks)
        machine.run(TIMEOUT)


def test_what_a_fault_is_stays_the_same_under_userfaultfd():
    workload, more = plan("checksum", pages=16), plan("checksum", pages=32)
    with make_machine("userfaultfd", workload=workload) as machine:
        machine.run(TIMEOUT)
        machine.restart(more.blocks)
        machine.run(TIMEOUT)
        assert sum(len(each) for each in machine.pager.trap.latencies) == 32
        assert machine.threads[0].exits.total() == 1  # the report


def test_a_machine_whose_guest_is_not_done_is_not_restarted():
    with program_machine("marker", LOOP_FOREVER) as machine:
        blocks = [each.parameters for each in machine.threads]
        with pytest.raises(ValueError, match="when all its vCPUs are done"):
            machine.restart(blocks)
        with pytest.raises(GuestError):
            machine.run(0.2)
        with pytest.raises(ValueError, match="when all its vCPUs are done"):
            machine.restart(blocks)
