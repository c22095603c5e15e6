"""A machine that has been closed leaves nothing, however it ended: no descriptor, mapping, thread or memslot."""

import contextlib
import gc
import signal
import threading
from pathlib import Path

import pytest
from harness import BACKINGS, LOOP_FOREVER, SEED, TIMEOUT, TRAPS, make_machine, plan, program_machine

from kvmdp.errors import PagingError
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.vcpu_thread import GuestError, GuestTimeoutError
from kvmdp.paging.pager import Pager
from kvmdp.paging.policy import FaultAround
from kvmdp.source.base import SourceError
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.slots.mmio import MmioTrap
from kvmdp.trap.slots.ram_slots import RamSlots
from kvmdp.trap.uffd.device_view import DeviceFaults
from kvmdp.trap.uffd.marker import MarkerTrap
from kvmdp.trap.uffd.registered_view import UffdView

pytestmark = pytest.mark.kvm

MEMORY = 32 << 20
ARENA = 64 << 20
EVERY = pytest.mark.parametrize(
    ("trap", "backing"),
    [
        *((trap, backing) for trap in TRAPS for backing in BACKINGS),
        ("memory-fault:device-view", "memfd"),
        ("mmio:device-view", "memfd"),
    ],
)


class BrokenSource(SyntheticSource):
    """Fails for good at page 5."""

    def fetch(self, request, destination):
        offset = request.offset
        if offset <= 5 * 4096 < offset + destination.nbytes:
            raise SourceError(self.name, offset, destination.nbytes, "it is gone")
        super().fetch(request, destination)


def holdings():
    """What this process holds: descriptors by target, named mappings, number of threads."""
    gc.collect()
    descriptors = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that listed the directory
            descriptors.append(str(entry.readlink()))
    names = sorted(name for _, _, name in mappings() if name)
    return sorted(descriptors), names, threading.active_count()


