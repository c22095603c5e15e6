"""`GuestMemory` on a machine: under every trap what is read and written is exact, and nothing is lost or torn.

What an access waits for and what keeps it out is in tests/paging/test_access.py, without a kernel.
"""

import sys
import threading
import time

import numpy as np
import pytest
from harness import (
    MEMORY,
    SEED,
    TIMEOUT,
    all_of_ram,
    every_trap,
    every_trap_and_backing,
    make_machine,
    meanwhile,
    plan,
    program_machine,
)

from kvmdp.errors import BusyError, FrozenError, PagingError
from kvmdp.machine.hostinfo import cpu_model
from kvmdp.machine.workloads.arithmetic import place_in_page
from kvmdp.memory.layout import HIGH_RAM_BASE, LOW_RAM_END
from kvmdp.page import PAGE_SIZE, Origin
from kvmdp.paging.jobs import Observer
from kvmdp.source.base import read_pages
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm


def image_of(source):
    return read_pages(source, np.arange(source.size // PAGE_SIZE)).tobytes()


def numbers(length):
    """Bytes that no shift by less than 251 makes the same."""
    return bytes(number % 251 for number in range(length))


# So many that pages come and go while the guest adds; the additions themselves are quick.
ITERATIONS = 2000 if cpu_model().startswith("QEMU TCG") else 50000


@pytest.fixture(autouse=True)
def _short_turns():
    """Let threads take turns at Python often: where one is cut off is what these tests are about."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    yield
    sys.setswitchinterval(before)


# Absent pages


@every_trap_and_backing
def test_reads_of_absent_pages_have_what_the_source_has(trap, backing):
    source = SyntheticSource(MEMORY, SEED)
    image = image_of(source)
    faults = []
    with make_machine(trap, backing, source=source) as machine:
        device = machine.memory_for_device(7)
        machine.pager.jobs.add(
            Observer(lambda fault, claim, began: faults.append((fault.page, fault.origin, fault.number)))
        )
        assert device.read(5, 8) == image[5:13]
        assert device.read(2 * PAGE_SIZE - 3, PAGE_SIZE + 6) == image[2 * PAGE_SIZE - 3 : 3 * PAGE_SIZE + 3]
        with device.view(4 * PAGE_SIZE, 2 * PAGE_SIZE) as view:
            assert view == image[4 * PAGE_SIZE : 6 * PAGE_SIZE]
        assert device.readv([(7 * PAGE_SIZE + 1, 2), (6 * PAGE_SIZE, 3)]) == (
            image[7 * PAGE_SIZE + 1 : 7 * PAGE_SIZE + 3] + image[6 * PAGE_SIZE : 6 * PAGE_SIZE + 3]
        )
        assert device.load64(8 * PAGE_SIZE + 16).to_bytes(8, "little") == image[8 * PAGE_SIZE + 16 :][:8]
        assert faults == [(page, Origin.DEVICE, 7) for page in (0, 1, 2, 3, 4, 5, 7, 6, 8)]
        assert device.read(0, MEMORY) == image
        assert machine.pager.counters.pages_fetched == MEMORY // PAGE_SIZE


@every_trap_and_backing
def test_writes_to_absent_pages_change_their_bytes_and_no_others(trap, backing):
    source = SyntheticSource(MEMORY, SEED)
    expected = bytearray(image_of(source))
    pieces = {5: 8, 2 * PAGE_SIZE - 3: PAGE_SIZE + 6, 5 * PAGE_SIZE + 9: 1, 7 * PAGE_SIZE: PAGE_SIZE}
    with make_machine(trap, backing, source=source) as machine:
        device = machine.memory_for_device(0)
        for gpa, length in pieces.items():
            device.write(gpa, numbers(length))
            expected[gpa : gpa + length] = numbers(length)
        with device.view(10 * PAGE_SIZE - 2, 4) as view:
            view[:] = b"view"
        device.writev([(12 * PAGE_SIZE - 1, 3), (14 * PAGE_SIZE, 2)], b"chain")
        device.store64(16 * PAGE_SIZE + 8, 0x0807060504030201)
        for gpa, data in (
            (10 * PAGE_SIZE - 2, b"view"),
            (12 * PAGE_SIZE - 1, b"cha"),
            (14 * PAGE_SIZE, b"in"),
            (16 * PAGE_SIZE + 8, bytes(range(1, 9))),
        ):
            expected[gpa : gpa + len(data)] = data
        for _ in range(2):  # and they are kept when pages go and come back
            assert machine.memory.read(0, MEMORY) == expected
            machine.pager.mark_nonpresent(0, machine.layout.pages)
        assert machine.pager.counters.pages_fetched == MEMORY // PAGE_SIZE


@every_trap_and_backing
def test_nowait_fetches_nothing_and_touches_nothing(trap, backing):
    source = SyntheticSource(MEMORY, SEED)
    image = image_of(source)
    with make_machine(trap, backing, source=source) as machine:
        device = machine.memory_for_device(0)
        device.load64(0)
        fetched = machine.pager.counters.pages_fetched
        absent = fetched * PAGE_SIZE
        for call in (
            lambda: device.read(absent, 8, nowait=True),
            lambda: device.read(absent - 4, 8, nowait=True),
            lambda: device.write(absent, b"lost", nowait=True),
            lambda: device.write(absent - 2, b"lost", nowait=True),
        ):
            with pytest.raises(BusyError, match=f"gpa {absent:#x} is absent, and the access is not to wait"):
                call()
        assert machine.pager.counters.pages_fetched == fetched
        assert device.read(0, 8, nowait=True) == image[:8]
        device.write(8, b"written", nowait=True)
        assert device.read(0, MEMORY) == image[:8] + b"written" + image[15:]


@every_trap
def test_on_both_sides_of_the_hole_there_is_ram_and_in_it_there_is_none(trap):
    memory = LOW_RAM_END + MEMORY
    source = SyntheticSource(memory, SEED)
    last, first = (source.pages(np.array([LOW_RAM_END // PAGE_SIZE + page])).tobytes() for page in (-1, 0))
    with make_machine(trap, memory_bytes=memory, source=source) as machine:
        device = machine.memory_for_device(0)
        for call in (
            lambda: device.view(LOW_RAM_END - 8, 16).__enter__(),
            lambda: device.view(LOW_RAM_END - 8, HIGH_RAM_BASE - LOW_RAM_END + 16).__enter__(),
            lambda: device.view(HIGH_RAM_BASE + MEMORY - 8, 16).__enter__(),
            lambda: device.read(HIGH_RAM_BASE - 8, 16),
            lambda: device.write(LOW_RAM_END - 8, bytes(16)),
            lambda: device.load64(LOW_RAM_END),
            lambda: device.store64(HIGH_RAM_BASE - 8, 1),
        ):
            with pytest.raises(ValueError, match="is not guest RAM"):
                call()
        assert machine.pager.counters.pages_fetched == 0
        assert device.readv([(LOW_RAM_END - 8, 8), (HIGH_RAM_BASE, 8)]) == last[-8:] + first[:8]
        device.writev([(LOW_RAM_END - 4, 4), (HIGH_RAM_BASE, 4)], b"low.high")
        assert device.load64(LOW_RAM_END - 8).to_bytes(8, "little") == last[-8:-4] + b"low."
        with device.view(HIGH_RAM_BASE, 2 * PAGE_SIZE) as view:
            assert view[:PAGE_SIZE] == b"high" + first[4:]
            view[-8:] = bytes(8)
        assert device.load64(HIGH_RAM_BASE + 2 * PAGE_SIZE - 8) == 0


# Beside vCPUs, while pages come and go


class Devices:
    """Four devices, each of which adds 1, in a way of its own, to its own word of each page.

    The words lie behind the one that `atomic` adds to. An access that raises has touched nothing, so `done`, by
    device and page, is exact.
    """

    def __init__(self, machine, pages):
        self._words = np.arange(pages) * PAGE_SIZE // 8 + place_in_page(np.arange(pages), 9)
        self._pages = pages
        self.done = np.zeros((4, pages), dtype=np.uint64)
        ways = (self._by_copy, self._by_view, self._by_load_and_store, self._by_list)
        self.actions = [
            self._action(way, number, machine.memory_for_device(number)) for number, way in enumerate(ways)
        ]

    def places(self, number):
        """The word of each page that a device adds to, by number in RAM."""
        return self._words // 512 * 512 + (self._words + 1 + number) % 512

    def _action(self, way, number, memory):
        gpas = (self.places(number) * 8).tolist()

        def act(turn):
            page = turn * 5 % self._pages
            try:
                way(memory, gpas[page])
            except FrozenError:
                time.sleep(0.0005)
                return None
            except PagingError:
                return False  # the machine has stopped
            self.done[number, page] += np.uint64(1)
            return None

        return act

    @staticmethod
    def _by_copy(memory, gpa):
        memory.write(gpa, plus_one(memory.read(gpa, 8)))

    @staticmethod
    def _by_view(memory, gpa):
        start = max(gpa - PAGE_SIZE, 0)  # of two pages, or within one
        with memory.view(start, gpa + 8 - start) as view:
            view[-8:] = plus_one(view[-8:])

    @staticmethod
    def _by_load_and_store(memory, gpa):
        memory.store64(gpa, (memory.load64(gpa) + 1) % (1 << 64))

    @staticmethod
    def _by_list(memory, gpa):
        halves = [(gpa, 4), (gpa + 4, 4)]
        memory.writev(halves, plus_one(memory.readv(halves)))

    def check(self, machine, workload, source):
        """All additions of vCPUs and devices are in RAM, nothing else has changed, and pages were fetched once."""
        pages = workload.touched
        expected = workload.expected_pages(source.pages, pages).reshape(-1)
        for number, done in enumerate(self.done):
            expected[self.places(number)] += done
        wrong = (all_of_ram(machine)[pages] != expected.reshape(len(pages), -1)).any(axis=1)
        assert np.flatnonzero(wrong).tolist() == []
        assert machine.pager.counters.pages_fetched == len(pages)
        assert self.done.sum(axis=1).all()


def plus_one(word):
    return ((int.from_bytes(word, "little") + 1) % (1 << 64)).to_bytes(8, "little")


def revoking(machine, pages):
    def revoke(number):
        machine.pager.mark_nonpresent(number * 7 % pages, 4)
        time.sleep(0.001)
        return number < 300  # where pages go faster than they come back, the guest would hardly get on

    return revoke


@every_trap_and_backing
def test_devices_and_vcpus_lose_nothing_while_pages_come_and_go(trap, backing):
    workload = plan("atomic", vcpus=2, pages=64, iterations=ITERATIONS)
    source = SyntheticSource(MEMORY, SEED)
    with make_machine(trap, backing, workload=workload, source=source) as machine:
        devices = Devices(machine, 64)
        with meanwhile(*devices.actions, revoking(machine, 60)):
            machine.run(TIMEOUT)
        assert machine.pager.counters.pages_revoked > 0
        devices.check(machine, workload, source)


@every_trap
def test_frozen_under_fire_devices_stand_still_and_lose_nothing(trap):
    workload = plan("atomic", vcpus=2, pages=64, iterations=ITERATIONS)
    source = SyntheticSource(MEMORY, SEED)
    frozen = []
    with make_machine(trap, workload=workload, source=source) as machine:
        machine.pager.mark_present(0, 64)  # from here on only an addition changes a word
        devices = Devices(machine, 64)
        theirs = np.concatenate([devices.places(number) for number in range(4)])

        def words():
            return np.frombuffer(machine.backing.vmm.view, dtype=np.uint64)[theirs]

        def freeze(number):
            with machine.pager.frozen(TIMEOUT):
                before = words()
                time.sleep(0.002)
                frozen.append((words() == before).all())
                with pytest.raises(FrozenError):
                    machine.memory.load64(0)
            time.sleep(0.002)

        with meanwhile(*devices.actions, freeze, revoking(machine, 60)):
            machine.run(TIMEOUT)
        assert frozen
        assert all(frozen)
        devices.check(machine, workload, source)


@every_trap
def test_the_guest_goes_on_while_devices_are_frozen(trap):
    workload = plan("atomic", vcpus=2, pages=64, iterations=4)
    source = SyntheticSource(MEMORY, SEED)
    with make_machine(trap, workload=workload, source=source) as machine:
        with machine.pager.frozen(TIMEOUT):
            with meanwhile(revoking(machine, 60)):
                machine.run(TIMEOUT)
            with pytest.raises(FrozenError, match="frozen: try again when they are thawed"):
                machine.memory.read(0, 8)
        pages = workload.touched
        assert (all_of_ram(machine)[pages] == workload.expected_pages(source.pages, pages)).all()


# xor eax,eax; xor ecx,ecx
# again: inc ecx; mov edx,ecx; shl rdx,32; or rdx,rcx; mov [0x5000],rdx
# mov rdx,[0x5000]; mov esi,edx; shr rdx,32; cmp esi,edx; je $+4; inc eax; cmp qword ptr [0x5008],0; je again; ret
STORE_AND_LOOK = bytes.fromhex(
    """31c0 31c9 ffc1 89ca 48c1e220 4809ca 4889142500500000
    488b142500500000 89d6 48c1ea20 39d6 7402 ffc0 48833c250850000000 74ce c3"""
)


@every_trap_and_backing
def test_words_are_stored_and_loaded_as_one(trap, backing):
    # Guest and devices store numbers whose halves are the same, and look for one whose halves are not.
    word, end = 0x5000, 0x5008
    both_done = threading.Barrier(2)
    with program_machine(trap, STORE_AND_LOOK, backing, patches=[(word, bytes(16))]) as machine:
        first, second = machine.memory_for_device(0), machine.memory_for_device(1)

        def store(number):
            first.store64(word, number << 32 | number)
            if number == 5000:
                both_done.wait(TIMEOUT)
                first.store64(end, 1)
            return number < 5000

        def load(number):
            value = second.load64(word)
            if number == 5000:
                both_done.wait(TIMEOUT)
            assert value >> 32 == value & 0xFFFFFFFF
            return number < 5000

        def revoke(number):
            machine.pager.mark_nonpresent(word // PAGE_SIZE, 1)
            time.sleep(0.002)

        with meanwhile(store, load, revoke):
            machine.run(TIMEOUT)
        assert machine.threads[0].parameters.checksum == 0  # of those the guest saw
