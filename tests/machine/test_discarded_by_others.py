"""Private memory that somebody discards without asking the pager: it reads as zeros, whatever the pager was just at.

The kernel has no second copy of it, so a page that is present and has nothing mapped is one that nobody can bring back.
"""

import contextlib
import threading
import time

import numpy as np
import pytest
from harness import MEMORY, SEED, TIMEOUT, make_machine, meanwhile, plan, without_kernel_faults

from kvmdp.errors import BusyError
from kvmdp.lab.invariants import violations
from kvmdp.page import PAGE_SIZE, REGION, Outcome
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.collapse import can_collapse
from kvmdp.trap.uffd import descriptor as uffd
from kvmdp.trap.uffd import userfaultfd
from kvmdp.trap.uffd.options import UffdOptions

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]

PAGE = 7
ZEROS = bytes(PAGE_SIZE)
NOTED_SECONDS = 0.05  # from when a discard is over to when the reader that was told of it has noted it
EVERY_TRAP = pytest.mark.parametrize("trap", ["marker", "userfaultfd"])


def private_machine(trap, **options):
    # Two readers where there is a choice: one may be at the very page.
    readers = 2 if trap == "userfaultfd" else 1
    return make_machine(trap, "anonymous", uffd=UffdOptions(readers=readers), **options)


def discard(machine, page=PAGE, count=1):
    """As a balloon would. Sleeps until a reader has been told, so it is done in a thread that no reader waits for."""
    thread = threading.Thread(target=machine.backing.guest.drop, args=(page * PAGE_SIZE, count * PAGE_SIZE))
    thread.start()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    time.sleep(NOTED_SECONDS)


def check(machine):
    # A discard takes markers, too. Then an access comes to the reader, which puts the marker back.
    assert [
        each for each in violations(machine.pager) if not each.startswith("absent, and without a marker")
    ] == []


def check_zeros(machine, page=PAGE):
    check(machine)  # before any access of ours, which would not come back from a hole
    assert machine.memory.read(page * PAGE_SIZE, PAGE_SIZE) == ZEROS
    assert violations(machine.pager) == []


class CutIn(SyntheticSource):
    """Calls `between` once, when the bytes of the page have been fetched and nobody knows it yet."""

    def __init__(self):
        super().__init__(MEMORY, SEED)
        self.between = lambda: None

    def fetch(self, request, destination):
        offset = request.offset
        super().fetch(request, destination)
        if offset == PAGE * PAGE_SIZE:
            between, self.between = self.between, lambda: None
            between()


@EVERY_TRAP
def test_a_page_that_is_being_fetched(trap):
    source = CutIn()
    with private_machine(trap, workload=plan("touch", pages=16), source=source) as machine:
        source.between = lambda: discard(machine)
        machine.run(TIMEOUT)
        check_zeros(machine)


@EVERY_TRAP
def test_a_page_that_is_being_admitted(trap, monkeypatch):
    with private_machine(trap, workload=plan("touch", pages=16)) as machine:
        admit = machine.pager.trap.admit

        def admit_and_be_late(first, count):
            admit(first, count)
            if first == PAGE:
                monkeypatch.setattr(machine.pager.trap, "admit", admit)
                discard(machine)

        monkeypatch.setattr(machine.pager.trap, "admit", admit_and_be_late)
        machine.run(TIMEOUT)
        check_zeros(machine)


@EVERY_TRAP
@pytest.mark.parametrize("comes", ["before", "after"])
@pytest.mark.parametrize("take", ["mark_nonpresent", "evict"])
def test_a_page_that_is_being_taken_away(trap, take, comes, monkeypatch):
    with private_machine(trap) as machine:
        machine.memory.write(PAGE * PAGE_SIZE, b"thrown away")
        revoke = machine.pager.trap.revoke

        def revoke_meanwhile(first, count):
            revoke(first, count)
            discard(machine)

        if comes == "after":
            monkeypatch.setattr(machine.pager.trap, "revoke", revoke_meanwhile)
        else:
            # It is in use until it has been discarded, and the revocation waits for that.
            assert machine.pager.hold(PAGE)
        taker = threading.Thread(target=getattr(machine.pager, take), args=(PAGE, 1))
        taker.start()
        if comes == "before":
            while machine.pager.bitmap.test(PAGE):
                time.sleep(0.001)
            discard(machine)
            machine.pager.release(PAGE)
        taker.join(TIMEOUT)
        check_zeros(machine)


@EVERY_TRAP
def test_a_page_that_cannot_be_taken_away_after_all(trap):
    with private_machine(trap) as machine:
        machine.memory.write(PAGE * PAGE_SIZE, b"thrown away")
        assert machine.pager.hold(PAGE)
        refused = []

        def take():
            try:
                machine.pager.mark_nonpresent(PAGE, 1, timeout=4 * NOTED_SECONDS)
            except BusyError as error:
                refused.append(error)

        taker = threading.Thread(target=take)
        taker.start()
        while machine.pager.bitmap.test(PAGE):
            time.sleep(0.001)
        discard(machine)
        taker.join(TIMEOUT)
        assert refused
        machine.pager.release(PAGE)
        check_zeros(machine)