def mappings():
    """This process's mappings: first address, end, name of what is mapped ("" if anonymous)."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in fields[0].split("-"))
        found.append((start, end, fields[5] if len(fields) == 6 else ""))
    return found


def anonymous_memory():
    """Bytes of anonymous address space, less the heaps that malloc makes for threads: 64 MiB each, so aligned."""
    total, heap = 0, -1
    for start, end, name in mappings():
        if start % ARENA == 0:
            heap = start
        if not name and start // ARENA * ARENA != heap:
            total += end - start
    return total


def check_nothing_left(make_and_end, repeats=3):
    """Do it twice, for what is made once a process; then again: nothing more may be there.

    Stacks of threads stay with the allocator for the next thread, but RAM left behind would be RAM each time.
    """
    make_and_end()
    make_and_end()
    before, space = holdings(), anonymous_memory()
    for _ in range(repeats):
        make_and_end()
    assert holdings() == before
    assert anonymous_memory() - space < repeats * MEMORY // 2


def make(trap, backing="memfd", **options):
    """Make a machine with few memslots."""
    return make_machine(trap, backing, memory_bytes=MEMORY, **granule_of(trap), **options)


def make_program(trap, code, backing="memfd", **options):
    return program_machine(trap, code, backing, memory_bytes=MEMORY, **granule_of(trap), **options)


def granule_of(trap):
    return {} if trap == "marker" else {"granule": 256 << 10}


def test_two_hundred_machines_leave_nothing():
    ways = [(trap, backing, vcpus) for trap in TRAPS for backing in BACKINGS for vcpus in (1, 2)]
    turn = iter(range(1000))

    def run():
        trap, backing, vcpus = ways[next(turn) % len(ways)]
        workload = plan("touch", vcpus=vcpus, pages=8, write=True, memory=MEMORY)
        with make(trap, backing, workload=workload) as machine:
            machine.run(TIMEOUT)

    for _ in ways:
        run()
    check_nothing_left(run, repeats=200)


@EVERY
def test_a_triple_fault_leaves_nothing(trap, backing):
    # sub rsp,16; mov qword ptr [rsp],0; mov qword ptr [rsp+8],0; mov rdi,rsp; mov eax,6; int 0x80 (LIDT of an empty
    # table); ud2
    code = bytes.fromhex("4883ec10 48c7042400000000 48c744240800000000 4889e7 b806000000 cd80 0f0b")

    def end():
        with make_program(trap, code, backing) as machine, pytest.raises(GuestError, match="triple fault"):
            machine.run(TIMEOUT)

    check_nothing_left(end)


@EVERY
def test_a_source_that_fails_for_good_leaves_nothing(trap, backing):
    def end():
        source = BrokenSource(MEMORY, SEED)
        workload = plan("checksum", vcpus=2, pages=32, memory=MEMORY)
        with (
            make(trap, backing, workload=workload, source=source) as machine,
            pytest.raises(
                PagingError, match=r"paused: the page at gpa 0x(0|5000) cannot be fetched: .*it is gone"
            ),
        ):
            machine.run(TIMEOUT)

    check_nothing_left(end)


@EVERY
def test_a_guest_that_never_ends_leaves_nothing(trap, backing):
    def end():
        with (
            make_program(trap, LOOP_FOREVER, backing, vcpus=2) as machine,
            pytest.raises(
                GuestTimeoutError,
                match=r"not done within 0.5 seconds \(vCPU 0 at RIP 0xd0100000, vCPU 1 at RIP 0xd0100000\)",
            ),
        ):
            machine.run(0.5)

    check_nothing_left(end)


@EVERY
def test_ctrl_c_leaves_nothing(trap, backing):
    def end():
        with (
            make_program(trap, LOOP_FOREVER, backing, vcpus=2) as machine,
            pytest.raises(KeyboardInterrupt),
        ):
            machine.run(TIMEOUT, on_tick=lambda: signal.raise_signal(signal.SIGINT))

    check_nothing_left(end)


@pytest.mark.parametrize("trap", TRAPS)
def test_a_guest_on_which_kvm_spins_is_stopped_and_leaves_nothing(monkeypatch, trap):
    def end():
        # sgdt [0x5000]: the time is over before the watchdog looks
        with (
            make_program(trap, bytes.fromhex("0f01042500500000")) as machine,
            pytest.raises(GuestTimeoutError),
        ):
            machine.run(0.2)

    check_nothing_left(end, repeats=2)


@pytest.mark.parametrize("trap", ["memory-fault:device-view", "mmio:device-view"])
def test_a_machine_whose_devices_are_in_mid_access_leaves_nothing(trap):
    def read_all(machine):
        for page in range(MEMORY // 4096):
            try:
                machine.device_view.read(page * 4096, 8)
            except PagingError:
                return

    def end():
        with make(trap) as machine:
            threads = [threading.Thread(target=read_all, args=(machine,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            while machine.pager.counters.claims < 5:
                pass
        for thread in threads:
            thread.join()

    check_nothing_left(end)


@EVERY
def test_a_machine_that_never_ran_leaves_nothing(trap, backing):
    def end():
        with make(trap, backing):
            pass

    check_nothing_left(end)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trap": "mmio", "granule": 5000}, "a granule of"),
        ({"trap": "marker", "granule": 65536}, "a granule is for memory-fault and mmio"),
        ({"trap": "smoke"}, "there is no trap 'smoke': choose from"),
        ({"trap": "mmio", "fault_around": 3}, "fault-around of 3 pages: give a power of two from 1 to 512"),
        (
            {"trap": "mmio", "fault_around": 8, "policy": FaultAround(8)},
            "a policy and a fault-around of 8 pages, which is a policy too: leave one out",
        ),
        ({"trap": "mmio", "memory_bytes": 1 << 20}, "1M of guest memory is too little: the least is 2M"),
        ({"trap": "mmio", "memory_bytes": 2 << 40}, "2T of guest memory is too much: the most is 256G"),
    ],
)
def test_options_that_make_no_sense_are_refused_and_leave_nothing(options, message):
    def end():
        with pytest.raises(ValueError, match=message):
            Machine(MachineOptions(**{"memory_bytes": MEMORY, **options}), SyntheticSource(MEMORY, SEED))

    check_nothing_left(end)


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize(
    ("trap", "place"),
    [
        ("marker", (MarkerTrap, "arm")),
        ("marker", (RamSlots, "map_plain")),
        ("mmio", (Pager, "enable")),
        ("memory-fault", (RamSlots, "close_pieces")),
    ],
    ids=["marker", "marker-slots", "mmio", "memory-fault"],
)
def test_a_machine_that_cannot_be_made_leaves_nothing(monkeypatch, trap, place, backing):
    make(trap, backing).close()  # skips where the trap cannot be had
    monkeypatch.setattr(*place, broken)

    def end():
        with pytest.raises(MemoryError, match="no more"):
            make(trap, backing)

    check_nothing_left(end)


@pytest.mark.parametrize("place", [(DeviceFaults, "arm"), (MmioTrap, "arm"), (UffdView, "__init__")])
def test_a_machine_with_a_device_view_that_cannot_be_made_leaves_nothing(monkeypatch, place):
    make("mmio:device-view").close()
    monkeypatch.setattr(*place, broken)

    def end():
        with pytest.raises(MemoryError, match="no more"):
            make("mmio:device-view")

    check_nothing_left(end)


def broken(*_arguments, **_options):
    raise MemoryError("no more")


def test_closing_a_machine_twice_does_nothing_more():
    machine = make("mmio")
    machine.close()
    machine.close()
    assert (machine.vm.fd, machine.backing.fd, machine.pager.bitmap.fd) == (-1, -1, -1)
