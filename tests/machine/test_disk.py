"""The disk: exact under every trap, and never upset by what a guest puts into its ring."""

import queue
import struct
import threading

import numpy as np
import pytest
from harness import BACKINGS, MEMORY, SEED, TIMEOUT, TRAPS, all_of_ram, make_machine, meanwhile, plan, prove
from plain_guest import PlainMemory

from kvmdp.errors import FrozenError
from kvmdp.kvm import IoOut
from kvmdp.lab.experiment import in_process_disk, run_workload
from kvmdp.machine import guest_abi as guest
from kvmdp.machine.disk import DiskDevice, DiskError, DiskFile
from kvmdp.machine.disk_ports import DiskThread
from kvmdp.machine.guest_abi import DiskStatus
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.source.base import SourceError
from kvmdp.source.synthetic import SyntheticSource

RING, REQUESTS, TABLE, BUFFER = 0x1000, 0x2000, 0x3000, 0x10000
SECTORS = 128
NOT_DONE = (1 << 64) - 1


@pytest.mark.kvm
@pytest.mark.parametrize("ring", [3, 0])
@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("trap", TRAPS)
def test_what_goes_out_comes_back_exactly(trap, backing, vcpus, ring):
    workload = plan("disk", vcpus=vcpus, ring=ring, pages=100 * vcpus + 1)
    result = prove(trap, backing, workload)
    assert result.counters.pages_fetched == len(workload.touched) == result.pages_present


@pytest.mark.kvm
def test_the_file_holds_what_the_guest_wrote(tmp_path):
    workload = plan("disk", pages=103)
    path = tmp_path / "disk"
    path.write_bytes(bytes(MEMORY))
    source = SyntheticSource(MEMORY, SEED)
    options = MachineOptions(MEMORY, "mmio")
    result = run_workload(
        options, workload, source, timeout=TIMEOUT, device=in_process_disk(workload.disk_bytes, str(path))
    )
    assert result.ok
    written = source.pages(np.arange(3, 53)).tobytes()[: -guest.DISK_SECTOR]
    chunks = [written[at : at + guest.DISK_CHUNK] for at in range(0, len(written), guest.DISK_CHUNK)]
    disk = path.read_bytes()
    for number, chunk in enumerate(reversed(chunks)):
        assert disk[number * guest.DISK_CHUNK :][: len(chunk)] == chunk
    assert not any(disk[len(chunks) * guest.DISK_CHUNK :])


@pytest.mark.kvm
@pytest.mark.parametrize("trap", TRAPS)
def test_pages_that_go_while_the_device_is_at_them_lose_nothing(trap):
    workload = plan("disk", vcpus=2)
    source = SyntheticSource(MEMORY, SEED)
    with make_machine(trap, workload=workload, source=source) as machine:
        random = np.random.default_rng(SEED)

        def shut(number):
            machine.pager.mark_nonpresent(int(random.integers(0, 500)), 8)
            return machine.pager.counters.pages_revoked < 1000

        with DiskFile.temporary(MEMORY) as file, DiskThread(machine, file), meanwhile(shut):
            machine.run(TIMEOUT)
        pages = workload.touched
        expected = workload.expected_pages(source.pages, pages)
        assert np.array_equal(all_of_ram(machine)[pages], expected)
        assert machine.pager.counters.pages_fetched == len(pages)


@pytest.mark.kvm
def test_a_disk_that_is_too_small_fails_the_run_with_a_sentence():
    with (
        make_machine("mmio", workload=plan("disk")) as machine,
        DiskFile.temporary(guest.DISK_CHUNK) as file,
        DiskThread(machine, file),
        pytest.raises(GuestError, match=r"vCPU 0: the guest's disk failed: request \d+, status RANGE"),
    ):
        machine.run(TIMEOUT)


