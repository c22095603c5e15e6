"""Machines for the tests of `kvmdp handler`: one whose every message is the test's, and one as it should be."""

import contextlib
import fcntl
import os
import socket
import subprocess
from pathlib import Path

import forked
from handlers import MEMORY, SEED

from kvmdp.memory.backing import MemfdBacking
from kvmdp.memory.bitmap import PresentBitmap
from kvmdp.peers.handler.source import HandlerSource
from kvmdp.peers.wire import handover, offer
from kvmdp.peers.wire.endpoint import connect
from kvmdp.peers.wire.handover import Handover, Role
from kvmdp.peers.wire.records import Kind, Record, unpack
from kvmdp.source.request import FetchRequest
from kvmdp.source.synthetic import SyntheticSource

PAGE = 4096
TERMS = Handover(1, Role.HANDLER, 64, MEMORY // PAGE, ((0, MEMORY, 0),))


class Machine:
    """A machine whose every message is the test's; it has taken the handler's offer."""

    def __init__(self, path, stack, offered=MEMORY):
        self.connection = stack.enter_context(connect(path))
        assert offer.receive(self.connection) == offer.Offer(offered, None)
        self.ram = stack.enter_context(MemfdBacking(MEMORY)).fd
        self.bitmap = stack.enter_context(PresentBitmap(MEMORY // PAGE)).fd
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(self.ours)
        stack.enter_context(self.theirs)
        self.ours.settimeout(20)

    def hand_over(self, terms=TERMS, *, ram=None, notifier=None):
        fds = handover.Descriptors(
            self.ram if ram is None else ram,
            self.bitmap,
            self.theirs.fileno() if notifier is None else notifier,
        )
        handover.send(self.connection, terms, fds)
        self.theirs.close()

    def message(self, terms=TERMS):
        """What `hand_over` would send."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with here, there:
            handover.send(here, terms, handover.Descriptors(0, 0, 0))
            return there.recv(4096)


def fault(number, size=PAGE):
    """A FAULT on a page, with its number and one as token."""
    return Record(Kind.FAULT, number + 1, number * PAGE, size).pack(1)


def answer(machine):
    """The next record that the handler sends."""
    return unpack(machine.ours.recv(65), 1)


def memfd(size, *seals):
    fd = os.memfd_create("bad", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    for seal in seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    return fd


def check_served(path, page=3):
    """Be a machine that gets a page from the handler at `path`, exactly."""
    source = HandlerSource(str(path), 20)
    try:
        with MemfdBacking(MEMORY) as ram, PresentBitmap(MEMORY // PAGE) as bitmap:
            source.bind(ram.vmm.view, ram.fd, bitmap.fd, TERMS.regions)
            with ram.vmm.view[page * PAGE : (page + 1) * PAGE] as destination:
                source.fetch(FetchRequest(page * PAGE), destination)
                expected = bytearray(PAGE)
                SyntheticSource(MEMORY, SEED).fetch(FetchRequest(page * PAGE), memoryview(expected))
                assert destination == expected
            source.cancel()
    finally:
        source.close()


_PRELUDE = """
import contextlib, os, signal, socket, sys, time
sys.path[:0] = sys.argv[2:]
from machines import *
from kvmdp.peers.wire.records import *
path, stack = sys.argv[1], contextlib.ExitStack()
def say(what):
    print(what, flush=True)
def wait_for_the_end():
    sys.stdin.read()
"""


class MachineProcess:
    """A process that runs `code`, which may make a `Machine(path, stack)`; killed at the end of the block.

    It hears of the end on its standard input, and so do its children.
    """

    def __init__(self, path, code):
        here = Path(__file__).resolve()
        self.process = forked.start(
            _PRELUDE + code,
            path,
            here.parent,
            here.parents[2],
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
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()
