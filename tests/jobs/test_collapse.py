"""Present pages put together into huge ones while the guest runs: nothing lost, and taken apart before one goes."""

import errno
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from harness import SEED, TIMEOUT, all_of_ram, make_machine, meanwhile, plan

from kvmdp.errors import PagingError
from kvmdp.jobs.collapse import Collapser
from kvmdp.machine.machine import Machine
from kvmdp.page import REGION, Outcome
from kvmdp.paging.jobs import Observer
from kvmdp.paging.pager import Pager
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap import collapse as trap_collapse
from kvmdp.trap.collapse import can_collapse
from kvmdp.trap.uffd.options import UffdOptions

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


def eventually(condition):
    """Wait until a condition holds; returns whether it does."""
    deadline = time.monotonic() + TIMEOUT
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds


def collapse(pager, first, count, regions):
    """Collapse whole regions, whose numbers are given, all of them at last: a page may be in use for a moment."""
    done = 0

    def again():
        nonlocal done
        done += pager.collapse(first, count)
        return done >= len(regions) * REGION

    assert eventually(again), "the kernel has no huge page to spare, or its pages stay in use"
    assert done == len(regions) * REGION


def huge_pages(machine):
    """How many huge pages the guest view is mapped with, and whether the kernel may make more there by itself."""
    view, inside, kib, flags = machine.backing.guest, False, 0, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if "-" in name and " " in name:
            first, end = (int(each, 16) for each in line.split()[0].split("-"))
            inside = first < view.hva + view.length and end > view.hva
        elif inside and name in ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"):
            kib += int(rest.split()[0])
        elif inside and name == "VmFlags":
            flags.append("nh" not in rest.split())
    return kib // 2048, any(flags)


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
    assert small > PAGES - REGION // 2  # KVM drops some of its own accord
    assert huge == 0
    collapse(machine.pager, 0, PAGES, regions=range(4))
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

    def put_together(_number):
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

    with meanwhile(put_together, shut_off, shut_off):
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

    collapse(pager, 0, PAGES, regions=range(4))
    with meanwhile(every_other(0), every_other(1)):
        assert eventually(lambda: pager.bitmap.count() == PAGES - REGION)
    machine.run(TIMEOUT)
    assert pager.counters.pages_backed == REGION
    check(machine, atomic())


@BY_UFFD
def test_of_two_threads_that_take_pages_from_one_region_the_second_waits_for_the_first(
    machine_of, monkeypatch, trap, backing
):
    machine = machine_of(trap, backing, atomic())
    pager, regions = machine.pager, machine.pager.trap._regions
    assert pager.mark_present(0, PAGES) is Outcome.PRESENT
    collapse(pager, 0, PAGES, regions=range(4))
    entered, second_done, registered, overtaken = threading.Event(), threading.Event(), [], []
    register = regions._register

    def register_late(first, count):
        registered.append(first)
        entered.set()
        overtaken.append(second_done.wait(0.3))  # longer than it takes if it does not wait
        register(first, count)

    def take_one(_number):
        pager.mark_nonpresent(7, 1)
        return False

    def take_another(_number):
        assert entered.wait(TIMEOUT)
        try:
            pager.mark_nonpresent(9, 1)
        finally:
            second_done.set()
        return False

    monkeypatch.setattr(regions, "_register", register_late)
    with meanwhile(take_one, take_another):
        assert second_done.wait(TIMEOUT)
    assert (registered, overtaken) == ([0], [False])
    machine.run(TIMEOUT)
    assert pager.counters.pages_backed == 2
    check(machine, atomic())


@pytest.mark.parametrize("huge_page_to_spare", [True, False])
@pytest.mark.parametrize("trap", UFFD_TRAPS)
def test_a_marker_that_a_reader_left_on_a_present_page_is_gone_after_a_collapse(
    machine_of, monkeypatch, trap, huge_page_to_spare
):
    machine = machine_of(trap, workload=atomic())
    pager, guest = machine.pager, machine.backing.guest
    assert pager.mark_present(0, PAGES) is Outcome.PRESENT
    uffd = pager.trap._uffd_of(7)
    if trap == "userfaultfd":
        pager.trap._announce(7, 1)  # its own drop, no discard
    guest.drop(7 * 4096, 4096)
    assert uffd.poison(guest.hva + 7 * 4096, 4096)
    if huge_page_to_spare:
        collapse(pager, 0, PAGES, regions=range(4))
    else:
        monkeypatch.setattr(trap_collapse, "put_together", lambda *pages, thp: False)
        assert pager.collapse(0, PAGES) == 0
    machine.run(TIMEOUT)
    check(machine, atomic())