@pytest.mark.kvm
def test_a_source_that_fails_under_the_device_pauses_the_machine():
    class Failing(SyntheticSource):
        def fetch(self, request, destination):
            offset = request.offset
            if offset >= 3 * PAGE_SIZE:  # behind the ring: only the device goes there
                raise SourceError(self.name, offset, len(destination), "it is a test")
            super().fetch(request, destination)

    machine = make_machine("mmio", workload=plan("disk"), source=Failing(MEMORY, SEED))
    with (
        machine,
        DiskFile.temporary(MEMORY) as file,
        DiskThread(machine, file),
        pytest.raises(Exception, match="paused: the page at gpa 0x3000 cannot be fetched"),
    ):
        machine.run(TIMEOUT)


@pytest.mark.kvm
def test_rings_are_served_in_the_order_in_which_they_were_rung(file):
    begun, may_go_on, served = threading.Event(), threading.Event(), queue.SimpleQueue()

    def serve(ring):
        served.put(ring)
        begun.set()
        may_go_on.wait(TIMEOUT)

    with make_machine("mmio", vcpus=4) as machine, DiskThread(machine, file) as disk:
        disk.device.serve = serve
        try:
            for vcpu in range(4):
                number = memoryview((vcpu + 1).to_bytes(4, "little"))
                machine.ports.handle(vcpu, IoOut(guest.DISK_DOORBELL_PORT, 4, 1, number))
                assert begun.wait(TIMEOUT)  # the others are rung while the first is served
        finally:
            may_go_on.set()
        found = [served.get(timeout=TIMEOUT) for _ in range(4)]
    assert found == [PAGE_SIZE, 2 * PAGE_SIZE, 3 * PAGE_SIZE, 4 * PAGE_SIZE]


def ring(machine):
    """Ring the doorbell for a ring at page 1."""
    number = memoryview((1).to_bytes(4, "little"))
    machine.ports.handle(0, IoOut(guest.DISK_DOORBELL_PORT, 4, 1, number))


@pytest.fixture
def turned_away(monkeypatch):
    """Counts how often the device has found accesses frozen, and how often it has served a ring to its end."""
    counts = {"frozen": threading.Semaphore(0), "served": threading.Semaphore(0)}
    serve = DiskDevice.serve

    def counted(self, ring):
        try:
            done = serve(self, ring)
        except FrozenError:
            counts["frozen"].release()
            raise
        counts["served"].release()
        return done

    monkeypatch.setattr(DiskDevice, "serve", counted)
    return counts


@pytest.mark.kvm
def test_a_frozen_disk_looks_once_and_serves_when_accesses_are_thawed(file, turned_away):
    with make_machine("mmio") as machine, DiskThread(machine, file):
        with machine.pager.frozen(TIMEOUT):
            ring(machine)
            assert turned_away["frozen"].acquire(timeout=TIMEOUT)
            assert not turned_away["frozen"].acquire(timeout=0.05)
        assert turned_away["served"].acquire(timeout=TIMEOUT)


@pytest.mark.kvm
def test_a_disk_is_closed_while_accesses_are_frozen(file, turned_away):
    with make_machine("mmio") as machine, machine.pager.frozen(TIMEOUT):
        with DiskThread(machine, file):
            ring(machine)
            assert turned_away["frozen"].acquire(timeout=TIMEOUT)
        assert not turned_away["served"].acquire(blocking=False)


# The ring, without a guest


