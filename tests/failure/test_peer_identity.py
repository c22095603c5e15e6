"""A peer is the process that has connected, not a later one that was given its number."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvmdp.abi.socket import SO_PEERPIDFD

pytestmark = pytest.mark.root

# In a PID namespace of its own, where numbers are given out as it says: a process connects and ends, and the next gets
# its number, before anybody has looked who has connected.
REUSED = """
import ctypes, os, signal, socket, sys, time
from pathlib import Path
from kvmdp.peers.wire import endpoint
from kvmdp.peers.wire.endpoint import EndpointError, Listener, Peer, connect

def fork(body):
    if child := os.fork():
        return child
    try:
        body()
    finally:
        os._exit(0)

def main():
    with Listener(path) as listener:
        first = fork(connects)
        while not Path(path + ".connected").exists():
            time.sleep(0.001)
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(first - 1))
        second = fork(lambda: time.sleep(600))
        assert second == first
        with listener.accept(20) as connection:
            try:
                peer = Peer.of(connection)
            except EndpointError as error:
                print("refused:", error, flush=True)
            else:
                print("dead" if peer.wait_dead(0) else "alive", flush=True)
        os.kill(second, signal.SIGKILL)

def connects():
    connection = connect(path)
    if sys.argv[2] == "leaves a child":
        fork(lambda: time.sleep(600))
    Path(path + ".connected").touch()
    time.sleep(600)

path = sys.argv[1]
if sys.argv[2] == "knows no pidfd":
    endpoint.SO_PEERPIDFD = 0x7FFF  # an option that no kernel has: ENOPROTOOPT, as before Linux 6.5
libc = ctypes.CDLL(None)
assert not libc.unshare(0x20000000)
if not (child := os.fork()):
    libc.prctl(1, signal.SIGKILL)  # ends with its parent, and all of the namespace with it
    main()
    os._exit(0)
os.waitpid(child, 0)
"""


def seen(path, how):
    """What a listener sees of a process whose number another has by now."""
    done = subprocess.run(
        [sys.executable, "-c", REUSED, str(path), how],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.stderr == ""
    return done.stdout.strip()


REFUSED = "refused: process 2 has ended before its session began"


# With a child that holds the connection open only the kernel can tell which process it was.
@pytest.mark.parametrize("how", ["ends", "leaves a child"])
def test_a_number_that_another_process_has_by_now(socket_path, how):
    if how == "leaves a child":
        require_peer_pidfd()
    assert seen(socket_path, how) in ("dead", REFUSED)


def test_the_same_where_the_kernel_knows_no_pidfd_of_a_peer(socket_path):
    assert seen(socket_path, "knows no pidfd") == REFUSED


def require_peer_pidfd():
    here, there = socket.socketpair()
    with here, there:
        try:
            os.close(here.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError:
            pytest.skip("this kernel has no SO_PEERPIDFD (Linux 6.5)")
