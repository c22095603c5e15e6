"""Ctrl-C at any moment, with Python's own handler: a machine goes on exact, or is gone; its trap is never half told."""

import contextlib
import os
import random
import signal
import threading

import numpy as np
import pytest
from harness import (
    ALL_TRAPS,
    MEMORY,
    SEED,
    TIMEOUT,
    all_of_ram,
    contents,
    make_machine,
    options_of,
    plan,
    require_trap,
)
from interruptions import interrupt, points

from kvmdp.errors import CancelledError
from kvmdp.interruption import entered
from kvmdp.lab.experiment import run_workload
from kvmdp.lab.invariants import violations
from kvmdp.machine.machine import Machine
from kvmdp.machine.workloads import WorkloadOptions, make_workload
from kvmdp.page import PAGE_SIZE, REGION, Outcome
from kvmdp.source.synthetic import SyntheticSource

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]

WAYS = [(trap, "memfd") for trap in ALL_TRAPS] + [("marker", "anonymous"), ("userfaultfd", "anonymous")]
EVERY_WAY = pytest.mark.parametrize(("trap", "backing"), WAYS)
EACH_KIND = pytest.mark.parametrize("trap", ["memory-fault", "marker", "userfaultfd", "mmio:device-view"])
FULL = os.environ.get("KVMDP_EFFORT") == "full"
INTERRUPTIONS = 400 if FULL else 40
PAGES = 64


def operations(machine):
    """What the main thread of a program may do with its machine while the guest runs."""
    pager, memory = machine.pager, machine.memory
    return (
        lambda: pager.mark_nonpresent(0, PAGES),
        lambda: pager.evict(8, 24),
        lambda: pager.mark_present(0, PAGES),
        lambda: memory.read(4 * PAGE_SIZE, 20 * PAGE_SIZE),
        lambda: pager.mark_nonpresent(30, 2),
        lambda: memory.load64(31 * PAGE_SIZE),
        lambda: pager.collapse(0, REGION),
        lambda: pager.reassert(3),
    )


@EVERY_WAY
def test_a_guest_is_exact_whose_memory_comes_and_goes_by_calls_that_are_interrupted(trap, backing):
    workload = plan("atomic", vcpus=2, pages=PAGES, iterations=100)
    source = SyntheticSource(MEMORY, SEED)
    chance = random.Random(7)
    with make_machine(trap, backing, workload=workload, source=source) as machine:
        errors = []

        def run():
            try:
                machine.run(TIMEOUT)
            except Exception as error:
                errors.append(error)

        guest = threading.Thread(target=run)
        guest.start()
        interrupted, where = 0, None
        for number in range(INTERRUPTIONS):
            with contextlib.suppress(CancelledError):  # the guest is done
                where = interrupt(chance.choice(operations(machine)), chance.randrange(300), steps=True)
                interrupted += where is not None
            assert machine.pager.error is None, (number, where)
        guest.join(TIMEOUT)
        assert errors == []
        assert interrupted
        assert violations(machine.pager) == []
        found = contents(machine, workload.touched.tolist())
        assert np.array_equal(found, workload.expected_pages(source.pages, workload.touched))


@EVERY_WAY
def test_a_pager_of_a_real_trap_goes_on_wherever_it_is_interrupted(trap, backing):
    source = SyntheticSource(MEMORY, SEED)
    chance = random.Random(11)
    with make_machine(trap, backing, source=source) as machine:
        pager = machine.pager
        calls = (
            *operations(machine),
            lambda: (pager.mark_present(0, MEMORY // PAGE_SIZE), pager.disable(), pager.enable()),
        )
        for number in range(INTERRUPTIONS):
            where = interrupt(chance.choice(calls), chance.randrange(400), steps=True)
            assert violations(pager) == [], (number, where)
            assert pager.error is None, (number, where)
        pager.enable()
        assert pager.mark_nonpresent(0, MEMORY // PAGE_SIZE, timeout=TIMEOUT) >= 0
        assert pager.mark_present(0, MEMORY // PAGE_SIZE) is Outcome.PRESENT
        assert np.array_equal(all_of_ram(machine), source.pages(np.arange(MEMORY // PAGE_SIZE)))
        pager.disable()


@EACH_KIND
def test_a_machine_whose_making_is_interrupted_leaves_nothing(trap):
    require_trap(trap)
    source = SyntheticSource(4 * MEMORY, SEED)
    # In granules that make the trap's own loops, which are traced, short.
    granule = 16 * PAGE_SIZE if "memory-fault" in trap or "mmio" in trap else None
    options = options_of(
        trap,
        memory_bytes=4 * MEMORY,
        vcpus=2,
        granule=granule,
        resident_limit=2 * MEMORY,
        page_tables="paged",
    )

    def make():
        with entered(Machine, options, source):
            pass

    most = points(make, steps=True)
    chance = random.Random(13)
    threads = threading.active_count()
    for _ in range(INTERRUPTIONS // 2):
        interrupt(make, chance.randrange(most), steps=True)
        assert threading.active_count() == threads


@EACH_KIND
def test_a_run_that_is_interrupted_has_stopped_every_vcpu(trap):
    source = SyntheticSource(MEMORY, SEED)
    chance = random.Random(17)
    most = None
    for _ in range(INTERRUPTIONS // 4):
        workload = plan("touch", vcpus=2, touches=100)
        with make_machine(trap, workload=workload, source=source) as machine:
            if most is None:
                most = points(lambda: machine.run(TIMEOUT), steps=True)
                continue
            interrupt(lambda: machine.run(TIMEOUT), chance.randrange(most), steps=True)
            assert all(thread.join(0) for thread in machine.threads)
            assert violations(machine.pager) == []


def starts(monkeypatch, interrupted_at):
    """Have SIGINT come as a thread is started, the `interrupted_at`-th; returns the list that all are noted in."""
    noted, start = [], threading.Thread.start

    def interrupted_start(thread):
        if len(noted) == interrupted_at:
            signal.raise_signal(signal.SIGINT)
        noted.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    return noted


@EACH_KIND
def test_an_interruption_as_any_thread_is_started_leaves_none_of_them(trap, monkeypatch):
    require_trap(trap)
    source = SyntheticSource(MEMORY, SEED)
    options = options_of(trap, memory_bytes=MEMORY, vcpus=2, resident_limit=MEMORY // 2)

    def run(interrupted_at):
        workload = make_workload("disk", WorkloadOptions(memory_bytes=MEMORY, vcpus=2, seed=SEED))
        with monkeypatch.context() as patch:
            noted = starts(patch, interrupted_at)
            run_workload(options, workload, source, timeout=TIMEOUT, collapse="full")
        return noted

    names = run(None)
    assert {"vcpu-0", "vcpu-1", "disk", "collapse"} <= {*names}
    threads = {*threading.enumerate()}
    for number in range(len(names)):
        with pytest.raises(KeyboardInterrupt):
            run(number)
        assert {*threading.enumerate()} == threads, f"as {names[number]} was started"


@EACH_KIND
def test_an_interruption_as_vcpus_are_stopped_comes_when_they_have_been(trap, monkeypatch):
    with make_machine(trap, workload=plan("touch", vcpus=2)) as machine:
        stop, stopped = machine.stop, []

        def interrupted_stop():
            signal.raise_signal(signal.SIGINT)
            stop()
            stopped.append(all(thread.join(0) for thread in machine.threads))

        monkeypatch.setattr(machine, "stop", interrupted_stop)
        with pytest.raises(KeyboardInterrupt):
            machine.run(TIMEOUT)
        assert stopped == [True]
