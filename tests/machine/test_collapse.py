"""Present pages put together into huge ones while the guest runs: nothing lost, and taken apart before one goes."""

import random
import threading
import time

import numpy as np
import pytest
from harness import SEED, TIMEOUT, all_of_ram, make_machine, meanwhile, plan

from kvmdp.machine.machine import Machine
from kvmdp.paging.collapse import Collapser
from kvmdp.paging.fault import Outcome, PagingError
from kvmdp.paging.trap.collapse import REGION, can_collapse
from kvmdp.paging.trap.userfaultfd import UffdOptions
from kvmdp.source.synthetic import SyntheticSource

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]

MEMORY = 8 << 20
PAGES = MEMORY // 4096
SOURCE = SyntheticSource(MEMORY, SEED)
UFFD_TRAPS = ("marker", "userfaultfd")
UFFD = [(trap, backing) for trap in UFFD_TRAPS for backing in ("memfd", "anonymous")]
EVERY = pytest.mark.parametrize(
    ("trap", "backing"), [*UFFD, ("memory-fault", "memfd"), ("mmio", "anonymous")]
)
BY_UFFD = pytest.mark.parametrize(("trap", "backing"), UFFD)


@pytest.fixture
def machine_of():
    """Make a machine of 8 MiB; skip where nothing can be collapsed."""
    made = []

    def make(trap, backing="memfd", workload=None, **options):
        machine = make_machine(
            trap, backing, workload=workload, source=SOURCE, memory_bytes=MEMORY, **options
        )
        made.append(machine)
        if not can_collapse(machine.backing.guest):
            pytest.skip(
                "this kernel has no MADV_COLLAPSE: use Linux 6.1 or later, with transparent huge pages"
            )
        return machine

    yield make
    for machine in made:
        machine.close()


def atomic(iterations=1, pages=PAGES):
    return plan("atomic", vcpus=2, memory=MEMORY, pages=pages, iterations=iterations)


def check(machine: Machine, workload):
    expected = workload.expected_pages(SOURCE.pages, np.arange(PAGES))
    assert np.array_equal(all_of_ram(machine), expected)
    checksums = workload.expected_checksums(SOURCE.pages)
    assert [thread.parameters.checksum for thread in machine.threads] == checksums


def mapped(machine):
    with machine.vm.statistics() as statistics:
        return statistics.get("pages_4k"), statistics.get("pages_2m")


@pytest.mark.parametrize(
    ("trap", "backing"),
    [*UFFD, *((trap, backing) for trap in ("memory-fault", "mmio") for backing in ("memfd", "anonymous"))],
)
def test_kvm_maps_huge_pages_after_a_collapse(machine_of, trap, backing):
    workload = atomic()
    machine = machine_of(trap, backing, workload)
    machine.run(TIMEOUT)
    small, huge = mapped(machine)
    assert small >= PAGES
    assert huge == 0
    assert machine.pager.collapse(0, PAGES) == PAGES
    machine.restart(plan("touch", vcpus=2, memory=MEMORY).blocks)
    machine.run(TIMEOUT)
    small, huge = mapped(machine)
    assert small < REGION
    assert huge == PAGES // REGION
    check_bytes = workload.expected_pages(SOURCE.pages, np.arange(PAGES))
    assert np.array_equal(all_of_ram(machine), check_bytes)


@EVERY
def test_collapse_and_revocation_at_random_lose_no_update_of_running_vcpus(machine_of, trap, backing):
    workload = atomic(iterations=3000)
    machine = machine_of(trap, backing, workload, fault_around=4)
    pager, chance, collapsed = machine.pager, random.Random(SEED), []

    def collapse(_number):
        collapsed.append(pager.collapse(0, PAGES))
        # Memslots are merged with the vCPUs stopped, again and again: the guest is to get on between.
        time.sleep(0.02)

    def shut_off(_number):
        for _ in range(chance.randrange(4)):
            pager.mark_nonpresent(chance.randrange(PAGES - 8), chance.randrange(1, 8))
        # Once in a while all of it has to be there, or no region would ever be full.
        if not chance.randrange(3) and pager.mark_present(0, PAGES) is not Outcome.PRESENT:
            return False
        time.sleep(chance.random() / 100)
        return None

    with meanwhile(collapse, shut_off, shut_off):
        machine.run(TIMEOUT)
    check(machine, workload)
    assert sum(collapsed) > 0
    assert pager.counters.pages_revoked > 0
    assert pager.counters.pages_fetched == PAGES


@BY_UFFD
def test_pages_of_one_collapsed_region_that_go_at_the_same_time_all_trap(machine_of, trap, backing):
    machine = machine_of(trap, backing, atomic())
    pager = machine.pager
    assert pager.mark_present(0, PAGES) is Outcome.PRESENT

    def every_other(parity):
        def shut_off(number):
            pager.mark_nonpresent(2 * number + parity, 1)
            return number < REGION // 2 - 1

        return shut_off

    assert pager.collapse(0, PAGES) == PAGES
    with meanwhile(every_other(0), every_other(1)):
        time.sleep(0.5)
    assert pager.bitmap.count() == PAGES - REGION
    machine.run(TIMEOUT)
    assert pager.counters.pages_backed == REGION
    check(machine, atomic())


@EVERY
def test_only_whole_regions_that_are_all_present_are_put_together(machine_of, trap, backing):
    machine = machine_of(trap, backing, atomic())
    pager = machine.pager
    pager.mark_present(0, 3 * REGION - 1)
    assert pager.collapse(0, PAGES) == 2 * REGION
    assert pager.collapse(1, 2 * REGION - 2) == 0
    with pytest.raises(IndexError, match="not all in the"):
        pager.collapse(0, PAGES + 1)
    machine.run(TIMEOUT)
    assert pager.counters.pages_fetched == PAGES
    check(machine, atomic())


