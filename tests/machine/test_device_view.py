"""The device view: vCPUs exit, devices sleep on a view of their own, and both are at the same pages."""

import os
import threading
import time

import numpy as np
import pytest
from harness import (
    MEMORY,
    SEED,
    TIMEOUT,
    WITH_DEVICE_VIEW,
    all_of_ram,
    make_machine,
    meanwhile,
    options_of,
    plan,
    prove,
    without_kernel_faults,
)

from kvmdp.errors import PagingError
from kvmdp.machine.machine import Machine
from kvmdp.machine.workloads.arithmetic import place_in_page
from kvmdp.memory.layout import HIGH_RAM_BASE, LOW_RAM_END
from kvmdp.page import PAGE_SIZE, Origin
from kvmdp.paging.jobs import Observer
from kvmdp.source.base import SourceError
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.uffd.options import UffdOptions

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]

every = pytest.mark.parametrize("trap", WITH_DEVICE_VIEW)


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def content(source, page):
    return source.pages(np.array([page])).tobytes()


@every
def test_granules_and_blocks_of_pages_arrive_together(trap):
    result = prove(trap, "memfd", plan("touch"), granule=64 << 10, fault_around=32)
    assert result.counters.claims == 512 // 32
    assert result.memslots == 2 * 16


@pytest.mark.parametrize("uffd", [UffdOptions(), UffdOptions(readers=3), UffdOptions(shards=2)])
@every
def test_a_device_reads_what_the_source_has_and_the_pager_knows_it_was_a_device(trap, uffd):
    source = SyntheticSource(MEMORY, SEED)
    faults = []
    with make_machine(trap, source=source, uffd=uffd) as machine:
        machine.pager.jobs.add(
            Observer(lambda fault, claim, began: faults.append((fault.page, fault.origin)))
        )
        device = machine.device_view
        assert device.read(0, 3 * PAGE_SIZE) == b"".join(content(source, page) for page in range(3))
        assert device.read(511 * PAGE_SIZE - 3, 6) == content(source, 510)[-3:] + content(source, 511)[:3]
        assert device.read(5, 0) == b""
        assert faults == [(page, Origin.DEVICE) for page in (0, 1, 2, 510, 511)]
        device.read(PAGE_SIZE, PAGE_SIZE)
        assert machine.pager.counters.pages_fetched == 5


@every
def test_a_userfaultfd_for_user_mode_faults_alone_will_do(trap, monkeypatch):
    without_kernel_faults(monkeypatch)
    source = SyntheticSource(MEMORY, SEED)
    with make_machine(trap, source=source) as machine:
        assert machine.device_view.read(PAGE_SIZE, PAGE_SIZE) == content(source, 1)


@every
def test_what_a_device_writes_is_there_for_everybody_and_the_rest_of_the_page_is_the_sources(trap):
    source = SyntheticSource(MEMORY, SEED)
    with make_machine(trap, source=source) as machine:
        machine.device_view.write(2 * PAGE_SIZE - 4, b"deadbeef")
        assert machine.memory.read(2 * PAGE_SIZE - 4, 8) == b"deadbeef"
        assert machine.memory.read(PAGE_SIZE, PAGE_SIZE - 4) == content(source, 1)[:-4]
        assert machine.memory.read(2 * PAGE_SIZE + 4, PAGE_SIZE - 4) == content(source, 2)[4:]
        machine.memory.write(9 * PAGE_SIZE, b"host")
        assert machine.device_view.read(9 * PAGE_SIZE, 4) == b"host"


