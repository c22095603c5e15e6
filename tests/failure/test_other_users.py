"""Processes of other users, and of other PID namespaces, are nobody's peers."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from command import NOBODY
from device_process import SOON, bench, child_of
from handlers import MEMORY, SEED, HandlerProcess

from kvmdp.peers.handler.source import HandlerSource
from kvmdp.peers.wire.endpoint import EndpointError, Listener, connect

pytestmark = pytest.mark.root

OTHER = f"""
import os, sys
from kvmdp.peers.handler.source import HandlerSource
from kvmdp.peers.wire import handover
from kvmdp.peers.wire import offer
from kvmdp.peers.wire.endpoint import EndpointError, Listener, connect
def become_nobody():
    os.setgroups([])
    os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
    os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
path = sys.argv[1]
"""
DEVICE = """
become_nobody()
try:
    handover.receive(connect(path))
except (EndpointError, handover.HandoverError) as error:
    print(error)
"""
MACHINE = """
become_nobody()
try:
    HandlerSource(path, 5)
except EndpointError as error:
    print(error)
"""
LISTENS = """
become_nobody()
with Listener(path):
    print("listening", flush=True)
    sys.stdin.readline()
"""
LISTENS_AT_ROOTS_SOCKET = """
import socket
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(path)
become_nobody()
listener.listen()
print("listening", flush=True)
connection, _ = listener.accept()
sys.stdin.readline()
"""
# Ends with its parent, which a test kills.
APART = """
import ctypes, os
libc = ctypes.CDLL(None)
assert not libc.unshare(0x20000000)
if child := os.fork():
    os.waitpid(child, 0)
    os._exit(0)
libc.prctl(1, 9)
"""


@pytest.fixture
def path():
    """A path for a socket in a folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield f"{folder}/s"


class Other:
    """A process that becomes another user."""

    def __init__(self, path, code):
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER + code, path],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def hear(self):
        return self.process.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.communicate("end\n", timeout=SOON)


def refusal(pid):
    return f"process {pid} belongs to user {NOBODY}: only this user's, or root's, may be a peer"


def test_a_device_of_another_user_gets_nothing(path):
    with bench() as here, Listener(path) as listener:
        Path(path).chmod(0o666)
        with Other(path, DEVICE) as device:
            with pytest.raises(EndpointError) as refused:
                here.server.serve(listener.accept(SOON))
            assert str(refused.value) == refusal(device.pid)
            assert device.hear() == "the connection was closed before the hand-over"
        with child_of(here.server, "say(memory.read(0, 1)[0])") as child:
            assert child.hear() == 1


def test_a_device_of_another_user_does_not_even_get_in(path):
    with Listener(path), Other(path, DEVICE) as device:
        assert device.hear() == (
            f"cannot connect to {path}, which belongs to user 0: run both sides as the same user"
        )


@pytest.mark.parametrize("connects", [connect, HandlerSource])
def test_another_users_socket_is_not_used(path, connects):
    with Other(path, LISTENS) as other:
        assert other.hear() == "listening"
        with pytest.raises(EndpointError) as refused:
            connects(path)
        assert str(refused.value) == (
            f"the socket {path} belongs to user {NOBODY}: only this user's, or root's, is used"
        )


def test_a_handler_of_another_user_behind_a_socket_of_ones_own_gets_nothing(path):
    with Other(path, LISTENS_AT_ROOTS_SOCKET) as other:
        assert other.hear() == "listening"
        with pytest.raises(EndpointError) as refused:
            HandlerSource(path)
        assert str(refused.value) == refusal(other.pid)


def test_a_machine_of_another_user_is_not_served(path):
    with HandlerProcess(path) as handler:
        Path(path).chmod(0o666)
        with Other(path, MACHINE) as machine:
            assert handler.says("a machine was refused: " + refusal(machine.pid))
            assert machine.hear() == (
                f"process {handler.pid}, which listens at {path}, is no handler that can be used (the connection was "
                "closed before the offer): start kvmdp handler there"
            )


def test_who_cannot_be_seen_from_here_is_refused(path):
    with HandlerProcess(path, "--synthetic", f"{MEMORY},{SEED}", prelude=APART) as handler:
        with pytest.raises(EndpointError, match="closed before the offer"):
            HandlerSource(path)
        assert handler.says(
            "a machine was refused: the process at the other end is in another PID namespace, so that its death could "
            "not be seen: run both in the same one"
        )
