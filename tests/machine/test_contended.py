"""Several vCPUs add to the same words while pages come and go: no addition may be lost, no page fetched twice.

Many pages once, and few pages many times. `KVMDP_EFFORT=full` goes on for longer.
"""

import time

import numpy as np
import pytest
from effort import by_effort
from harness import BACKINGS, SEED, TIMEOUT, TRAPS, all_of_ram, make_machine, meanwhile, plan

from kvmdp.errors import PagingError
from kvmdp.kvm import MmioWrite
from kvmdp.machine.hostinfo import cpu_model
from kvmdp.machine.workloads.arithmetic import place_in_page
from kvmdp.memory.layout import MIN_MEMORY
from kvmdp.page import PAGE_SIZE
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.vcpu.emulated import Emulation

pytestmark = pytest.mark.kvm

# A CPU that QEMU emulates takes minutes for what a real one does in seconds.
EMULATED = cpu_model().startswith("QEMU TCG")
ROUNDS = by_effort(1, 3 if EMULATED else 5, 20)
PAGES = 256 if EMULATED else by_effort(2048, 4096, 8192)


def source_for(workload):
    return SyntheticSource(workload.options.memory_bytes, SEED)


def check(machine, workload, source):
    """Every page the workload names holds every addition, and was read from the source once."""
    pages = workload.touched
    wrong = np.flatnonzero(
        (all_of_ram(machine)[pages] != workload.expected_pages(source.pages, pages)).any(axis=1)
    )
    assert wrong.tolist() == []
    assert machine.pager.counters.pages_fetched == len(pages)


@pytest.mark.parametrize("vcpus", [2, 4])
@pytest.mark.parametrize("trap", TRAPS)
def test_vcpus_that_fault_on_the_same_pages_lose_nothing(trap, vcpus):
    for _ in range(ROUNDS):
        workload = plan("atomic", vcpus=vcpus, memory=max(PAGES * PAGE_SIZE, MIN_MEMORY), pages=PAGES)
        source = source_for(workload)
        with make_machine(trap, workload=workload, source=source) as machine:
            machine.run(TIMEOUT)
            check(machine, workload, source)
            assert machine.pager.counters.pages_backed == 0


@pytest.mark.parametrize("vcpus", [2, 4])
@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("trap", TRAPS)
def test_no_operation_loses_an_addition_on_any_backing(trap, backing, vcpus):
    for turn in range(ROUNDS):
        operation = ("add", "inc", "xadd", "cmpxchg")[turn % 4]
        workload = plan("atomic", vcpus=vcpus, pages=256, iterations=5, operation=operation)
        source = source_for(workload)
        with make_machine(trap, backing, workload=workload, source=source) as machine:
            machine.run(TIMEOUT)
            check(machine, workload, source)


