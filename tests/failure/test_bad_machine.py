"""Machines that break the rules with `kvmdp handler`: each is given up with a sentence, and the next one is served."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

import pytest
from handlers import MEMORY, HandlerProcess
from machines import PAGE, TERMS, Machine, check_served, memfd

from kvmdp.page import Outcome
from kvmdp.peers.wire.handover import Handover, Role
from kvmdp.peers.wire.records import Kind, Record, unpack

IMPATIENT = "from kvmdp.peers.handler import server as serving\nserving._PATIENCE_SECONDS = 0.2"


@pytest.fixture(scope="module")
def handler(tmp_path_factory):
    """One handler for all the machines of this module: it outlives each of them."""
    path = tmp_path_factory.mktemp("bad") / "s"
    with HandlerProcess(path, prelude=IMPATIENT) as process:
        process.path = str(path)
        yield process
        assert process.process.poll() is None
        process.end()
        assert "Traceback" not in process.said


def descriptors_of(pid):
    while True:
        try:
            return sorted(str(each.readlink()).split(":")[0] for each in Path(f"/proc/{pid}/fd").iterdir())
        except FileNotFoundError:
            pass  # one was closed between the two looks: the handler is still winding up a session


@pytest.fixture(autouse=True)
def unharmed(handler):
    """After each machine the handler has the descriptors it had, and serves the next machine."""
    before = descriptors_of(handler.pid)
    handler.said = ""
    yield
    check_served(handler.path)
    assert handler.says("0 vCPU, 0 device, 1 host faults")
    deadline = time.monotonic() + 20
    while descriptors_of(handler.pid) != before:
        assert time.monotonic() < deadline, (descriptors_of(handler.pid), before)
        time.sleep(0.01)


@pytest.fixture
def machine(handler):
    with contextlib.ExitStack() as stack:
        yield Machine(handler.path, stack)


@pytest.mark.parametrize("count", [0, 1, 2, 4, 16])
def test_a_hand_over_with_another_number_of_descriptors(handler, machine, count):
    socket.send_fds(machine.connection, [machine.message()], [machine.ram] * count)
    assert handler.says(f"was given up: a hand-over with {count} descriptors, where 3 belong to it")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda message: os.urandom(80), "does not begin as a hand-over does"),
        (lambda message: message[:20], "a message of 20 bytes, which is no hand-over"),
        (lambda message: message[:-1], "that announces 1 regions"),
        (lambda message: message[:8] + b"\2" + message[9:], "of version 2, where version 1 is spoken"),
        (lambda message: message[:16] + b"\x09" + message[17:], "for role 9, which there is none of"),
        (lambda message: message[:24] + bytes(8) + message[32:], "a hand-over of 0 pages"),
    ],
)
def test_what_is_no_hand_over(handler, machine, change, sentence):
    fds = [machine.ram, machine.bitmap, machine.theirs.fileno()]
    socket.send_fds(machine.connection, [change(machine.message())], fds)
    assert handler.says(sentence)


def test_a_hand_over_that_is_not_for_a_handler(handler, machine):
    machine.hand_over(Handover(1, Role.DEVICE, 64, TERMS.pages, TERMS.regions))
    assert handler.says("it wants a device, and this is a handler")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: memfd(MEMORY), "is not sealed against shrinking"),
        (lambda: os.open(os.devnull, os.O_RDWR), "is not sealed against shrinking"),
        (lambda: memfd(MEMORY - PAGE, fcntl.F_SEAL_SHRINK), f"less than {MEMORY} bytes"),
        (lambda: memfd(MEMORY, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_WRITE), os.strerror(errno.EPERM)),
    ],
)
def test_ram_that_could_end_the_handler(handler, machine, make, sentence):
    ram = make()
    try:
        machine.hand_over(ram=ram)
    finally:
        os.close(ram)
    assert handler.says(sentence)


def test_more_ram_than_there_are_addresses(handler, machine):
    size = 1 << 63
    machine.hand_over(Handover(1, Role.HANDLER, 64, size // PAGE, ((0, size, 0),)))
    assert handler.says(f"less than {size} bytes")


def test_a_notifier_that_is_no_socket(handler, machine):
    machine.hand_over(notifier=machine.bitmap)
    assert handler.says("was given up: a notifier that is no socket")


def test_a_notifier_that_is_not_connected(handler, machine):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as alone:
        machine.hand_over(notifier=alone.fileno())
        assert handler.says("its notifier does not work")


def test_one_that_closes_before_the_hand_over(handler, machine):
    machine.connection.close()
    assert handler.says("was given up: the connection was closed before the hand-over")


def test_one_that_never_hands_over(handler, machine):
    assert handler.says("was given up: nothing was handed over within 0.2 seconds")


def fault(gpa, size=PAGE):
    return Record(Kind.FAULT, 1, gpa, size)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (os.urandom(64), "it sent a record of version"),
        (fault(0).pack(1)[:32], "a message of 32 bytes, where a record has 64"),
        (fault(0).pack(1) + bytes(64), "a message of 65 bytes, where a record has 64"),
        (fault(0).pack(2), "a record of session 2"),
        (fault(MEMORY).pack(1), f"a FAULT for 4096 bytes at gpa {MEMORY:#x}, which are not RAM"),
        (fault(0, MEMORY + PAGE).pack(1), "which are not RAM"),
        (fault((1 << 64) - PAGE).pack(1), "which are not RAM"),
        (fault(100).pack(1), "not whole pages"),
        (Record(Kind.DONE, 1, 0, PAGE).pack(1), "a DONE, which is not for a handler"),
        (Record(Kind.INVALIDATE, 1, 0, PAGE).pack(1), "a INVALIDATE, which is not for a handler"),
    ],
)
def test_records_that_are_none_for_a_handler(handler, machine, message, sentence):
    machine.hand_over()
    machine.ours.send(message)
    assert handler.says(sentence)
    assert handler.says("it was cut off")
    assert machine.ours.recv(64) == b""
    assert os.pread(machine.ram, MEMORY, 0) == bytes(MEMORY)


def test_ram_beyond_the_image_cannot_be_brought(handler, machine):
    ram = memfd(2 * MEMORY, fcntl.F_SEAL_SHRINK)
    try:
        machine.hand_over(Handover(1, Role.HANDLER, 64, 2 * TERMS.pages, ((0, 2 * MEMORY, 0),)), ram=ram)
    finally:
        os.close(ram)
    machine.ours.send(fault(MEMORY).pack(1))
    assert unpack(machine.ours.recv(65), 1).outcome is Outcome.FAILED
    machine.ours.close()
    assert handler.says("1 of them failed")


def test_one_that_never_reads_its_answers_is_cut_off(handler, machine):
    machine.hand_over()
    with contextlib.suppress(ConnectionError):
        for number in range(100_000):
            machine.ours.send(Record(Kind.FAULT, number, 0, PAGE).pack(1))
        pytest.fail("it reads on although nobody reads its answers")
    assert handler.says("it does not read its answers; it was cut off")
    assert handler.says("has gone")


def test_one_that_makes_its_notifier_not_wait(handler, machine):
    os.set_blocking(machine.theirs.fileno(), False)
    machine.hand_over()
    machine.ours.send(fault(0).pack(1))
    assert unpack(machine.ours.recv(65), 1).outcome is Outcome.PRESENT
    machine.ours.close()
    assert handler.says("has gone")
