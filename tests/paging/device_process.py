"""Devices in processes of their own, for tests: real ones on `RemoteMemory`, and a server for them without a guest."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading

from fakes import PAGES, FakeSource, FakeTrap

from kvmdp.memory.backing import MemfdBacking
from kvmdp.memory.layout import PAGE_SIZE, GuestLayout
from kvmdp.paging.gate import VcpuGate
from kvmdp.paging.pager import DemandPager
from kvmdp.paging.peers import DeviceServer
from kvmdp.paging.policy import FaultAround

SOON = 20  # seconds: long past anything here

# A child has one connection, as descriptor 0. It prints what it found as JSON, a line each, and obeys lines.
_PRELUDE = """
import json, os, random, signal, socket, struct, sys, threading, time
from kvmdp.paging.fault import *
from kvmdp.paging.remote import RemoteMemory
from kvmdp.wire import handover
from kvmdp.wire.records import *
def say(what):
    print(json.dumps(what), flush=True)
commands = os.fdopen(int(sys.argv[1]), "r")
def heard():
    return commands.readline().strip()
connection = socket.socket(fileno=0)
given, descriptors = handover.receive(connection)
"""
_MEMORY = "memory = RemoteMemory(given, descriptors)\n"
_RAW = """
notifier = socket.socket(fileno=descriptors.notifier)
def send(record, epoch=None):
    notifier.send(record.pack(given.epoch if epoch is None else epoch))
def receive():
    return unpack(notifier.recv(65), given.epoch)
"""


class Child:
    """A device process; `connection` is the machine's end of the socket it was born with."""

    def __init__(self, code, *, raw=False, user=None):
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        read, write = os.pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PRELUDE + (_RAW if raw else _MEMORY) + code, str(read)],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[read],
                user=user,
                text=True,
            )
        os.close(read)
        self._commands = os.fdopen(write, "w")

    @property
    def pid(self):
        return self.process.pid

    def tell(self, line):
        with contextlib.suppress(BrokenPipeError):
            self._commands.write(line + "\n")
            self._commands.flush()

    def hear(self):
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line)

    def close(self):
        """Kill it if it still runs."""
        self.connection.close()
        self.process.kill()
        self.process.wait(SOON)
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()
        self.process.stdout.close()
        self.process.stderr.close()


class Bench:
    """A pager on RAM in a memfd, with a trap that only remembers, and a server of devices; no guest."""

    def __init__(self, pages=PAGES, patience=10.0, **fake):
        self.layout = GuestLayout(pages * PAGE_SIZE)
        self.backing = MemfdBacking(pages * PAGE_SIZE)
        self.source = FakeSource(pages)
        self.trap = FakeTrap(pages, PAGE_SIZE, self.backing.vmm)
        self.pager = DemandPager(self.layout, self.trap, self.source, FaultAround(1), VcpuGate())
        self.sentences = []
        self.reported = threading.Semaphore(0)
        self.server = DeviceServer(self.layout, self.backing, self.pager, self._report, patience)
        self.pager.peers = self.server
        self.pager.enable()
        self.children = []

    def _report(self, sentence):
        self.sentences.append(sentence)
        self.reported.release()

    def next_report(self):
        """The next sentence about a device that ended badly."""
        assert self.reported.acquire(timeout=SOON)
        return self.sentences[-1]

    def child(self, code, *, raw=False):
        """Start a device and its session."""
        child = Child(code, raw=raw)
        self.children.append(child)
        # SO_PEERCRED of a socketpair names who made it; the server takes who is connected from there.
        with announced(child.connection) as connection:
            child.session = self.server.serve(connection)
        return child

    def nobody_waits(self):
        return not any(claim.waiters for claim in self.pager.ledger.claims)

    def balanced(self):
        """Whether as many replies went out as requests came in."""
        return self.server.counters.requests == self.server.counters.replies

    def close(self):
        self.server.close()
        for child in self.children:
            child.close()
        self.pager.close()
        self.backing.close()


@contextlib.contextmanager
def bench(**options):
    made = Bench(**options)
    try:
        yield made
    finally:
        made.close()
