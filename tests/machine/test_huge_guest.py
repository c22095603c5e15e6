"""4 KiB faults on HugeTLB memory, and what KVM has mapped once all of it is present and put together.

`KVMDP_EFFORT=full` takes guests of 1 GiB, with huge pages of that size too, and one of 2 GiB, which has more granules
than there are memslots.
"""

import contextlib

import numpy as np
import pytest
from effort import by_effort
from harness import SEED, TIMEOUT, plan, require_trap

from kvmdp.errors import UnsupportedError
from kvmdp.lab.invariants import violations
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.page import PAGE_SIZE, Outcome
from kvmdp.source.base import read_pages
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.slots import ram_slots as slots

pytestmark = [pytest.mark.kvm, pytest.mark.root, pytest.mark.hugepages]

MEMORY = by_effort(64 << 20, 64 << 20, 1 << 30)
BACKINGS = by_effort(["hugetlb-2m"], ["hugetlb-2m"], ["hugetlb-2m", "hugetlb-1g"])
PAGES = MEMORY // PAGE_SIZE
REGION = 512
HUGE_PAGES = MEMORY >> 21
MEMORY_IN_REGIONS = by_effort(64 << 20, 64 << 20, 2 << 30)
TOUCHED_REGIONS = by_effort(6, 6, 48)


@contextlib.contextmanager
def machine_of(memory, backing="hugetlb-2m"):
    require_trap("memory-fault")
    options = MachineOptions(memory, "memory-fault", backing, granule=PAGE_SIZE, reserve_hugepages=True)
    try:
        machine = Machine(options, SyntheticSource(memory, SEED))
    except UnsupportedError as error:
        pytest.skip(str(error))
    with machine:
        machine.gate.forget_stops()  # arming is one, of nobody
        yield machine


@pytest.fixture(params=BACKINGS)
def machine(request):
    with machine_of(MEMORY, request.param) as machine:
        yield machine


def touch(machine, workload):
    machine.set_parameters(workload.blocks)
    machine.run(TIMEOUT)


def check_content(machine, pages):
    wanted = read_pages(SyntheticSource(machine.layout.memory_bytes, SEED), pages)
    assert (machine.memory.read_pages(pages) == wanted).all()


def test_what_is_touched_inside_16_regions_is_fetched_and_nothing_else(machine):
    workload = plan("touch", memory=MEMORY, pages=16 * REGION, order="random", touches=2000)
    touch(machine, workload)
    assert machine.pager.counters.pages_fetched == len(workload.touched)
    assert machine.pager.bitmap.count() == len(workload.touched)
    check_content(machine, workload.touched)
    assert violations(machine.pager) == []


def test_what_is_touched_inside_regions_is_fetched_by_4_kib_where_not_every_granule_has_a_memslot(
    monkeypatch,
):
    if MEMORY_IN_REGIONS <= slots.MAX_GRANULE_SLOTS * PAGE_SIZE:
        monkeypatch.setattr(slots, "MAX_GRANULE_SLOTS", 64)
    with machine_of(MEMORY_IN_REGIONS) as machine:
        regions = MEMORY_IN_REGIONS // (REGION * PAGE_SIZE)
        assert machine.pager.trap.memslots == regions
        # As many as their memslots may take kernel memory for: beyond that a region would be completed.
        workload = plan(
            "touch",
            memory=MEMORY_IN_REGIONS,
            pages=TOUCHED_REGIONS * REGION,
            order="random",
            touches=100 * TOUCHED_REGIONS,
        )
        touch(machine, workload)
        touched = np.unique(np.asarray(workload.touched) // REGION)
        assert len(touched) == TOUCHED_REGIONS
        assert machine.pager.counters.pages_fetched == len(workload.touched)
        assert machine.pager.bitmap.count() == len(workload.touched)
        assert machine.pager.trap.memslots > regions
        print(
            f"{len(workload.touched)} pages inside {len(touched)} of {regions} regions, longest stop "
            f"{machine.gate.longest_stop * 1e6:.0f} us of {machine.gate.stops}"
        )
        check_content(machine, workload.touched)
        assert violations(machine.pager) == []


def test_all_of_it_is_mapped_by_huge_pages_once_it_is_complete(machine):
    workload = plan("touch", memory=MEMORY, order="random", touches=2000)
    touch(machine, workload)
    beyond = machine.pager.counters.pages_fetched - len(workload.touched)
    assert beyond >= 0
    print(f"{beyond} pages fetched beyond the {len(workload.touched)} touched")
    check_content(machine, workload.touched)
    machine.restart(plan("touch", memory=MEMORY, pages=1).blocks)  # a stopped machine fetches nothing
    assert machine.pager.mark_present(0, PAGES) is Outcome.PRESENT
    machine.pager.collapse(0, PAGES)
    assert machine.pager.trap.memslots == 1
    machine.run(TIMEOUT)
    machine.restart(plan("touch", memory=MEMORY).blocks)
    machine.run(TIMEOUT)
    with machine.vm.statistics() as statistics:
        mapped = {name: statistics.get(name) for name in ("pages_4k", "pages_2m", "pages_1g")}
    print(mapped, f"longest stop {machine.gate.longest_stop * 1e6:.0f} us of {machine.gate.stops}")
    assert mapped["pages_4k"] <= 16
    assert mapped["pages_2m"] + REGION * mapped["pages_1g"] >= HUGE_PAGES
    check_content(machine, np.arange(min(PAGES, 4 * REGION)))