def test_only_of_a_plain_region_a_reader_puts_up_with_finding_nothing_registered(machine_of):
    machine = machine_of("marker", workload=atomic())
    pager, trap = machine.pager, machine.pager.trap
    assert pager.mark_present(0, 2 * REGION) is Outcome.PRESENT
    collapse(pager, 0, REGION, regions=range(1))
    trap._serve(trap._hva(0), 0)  # an event from before
    trap._unregister(REGION, 2 * REGION)  # whatever for: it is nothing that a collapse has done
    for page in (REGION, 2 * REGION):  # one present, one not
        with pytest.raises(FileNotFoundError):
            trap._serve(trap._hva(page), 0)
    with trap._regions.unless_plain(0, 1):
        pager.mark_nonpresent(0, 1)
        raise FileNotFoundError(errno.ENOENT, "what a call got before that")
    with pytest.raises(FileNotFoundError), trap._regions.unless_plain(0, 1):
        raise FileNotFoundError(errno.ENOENT, "what it cannot have got since")


@EVERY
def test_the_kernel_makes_no_huge_page_by_itself_where_some_were_put_together(machine_of, trap, backing):
    machine = machine_of(trap, backing, atomic())
    pager = machine.pager
    assert pager.mark_present(0, PAGES) is Outcome.PRESENT

    def all_huge():
        pager.collapse(0, PAGES)
        return huge_pages(machine)[0] == PAGES // REGION

    assert eventually(all_huge)
    assert huge_pages(machine) == (PAGES // REGION, False)
    pager.mark_nonpresent(7, 1)
    assert not huge_pages(machine)[1]


@EVERY
def test_only_whole_regions_that_are_all_present_are_put_together(machine_of, trap, backing):
    machine = machine_of(trap, backing, atomic())
    pager = machine.pager
    pager.mark_present(0, 3 * REGION - 1)
    collapse(pager, 0, PAGES, regions=range(2))
    assert pager.collapse(1, 2 * REGION - 2) == 0
    with pytest.raises(ValueError, match="not all in the"):
        pager.collapse(0, PAGES + 1)
    machine.run(TIMEOUT)
    assert pager.counters.pages_fetched == PAGES
    check(machine, atomic())


@BY_UFFD
@pytest.mark.parametrize("policy", ["full", "background"])
def test_a_policy_collapses_what_the_guest_fills(machine_of, monkeypatch, trap, backing, policy):
    workload = atomic(iterations=4)
    machine = machine_of(trap, backing, workload)
    pager, seen, tried = machine.pager, [], set()
    pager.jobs.add(Observer(lambda fault, claim, began: seen.append(claim.count)))

    def try_to(first, count):
        done = Pager.collapse(pager, first, count)
        tried.add(first)
        return done

    monkeypatch.setattr(pager, "collapse", try_to)
    with Collapser(pager, policy) as collapser:
        machine.run(TIMEOUT)
        assert eventually(lambda: tried >= set(range(0, PAGES, REGION)))
        # As a region fills it is tried a few times, and a page of it may be in use each time.
        assert eventually(lambda: collapser.pages == PAGES or (policy == "full" and collapser.collapse_all()))
    assert collapser.pages == PAGES
    assert sum(seen) == PAGES  # who observed faults before still does
    check(machine, workload)


def gets_to(collapser, pages):
    """Whether so many pages are put together; its thread does that in its own time."""
    deadline = time.monotonic() + TIMEOUT
    while collapser.pages != pages and time.monotonic() < deadline:
        time.sleep(0.01)
    return collapser.pages == pages


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
        assert gets_to(collapser, REGION)


@EVERY
def test_a_region_whose_last_page_is_healed_is_collapsed(machine_of, trap, backing):
    pager = machine_of(trap, backing).pager
    with Collapser(pager, "full") as collapser:
        pager.poison(5)
        pager.mark_present(0, 5)
        pager.mark_present(6, REGION - 6)
        pager.unpoison(5, bytes(4096))
        assert gets_to(collapser, REGION)


@EVERY
def test_demand_paging_goes_off_and_on_over_collapsed_regions(machine_of, trap, backing):
    machine = machine_of(trap, backing, atomic())
    pager = machine.pager
    pager.mark_present(0, PAGES)
    collapse(pager, 0, 2 * REGION, regions=range(2))
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
    monkeypatch.setattr("kvmdp.trap.uffd.guest_view.can_collapse", lambda view: False)
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