@BY_UFFD
@pytest.mark.parametrize("policy", ["full", "background"])
def test_a_policy_collapses_what_the_guest_fills(machine_of, trap, backing, policy):
    workload = atomic(iterations=4)
    machine = machine_of(trap, backing, workload)
    seen = []
    machine.pager.observer = lambda fault, claim, began: seen.append(claim.count)
    with Collapser(machine.pager, policy) as collapser:
        machine.run(TIMEOUT)
        await_pages(collapser, PAGES)
    assert sum(seen) == PAGES  # who observed faults before still does
    check(machine, workload)


def await_pages(collapser, pages):
    """Its thread puts them together in its own time."""
    deadline = time.monotonic() + TIMEOUT
    while collapser.pages != pages and time.monotonic() < deadline:
        time.sleep(0.01)
    assert collapser.pages == pages


@EVERY
def test_a_region_that_fills_while_somebody_is_at_a_page_of_it_is_collapsed_afterwards(
    machine_of, monkeypatch, trap, backing
):
    machine = machine_of(trap, backing)
    pager, entered, may_go_on = machine.pager, threading.Event(), threading.Event()
    tried, collapse = threading.Event(), pager.collapse

    def reassert_late(first, count):
        entered.set()
        assert may_go_on.wait(TIMEOUT)

    def collapse_and_say(first, count):
        done = collapse(first, count)
        tried.set()
        return done

    monkeypatch.setattr(pager.trap, "reassert", reassert_late)
    monkeypatch.setattr(pager, "collapse", collapse_and_say)
    with Collapser(pager, "full") as collapser:
        pager.mark_present(0, REGION - 1)
        other = threading.Thread(target=pager.reassert, args=(5,))
        other.start()
        assert entered.wait(TIMEOUT)
        pager.mark_present(REGION - 1, 1)
        assert tried.wait(TIMEOUT)
        assert collapser.pages == 0
        may_go_on.set()
        other.join()
        await_pages(collapser, REGION)


@EVERY
def test_a_region_whose_last_page_is_healed_is_collapsed(machine_of, trap, backing):
    pager = machine_of(trap, backing).pager
    with Collapser(pager, "full") as collapser:
        pager.poison(5)
        pager.mark_present(0, 5)
        pager.mark_present(6, REGION - 6)
        pager.unpoison(5, bytes(4096))
        await_pages(collapser, REGION)


@EVERY
def test_demand_paging_goes_off_and_on_over_collapsed_regions(machine_of, trap, backing):
    machine = machine_of(trap, backing, atomic())
    pager = machine.pager
    pager.mark_present(0, PAGES)
    assert pager.collapse(0, 2 * REGION) == 2 * REGION
    pager.disable()
    assert pager.collapse(0, PAGES) == 0  # off: memory is as it is
    pager.enable()
    assert pager.mark_nonpresent(0, PAGES) == PAGES
    machine.run(TIMEOUT)
    assert pager.counters.pages_backed == PAGES
    check(machine, atomic())


@BY_UFFD
def test_off_and_on_while_the_guest_runs_over_collapsed_regions_loses_nothing(machine_of, trap, backing):
    workload = atomic(iterations=2000)
    machine = machine_of(trap, backing, workload)
    pager = machine.pager

    def switch(number):
        if pager.mark_present(0, PAGES) is not Outcome.PRESENT:
            return False  # the guest has come to its end
        pager.collapse(0, PAGES)
        pager.disable()
        pager.enable()
        pager.mark_nonpresent(number * 32 % PAGES, 32)
        time.sleep(0.02)
        return None

    with meanwhile(switch):
        machine.run(TIMEOUT)
    check(machine, workload)
    assert pager.counters.pages_fetched == PAGES


def test_holes_of_a_shared_memory_file_are_never_in_a_huge_page(machine_of):
    machine = machine_of("userfaultfd", workload=atomic(), uffd=UffdOptions(mode="missing"))
    assert machine.pager.mark_present(0, PAGES) is Outcome.PRESENT
    assert machine.pager.collapse(0, PAGES) == 0
    machine.run(TIMEOUT)
    check(machine, atomic())


@pytest.mark.parametrize("trap", UFFD_TRAPS)
def test_a_kernel_that_cannot_collapse_leaves_all_as_it_is(machine_of, monkeypatch, trap):
    machine = machine_of(trap, workload=atomic())
    machine.pager.mark_present(0, PAGES)
    monkeypatch.setattr("kvmdp.paging.trap.view.can_collapse", lambda view: False)
    assert machine.pager.collapse(0, PAGES) == 0
    assert machine.pager.mark_nonpresent(7, 1) == 1
    machine.run(TIMEOUT)
    check(machine, atomic())


def test_an_unknown_policy_is_refused(machine_of):
    with pytest.raises(ValueError, match="no policy 'always' to collapse by: choose from off, full"):
        Collapser(machine_of("marker").pager, "always")


def test_a_collapse_that_breaks_stops_the_machine_with_its_reason(machine_of, monkeypatch):
    machine = machine_of("marker", workload=atomic(iterations=100_000))

    def broken(first, count):
        raise OSError(5, "broken")

    monkeypatch.setattr(machine.pager.trap, "collapse", broken)
    with Collapser(machine.pager, "full"), pytest.raises(PagingError, match="could not be put together"):
        machine.run(TIMEOUT)
