"""The userfaultfd mode: same pager, same results; vCPUs sleep in the kernel and always come out again."""

import os
import threading
import time

import numpy as np
import pytest
from harness import BACKINGS, MEMORY, SEED, TIMEOUT, all_of_ram, make_machine, plan

from kvmdp.abi.mman import MADV_DONTNEED, MADV_REMOVE
from kvmdp.errors import PagingError
from kvmdp.lab.experiment import run_workload
from kvmdp.machine import machine as machine_module
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.jobs import Observer
from kvmdp.source.base import SourceError
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.uffd.options import UffdOptions

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]

FORMS = {
    "one reader": UffdOptions(),
    "four readers": UffdOptions(4),
    "sharded": UffdOptions(1, 2),
    "missing": UffdOptions(mode="missing"),
    "missing, sharded": UffdOptions(2, 2, "missing"),
}


def prove(workload, backing="memfd", form="one reader", **options):
    memory, vcpus = workload.options.memory_bytes, workload.options.vcpus
    machine = MachineOptions(memory, "userfaultfd", backing, vcpus, uffd=FORMS[form], **options)
    result = run_workload(machine, workload, SyntheticSource(memory, SEED), timeout=TIMEOUT)
    assert result.ok
    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backing", BACKINGS)
def test_vcpus_that_want_the_same_pages_lose_nothing_in_any_form(backing, form):
    for _ in range(5):
        workload = plan("atomic", vcpus=4, iterations=4)
        result = prove(workload, backing, form)
        assert result.counters.pages_fetched == len(workload.touched)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_pages_arrive_together(form):
    result = prove(plan("touch"), form=form, fault_around=16)
    assert result.counters.claims == result.counters.pages_fetched // 16


@pytest.mark.parametrize("form", ["one reader", "missing, sharded"])
@pytest.mark.parametrize("backing", BACKINGS)
def test_pages_that_come_and_go_lose_no_addition(backing, form):
    workload = plan("atomic", vcpus=2, iterations=400)
    source = SyntheticSource(workload.options.memory_bytes, SEED)
    with make_machine("userfaultfd", backing, workload=workload, source=source, uffd=FORMS[form]) as machine:
        stop = threading.Event()

        def revoke():
            # Not for ever: where pages go faster than they come back, the guest would hardly get on.
            for page in range(0, 7 * 300, 7):
                if stop.is_set():
                    break
                machine.pager.mark_nonpresent(page % 480, 8)
                time.sleep(0.001)

        revoker = threading.Thread(target=revoke)
        revoker.start()
        try:
            machine.run(TIMEOUT)
        finally:
            stop.set()
            revoker.join()
        pages = workload.touched
        assert (all_of_ram(machine)[pages] == workload.expected_pages(source.pages, pages)).all()
        assert machine.pager.counters.pages_fetched == len(pages)
        assert machine.pager.counters.pages_revoked > 0


def pages_in_the_memory_file(machine):
    return os.fstat(machine.backing.fd).st_blocks * 512 // PAGE_SIZE


def test_with_missing_faults_alone_an_absent_page_is_a_hole_of_the_memory_file():
    source = SyntheticSource(MEMORY, SEED)
    with make_machine("userfaultfd", source=source, uffd=FORMS["missing"]) as machine:
        assert pages_in_the_memory_file(machine) == 0
        machine.memory.write(3 * PAGE_SIZE, b"kept")
        machine.memory.read(8 * PAGE_SIZE, 4 * PAGE_SIZE)
        assert pages_in_the_memory_file(machine) == 5
        assert machine.pager.mark_nonpresent(0, 10) == 3
        assert pages_in_the_memory_file(machine) == 2
        page = source.pages(np.array([3])).tobytes()
        assert machine.memory.read(3 * PAGE_SIZE, PAGE_SIZE) == b"kept" + page[4:]
        assert (machine.pager.counters.pages_fetched, machine.pager.counters.pages_backed) == (5, 1)


