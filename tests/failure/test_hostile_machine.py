"""A handler outlives its machines, and serves each whatever the others are, send, lack or do."""

import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import struct

import pytest
from handlers import MEMORY, SEED, HandlerProcess
from machines import PAGE, Machine, MachineProcess, answer, check_served, fault, memfd

from kvmdp.memory.hugepages import Reservation
from kvmdp.page import Outcome
from kvmdp.peers.wire.handover import Handover, Role
from kvmdp.source.request import FetchRequest
from kvmdp.source.synthetic import SyntheticSource

IMPATIENT = "from kvmdp.peers.handler import server as serving\nserving._PATIENCE_SECONDS = 0.2"
HUGE_PAGE = 2 << 20


@pytest.fixture(scope="module")
def handler(tmp_path_factory):
    """One for all of this module: it outlives each test's machines."""
    path = tmp_path_factory.mktemp("hostile") / "s"
    with HandlerProcess(path) as process:
        process.path = str(path)
        yield process
        assert process.process.poll() is None
        process.end()
        assert "Traceback" not in process.said


@pytest.fixture(autouse=True)
def forgotten(handler):
    handler.said = ""


@pytest.fixture
def machine(handler):
    with contextlib.ExitStack() as stack:
        yield Machine(handler.path, stack)


# What it hands over


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_notifier_that_would_not_tell_of_the_end(handler, machine, kind):
    # A receive from a DGRAM socket whose peer has gone waits for ever.
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        machine.hand_over(notifier=theirs.fileno())
    assert handler.says("a notifier that is no Unix SEQPACKET socket")
    check_served(handler.path)


def test_a_notifier_of_another_family(handler, machine):
    with socket.socket(socket.AF_INET) as other:
        machine.hand_over(notifier=other.fileno())
    assert handler.says("a notifier that is no Unix SEQPACKET socket")
    check_served(handler.path)


@pytest.mark.parametrize("page_size", [0, 1, 8192])
def test_pages_of_another_size(handler, machine, page_size):
    message = bytearray(machine.message())
    struct.pack_into("<I", message, 32, page_size)
    socket.send_fds(machine.connection, [message], [machine.ram, machine.bitmap, machine.theirs.fileno()])
    assert handler.says(f"a hand-over with pages of {page_size} bytes, where they have 4096")
    check_served(handler.path)


def test_no_regions_at_all(handler, machine):
    machine.hand_over(Handover(1, Role.HANDLER, 64, 0, ()))
    assert handler.says("a hand-over of 0 pages")
    check_served(handler.path)


def test_a_notifier_that_stops_waiting_and_waits_again(handler, machine):
    descriptor = os.dup(machine.theirs.fileno())
    try:
        machine.hand_over()
        machine.ours.send(fault(0))
        assert answer(machine).outcome is Outcome.PRESENT
        os.set_blocking(descriptor, False)  # the receive under way waits on; the next does not
        machine.ours.send(fault(1))
        assert handler.says("its notifier does not work")
        assert handler.says("has gone")
    finally:
        os.close(descriptor)
    check_served(handler.path)


