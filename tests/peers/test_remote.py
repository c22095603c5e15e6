"""RemoteMemory against a machine that the test plays itself, at the other end of the notifier."""

import os
import subprocess

import pytest
from fakes import PAGES
from remote_devices import EPOCH, device, readers

from kvmdp.errors import CancelledError, FrozenError, PagingError
from kvmdp.page import PAGE_SIZE
from kvmdp.peers.wire.endpoint import Peer
from kvmdp.peers.wire.records import RECORD_SIZE, Kind, Record, unpack

SOON = 20


@pytest.mark.parametrize("how", ["the machine goes", "cancel"])
def test_nobody_waits_for_a_credit_when_the_session_is_over(how):
    with device(1) as (memory, machine):
        threads, errors = readers(memory, (1, 2, 3))
        assert unpack(machine.recv(RECORD_SIZE), EPOCH).kind is Kind.FAULT
        if how == "cancel":
            memory.cancel()
        else:
            machine.close()
        for thread in threads:
            thread.join(SOON)
            assert not thread.is_alive()
        assert len(errors) == 3
        assert {type(error) for error in errors} == {CancelledError if how == "cancel" else PagingError}


def test_a_freeze_sent_before_the_hand_over_counts_before_the_first_access():
    with device(1, sent_before=[Record(Kind.FREEZE, 7)]) as (memory, machine):
        with pytest.raises(FrozenError):
            memory.read(0, 1)
        assert unpack(machine.recv(RECORD_SIZE), EPOCH).token == 7
        machine.send(Record(Kind.THAW).pack(EPOCH))
        machine.send(Record(Kind.DOORBELL).pack(EPOCH))
        assert memory.wait_doorbell(SOON)
        assert memory.read(0, 1) == b"\0"


def test_an_invalidate_outside_ram_ends_the_session():
    with device(1) as (memory, machine):
        threads, errors = readers(memory, (1,))
        machine.send(Record(Kind.INVALIDATE, 1, 1 << 40, PAGE_SIZE).pack(EPOCH))
        threads[0].join(SOON)
        assert "a record that makes no sense (gpa 0x10000000000 is not guest RAM)" in str(errors[0])


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([Record(Kind.DONE, 77).pack(EPOCH)], "the machine sent a DONE of 77, which was not asked"),
        ([Record(Kind.FAULT, 1, 0, PAGE_SIZE).pack(EPOCH)], "a FAULT, which is not a machine's to send"),
        ([Record(Kind.ACK, 1).pack(EPOCH)], "a ACK, which is not a machine's to send"),
        ([Record(Kind.RELEASE, 1).pack(EPOCH)], "a RELEASE, which is not a machine's to send"),
        ([Record(Kind.COMPLETED).pack(EPOCH)], "a COMPLETED, which is not a machine's to send"),
        ([Record(Kind.THAW).pack(EPOCH + 1)], "a record of session 4, where this is session 3"),
        ([bytes(63)], "a message of 63 bytes"),
        ([bytes(RECORD_SIZE)], "a record of version 0"),
        (
            [Record(Kind.INVALIDATE, 1, (PAGES - 1) * PAGE_SIZE, 2 * PAGE_SIZE).pack(EPOCH)],
            "a record that makes no sense (gpa 0x200000 is not guest RAM)",
        ),
    ],
)
def test_what_a_machine_may_not_send_ends_the_session(messages, sentence):
    with device(1) as (memory, machine):
        for message in messages:
            machine.send(message)
        with pytest.raises(PagingError) as error:
            memory.wait_doorbell(SOON)
        assert sentence in str(error.value)
        with pytest.raises(PagingError):
            memory.read(0, 1)


def test_an_invalidate_of_pages_that_are_not_one_stretch_ends_the_session():
    half = PAGES // 2 * PAGE_SIZE
    regions = ((0, half, 0), (1 << 32, half, half))
    with device(2, regions=regions) as (memory, machine):
        machine.send(Record(Kind.INVALIDATE, 1, half - PAGE_SIZE, PAGE_SIZE).pack(EPOCH))
        assert unpack(machine.recv(RECORD_SIZE), EPOCH).token == 1
        machine.send(Record(Kind.INVALIDATE, 2, half - PAGE_SIZE, 2 * PAGE_SIZE).pack(EPOCH))
        with pytest.raises(PagingError, match="makes no sense"):
            memory.wait_doorbell(SOON)


def test_more_questions_than_there_are_credits_end_the_session():
    with device(2) as (memory, machine), memory.view(0, 8):
        for token in range(1, 4):
            machine.send(Record(Kind.INVALIDATE, token, 0, PAGE_SIZE).pack(EPOCH))
        with pytest.raises(PagingError, match="the machine sent a question beyond its 2 credits"):
            memory.wait_doorbell(SOON)


def test_a_machine_that_does_not_read_ends_the_session():
    with device(1) as (memory, _machine):
        for _ in range(100_000):
            memory.completed(0)
            if memory.over is not None:
                break
        with pytest.raises(
            PagingError, match="the machine does not read what it is sent: the session is over"
        ):
            memory.read(0, 1)


def test_the_death_of_the_machine_ends_the_session_although_its_end_of_the_notifier_is_open():
    process = subprocess.Popen(["sleep", "600"])
    try:
        machine = Peer(process.pid, os.getuid(), os.pidfd_open(process.pid))
        with device(1, machine=machine) as (memory, _notifier):
            assert memory.wait_doorbell(0) is None
            process.kill()
            with pytest.raises(PagingError, match="has closed the notifier, or died"):
                memory.wait_doorbell(SOON)
    finally:
        process.kill()
        process.wait()


def test_what_the_machine_had_sent_before_its_death_counts():
    process = subprocess.Popen(["true"])
    process.wait()
    machine = Peer(
        process.pid, os.getuid(), os.open("/dev/null", os.O_RDONLY)
    )  # readable at once, as of a dead one
    before = [Record(Kind.DOORBELL, gpa=0x3000, number=2), Record(Kind.BYE)]
    with device(1, sent_before=before, machine=machine) as (memory, _notifier):
        rung = memory.wait_doorbell(SOON)
        assert (rung.number, rung.gpa) == (2, 0x3000)
        assert memory.wait_doorbell(SOON) is None
        assert memory.over == "the machine has ended the session"