def test_the_hole_of_the_pc_is_no_ram_and_what_lies_above_it_is():
    memory = LOW_RAM_END + MEMORY
    source = SyntheticSource(memory, SEED)
    with make_machine("mmio:device-view", memory_bytes=memory, source=source) as machine:
        device = machine.device_view
        page = LOW_RAM_END // PAGE_SIZE
        assert device.read(HIGH_RAM_BASE, PAGE_SIZE) == content(source, page)
        for gpa in (LOW_RAM_END - 4, HIGH_RAM_BASE - 4, HIGH_RAM_BASE + MEMORY - 4, -4):
            with pytest.raises(ValueError, match="is not guest RAM"):
                device.read(gpa, 8)
            with pytest.raises(ValueError, match="is not guest RAM"):
                device.write(gpa, bytes(8))
        granule = machine.pager.trap.granule // PAGE_SIZE
        assert machine.pager.counters.pages_fetched == granule  # nothing was touched on the way to a refusal


@pytest.mark.parametrize("trap", ["marker", "memory-fault", "mmio", "userfaultfd"])
def test_there_is_none_that_was_not_asked_for(trap):
    with make_machine(trap) as machine:
        assert machine.device_view is None


@pytest.mark.parametrize("trap", ["marker", "layered", "userfaultfd"])
def test_a_trap_by_page_table_is_refused_with_the_reason(trap):
    options = options_of(f"{trap}:device-view", memory_bytes=MEMORY)
    with pytest.raises(ValueError, match=f"the trap {trap} has no device view, for it works by page tables"):
        Machine(options, SyntheticSource(MEMORY))


@every
def test_anonymous_memory_is_refused_with_the_reason(trap):
    options = options_of(trap, "anonymous", memory_bytes=MEMORY)
    with pytest.raises(ValueError, match=r"a device view maps RAM once more, .+ with anonymous memory"):
        Machine(options, SyntheticSource(MEMORY))


# Devices and vCPUs at the same pages