class Bench:
    """A device on plain RAM, with a ring of four requests that all are a good write of a sector."""

    def __init__(self, file):
        self.view = memoryview(bytearray(MEMORY))
        self.memory = PlainMemory(self.view, GuestLayout(MEMORY))
        self.device = DiskDevice(self.memory, file)
        self.reset()

    def reset(self):
        self.put(RING, "<QIIIIQ", guest.DISK_MAGIC, guest.DISK_VERSION, 0, 4, 0, REQUESTS)
        self.put(TABLE, "<QQ", BUFFER, guest.DISK_SECTOR)
        for number in range(4):
            self.request(number)

    def put(self, gpa, layout, *values):
        struct.pack_into(layout, self.view, gpa, *values)

    def request(self, number, sector=1, operation=guest.DISK_WRITE, segments=1, table=TABLE):
        self.put(REQUESTS + 32 * number, "<QIIQQ", sector, operation, segments, table, NOT_DONE)

    def submit(self, count, ring=RING):
        self.memory.store64(RING + guest.DISK_RING_SUBMITTED, count)
        return self.device.serve(ring)

    def status(self, number=0):
        return self.memory.load64(REQUESTS + 32 * number + guest.DISK_REQUEST_STATUS)

    @property
    def completed(self):
        return self.memory.load64(RING + guest.DISK_RING_COMPLETED)

    @property
    def ring_status(self):
        return self.memory.load64(RING + guest.DISK_RING_STATUS)


@pytest.fixture
def file():
    with DiskFile.temporary(SECTORS * guest.DISK_SECTOR) as file:
        yield file


@pytest.fixture
def bench(file):
    return Bench(file)


def test_requests_are_done_once_and_the_ring_wraps(bench):
    assert bench.submit(3) == 3
    assert bench.submit(3) == 0
    assert bench.submit(7) == 4
    assert (bench.completed, bench.status()) == (7, DiskStatus.OK)


def test_counts_run_over_their_end(bench):
    bench.memory.store64(RING + guest.DISK_RING_COMPLETED, NOT_DONE - 1)
    assert bench.submit(1) == 3
    assert bench.completed == 1


@pytest.mark.parametrize(
    ("request_", "segments", "status"),
    [
        ({"operation": 2}, [], DiskStatus.MALFORMED),
        ({"segments": 0}, [], DiskStatus.MALFORMED),
        ({"segments": 65}, [], DiskStatus.MALFORMED),
        ({"segments": 0xFFFFFFFF}, [], DiskStatus.MALFORMED),
        ({}, [(BUFFER, 0)], DiskStatus.MALFORMED),
        ({}, [(BUFFER, 511)], DiskStatus.MALFORMED),
        ({}, [(BUFFER, (1 << 20) + 512)], DiskStatus.MALFORMED),
        ({}, [(BUFFER, NOT_DONE - 511)], DiskStatus.MALFORMED),
        ({"segments": 2}, [(BUFFER, NOT_DONE), (BUFFER, 513)], DiskStatus.MALFORMED),
        ({}, [(NOT_DONE - 100, 512)], DiskStatus.ADDRESS),
        ({}, [(MEMORY - 256, 512)], DiskStatus.ADDRESS),
        ({}, [(3 << 30, 512)], DiskStatus.ADDRESS),
        ({"operation": guest.DISK_READ}, [(MEMORY - 256, 512)], DiskStatus.ADDRESS),
        ({"table": NOT_DONE - 7}, [], DiskStatus.ADDRESS),
        ({"table": MEMORY - 8}, [], DiskStatus.ADDRESS),
        ({"sector": SECTORS}, [], DiskStatus.RANGE),
        ({"sector": NOT_DONE}, [], DiskStatus.RANGE),
    ],
)
def test_a_request_that_makes_no_sense_ends_with_a_status(bench, request_, segments, status):
    bench.request(0, **request_)
    for number, segment in enumerate(segments):
        bench.put(TABLE + 16 * number, "<QQ", *segment)
    assert bench.submit(1) == 1
    assert (bench.status(), bench.completed, bench.ring_status) == (status, 1, 0)


