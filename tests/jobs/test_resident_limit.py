"""A guest that has a quarter of its working set in memory: slower, and exact."""

import contextlib
import threading
import time

import numpy as np
import pytest
from harness import (
    MEMORY,
    SEED,
    TIMEOUT,
    TRAPS,
    every_trap,
    every_trap_and_backing,
    host_vectors,
    make_machine,
    plan,
    require_trap,
)

from kvmdp.errors import PagingError
from kvmdp.jobs import resident_limit as resident
from kvmdp.jobs.resident_limit import ResidentLimit, check_limit
from kvmdp.lab.experiment import run_workload
from kvmdp.lab.invariants import violations
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.workloads import WORKLOADS
from kvmdp.page import PAGE_SIZE, Outcome
from kvmdp.paging.jobs import Job
from kvmdp.paging.store import FileSink
from kvmdp.source.base import read_pages
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.slots import ram_slots as slots
from kvmdp.trap.slots.partial_slots import LEAST_SLOT_MEMORY, SLOT_BYTES

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
    with pytest.raises(ValueError, match="less than this guest can run in: give 344K or more"):
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


@every_trap
def test_a_fault_over_the_limit_passes_over_the_pages_that_somebody_is_at(monkeypatch, trap):
    for name in (
        "_PAUSE_SECONDS",
        "ANSWER_SECONDS",
        "_PATIENCE_SECONDS",
    ):  # for the thread, and for devices elsewhere
        monkeypatch.setattr(resident, name, 10 * TIMEOUT)
    with make_machine(trap, resident_limit=LIMIT) as machine:
        pager = machine.pager
        machine.memory.read(0, LIMIT)
        with machine.memory.view(0, LIMIT // 2):
            reader = threading.Thread(target=machine.memory.read, args=(LIMIT, LIMIT // 4), daemon=True)
            reader.start()
            reader.join(TIMEOUT)
            assert not reader.is_alive()
            assert pager.ledger.resident <= LIMIT // PAGE_SIZE
            assert pager.bitmap.count_range(0, LIMIT // PAGE_SIZE // 2) == LIMIT // PAGE_SIZE // 2


def settles_at_the_limit(pager):
    """Whether no more pages than the limit are left; the thread may have been at it."""
    deadline = time.monotonic() + TIMEOUT
    while pager.ledger.resident > LIMIT // PAGE_SIZE and time.monotonic() < deadline:
        time.sleep(0.001)
    return pager.ledger.resident <= LIMIT // PAGE_SIZE


@pytest.mark.parametrize("trap", TRAPS)
def test_of_what_others_have_shut_off_no_more_is_evicted_than_must_be(trap):
    with make_machine(trap) as machine:
        pager, limit = machine.pager, LIMIT // PAGE_SIZE
        pager.mark_present(0, machine.layout.pages)
        pager.mark_nonpresent(0, machine.layout.pages)
        with contextlib.closing(ResidentLimit(pager, limit)):
            machine.memory.read(0, 8)
            assert settles_at_the_limit(pager)
        assert pager.ledger.resident > limit - 2 * 32


@every_trap
def test_a_limit_gives_way_to_switching_off(monkeypatch, trap):
    # Off wants all of RAM. Who is about to take pages out for the limit when it comes is refused, and that is no error.
    with make_machine(trap) as machine, contextlib.ExitStack() as stack:
        pager, pages = machine.pager, machine.layout.pages
        off, take = threading.Thread(target=pager.disable), pager.mark_nonpresent

        def take_once_it_is_off(first, count, timeout):
            off.start()
            while pager.enabled:
                time.sleep(0.001)
            return take(first, count, timeout)

        pager.mark_present(0, pages - 1)
        stack.enter_context(contextlib.closing(ResidentLimit(pager, LIMIT // PAGE_SIZE)))
        monkeypatch.setattr(pager, "mark_nonpresent", take_once_it_is_off)
        machine.memory.read((pages - 1) * PAGE_SIZE, 8)
        off.join()
        assert (pager.enabled, pager.error, pager.bitmap.count()) == (False, None, pages)
        monkeypatch.undo()
        pager.enable()
        pager.evict(0, 1)
        machine.memory.read(0, 8)
        assert settles_at_the_limit(pager)


@pytest.mark.userfaultfd
@pytest.mark.parametrize("backing", ["memfd", "anonymous"])
def test_what_a_reader_brings_in_around_a_fault_is_kept_back_while_there_is_no_room(backing):
    limit, around = 2 << 20, 32
    workload = plan("touch", memory=16 << 20, vcpus=2, order="random", touches=1000, write=True)
    with make_machine(
        "userfaultfd", backing, workload=workload, resident_limit=limit, fault_around=around
    ) as machine:
        machine.run(TIMEOUT)
        assert machine.pager.counters.pages_evicted > 1024
        # Held back for a while, not for ever: a thread that gets no CPU makes no room.
        assert limit // PAGE_SIZE < machine.limit.peak <= 2 * limit // PAGE_SIZE


@pytest.mark.parametrize("trap", TRAPS)
def test_pages_that_others_have_shut_off_go_before_the_guest_starves(trap):
    limit = LIMIT // PAGE_SIZE
    workload = plan("touch", pages=64)
    with make_machine(trap, workload=workload, resident_limit=LIMIT) as machine:
        machine.pager.mark_present(300, limit)
        machine.pager.mark_nonpresent(300, limit)
        machine.run(TIMEOUT)
        assert machine.pager.counters.pages_refetched < limit


def test_an_access_of_more_than_half_the_limit_is_made_in_parts_and_a_view_is_refused():
    with make_machine("mmio", resident_limit=LIMIT) as machine:
        image = read_pages(SyntheticSource(MEMORY, SEED), np.arange(MEMORY // PAGE_SIZE)).tobytes()
        assert machine.memory.read(100, MEMORY - 200) == image[100:-100]
        everywhere = [(page * PAGE_SIZE + PAGE_SIZE - 4, 8) for page in range(0, 500, 2)]
        machine.memory.writev(everywhere, b"12345678" * len(everywhere))
        assert machine.memory.readv(everywhere) == b"12345678" * len(everywhere)
        with (
            pytest.raises(PagingError, match="needs more than the 64 pages that the resident limit lets"),
            machine.memory.view(0, LIMIT),
        ):
            pass


def test_the_limit_is_kept_once_demand_paging_is_switched_on():
    with make_machine("mmio", resident_limit=LIMIT, demand_paging=False) as machine:
        machine.pager.enable()
        assert settles_at_the_limit(machine.pager)


@pytest.mark.userfaultfd
def test_who_comes_to_a_present_page_is_not_kept_waiting_for_room():
    with make_machine("mmio:device-view", resident_limit=LIMIT) as machine:
        pager = machine.pager
        machine.memory.read(0, LIMIT // 2)
        asked = []

        class Asked(Job):
            def seconds_held(self, since):
                asked.append(since)
                return 0

        pager.jobs.add(Asked())
        device = machine.device_view
        assert device.read(5 * PAGE_SIZE, 8) == machine.memory.read(5 * PAGE_SIZE, 8)
        assert asked == []
        assert device.read(400 * PAGE_SIZE, 8) == machine.memory.read(400 * PAGE_SIZE, 8)
        assert len(asked) == 1


@every_trap
def test_whoever_marks_pages_present_keeps_to_the_limit(trap):
    with make_machine(trap, resident_limit=LIMIT) as machine:
        pager, limit = machine.pager, LIMIT // PAGE_SIZE
        assert pager.mark_present(0, machine.layout.pages) is Outcome.PRESENT
        assert settles_at_the_limit(pager)
        assert pager.counters.pages_fetched == machine.layout.pages
        assert limit < machine.limit.peak <= limit + 512  # what is claimed at once
        page = pager.poison(machine.layout.pages - 1)[0]
        pager.unpoison(page, bytes(PAGE_SIZE))
        assert settles_at_the_limit(pager)


@pytest.mark.parametrize("trap", ["memory-fault", "mmio"])
def test_regions_in_too_many_pieces_are_shut_off_and_not_completed(monkeypatch, trap):
    monkeypatch.setattr(slots, "MAX_GRANULE_SLOTS", 64)
    least = LEAST_SLOT_MEMORY // SLOT_BYTES
    workload = plan("touch", memory=16 << 20, order="strided", stride=5)
    options = {"granule": PAGE_SIZE, "slot_memory": LEAST_SLOT_MEMORY}
    with make_machine(trap, workload=workload, resident_limit=4 << 20, **options) as machine:
        machine.run(TIMEOUT)
        assert machine.pager.counters.pages_fetched == len(workload.touched)
        assert machine.limit.peak <= 1024 + 2
        assert machine.pager.trap.memslots <= least + 512 + 8
        assert violations(machine.pager) == []


def test_a_folder_that_takes_no_evicted_pages_is_named(monkeypatch):
    with make_machine("mmio") as machine:
        machine.memory.read(0, 8)
        monkeypatch.setenv("TMPDIR", "/proc/self")
        with pytest.raises(
            PagingError, match=r"no page can be evicted: .+: /proc/self is where evicted pages go; name"
        ):
            machine.pager.evict(0, 1)
        assert machine.memory.read(0, 8)
        assert machine.pager.error is None


@pytest.mark.parametrize(
    ("vcpus", "fault_around", "unit", "retained", "least"),
    [
        (1, 1, 1, 0, 64 + 6 + 5),
        (1, 1, 1, 3, 64 + 6 + 5 + 3),
        (2, 8, 1, 0, 64 + 2 * (6 * 8 + 5)),
        (1, 1, 16, 3, 64 + 16 * (6 + 5 + 2)),  # three table pages in a row can lie in two units
        (1, 1, 16, 17, 64 + 16 * (6 + 5 + 2)),
        (1, 1, 16, 18, 64 + 16 * (6 + 5 + 3)),
    ],
)
def test_what_can_never_leave_counts_in_whole_units(vcpus, fault_around, unit, retained, least):
    check_limit(least * PAGE_SIZE, vcpus, fault_around, unit, retained)
    with pytest.raises(ValueError, match=f"give {least * 4}K or more"):
        check_limit(least * PAGE_SIZE - 1, vcpus, fault_around, unit, retained)


@pytest.mark.root
@pytest.mark.hugepages
def test_there_is_no_limit_to_memory_that_is_never_freed():
    options = MachineOptions(
        MEMORY, "mmio", "hugetlb-2m", granule=PAGE_SIZE, resident_limit=LIMIT, reserve_hugepages=True
    )
    with pytest.raises(ValueError, match="hugetlb-2m memory is held to the end"):
        Machine(options, SyntheticSource(MEMORY))


def test_a_run_ends_once_the_eviction_under_way_has(monkeypatch):
    begun, may_end = threading.Event(), threading.Event()

    class SlowSink(FileSink):
        def store(self, offset, content):
            begun.set()
            assert may_end.wait(TIMEOUT)
            super().store(offset, content)

    monkeypatch.setattr(ResidentLimit, "after_fault", ResidentLimit._remind)  # the thread alone evicts
    with make_machine("mmio", workload=plan("fill"), resident_limit=LIMIT) as machine:
        machine.pager.sink = SlowSink(machine.layout.memory_bytes)
        timer, cancel = threading.Timer(0.2, may_end.set), machine.pager.cancel

        def cancel_first():
            cancel()
            timer.start()

        monkeypatch.setattr(machine.pager, "cancel", cancel_first)
        machine.run(TIMEOUT)
        claims = list(machine.pager.ledger.claims)
        timer.join()
        monkeypatch.setattr(machine.pager, "cancel", cancel)
    assert begun.is_set()
    assert claims == []