class Adder:
    """A device that adds to a word of its own in each page, next to the one `atomic` uses."""

    def __init__(self, machine, pages):
        self._device = machine.device_view
        self._words = [
            page * PAGE_SIZE + 8 * (place + 1 & 511)
            for page, place in enumerate(place_in_page(np.arange(pages), 9).tolist())
        ]
        self.done = [0] * pages
        self.cut_off = None  # the page whose addition the machine's end may have cut off

    def add(self, number):
        """Add once; pages come from the last one down."""
        page = -number % len(self._words)
        try:
            word = int.from_bytes(self._device.read(self._words[page], 8), "little")
            self._device.write(self._words[page], ((word + 1) % (1 << 64)).to_bytes(8, "little"))
        except PagingError:
            self.cut_off = page
            return False
        self.done[page] += 1
        return None

    def check(self, machine, workload, source):
        """All additions of vCPUs and device are in the pages, present or shut out, and nothing else changed."""
        pages = workload.touched
        assert len(pages) == len(self._words)
        expected = workload.expected_pages(source.pages, pages)
        for page, word in enumerate(self._words):
            expected[page, word % PAGE_SIZE // 8] += np.uint64(self.done[page])
        wrong = np.flatnonzero((all_of_ram(machine)[pages] != expected).any(axis=1)).tolist()
        if wrong == [self.cut_off]:
            word = self._words[self.cut_off] % PAGE_SIZE // 8
            expected[self.cut_off, word] += np.uint64(1)
            wrong = np.flatnonzero((all_of_ram(machine)[pages] != expected).any(axis=1)).tolist()
        assert wrong == []


@every
def test_a_device_and_vcpus_at_the_same_absent_pages_lose_nothing_and_fetch_each_once(trap):
    for _ in range(5):
        workload = plan("atomic", vcpus=2, iterations=4)
        source = SyntheticSource(MEMORY, SEED)
        with make_machine(trap, workload=workload, source=source, uffd=UffdOptions(readers=2)) as machine:
            adder = Adder(machine, 512)
            with meanwhile(adder.add):
                machine.run(TIMEOUT)
            adder.check(machine, workload, source)
            assert sum(adder.done) > 0
            # The device's reader may still be counting a page into which it has let the vCPUs.
            wait_until(lambda: not machine.pager.ledger.claims)
            assert machine.pager.counters.pages_fetched == 512


@pytest.mark.parametrize("granule", [None, 16 << 10])
@every
def test_pages_that_come_and_go_under_vcpus_and_a_device_lose_nothing(trap, granule):
    workload = plan("atomic", vcpus=2, pages=64, iterations=60)
    source = SyntheticSource(MEMORY, SEED)
    with make_machine(trap, workload=workload, source=source, granule=granule) as machine:
        adder = Adder(machine, 64)

        def revoke(number):
            machine.pager.mark_nonpresent(number * 7 % 60, 4)
            time.sleep(0.001)
            return number < 300  # where pages go faster than they come back, the guest would hardly get on

        with meanwhile(adder.add, revoke):
            machine.run(TIMEOUT)
        assert machine.pager.counters.pages_revoked > 0
        assert machine.pager.counters.pages_fetched == 64
        adder.check(machine, workload, source)


@every
def test_the_only_reader_does_not_wait_for_a_claim_that_is_at_its_memslot(trap, monkeypatch):
    source = SyntheticSource(MEMORY, SEED)
    at_its_memslot, go_on = threading.Event(), threading.Event()
    with make_machine(trap, source=source) as machine:
        pager, device = machine.pager, machine.device_view
        admit = pager.trap.admit

        def admit_late(first, count):
            if first == 0:
                at_its_memslot.set()
                assert go_on.wait(TIMEOUT)
            admit(first, count)

        monkeypatch.setattr(pager.trap, "admit", admit_late)
        got = {}

        def read(memory, page, key):
            got[key] = memory.read(page * PAGE_SIZE, PAGE_SIZE)

        host = threading.Thread(target=read, args=(machine.memory, 0, "host"))
        host.start()
        assert at_its_memslot.wait(TIMEOUT)
        parked = threading.Thread(target=read, args=(device, 0, "parked"))
        parked.start()
        wait_until(lambda: pager.counters.waits == 1)
        read(device, 7, "other")
        assert got == {"other": content(source, 7)}
        go_on.set()
        for thread in (host, parked):
            thread.join(TIMEOUT)
        assert got["host"] == got["parked"] == content(source, 0)
        assert pager.counters.pages_fetched == 2


@every
def test_while_a_page_is_shut_out_it_is_mapped_for_no_device(trap, monkeypatch):
    seen = []
    with make_machine(trap) as machine, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pager, device = machine.pager, machine.device_view
        revoke, first_hva = pager.trap.revoke, device._view.hva

        def mapped(page):
            entry = os.pread(pagemap.fileno(), 8, (first_hva // PAGE_SIZE + page) * 8)
            return bool(int.from_bytes(entry, "little") >> 63)

        def revoke_and_look(first, count):
            revoke(first, count)
            for _ in range(3):  # still under the claim: nobody may let a device in
                seen.append(any(mapped(page) for page in range(first, first + count)))
                time.sleep(0.0001)

        def slowly(call):
            def after_a_while(*arguments):
                time.sleep(0.0005)  # between a reader's look at the page and its mapping
                call(*arguments)

            return after_a_while

        for uffd in pager.trap._devices._uffds:
            monkeypatch.setattr(uffd, "continue_", slowly(uffd.continue_))
        monkeypatch.setattr(pager.trap, "revoke", revoke_and_look)
        with meanwhile(*[lambda number: device.read(number % 4 * PAGE_SIZE, 8) and None] * 2):
            deadline = time.monotonic() + TIMEOUT
            while len(seen) < 600 and time.monotonic() < deadline:
                pager.mark_nonpresent(0, 4)
        device.read(0, 8)
        assert mapped(0)
    assert len(seen) >= 600
    assert not any(seen)


@every
def test_a_page_marked_non_present_traps_for_devices_again_and_costs_no_fetch(trap):
    faults = []
    with make_machine(trap) as machine:
        pager, device = machine.pager, machine.device_view
        device.write(0, b"kept")
        pager.jobs.add(Observer(lambda fault, claim, began: faults.append(fault.page)))
        for _ in range(3):
            assert pager.mark_nonpresent(0, 1) == 1
            assert device.read(0, 4) == b"kept"
        assert faults == [0, 0, 0]
        assert (pager.counters.pages_fetched, pager.counters.pages_backed) == (1, 3)


@every
def test_switched_off_and_on_the_device_view_goes_on(trap):
    source = SyntheticSource(MEMORY, SEED)
    with make_machine(trap, source=source) as machine:
        machine.pager.mark_present(0, 512)
        machine.pager.disable()
        assert machine.device_view.read(0, PAGE_SIZE) == content(source, 0)
        machine.device_view.write(PAGE_SIZE, b"while off")
        machine.pager.enable()
        machine.pager.mark_nonpresent(1, 1)
        assert machine.device_view.read(PAGE_SIZE, 9) == b"while off"
        assert machine.device_view.read(7 * PAGE_SIZE, PAGE_SIZE) == content(source, 7)


# The end


class Stuck(SyntheticSource):
    """Fails for good at page 5."""

    def fetch(self, request, destination):
        offset = request.offset
        if offset <= 5 * PAGE_SIZE < offset + destination.nbytes:
            raise SourceError(self.name, offset, destination.nbytes, "it is gone")
        super().fetch(request, destination)


def asleep_on_page_5(machine):
    """Start a device that reads a page that never comes; returns its thread and where its error will be."""
    errors = []

    def read():
        try:
            machine.device_view.read(5 * PAGE_SIZE, 8)
        except PagingError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    return thread, errors


@every
def test_a_device_that_sleeps_on_a_page_that_never_comes_wakes_to_an_error_when_the_run_ends(trap):
    workload = plan("touch", pages=16)
    source = Stuck(MEMORY, SEED)
    with make_machine(trap, workload=workload, source=source) as machine:
        thread, errors = asleep_on_page_5(machine)
        wait_until(lambda: machine.pager.error is not None)
        assert thread.is_alive()
        with pytest.raises(PagingError, match=r"gpa 0x5000 cannot be fetched: .* it is gone"):
            machine.run(TIMEOUT)
        thread.join(TIMEOUT)
        assert errors == ["the device view ended during an access: the machine is stopping"]
        with pytest.raises(PagingError, match="the device view has ended: the machine is stopping"):
            machine.device_view.write(0, b"late")
        assert not machine.pager.bitmap.test(5)


@every
def test_closing_a_machine_waits_for_a_device_that_sleeps_and_wakes_it_to_an_error(trap):
    with make_machine(trap, source=Stuck(MEMORY, SEED)) as machine:
        thread, errors = asleep_on_page_5(machine)
        wait_until(lambda: machine.pager.error is not None)
    thread.join(TIMEOUT)
    assert errors == ["the device view ended during an access: the machine is stopping"]


@every
def test_an_access_cut_off_by_the_end_does_not_get_into_ram(trap):
    reached, go_on = threading.Event(), threading.Event()

    class Slow(SyntheticSource):
        def fetch(self, request, destination):
            super().fetch(request, destination)
            reached.set()
            assert go_on.wait(TIMEOUT)

    source = Slow(MEMORY, SEED)
    with make_machine(trap, source=source) as machine:
        errors = []

        def write():
            try:
                machine.device_view.write(0, b"too late")
            except PagingError as error:
                errors.append(str(error))

        thread = threading.Thread(target=write)
        thread.start()
        assert reached.wait(TIMEOUT)
        machine.stop()
        thread.join(TIMEOUT)
        assert len(errors) == 1
        go_on.set()
        wait_until(lambda: machine.pager.bitmap.test(0))  # the claim ends in its own time
        assert machine.memory.read(0, PAGE_SIZE) == content(source, 0)