@pytest.mark.hugepages
@pytest.mark.root
def test_huge_pages_that_are_taken_back_are_an_error_and_no_signal(handler):
    with Reservation(HUGE_PAGE, 2), contextlib.ExitStack() as stack:
        machine = Machine(handler.path, stack)
        ram = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING)
        stack.callback(os.close, ram)
        os.ftruncate(ram, HUGE_PAGE)
        fcntl.fcntl(ram, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        machine.hand_over(Handover(1, Role.HANDLER, 64, 512, ((0, HUGE_PAGE, 0),)), ram=ram)
        machine.ours.send(fault(0))
        assert answer(machine).outcome is Outcome.PRESENT
        _punch(ram)
        with _all_huge_pages():
            machine.ours.send(fault(1))
            assert answer(machine).outcome is Outcome.FAILED
        assert handler.says("the machine's RAM has no huge page for them")
        machine.ours.send(fault(2))
        assert answer(machine).outcome is Outcome.PRESENT
        expected = bytearray(PAGE)
        SyntheticSource(MEMORY, SEED).fetch(FetchRequest(2 * PAGE), memoryview(expected))
        with mmap.mmap(ram, HUGE_PAGE) as memory:
            assert memory[2 * PAGE : 3 * PAGE] == expected
    check_served(handler.path)


def _punch(ram):
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.fallocate(ram, 3, ctypes.c_long(0), ctypes.c_long(HUGE_PAGE)) == 0


@contextlib.contextmanager
def _all_huge_pages():
    """Take every huge page there is."""
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(mmap.mmap(-1, HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000))
        yield
    finally:
        for each in taken:
            each.close()


# That it says nothing


def test_one_that_says_nothing_has_its_place_for_a_while(tmp_path):
    path = str(tmp_path / "s")
    with HandlerProcess(path, prelude=IMPATIENT) as handler, contextlib.ExitStack() as stack:
        Machine(path, stack)
        assert handler.says("was given up: nothing was handed over within 0.2 seconds")
        check_served(path)


FLOOD = """
from kvmdp.peers.wire.endpoint import connect
connections = [connect(path) for _ in range(300)]
say("flooded")
wait_for_the_end()
"""


def test_300_connections_of_one_process_keep_nobody_out(handler, machine):
    # This one has connected before, and takes a while to make its RAM.
    with MachineProcess(handler.path, FLOOD) as flood:
        assert flood.hear() == "flooded"
        check_served(handler.path)
        machine.hand_over()
        machine.ours.send(fault(0))
        assert answer(machine).outcome is Outcome.PRESENT
        assert handler.says(
            f"machine {flood.pid} was turned away after the longest wait: process {flood.pid} has 16 connections, "
            "its share"
        )


HOARD = """
machines = []
try:
    while True:
        machines.append(Machine(path, stack))
        machines[-1].hand_over()
        machines[-1].ours.send(Record(Kind.FAULT, 1, 0, PAGE).pack(1))
        if not machines[-1].ours.recv(65):
            break
except Exception:
    pass
say(len(machines))
wait_for_the_end()
"""


def test_sessions_of_one_process_keep_nobody_out(handler):
    with MachineProcess(handler.path, HOARD) as hoard:
        assert hoard.hear() == "16"
        assert handler.says(
            f"a machine was refused: process {hoard.pid} has 16 connections, its share, and all of them are served"
        )
        check_served(handler.path)
    check_served(handler.path)


# That it lives, or dies


def test_one_that_asks_for_nothing_keeps_nobody_waiting(handler, machine):
    machine.hand_over()
    assert handler.says("has come")
    check_served(handler.path)


SERVED = """
machine = Machine(path, stack)
machine.hand_over()
machine.ours.send(Record(Kind.FAULT, 1, 0, PAGE).pack(1))
machine.ours.recv(65)
"""
STOPPED = (
    SERVED
    + """
say("served")
for number in range(64):
    machine.ours.send(Record(Kind.FAULT, number, 0, PAGE).pack(1))
os.kill(os.getpid(), signal.SIGSTOP)
"""
)


def test_one_that_is_stopped_keeps_nobody_waiting(handler):
    with MachineProcess(handler.path, STOPPED) as stopped:
        assert stopped.hear() == "served"
        check_served(handler.path)
    assert handler.says(f"machine {stopped.pid} has gone")


LEAVES_A_CHILD = (
    SERVED
    + """
if not os.fork():
    wait_for_the_end()
    os._exit(0)
say("served")
os.kill(os.getpid(), signal.SIGKILL)
"""
)


def test_one_that_dies_while_its_child_holds_the_notifier(handler):
    with MachineProcess(handler.path, LEAVES_A_CHILD) as dead:
        assert dead.hear() == "served"
        assert handler.says(f"machine {dead.pid} has gone: 0 vCPU, 1 device, 0 host faults")


LEAVES_A_CHILD_EARLY = """
machine = Machine(path, stack)
if not os.fork():
    wait_for_the_end()
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_one_that_dies_before_the_hand_over_while_its_child_holds_the_connection(handler):
    with MachineProcess(handler.path, LEAVES_A_CHILD_EARLY) as dead:
        assert handler.says(f"machine {dead.pid} was given up: it has died before the hand-over")


def test_one_that_asks_for_all_of_a_large_ram_and_goes(tmp_path):
    path, size = str(tmp_path / "s"), 1 << 40
    with HandlerProcess(path, "--synthetic", "1T") as handler:
        with contextlib.ExitStack() as stack:
            machine = Machine(path, stack, size)
            ram = memfd(size, fcntl.F_SEAL_SHRINK)
            machine.hand_over(Handover(1, Role.HANDLER, 64, size // PAGE, ((0, size, 0),)), ram=ram)
            os.close(ram)
            machine.ours.send(fault(0, size))
            assert handler.says("has come")
        assert handler.says(f"machine {os.getpid()} has gone")
