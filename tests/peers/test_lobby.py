"""The lobby: which process gets a place, and which leaves for it."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmdp.peers.wire.endpoint import Listener, connect
from kvmdp.peers.wire.lobby import Lobby

CONNECTS = """
import sys
from kvmdp.peers.wire.endpoint import connect
connections = [connect(sys.argv[1]) for _ in range(int(sys.argv[2]))]
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def stack():
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def lobby(tmp_path, stack):
    """A lobby of three places, two for each process; `said` is what it has reported."""
    listener = stack.enter_context(Listener(str(tmp_path / "s")))
    said = []
    made = Lobby(listener, "machine", said.append, places=3, share=2)
    stack.callback(made.close)
    made.said, made.path = said, listener.path
    return made


def connected(lobby, stack, count=1):
    """Connect from a process of its own; returns its pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", CONNECTS, lobby.path, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    )
    stack.callback(process.wait)
    stack.callback(process.stdout.close)
    stack.callback(process.stdin.close)
    process.stdout.readline()
    return process.pid


def pids(lobby):
    return [arrival.peer.pid for arrival in lobby.arrivals]


def test_a_process_beyond_its_share_loses_the_connection_that_waits_longest(lobby, stack):
    connections = [stack.enter_context(connect(lobby.path)) for _ in range(5)]
    assert (
        len(list(lobby.take_in([]))) == 3
    )  # no more than there are places: others are looked after in between
    assert len(list(lobby.take_in([]))) == 2
    assert pids(lobby) == [os.getpid()] * 2
    assert [connection.recv(1) for connection in connections[:3]] == [b""] * 3
    assert len(lobby.said) == 3
    assert lobby.said[0] == (
        f"machine {os.getpid()} was turned away after the longest wait: process {os.getpid()} has 2 connections, its "
        "share"
    )


def test_where_all_places_are_taken_the_longest_wait_ends(lobby, stack):
    first, second, third = (connected(lobby, stack, count) for count in (1, 2, 1))
    for _ in range(2):
        list(lobby.take_in([]))
    assert sorted(pids(lobby)) == sorted([second, second, third])
    assert lobby.said == [f"machine {first} was turned away after the longest wait: all 3 places are taken"]


def test_what_is_served_never_leaves(lobby, stack):
    one, own = connected(lobby, stack), os.getpid()
    assert list(lobby.take_in([1, 2, 3])) == []
    assert lobby.said.pop() == (
        "a machine was refused: all 3 places are taken, and all of them are served: try again later"
    )
    stack.enter_context(connect(lobby.path))
    assert list(lobby.take_in([own, own])) == []
    assert f"process {own} has 2 connections, its share, and all of them are served" in lobby.said.pop()
    stack.enter_context(connect(lobby.path))
    assert [arrival.peer.pid for arrival in lobby.take_in([own, one])] == [own]


@pytest.mark.parametrize("how", ["closes", "dies"])
def test_what_has_gone_is_forgotten(lobby, stack, how):
    if how == "closes":
        stays, goes = stack.enter_context(connect(lobby.path)), connect(lobby.path)
        list(lobby.take_in([]))
        goes.close()
    else:
        with contextlib.ExitStack() as other:
            connected(lobby, other)
            stays = stack.enter_context(connect(lobby.path))
            list(lobby.take_in([]))
    assert len(lobby.arrivals) == 2
    lobby.forget_gone()
    assert pids(lobby) == [os.getpid()]
    assert stays.fileno() >= 0