@pytest.mark.parametrize(("form", "advice"), [("one reader", MADV_DONTNEED), ("missing", MADV_REMOVE)])
def test_pages_that_are_discarded_read_as_zeros_afterwards(form, advice):
    with make_machine("userfaultfd", uffd=FORMS[form]) as machine:
        machine.memory.write(2 * PAGE_SIZE, b"discarded")
        machine.memory.write(3 * PAGE_SIZE, b"kept")
        machine.backing.guest.advise(advice, 2 * PAGE_SIZE, PAGE_SIZE)
        # The discard is over once a reader has taken the event, and the reader notes it after that.
        deadline = time.monotonic() + TIMEOUT
        while machine.pager.bitmap.test(2) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not machine.pager.bitmap.test(2)
        assert machine.memory.read(2 * PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert machine.memory.read(3 * PAGE_SIZE, 4) == b"kept"


def test_anonymous_memory_has_no_minor_faults():
    options = MachineOptions(MEMORY, "userfaultfd", "anonymous", uffd=UffdOptions(mode="minor"))
    with pytest.raises(ValueError, match="anonymous memory has no minor faults: use the mode missing"):
        Machine(options, SyntheticSource(MEMORY))


class Stuck(SyntheticSource):
    """Fails for good at page 5."""

    def fetch(self, request, destination):
        offset = request.offset
        if offset == 5 * 4096:
            raise SourceError(self.name, offset, destination.nbytes, "it is gone")
        super().fetch(request, destination)


@pytest.mark.parametrize("ring", [3, 0])
@pytest.mark.parametrize("form", ["one reader", "missing"])
@pytest.mark.parametrize("backing", BACKINGS)
def test_a_vcpu_that_sleeps_on_a_page_that_never_comes_is_let_go(backing, form, ring):
    workload = plan("touch", vcpus=2, overlap=True, ring=ring)
    source = Stuck(workload.options.memory_bytes, SEED)
    with make_machine("userfaultfd", backing, workload=workload, source=source, uffd=FORMS[form]) as machine:
        with pytest.raises(PagingError, match=r"gpa 0x5000 cannot be fetched: .* it is gone"):
            machine.run(TIMEOUT)
        assert not machine.pager.bitmap.test(5)
        assert all(thread.join(0) for thread in machine.threads)


@pytest.mark.parametrize("backing", BACKINGS)
def test_a_vcpu_whose_fault_is_read_after_the_stop_is_let_go(backing, monkeypatch):
    monkeypatch.setattr(machine_module, "_JOIN_SECONDS", 5)
    workload = plan("touch", pages=8, ring=0)  # where KVM emulates that no signal frees the vCPU
    with make_machine("userfaultfd", backing, workload=workload) as machine:
        pager, stopped = machine.pager, threading.Event()
        resolve_or_park, release_sleepers = pager.resolve_or_park, pager.trap.release_sleepers

        def resolve_late(*arguments):
            pager.abort(PagingError("that was enough"))
            assert stopped.wait(TIMEOUT)
            return resolve_or_park(*arguments)

        monkeypatch.setattr(pager, "resolve_or_park", resolve_late)
        # As if a revocation under way had taken off again what this puts on the page.
        monkeypatch.setattr(pager.trap, "release_sleepers", stopped.set)
        try:
            with pytest.raises(PagingError, match="that was enough"):
                machine.run(TIMEOUT)
        finally:
            release_sleepers()


@pytest.mark.parametrize("backing", BACKINGS)
def test_all_is_counted_and_traced_when_the_run_ends_however_slow_the_reader_is_behind_its_wake(
    backing, monkeypatch
):
    workload = plan("touch", pages=8)
    with make_machine("userfaultfd", backing, workload=workload) as machine:
        trap, traced = machine.pager.trap, []
        admit = trap.admit

        def admit_and_dawdle(first, count):
            admit(first, count)  # which wakes the vCPU
            time.sleep(0.05)

        monkeypatch.setattr(trap, "admit", admit_and_dawdle)
        machine.pager.jobs.add(Observer(lambda fault, *_: traced.append(fault.page)))
        machine.run(TIMEOUT)
        assert machine.pager.counters.pages_fetched == 8
        assert sorted(traced) == list(range(8))
        assert sum(len(each) for each in machine.pager.trap.latencies) == 8


def test_every_wait_for_a_reader_behind_its_wake_ends_when_it_is_through(monkeypatch):
    with make_machine("userfaultfd", workload=plan("touch", pages=1)) as machine:
        trap, awake, through, ends = machine.pager.trap, threading.Event(), threading.Event(), []
        admit = trap.admit

        def admit_and_stay(first, count):
            admit(first, count)  # which wakes the vCPU
            awake.set()
            assert through.wait(TIMEOUT)

        monkeypatch.setattr(trap, "admit", admit_and_stay)
        # The end of a run waits as the other two do.
        waits = [lambda: machine.run(TIMEOUT), *[lambda: ends.append(trap.settle(TIMEOUT))] * 2]
        threads = [threading.Thread(target=wait, daemon=True) for wait in waits]
        threads[0].start()
        assert awake.wait(TIMEOUT)
        assert not trap.settle(0)
        for thread in threads[1:]:
            thread.start()
        through.set()
        for thread in threads:
            thread.join(TIMEOUT / 2)
        assert not any(thread.is_alive() for thread in threads)
        assert ends == [True, True]