def marking(machine, pages):
    """Two actions for threads of their own: pages go by range and by bitmap, and come back by both."""
    ranges, bitmaps = np.random.default_rng(1), np.random.default_rng(2)
    pager = machine.pager

    def by_range(number):
        first = int(ranges.integers(pages))
        count = min(int(ranges.integers(1, 9)), pages - first)
        if number % 4 == 3:
            pager.mark_present(first, count)
        else:
            pager.mark_nonpresent(first, count)
        time.sleep(0.002)

    def by_bitmap(number):
        words = np.zeros(-(-machine.layout.pages // 64), dtype=np.uint64)
        for page in bitmaps.integers(0, pages, 6).tolist():
            words[page // 64] |= np.uint64(1 << page % 64)
        if number % 4 == 3:
            pager.mark_bitmap_present(words)
        else:
            pager.mark_bitmap_nonpresent(words)
        time.sleep(0.002)

    return by_range, by_bitmap


@pytest.mark.parametrize(("operation", "vcpus"), [("add", 2), ("inc", 4), ("xadd", 2), ("cmpxchg", 4)])
@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("trap", TRAPS)
def test_marking_pages_while_vcpus_add_to_them_loses_nothing(trap, backing, operation, vcpus):
    workload = plan("atomic", vcpus=vcpus, pages=128, iterations=40, operation=operation)
    source = source_for(workload)
    with make_machine(trap, backing, workload=workload, source=source) as machine:
        with meanwhile(*marking(machine, 128)):
            machine.run(TIMEOUT)
        check(machine, workload, source)
        counters = machine.pager.counters
        assert counters.pages_revoked > 0
        assert 0 <= counters.pages_revoked - counters.pages_backed <= 128


@pytest.mark.parametrize("trap", ["memory-fault", "mmio"])
def test_marking_granules_of_many_pages_loses_nothing(trap):
    workload = plan("atomic", vcpus=2, pages=512, iterations=10)
    source = source_for(workload)
    with make_machine(trap, workload=workload, source=source, granule=32 << 10) as machine:
        with meanwhile(*marking(machine, 512)):
            machine.run(TIMEOUT)
        check(machine, workload, source)
        assert machine.pager.counters.pages_revoked % 8 == 0


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("trap", TRAPS)
def test_the_host_reads_whole_additions_while_pages_come_and_go(trap, backing):
    workload = plan("atomic", vcpus=2, pages=64, iterations=100)
    source = source_for(workload)
    before = source.pages(np.arange(64))
    places = place_in_page(np.arange(64), 9).tolist()
    most, amount = 2 * 100, workload.blocks[0].amount
    with make_machine(trap, backing, workload=workload, source=source) as machine:

        def read(number):
            page = number % 64
            try:
                word = machine.memory.read(page * 4096 + 8 * places[page], 8)
            except PagingError:
                return False  # the machine has stopped
            added = (int.from_bytes(word, "little") - int(before[page, places[page]])) % (1 << 64)
            assert added in range(0, most * amount + 1, amount)
            return None

        with meanwhile(*marking(machine, 64), read):
            machine.run(TIMEOUT)
        check(machine, workload, source)


@pytest.mark.parametrize("trap", TRAPS)
def test_ring_0_loses_nothing_while_pages_are_marked(trap):
    workload = plan("atomic", vcpus=2, ring=0, pages=32, iterations=40)
    source = source_for(workload)
    with make_machine(trap, workload=workload, source=source) as machine:
        with meanwhile(*marking(machine, 32)):
            machine.run(TIMEOUT)
        check(machine, workload, source)


# Can these tests see a loss at all? The window is between the exit of an emulated exchange for its load and the store
# in its second half. Here another party adds to the word in that window, every time. An access that is called off does
# not know of it; one that is completed stores what it has made of the bytes from before.

OTHERS_AMOUNT = 1 << 20
WINDOWS = 5


def missing_from_the_word(monkeypatch, completed):
    """Run `atomic` on page 0, which is shut off again and again, and add to its word in each of the first windows.

    Loads are `completed` with bytes, or called off. Returns how much less than all additions the word holds.
    """
    workload = plan("atomic", pages=1, iterations=100)
    source = source_for(workload)
    call_off = Emulation.call_off
    with make_machine("mmio", workload=workload, source=source) as machine:
        view = machine.backing.vmm.view
        offset = 8 * int(place_in_page(np.array([0]), 9)[0])
        turns = []

        def in_the_window(emulation, load, **options):
            before = view[load.gpa : load.gpa + load.size].tobytes()
            if len(turns) < WINDOWS:
                turns.append(load)
                with view[offset : offset + 8].cast("Q") as word:
                    word[0] += OTHERS_AMOUNT
            if not completed:
                return call_off(emulation, load, **options)
            load.data[:] = before
            following = emulation.finish()
            while isinstance(following, MmioWrite):
                view[following.gpa : following.gpa + following.size] = following.data
                following = emulation.finish()
            return following

        def shut_off(_number):
            machine.pager.mark_nonpresent(0, 1)
            time.sleep(0.001)

        monkeypatch.setattr(Emulation, "call_off", in_the_window)
        machine.pager.mark_present(0, 1)  # the source would overwrite what is added before that
        machine.pager.mark_nonpresent(0, 1)
        with meanwhile(shut_off):
            machine.run(TIMEOUT)
        after = all_of_ram(machine)[:1]
    assert turns
    missing = int(workload.expected_pages(source.pages, np.array([0])).sum()) - int(after.sum())
    return (missing + len(turns) * OTHERS_AMOUNT) % (1 << 64)


def test_an_exchange_that_is_called_off_loses_nothing(monkeypatch):
    assert missing_from_the_word(monkeypatch, completed=False) == 0


def test_an_exchange_that_is_completed_is_seen_to_lose(monkeypatch):
    assert missing_from_the_word(monkeypatch, completed=True) >= OTHERS_AMOUNT