@pytest.mark.parametrize(
    ("at", "layout", "value", "status"),
    [
        (guest.DISK_RING_VERSION, "<I", 2, DiskStatus.MALFORMED),
        (guest.DISK_RING_FEATURES, "<I", 1, DiskStatus.MALFORMED),
        (guest.DISK_RING_ENTRIES, "<I", 0, DiskStatus.MALFORMED),
        (guest.DISK_RING_ENTRIES, "<I", 3, DiskStatus.MALFORMED),
        (guest.DISK_RING_ENTRIES, "<I", 1 << 31, DiskStatus.MALFORMED),
        (guest.DISK_RING_COMPLETED, "<Q", 1000, DiskStatus.MALFORMED),
        (guest.DISK_RING_REQUESTS, "<Q", REQUESTS + 4, DiskStatus.ADDRESS),
        (guest.DISK_RING_REQUESTS, "<Q", NOT_DONE - 7, DiskStatus.ADDRESS),
        (guest.DISK_RING_REQUESTS, "<Q", MEMORY, DiskStatus.ADDRESS),
    ],
)
def test_a_header_that_makes_no_sense_is_told_so_and_nothing_is_done(bench, at, layout, value, status):
    bench.put(RING + at, layout, value)
    assert bench.submit(1) == 0
    assert (bench.ring_status, bench.status()) == (status, NOT_DONE)


@pytest.mark.parametrize("ring", [RING + 4, RING + PAGE_SIZE, MEMORY, 0xFFFFFFFF000, 3 << 30])
def test_what_is_no_ring_is_not_touched(bench, ring):
    before = bytes(bench.view)
    assert bench.device.serve(ring) == 0
    assert bytes(bench.view) == before


def test_random_rings_raise_nothing_and_a_good_one_is_served_after_them(bench):
    random = np.random.default_rng(SEED)
    for _ in range(2000):
        bench.view[RING + 8 : RING + 0x20] = (
            random.bytes(0x18) if random.integers(2) else bench.view[RING + 8 : RING + 0x20]
        )
        bench.view[REQUESTS : REQUESTS + 128] = random.bytes(128)
        bench.submit(int(random.integers(1 << 62)) if random.integers(2) else bench.completed + 4)
    bench.reset()
    bench.request(1, operation=guest.DISK_READ)
    sector = bench.view[BUFFER : BUFFER + guest.DISK_SECTOR]
    sector[:] = b"\x5a" * guest.DISK_SECTOR
    assert (bench.submit(1), bench.status(0)) == (1, DiskStatus.OK)
    sector[:] = bytes(guest.DISK_SECTOR)
    assert (bench.submit(2), bench.status(1)) == (1, DiskStatus.OK)
    assert sector == b"\x5a" * guest.DISK_SECTOR


def test_a_full_file_system_is_a_status(bench, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    assert bench.submit(1) == 1
    assert bench.status() == DiskStatus.SPACE


def test_short_writes_and_reads_are_gone_on_with(bench, monkeypatch):
    import os

    pwrite, pread = os.pwrite, os.pread
    monkeypatch.setattr("os.pwrite", lambda fd, data, at: pwrite(fd, data[:100], at))
    monkeypatch.setattr("os.pread", lambda fd, length, at: pread(fd, min(length, 77), at))
    content = np.random.default_rng(SEED).bytes(guest.DISK_SECTOR)
    bench.memory.write(BUFFER, content)
    bench.request(1, operation=guest.DISK_READ, table=TABLE + 16)
    bench.put(TABLE + 16, "<QQ", BUFFER + PAGE_SIZE, guest.DISK_SECTOR)
    assert bench.submit(2) == 2
    assert bench.memory.read(BUFFER + PAGE_SIZE, guest.DISK_SECTOR) == content


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot open the disk .*: No such file or directory: make one with truncate"),
        (lambda path: path.mkdir(), "cannot open the disk .*: Is a directory: give a regular file"),
        (lambda path: path.write_bytes(b"x"), "has 1 bytes, less than one sector .*: give a larger one"),
    ],
)
def test_a_file_that_is_no_disk_is_refused(tmp_path, make, message):
    make(tmp_path / "disk")
    with pytest.raises(DiskError, match=message):
        DiskFile.open(str(tmp_path / "disk"))
