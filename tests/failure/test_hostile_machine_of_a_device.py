"""`kvmdp device` with a machine that breaks the rules, is mute or dies: it ends with one sentence."""

import contextlib
import fcntl
import os
import socket

import pytest
from command import Running, kvmdp
from machines import MachineProcess

from kvmdp.memory.backing import MemfdBacking
from kvmdp.memory.bitmap import PresentBitmap
from kvmdp.peers.wire import handover
from kvmdp.peers.wire.endpoint import Listener
from kvmdp.peers.wire.handover import Descriptors, Handover, Role

PAGES = 512
TERMS = Handover(1, Role.DEVICE, 64, PAGES, ((0, PAGES * 4096, 0),))


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(2 << 20)
    return path


@contextlib.contextmanager
def listening(path):
    """A machine that has let a device in; yields `hand over(notifier)`."""
    with (
        Listener(str(path)) as listener,
        MemfdBacking(PAGES * 4096) as ram,
        contextlib.closing(PresentBitmap(PAGES)) as bitmap,
        contextlib.ExitStack() as stack,
    ):

        def hand_over(notifier):
            connection = stack.enter_context(listener.accept(60))
            fcntl.fcntl(ram.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            handover.send(connection, TERMS, Descriptors(ram.fd, bitmap.fd, notifier.fileno()))

        yield hand_over


def failed(finished):
    assert finished.status == 1
    return finished.error


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_notifier_that_would_not_tell_of_the_end(kind, socket_path, disk):
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with (
        ours,
        theirs,
        listening(socket_path) as hand_over,
        Running("device", "--connect", socket_path, "--file", disk) as device,
    ):
        hand_over(theirs)
        assert "a notifier that is no Unix SEQPACKET socket" in failed(device.finish())


def test_a_machine_that_never_hands_over(socket_path, disk):
    with listening(socket_path):
        done = kvmdp("device", "--connect", socket_path, "--file", disk, "--timeout", 0.3)
    assert failed(done) == (
        f"no session with {socket_path}: process {os.getpid()} has not handed over its memory within 0.3 seconds: it "
        "is stopped, or another device serves its disk; try again later, or give more time with --timeout"
    )


def test_a_time_that_makes_no_sense(disk):
    done = kvmdp("device", "--connect", "s", "--file", disk, "--timeout", 0)
    assert done.status == 2
    assert done.error == "--timeout 0: give more than 0 seconds"


LEAVES_A_CHILD = """
from kvmdp.peers.wire.endpoint import Listener
from kvmdp.peers.wire.notifier import notifier_pair
def leave_a_child():
    if not os.fork():
        wait_for_the_end()
        os._exit(0)
    say("left")
    os.kill(os.getpid(), signal.SIGKILL)
listener = Listener(path)
say("listening")
connection = listener.accept(60)
"""
HANDS_OVER = """
from kvmdp.memory.backing import MemfdBacking
from kvmdp.memory.bitmap import PresentBitmap
PAGES = 512
TERMS = Handover(1, Role.DEVICE, 64, PAGES, ((0, PAGES * 4096, 0),))
ram, bitmap = MemfdBacking(PAGES * 4096), PresentBitmap(PAGES)
ours, theirs, _ = notifier_pair()
fcntl.fcntl(ram.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
handover.send(connection, TERMS, handover.Descriptors(ram.fd, bitmap.fd, theirs.fileno()))
theirs.close()
"""


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("", "has died before the hand-over"),
        (HANDS_OVER, "the machine has closed the notifier, or died: its memory cannot be used any more"),
    ],
)
def test_a_machine_that_dies_while_its_child_holds_its_ends(code, sentence, socket_path, disk):
    with MachineProcess(socket_path, LEAVES_A_CHILD + code + "leave_a_child()") as machine:
        assert machine.hear() == "listening"
        with Running("device", "--connect", socket_path, "--file", disk) as device:
            assert machine.hear() == "left"
            assert sentence in failed(device.finish())


WITHOUT_THREADS = """
import threading
def start(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start
"""


def test_without_threads_it_says_so(socket_path, disk):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (
        ours,
        theirs,
        listening(socket_path) as hand_over,
        Running("device", "--connect", socket_path, "--file", disk, prelude=WITHOUT_THREADS) as device,
    ):
        hand_over(theirs)
        assert "processes and threads" in failed(device.finish())
