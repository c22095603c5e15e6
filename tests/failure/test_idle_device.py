"""Devices that live and do not serve: each is cut off with a sentence, its successor is served, the guest is exact."""

import contextlib
import os
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import forked
import pytest
from command import Running
from device_process import SOON, bench
from fakes import content
from harness import MEMORY, SEED, make_machine, plan

from kvmdp.errors import BusyError, PagingError
from kvmdp.machine.remote_disk import RemoteDisk
from kvmdp.page import Origin
from kvmdp.peers.wire.endpoint import Listener
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

START = "from kvmdp.cli.entry import entry; entry()"
RUN = ("run", "--memory", "8M", "--trap", "mmio", "--workload", "disk")
# Stops itself in the middle of a request, with the bytes for RAM in hand.
STOPS_ITSELF = """
import os, signal
from kvmdp.machine.disk import DiskFile
read, reads = DiskFile.read, 0
def read_and_stop(self, offset, length):
    global reads
    reads += 1
    data = read(self, offset, length)
    if reads == 5:
        os.kill(os.getpid(), signal.SIGSTOP)
    return data
DiskFile.read = read_and_stop
"""
SLOW = """
import time
from kvmdp.machine.disk import DiskFile
read = DiskFile.read
def read_slowly(self, offset, length):
    time.sleep({seconds})
    return read(self, offset, length)
DiskFile.read = read_slowly
"""
RAW = """
import os, socket, sys, time
from kvmdp.peers.wire import endpoint
from kvmdp.peers.wire import handover
from kvmdp.peers.wire.records import *
connection = endpoint.connect(sys.argv[2])
given, descriptors = handover.receive(connection)
notifier = socket.socket(fileno=descriptors.notifier)
def receive():
    return unpack(notifier.recv(65), given.epoch)
try:
    pass
{code}
except (RecordError, OSError):
    pass  # it was cut off, and lives on
time.sleep(600)
"""
IDLE = {
    "never reads": "",
    "reads and does nothing": "while True: receive()",
    "acknowledges and asks again and again for what is present": """
rung = receive()
while rung.kind is not Kind.DOORBELL: rung = receive()
def ask(token):
    notifier.send(Record(Kind.FAULT, token, rung.gpa, 4096).pack(given.epoch))
for token in range(given.credits):
    ask(token)
while True:  # there is a fault open at each moment
    ask(receive().token)
""",
}


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(8 << 20)
    return path


