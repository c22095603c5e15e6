"""A guest that has a quarter of its working set in memory: slower, and exact."""

import pytest
from harness import (
    MEMORY,
    SEED,
    TIMEOUT,
    every_trap,
    every_trap_and_backing,
    host_vectors,
    plan,
    require_trap,
)

from kvmdp.machine.experiment import run_workload
from kvmdp.machine.machine import Machine, MachineOptions
from kvmdp.machine.workloads import WORKLOADS
from kvmdp.memory.layout import PAGE_SIZE
from kvmdp.paging.fault import PagingError
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

LIMIT = MEMORY // 4


def run_limited(trap, workload, backing="memfd", **options):
    require_trap(trap)
    machine = MachineOptions(MEMORY, trap, backing, workload.options.vcpus, resident_limit=LIMIT, **options)
    result = run_workload(machine, workload, SyntheticSource(MEMORY, SEED), timeout=TIMEOUT)
    assert result.wrong_pages == []
    assert result.guest_checksum == result.expected_checksum
    assert result.ok
    return result


@every_trap
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_is_exact(trap, name):
    workload = plan(name, vcpus=2, vector=host_vectors())
    result = run_limited(trap, workload)
    if len(workload.touched) * PAGE_SIZE > 2 * LIMIT:
        assert result.counters.pages_evicted > 0
    assert result.pages_checked >= len(workload.touched)


@every_trap_and_backing
def test_what_comes_again_has_been_written(trap, backing):
    workload = plan("atomic", vcpus=2, iterations=3)
    result = run_limited(trap, workload, backing)
    counters = result.counters
    assert counters.pages_fetched == len(workload.touched)
    assert counters.pages_refetched > 0
    # A uffd reader cannot take pages out itself.
    slack = 64 if trap == "userfaultfd" else 2
    assert result.resident_peak <= LIMIT // PAGE_SIZE + slack


def test_pages_that_are_used_are_spared():
    workload = plan("atomic", vcpus=1, pages=200, iterations=3)
    assert run_limited("marker", workload).counters.pages_backed > 0


def test_a_limit_below_what_the_guest_can_run_in():
    options = MachineOptions(MEMORY, "mmio", vcpus=2, resident_limit=64 << 10)
    with pytest.raises(ValueError, match="less than this guest can run in: give 304K or more"):
        Machine(options, SyntheticSource(MEMORY))


class FullSink:
    def store(self, offset, content):
        raise OSError(28, "No space left on device")

    def close(self):
        pass


@every_trap
def test_a_sink_that_is_full_ends_the_run(trap):
    require_trap(trap)

    def fill_up(machine):
        machine.pager.sink = FullSink()

    workload = plan("checksum")
    machine = MachineOptions(MEMORY, trap, resident_limit=LIMIT)
    with pytest.raises(PagingError, match="No space left on device"):
        run_workload(machine, workload, SyntheticSource(MEMORY, SEED), timeout=TIMEOUT, on_start=fill_up)