@EVERY_TRAP
def test_pages_that_nobody_is_at_present_or_not(trap):
    with private_machine(trap) as machine:
        machine.pager.mark_present(0, 4)
        machine.pager.evict(1, 1)
        machine.pager.mark_nonpresent(2, 1)
        machine.pager.poison(3)
        discard(machine, 0, 8)
        check(machine)
        for page in (0, 1, 2, 4, 7):
            assert machine.memory.read(page * PAGE_SIZE, PAGE_SIZE) == ZEROS
        machine.pager.unpoison(3, b"healed  " * 512)  # it was unusable, and stays so
        assert machine.memory.read(3 * PAGE_SIZE, 6) == b"healed"
        assert machine.memory.read(8 * PAGE_SIZE, PAGE_SIZE) != ZEROS
        check(machine)


@EVERY_TRAP
@pytest.mark.parametrize("hears_kernel", [True, False])
def test_a_present_page_with_nothing_mapped_reads_as_zeros_for_the_guest(trap, hears_kernel, monkeypatch):
    if not hears_kernel:
        if trap == "userfaultfd":
            pytest.skip("userfaultfd is told of the kernel's own faults, or is not to be had")
        without_kernel_faults(monkeypatch)
    workload = plan("atomic", pages=16)
    with private_machine(trap, workload=workload) as machine:
        assert machine.pager.mark_present(0, 16) is Outcome.PRESENT
        machine.pager.trap._announce(
            PAGE, 1
        )  # the reader takes it for a drop of its own: the page stays PRESENT
        discard(machine)
        assert violations(machine.pager) == [f"present, and not mapped in the guest view: 1 pages ({PAGE})"]
        machine.run(TIMEOUT)
        assert violations(machine.pager) == []
        found = np.frombuffer(machine.memory.read(PAGE * PAGE_SIZE, PAGE_SIZE), dtype=np.uint64)
        source = SyntheticSource(MEMORY, SEED).pages(np.array([PAGE]))[0]
        expected = workload.expected_pages(
            lambda pages: np.zeros((len(pages), 512), np.uint64), np.array([PAGE])
        )
        assert np.array_equal(found, expected[0])
        assert not np.array_equal(found, source)


@EVERY_TRAP
def test_a_guest_whose_memory_is_discarded_all_the_time_gets_on(trap):
    workload = plan("touch", vcpus=2, touches=2000, overlap=True)
    with private_machine(trap, workload=workload) as machine:
        random = np.random.default_rng(5)

        def balloon(number):
            page = int(random.integers(MEMORY // PAGE_SIZE - 8))
            machine.backing.guest.drop(page * PAGE_SIZE, int(random.integers(1, 8)) * PAGE_SIZE)
            time.sleep(0.0005)
            return number < 1000  # a slow host's guest must get on in the end

        def mark(number):
            with contextlib.suppress(BusyError):
                machine.pager.mark_nonpresent(int(random.integers(MEMORY // PAGE_SIZE)), 1, timeout=1)
            time.sleep(0.0005)
            return number < 1000

        with meanwhile(balloon, mark):
            machine.run(TIMEOUT)


def test_what_was_discarded_of_a_collapsed_region_reads_as_zeros_when_that_is_taken_apart():
    memory = 4 * REGION * PAGE_SIZE
    source = SyntheticSource(memory, SEED)
    with make_machine("marker", "anonymous", memory_bytes=memory, source=source) as machine:
        if not can_collapse(machine.backing.guest):
            pytest.skip(
                "this kernel has no MADV_COLLAPSE: use Linux 6.1 or later, with transparent huge pages"
            )
        assert machine.pager.mark_present(0, REGION) is Outcome.PRESENT
        if not machine.pager.collapse(0, REGION):
            pytest.skip("the kernel has no huge page to spare")
        machine.backing.guest.drop(PAGE * PAGE_SIZE, PAGE_SIZE)  # nobody is told of plain memory
        assert machine.pager.mark_nonpresent(100, 1) == 1
        check_zeros(machine)


@EVERY_TRAP
def test_what_was_discarded_while_demand_paging_was_off_reads_as_zeros(trap):
    with private_machine(trap) as machine:
        assert machine.pager.mark_present(0, MEMORY // PAGE_SIZE) is Outcome.PRESENT
        machine.pager.disable()
        machine.backing.guest.drop(PAGE * PAGE_SIZE, PAGE_SIZE)
        machine.pager.enable()
        check_zeros(machine)


@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_what_a_device_brings_in_while_the_machine_is_made_to_run_again_is_kept(
    backing, markers, monkeypatch
):
    if not markers:  # Linux before 6.6
        without = uffd.supported_features() & ~uffd.abi.UFFD_FEATURE_POISON
        monkeypatch.setattr(userfaultfd, "supported_features", lambda: without)
    workload, again = plan("touch", pages=4), plan("touch", pages=300)
    with make_machine("userfaultfd", backing, workload=workload) as machine:
        machine.run(TIMEOUT)
        drop, devices = machine.backing.guest.drop, []

        def drop_late(offset, length):
            # The thread that drops is held up here, and a device of this process writes to an absent page.
            if not devices and offset <= 100 * PAGE_SIZE < offset + length:
                written = lambda: machine.memory.write(100 * PAGE_SIZE, b"written by a device")  # noqa: E731
                devices.append(threading.Thread(target=written))
                devices[0].start()
                devices[0].join(0.1)
            drop(offset, length)

        monkeypatch.setattr(machine.backing.guest, "drop", drop_late)
        machine.restart(again.blocks)
        assert devices
        devices[0].join(TIMEOUT)
        assert violations(machine.pager) == []
        assert machine.memory.read(100 * PAGE_SIZE, 19) == b"written by a device"
        machine.run(TIMEOUT)
