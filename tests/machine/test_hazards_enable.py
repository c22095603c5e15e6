"""Switching demand paging off and on again, and marking pages: bytes kept, and no overhead left when it is off."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from harness import BACKINGS, MEMORY, SEED, TIMEOUT, TRAPS, all_of_ram, make_machine, meanwhile, plan

from kvmdp.errors import PagingError
from kvmdp.lab.invariants import violations
from kvmdp.page import PAGE_SIZE, Outcome
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.slots import ram_slots as slots
from kvmdp.trap.slots.ram_slots import RamSlots

pytestmark = pytest.mark.kvm

SOURCE = SyntheticSource(MEMORY, SEED)
PAGES = MEMORY // 4096
EVERY = pytest.mark.parametrize(
    ("trap", "backing"), [(trap, backing) for trap in TRAPS for backing in BACKINGS]
)


def exits(machine):
    """Exits of all vCPUs but the report at the end."""
    return sum(thread.exits.total() for thread in machine.threads) - len(machine.threads)


def check(machine, workload):
    pages = np.arange(PAGES)
    assert np.array_equal(all_of_ram(machine), workload.expected_pages(SOURCE.pages, pages))
    expected = workload.expected_checksums(SOURCE.pages)
    assert [thread.parameters.checksum for thread in machine.threads] == expected


@EVERY
def test_off_is_refused_while_a_page_is_absent(trap, backing):
    workload = plan("checksum", pages=64)
    with make_machine(trap, backing, workload=workload) as machine:
        assert machine.pager.mark_present(0, PAGES - 3) is Outcome.PRESENT
        with pytest.raises(
            PagingError, match="cannot be switched off while 3 pages are absent: make them present"
        ):
            machine.pager.disable()
        assert machine.pager.enabled
        machine.run(TIMEOUT)
        assert exits(machine) == 0


@EVERY
def test_off_leaves_plain_memory_and_a_guest_that_never_exits(trap, backing):
    workload = plan("fill", vcpus=2)
    with make_machine(trap, backing, workload=workload) as machine:
        pager = machine.pager
        assert pager.mark_present(0, PAGES) is Outcome.PRESENT
        pager.disable()
        assert not pager.enabled
        assert pager.trap.memslots == len(machine.layout.regions)
        pager.disable()  # again: nothing
        machine.run(TIMEOUT)
        assert exits(machine) == 0
        assert pager.counters.claims == 0
        check(machine, workload)


@EVERY
def test_on_again_traps_what_is_marked_and_keeps_its_bytes(trap, backing):
    workload = plan("atomic", vcpus=2, pages=PAGES)
    with make_machine(trap, backing, workload=workload) as machine:
        pager = machine.pager
        pager.mark_present(0, PAGES)
        pager.disable()
        pager.enable()
        assert pager.mark_nonpresent(0, PAGES // 2) == PAGES // 2
        machine.run(TIMEOUT)
        assert exits(machine) > 0
        assert pager.counters.pages_backed == PAGES // 2
        assert pager.counters.pages_fetched == PAGES
        check(machine, workload)


@EVERY
def test_on_and_off_while_the_guest_runs_loses_nothing(trap, backing):
    workload = plan("atomic", vcpus=2, pages=PAGES, iterations=100)
    with make_machine(trap, backing, workload=workload) as machine:
        pager = machine.pager

        def switch(number):
            if pager.mark_present(0, PAGES) is not Outcome.PRESENT:
                return False  # the guest has come to its end
            pager.disable()
            pager.enable()
            pager.mark_nonpresent(number * 32 % PAGES, 32)
            time.sleep(0.02)  # arming makes all slots anew with the guest held up: let it get on
            return None

        with meanwhile(switch):
            machine.run(TIMEOUT)
        check(machine, workload)
        assert pager.counters.pages_fetched == PAGES


def off_waits_for(pager, last, entered, may_go_on):
    """Switch off while the thread `last` is held up until `may_go_on`, in the middle of what it does."""
    off = threading.Thread(target=pager.disable)
    last.start()
    assert entered.wait(TIMEOUT)
    off.start()
    off.join(0.1)
    still_on = off.is_alive()
    may_go_on.set()
    last.join()
    off.join()
    assert still_on


@EVERY
def test_off_waits_for_a_page_that_is_being_admitted(monkeypatch, trap, backing):
    # The bit is set before the trap admits: a full bitmap does not say that all is in place.
    with make_machine(trap, backing) as machine:
        pager = machine.pager
        pager.mark_present(0, PAGES - 1)
        admit, entered, may_go_on = pager.trap.admit, threading.Event(), threading.Event()

        def admit_late(first, count):
            entered.set()
            may_go_on.wait()
            admit(first, count)

        monkeypatch.setattr(pager.trap, "admit", admit_late)
        last = threading.Thread(target=pager.mark_present, args=(PAGES - 1, 1))
        off_waits_for(pager, last, entered, may_go_on)
        assert not pager.enabled
        assert pager.trap.memslots == len(machine.layout.regions)


@EVERY
def test_marking_is_refused_while_demand_paging_is_off(trap, backing):
    workload = plan("checksum", vcpus=2)
    with make_machine(trap, backing, workload=workload) as machine:
        machine.pager.mark_present(0, PAGES)
        machine.pager.disable()
        with pytest.raises(PagingError, match="switched off: enable it first"):
            machine.pager.mark_nonpresent(0, 1)
        machine.run(TIMEOUT)
        check(machine, workload)


@pytest.mark.parametrize("granule", [64 << 10, 4 << 20])
@pytest.mark.parametrize("trap", ["memory-fault", "mmio"])
def test_marking_one_page_takes_its_whole_granule_and_brings_it_back(trap, granule):
    workload = plan("atomic", vcpus=2, memory=8 << 20)
    source = SyntheticSource(8 << 20, SEED)
    pages, unit = (8 << 20) // 4096, granule // 4096
    with make_machine(trap, workload=workload, source=source, granule=granule) as machine:
        pager = machine.pager
        assert pager.mark_present(0, pages) is Outcome.PRESENT
        assert pager.mark_nonpresent(unit + 1, 1) == unit
        assert pager.mark_nonpresent(unit - 1, 2) == unit
        assert pager.bitmap.count() == pages - 2 * unit
        machine.run(TIMEOUT)
        assert pager.counters.pages_backed == 2 * unit
        assert pager.counters.pages_fetched == pages
        assert np.array_equal(all_of_ram(machine), workload.expected_pages(source.pages, np.arange(pages)))


@EVERY
def test_the_host_reads_and_writes_absent_pages_as_the_guest_would_find_them(trap, backing):
    workload = plan("checksum", pages=16)
    with make_machine(trap, backing, workload=workload) as machine:
        expected = SOURCE.pages(np.arange(16)).tobytes()
        assert machine.memory.read(0x1FF0, 0x1020) == expected[0x1FF0:0x3010]
        assert machine.pager.counters.pages_fetched == 3
        machine.memory.write(0x4FFC, b"kvmdp was here")
        machine.pager.mark_nonpresent(0, 16)
        assert machine.memory.read(0x4FFC, 14) == b"kvmdp was here"
        assert machine.pager.counters.pages_fetched == 5
        machine.pager.mark_nonpresent(4, 2)
        machine.run(TIMEOUT)
        assert all_of_ram(machine)[4:6].tobytes()[0xFFC : 0xFFC + 14] == b"kvmdp was here"
        assert machine.pager.counters.pages_fetched == 16


@EVERY
def test_several_threads_that_switch_on_at_once_arm_it_once(monkeypatch, trap, backing):
    with make_machine(trap, backing) as machine:
        pager = machine.pager
        pager.mark_present(0, PAGES)
        arm, armed = pager.trap.arm, []

        def arm_late(presence):
            armed.append(time.sleep(0.002))  # long enough for the others to come
            arm(presence)

        monkeypatch.setattr(pager.trap, "arm", arm_late)
        for number in range(1, 6):
            pager.disable()
            in_threads(pager.enable, pager.enable, pager.enable)
            assert (pager.enabled, len(armed), violations(pager)) == (True, number, [])
        pager.mark_nonpresent(7, 1)
        assert machine.memory.read(7 * PAGE_SIZE, PAGE_SIZE) == SOURCE.pages(np.array([7])).tobytes()
        assert pager.counters.pages_backed == 1


@EVERY
def test_switching_on_and_off_at_once_leaves_the_one_or_the_other(trap, backing):
    with make_machine(trap, backing) as machine:
        pager = machine.pager
        pager.mark_present(0, PAGES)
        for _ in range(10):
            in_threads(pager.disable, pager.enable, pager.disable, pager.enable)
            assert violations(pager) == []


def in_threads(*actions):
    """Do all of this at the same time; an error of any comes out."""
    with ThreadPoolExecutor(len(actions)) as pool:
        for each in [pool.submit(action) for action in actions]:
            each.result(TIMEOUT)


@pytest.mark.parametrize("trap", ["memory-fault", "mmio"])
def test_off_waits_for_memslots_that_are_being_merged(monkeypatch, trap):
    # All pages are present is when the last regions are merged, by vCPUs and devices that hold no claim then.
    monkeypatch.setattr(slots, "MAX_GRANULE_SLOTS", 64)
    memory = 4 << 20
    pages = memory // PAGE_SIZE
    workload = plan("atomic", vcpus=2, memory=memory, pages=pages, iterations=20)
    for _ in range(4):
        with make_machine(trap, workload=workload, granule=PAGE_SIZE) as machine:
            pager = machine.pager

            def switch_off(_number, pager=pager):
                if pager.bitmap.count() == pages:
                    pager.disable()
                    return False
                time.sleep(0.0001)
                return None

            def read_with_a_view_open(number, machine=machine):
                with machine.memory.view(0, 8):
                    machine.memory.read((number * 7 + 1) % pages * PAGE_SIZE, 8)
                time.sleep(0.0001)

            with meanwhile(switch_off, read_with_a_view_open):
                machine.run(TIMEOUT)
            assert violations(pager) == []
            if not pager.enabled:
                assert pager.trap.memslots == 1
            expected = workload.expected_pages(SyntheticSource(memory, SEED).pages, np.arange(pages))
            assert np.array_equal(all_of_ram(machine), expected)


@pytest.mark.parametrize("trap", ["memory-fault", "mmio"])
def test_off_does_not_disarm_before_a_merge_has_ended(monkeypatch, trap):
    monkeypatch.setattr(slots, "MAX_GRANULE_SLOTS", 64)
    with make_machine(trap, granule=PAGE_SIZE) as machine:
        pager = machine.pager
        merge, entered, may_go_on = RamSlots.merge, threading.Event(), threading.Event()

        def merge_late(*arguments):
            entered.set()
            assert may_go_on.wait(TIMEOUT)
            merge(*arguments)

        pager.mark_present(0, PAGES - 1)
        monkeypatch.setattr(RamSlots, "merge", merge_late)
        last = threading.Thread(target=machine.memory.read, args=((PAGES - 1) * PAGE_SIZE, 8))
        off_waits_for(pager, last, entered, may_go_on)
        assert (pager.enabled, pager.trap.memslots, violations(pager)) == (False, 1, [])


@EVERY
def test_off_is_refused_with_the_remedy_while_a_page_is_poisoned(trap, backing):
    with make_machine(trap, backing) as machine:
        pager = machine.pager
        pager.mark_present(0, PAGES - 2)
        pager.poison(5)
        with pytest.raises(
            PagingError,
            match=r"while 3 pages are absent: .*; 1 of them are poisoned, and have to be given new bytes",
        ):
            pager.disable()
        pager.unpoison(5, bytes(PAGE_SIZE))
        pager.mark_present(0, PAGES)
        pager.disable()
        assert not pager.enabled
