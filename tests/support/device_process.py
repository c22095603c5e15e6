"""Devices in processes of their own, for tests: real ones on `RemoteMemory`, and a server for them without a guest."""

import contextlib
import json
import subprocess
import tempfile
import threading

import forked
from fakes import PAGES, FakeSource, FakeTrap

from kvmdp.memory.backing import MemfdBacking
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.pager import Pager
from kvmdp.paging.policy import FaultAround
from kvmdp.peers.peers import DeviceServer
from kvmdp.peers.wire.endpoint import Listener
from kvmdp.vcpu.gate import VcpuGate

SOON = 20  # seconds: long past anything here

# A child prints what it found as JSON, a line each, and obeys lines on its standard input.
_PRELUDE = """
import fcntl, json, mmap, os, random, signal, socket, sys, threading, time
from pathlib import Path
from kvmdp.errors import *
from kvmdp.page import *
from kvmdp.peers.remote import RemoteMemory
from kvmdp.peers.wire import endpoint
from kvmdp.peers.wire import handover
from kvmdp.peers.wire.records import *
def say(what):
    print(json.dumps(what), flush=True)
def heard():
    return sys.stdin.readline().strip()
connection = endpoint.connect(sys.argv[1])
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
    """A device process that connects to `path`."""

    def __init__(self, path, code, *, raw=False):
        self.process = forked.start(
            _PRELUDE + (_RAW if raw else _MEMORY) + code,
            path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self):
        return self.process.pid

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self):
        """Return what it says next; one that says nothing, as after an exception beside a living thread, is killed."""
        guard = threading.Timer(3 * SOON, self.process.kill)
        guard.start()
        try:
            line = self.process.stdout.readline()
        finally:
            guard.cancel()
            guard.join()
        assert line, self.process.stderr.read()
        return json.loads(line)

    def done(self):
        """Wait for an end without an error."""
        _, errors = self.process.communicate(timeout=SOON)
        assert self.process.returncode == 0, errors

    def close(self):
        """Kill it if it still runs."""
        self.process.kill()
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.process.communicate(timeout=SOON)
        self.process.wait(SOON)


@contextlib.contextmanager
def child_of(server, code, *, raw=False):
    """Start a device and its session with `server`, `child.session`; kill it at the end of the block."""
    with tempfile.TemporaryDirectory() as folder, Listener(f"{folder}/socket") as listener:
        child = Child(listener.path, code, raw=raw)
        try:
            child.session = server.serve(listener.accept(SOON))
            yield child
        finally:
            child.close()


class Bench:
    """A pager on RAM in a memfd, with a trap that only remembers, and a server of devices; no guest."""

    def __init__(self, pages=PAGES, patience=10.0):
        self.layout = GuestLayout(pages * PAGE_SIZE)
        self.backing = MemfdBacking(pages * PAGE_SIZE)
        self.source = FakeSource(pages)
        self.trap = FakeTrap(pages, PAGE_SIZE, self.backing.vmm)
        self.pager = Pager(self.layout, self.trap, self.source, FaultAround(1), VcpuGate())
        self.sentences = []
        self.reported = threading.Semaphore(0)
        self.server = DeviceServer(self.layout, self.backing, self.pager, self._report, patience)
        self.pager.peers = self.server
        self.pager.enable()
        self._stack = contextlib.ExitStack()

    def _report(self, sentence):
        self.sentences.append(sentence)
        self.reported.release()

    def next_report(self):
        """The next sentence about a device that ended badly."""
        assert self.reported.acquire(timeout=SOON)
        return self.sentences[-1]

    def child(self, code, *, raw=False):
        """Start a device and its session; it lasts as long as the bench."""
        return self._stack.enter_context(child_of(self.server, code, raw=raw))

    def nobody_waits(self):
        return not any(claim.waiters for claim in self.pager.ledger.claims)

    def balanced(self):
        """Whether as many replies went out as requests came in."""
        return self.server.counters.requests == self.server.counters.replies

    def close(self):
        self.server.close()
        self._stack.close()
        self.pager.close()
        self.backing.close()


@contextlib.contextmanager
def bench(**options):
    made = Bench(**options)
    try:
        yield made
    finally:
        made.close()
