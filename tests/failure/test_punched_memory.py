"""A peer that punches holes into RAM all the time: the guest may see zeros, the machine runs to an end of its own."""

import time

import pytest
from device_process import bench, child_of
from fakes import content, page_of
from handlers import HandlerProcess
from harness import (
    ALL_TRAPS,
    MEMORY,
    TIMEOUT,
    make_machine,
    meanwhile,
    plan,
    require_trap,
    without_kernel_faults,
)

from kvmdp.errors import CancelledError
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.page import PAGE_SIZE
from kvmdp.peers.handler.source import HandlerSource
from kvmdp.trap.uffd.options import UffdOptions

PAGES = MEMORY // PAGE_SIZE
# All of RAM at times, else a page: MADV_REMOVE is fallocate's PUNCH_HOLE by way of a mapping.
PUNCH = f"""
import itertools
say("punching")
for number in itertools.count():
    first, count = (0, {PAGES}) if number % 64 == 0 else (number * 37 % {PAGES}, 1)
    memory._ram.advise(9, first * 4096, count * 4096)
"""
PUNCHING_HANDLER = f"""
import itertools, mmap, threading
from kvmdp.peers.handler import machine_session
map_ram = machine_session._map
def map_and_punch(terms, ram):
    memory = map_ram(terms, ram)
    def punch():
        for number in itertools.count():
            first, count = (0, {PAGES}) if number % 64 == 0 else (number * 37 % {PAGES}, 1)
            memory.obj.madvise(mmap.MADV_REMOVE, first * 4096, count * 4096)
    threading.Thread(target=punch, daemon=True).start()
    return memory
machine_session._map = map_and_punch
"""


def run_to_its_end(machine):
    """The guest gets done, or does what a guest may whose memory turns to zeros; nothing else stops the machine."""
    try:
        machine.run(TIMEOUT)
    except GuestError as error:
        if "guest exception" not in str(error):
            raise
    assert machine.pager.error is None


def take_away(machine, page):
    machine.pager.mark_nonpresent(page, 16)
    time.sleep(0.01)  # the guest is to get on too


def write(machine, page):
    """False once the machine has stopped."""
    try:
        machine.memory.write(page * PAGE_SIZE, b"written")
    except CancelledError:
        return False
    return True


@pytest.mark.kvm
@pytest.mark.parametrize(("trap", "fault_around"), [*((trap, 1) for trap in ALL_TRAPS), ("marker", 8)])
def test_a_device_that_punches_holes_does_not_stop_the_machine(trap, fault_around):
    require_trap(trap)
    workload = plan("atomic", vcpus=2, iterations=2)
    with make_machine(trap, workload=workload, fault_around=fault_around) as machine:
        with child_of(machine.serve_devices(print), PUNCH) as child:
            assert child.hear() == "punching"
            run_to_its_end(machine)
            assert child.process.poll() is None
        assert machine.pager.bitmap.count() == PAGES


@pytest.mark.kvm
def test_nor_where_userfaultfd_is_not_told_of_the_faults_on_them(monkeypatch):
    without_kernel_faults(monkeypatch)
    workload = plan("atomic", vcpus=2, iterations=2)
    with make_machine("marker", workload=workload) as machine:
        with child_of(machine.serve_devices(print), PUNCH) as child:
            assert child.hear() == "punching"
            run_to_its_end(machine)
        assert machine.pager.bitmap.count() == PAGES


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["copy", "execute", "string"])
def test_nor_what_guest_does_with_the_zeros(name):
    require_trap("marker")
    with (
        make_machine("marker", workload=plan(name, vcpus=2)) as machine,
        child_of(machine.serve_devices(print), PUNCH) as child,
    ):
        assert child.hear() == "punching"
        run_to_its_end(machine)


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("trap", "mode"),
    [
        ("marker", None),
        ("memory-fault", None),
        ("mmio", None),
        ("userfaultfd", "minor"),
    ],
)
def test_nor_while_pages_are_taken_away_and_machine_and_device_use_them(trap, mode):
    require_trap(trap)
    workload = plan("atomic", vcpus=2, iterations=1)
    with make_machine(trap, workload=workload, uffd=UffdOptions(mode=mode)) as machine:
        server = machine.serve_devices(print)
        with child_of(server, PUNCH) as child:
            assert child.hear() == "punching"
            with meanwhile(
                lambda number: take_away(machine, number * 16 % PAGES),
                lambda number: write(machine, number * 37 % PAGES),
            ):
                run_to_its_end(machine)
            assert child.process.poll() is None
        assert machine.pager.counters.pages_revoked > 0


@pytest.mark.kvm
@pytest.mark.parametrize("trap", ["marker", "userfaultfd"])
def test_a_handler_that_punches_holes_does_not_stop_the_machine(trap, socket_path):
    require_trap(trap)
    workload = plan("atomic", vcpus=2, iterations=2)
    with HandlerProcess(socket_path, prelude=PUNCHING_HANDLER) as handler:
        source = HandlerSource(str(socket_path))
        try:
            with make_machine(trap, workload=workload, source=source) as machine:
                run_to_its_end(machine)
        finally:
            source.close()
        assert handler.process.poll() is None


HOLES_IN_THE_BITMAP = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def errno_of(done):
    return errno.errorcode[ctypes.get_errno()] if done else "done"
import errno
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, COLLAPSE = 1, 2, 16, 8
for mode in (KEEP_SIZE | PUNCH_HOLE, KEEP_SIZE | ZERO_RANGE, COLLAPSE):
    done = libc.fallocate(descriptors.bitmap, mode, ctypes.c_long(0), ctypes.c_long(4096))
    say(errno_of(done))
with mmap.mmap(descriptors.bitmap, 64, mmap.MAP_SHARED, mmap.PROT_READ) as bitmap:
    try:
        bitmap.madvise(mmap.MADV_REMOVE)
        say("done")
    except OSError as error:
        say(errno.errorcode[error.errno])
done = libc.fallocate(descriptors.ram, KEEP_SIZE | PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(4096))
say(errno_of(done))
"""


def test_the_bitmap_cannot_be_punched_and_ram_can():
    with bench() as here:
        here.pager.mark_present(0, 2)
        child = here.child(HOLES_IN_THE_BITMAP, raw=True)
        assert child.hear() == "EPERM"
        assert {child.hear(), child.hear()} <= {"EPERM", "ENOTSUP"}
        assert child.hear() in ("EACCES", "EPERM")
        assert child.hear() == "done"
        assert here.pager.bitmap.test_range(0, 2)
        assert page_of(here.pager, 0) == bytes(PAGE_SIZE)  # what the README says of it
        assert page_of(here.pager, 1) == content(1)