@contextlib.contextmanager
def device(path, disk, *, code=None, prelude=""):
    """A device process: `kvmdp device` after `prelude`, or `code` with the hand-over in hand."""
    program = f"{prelude}\n{START}" if code is None else RAW.format(code=textwrap.indent(code, "    "))
    process = forked.start(
        program,
        *(("device", "--connect", path, "--file", disk) if code is None else ("device", path)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def end_of(process):
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def check_exact(guest):
    done = guest.finish()
    assert done.status == 0, done.err
    assert "all exact" in done.out
    return done.err


@pytest.mark.parametrize("how", IDLE)
def test_a_device_that_does_not_serve_is_cut_off_and_its_successor_is_served(how, tmp_path, disk):
    path = str(tmp_path / "s")
    with Running(*RUN, "--device-socket", path, "--device-timeout", 1.5) as guest:
        guest.wait_for_progress("waiting for a device")
        with device(path, disk, code=IDLE[how]) as idle:
            guest.wait_for_progress("serves the disk")
            with device(path, disk) as successor:  # waits for its turn
                err = check_exact(guest)
                assert end_of(successor)[0] == 0
            assert idle.poll() is None
    assert (
        f"device process {idle.pid} is cut off: it has not got on with the disk's work for 1.5 seconds; no page can be "
        f"taken away until process {idle.pid}, which has RAM mapped, has ended: end it"
    ) in err
    assert f"device process {successor.pid} serves the disk" in err


def test_a_stopped_device_that_comes_to_life_again_touches_nothing(tmp_path, disk):
    path = str(tmp_path / "s")
    with Running(*RUN, "--pages", 500, "--device-socket", path, "--device-timeout", 1.5) as guest:
        guest.wait_for_progress("waiting for a device")
        with device(path, disk, prelude=STOPS_ITSELF) as stopped:
            guest.wait_for_progress(f"device process {stopped.pid} serves the disk")
            with device(path, disk, prelude=SLOW.format(seconds=0.01)) as successor:
                guest.wait_for_progress(f"device process {successor.pid} serves the disk")
                stopped.send_signal(signal.SIGCONT)
                status, said = end_of(stopped)
                assert status == 1
                assert "the machine has closed the notifier" in said
                assert "Traceback" not in said
                assert f"device process {stopped.pid} is cut off" in check_exact(guest)
                assert end_of(successor)[0] == 0


def test_a_slow_device_that_gets_on_is_not_cut_off(tmp_path, disk):
    # A pass over a ring takes longer than the time-out, a request does not. All pages are there from the first fault.
    path = str(tmp_path / "s")
    run = (*RUN, "--pages", 48, "--fault-around", 512)
    with Running(*run, "--device-socket", path, "--device-timeout", 1.2) as guest:
        guest.wait_for_progress("waiting for a device")
        with device(path, disk, prelude=SLOW.format(seconds=0.25)) as slow:
            err = check_exact(guest)
            assert end_of(slow)[0] == 0
    assert "cut off" not in err


class SlowForDevices(SyntheticSource):
    """The first pages that a device asks for take longer than the time-out; `slow` is how many."""

    slow = 2

    def fetch(self, request, destination):
        if request.fault is not None and request.fault.origin is Origin.DEVICE and self.slow:
            self.slow -= 1
            time.sleep(1.5)
        super().fetch(request, destination)


def test_a_device_that_waits_for_a_page_is_not_cut_off(tmp_path, disk):
    sentences = []
    source = SlowForDevices(MEMORY, SEED)
    with (
        Listener(str(tmp_path / "s")) as listener,
        make_machine("mmio", workload=plan("disk", pages=100), source=source) as machine,
        RemoteDisk(machine, listener, 1, sentences.append) as remote,
        device(listener.path, disk),
    ):
        remote.await_device(SOON)
        machine.run(60)
    assert source.slow == 0
    assert not [sentence for sentence in sentences if "cut off" in sentence]


def test_one_process_that_does_not_serve_has_one_turn(tmp_path, disk):
    path = str(tmp_path / "s")
    many = "connections = [endpoint.connect(sys.argv[2]) for _ in range(99)]\nprint(flush=True)"
    with Running(*RUN, "--device-socket", path, "--device-timeout", 1.5) as guest:
        guest.wait_for_progress("waiting for a device")
        with device(path, disk, code=many) as idle:
            assert idle.stdout.readline()
            with device(path, disk) as successor:
                err = check_exact(guest)
                assert end_of(successor)[0] == 0
    assert (
        f"a device was refused: device process {idle.pid} has left a session but has RAM mapped: end it before it "
        "begins another"
    ) in err
    assert (
        f"device {idle.pid} was turned away after the longest wait: process {idle.pid} has 16 connections"
        in err
    )
    assert err.count("serves the disk") == 2


# Without a guest


STOPPED = """
memory.write(4096, b"before")
say("ready")
os.kill(os.getpid(), signal.SIGSTOP)
try:
    memory.write(4096, b"late")
    say("written")
except PagingError as error:
    say(str(error))
"""


def wait_for_state(pid, letter):
    deadline = time.monotonic() + SOON
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != letter:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_one_that_was_cut_off_while_it_was_stopped_writes_nothing():
    with bench() as here:
        child = here.child(STOPPED)
        assert child.hear() == "ready"
        wait_for_state(child.pid, "T")
        child.session.cut_off("it is stopped")
        assert child.session.wait_ended(SOON)
        time.sleep(0.2)  # longer than an access trusts the last look
        os.kill(child.pid, signal.SIGCONT)
        assert child.hear() == "the machine has closed the notifier: its memory cannot be used any more"
        assert bytes(here.backing.vmm.view[4096:4102]) == b"before"


def test_one_that_was_cut_off_and_lives_keeps_its_successor_from_nothing_but_the_pages():
    with bench() as here:
        first = here.child("heard()", raw=True)
        first.session.cut_off("it does nothing")
        second = here.child("say(memory.read(4096, 1)[0])\nsay(heard())")
        assert second.hear() == content(1)[0]
        with pytest.raises(BusyError, match=f"end process {first.pid}"):
            here.pager.mark_nonpresent(0, 4, timeout=0.01)
        first.process.kill()
        assert here.pager.mark_nonpresent(0, 4, timeout=SOON) == 1


def test_there_is_a_bound_on_those_that_were_cut_off_and_live(monkeypatch):
    monkeypatch.setattr("kvmdp.peers.peers._MOST_LIVING", 2)
    with bench() as here:
        living = [here.child("heard()", raw=True) for _ in range(2)]
        for each in living:
            each.session.cut_off("it does nothing")
            assert each.session.wait_ended(SOON)
        with pytest.raises(
            PagingError, match=f"2 devices have left their sessions .* end process {living[0].pid} and"
        ):
            here.child("heard()", raw=True)
        living[1].process.kill()
        living[1].process.wait(SOON)
        assert living[1].session.wait_gone(patiently=True)
        assert here.child("say(memory.read(0, 1)[0])").hear() == content(0)[0]
