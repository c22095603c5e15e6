"""RemoteMemory against a machine that the test plays itself, at the other end of the notifier."""

import contextlib
import os
import random
import subprocess
import threading
import time

import pytest
from fakes import PAGES, content
from remote_devices import EPOCH, device, device_and_ram, readers

from kvmdp.errors import BusyError, CancelledError, FrozenError, PagingError, PoisonedError
from kvmdp.page import PAGE_SIZE, Access, Outcome
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


# What one access asks for at once


def asked(machine, number):
    """The next FAULTs that come, by page."""
    machine.settimeout(SOON)
    records = [unpack(machine.recv(RECORD_SIZE), EPOCH) for _ in range(number)]
    assert {record.kind for record in records} <= {Kind.FAULT}
    assert len({record.token for record in records}) == number
    return {record.gpa // PAGE_SIZE: record for record in records}


def nothing_comes(machine):
    machine.settimeout(0.05)
    with pytest.raises(TimeoutError):
        machine.recv(RECORD_SIZE)


def answer(machine, record, outcome=Outcome.ADMITTED):
    machine.send(Record(Kind.DONE, record.token, outcome=outcome).pack(EPOCH))


class Machine:
    """Answers FAULTs as a machine does."""

    def __init__(self, notifier, bitmap, ram):
        self.notifier, self.bitmap, self.ram = notifier, bitmap, ram

    def admit(self, records):
        for page, record in records.items():
            count = record.size // PAGE_SIZE
            for each in range(page, page + count):
                self.ram[each * PAGE_SIZE : (each + 1) * PAGE_SIZE] = content(each)
            self.bitmap.set_range(page, count)
            answer(self.notifier, record)


@contextlib.contextmanager
def reading(memory, segments):
    """A thread reads the segments of whole pages (first, count); yields what that ends with, a list of one."""
    ends = []

    def read():
        try:
            ends.append(memory.readv([(first * PAGE_SIZE, count * PAGE_SIZE) for first, count in segments]))
        except PagingError as error:
            ends.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield ends
    finally:
        thread.join(SOON)
        assert not thread.is_alive()


SCATTERED = [3 + 7 * each for each in range(64)]


def shuffled(records):
    pages = list(records)
    random.Random(7).shuffle(pages)
    return {page: records[page] for page in pages}


def test_a_read_of_scattered_pages_asks_for_all_before_it_waits():
    with device_and_ram(64) as (memory, notifier, bitmap, ram):
        machine = Machine(notifier, bitmap, ram)
        with reading(memory, [(page, 1) for page in SCATTERED]) as ends:
            records = asked(notifier, 64)
            assert sorted(records) == SCATTERED
            assert {record.size for record in records.values()} == {PAGE_SIZE}
            assert {record.access for record in records.values()} == {Access.READ}
            assert ends == []
            machine.admit(shuffled(records))
        assert ends == [b"".join(map(content, SCATTERED))]
        nothing_comes(notifier)
        assert memory.readv(
            [(page * PAGE_SIZE, 8) for page in SCATTERED]
        )  # all credits are back, none is needed


def test_a_write_asks_for_all_as_well():
    with device_and_ram(64) as (memory, notifier, bitmap, ram):
        machine = Machine(notifier, bitmap, ram)
        segments = [(page * PAGE_SIZE, 2) for page in (5, 9, 70)]
        thread = threading.Thread(target=lambda: memory.writev(segments, b"abcdef"), daemon=True)
        thread.start()
        records = asked(notifier, 3)
        assert {record.access for record in records.values()} == {Access.WRITE}
        machine.admit(records)
        thread.join(SOON)
        assert [bytes(ram[at : at + 2]) for at, _ in segments] == [b"ab", b"cd", b"ef"]


def test_with_fewer_credits_it_asks_for_the_rest_when_those_are_back():
    with device_and_ram(10) as (memory, notifier, bitmap, ram):
        machine = Machine(notifier, bitmap, ram)
        with reading(memory, [(page, 1) for page in SCATTERED]) as ends:
            left, rounds = set(SCATTERED), []
            while left:
                records = asked(notifier, min(10, len(left)))
                nothing_comes(notifier)  # never beyond its credits
                assert set(records) <= left
                left -= set(records)
                rounds.append(len(records))
                machine.admit(shuffled(records))
        assert rounds == [10] * 6 + [4]
        assert ends == [b"".join(map(content, SCATTERED))]


def test_pages_side_by_side_are_one_fault_and_64_runs_are_the_most_at_once():
    runs = [(1 + 5 * each, 1 + each % 4) for each in range(80)]
    with device_and_ram(100) as (memory, notifier, bitmap, ram):
        machine = Machine(notifier, bitmap, ram)
        ram[12 * PAGE_SIZE : 13 * PAGE_SIZE] = content(12)
        bitmap.set_range(12, 1)  # in the middle of the third run
        with reading(memory, runs) as ends:
            records = asked(notifier, 64)
            nothing_comes(notifier)
            assert {page: record.size // PAGE_SIZE for page, record in records.items()} == {
                first: 1 if first == 11 else count for first, count in runs[:64]
            }
            machine.admit(records)
            records = asked(notifier, 17)
            assert sorted(records) == [13, *(first for first, _ in runs[64:])]
            machine.admit(records)
        assert ends == [
            b"".join(content(page) for first, count in runs for page in range(first, first + count))
        ]


@pytest.mark.parametrize(
    ("outcome", "error", "sentence"),
    [
        (Outcome.FAILED, PagingError, "the page at gpa 0x3000 cannot be made present: failed"),
        (Outcome.POISONED, PoisonedError, "the page at gpa 0x3000 is poisoned"),
        (Outcome.CANCELLED, CancelledError, "the page at gpa 0x3000 cannot be had: the machine is stopping"),
        (Outcome.FROZEN, FrozenError, "accesses to guest memory are frozen"),
    ],
)
def test_one_of_many_that_cannot_be_had_ends_the_access_and_all_credits_come_back(outcome, error, sentence):
    with device_and_ram(4) as (memory, notifier, bitmap, ram):
        machine = Machine(notifier, bitmap, ram)
        with reading(memory, [(page, 1) for page in (1, 3, 5, 7)]) as ends:
            records = asked(notifier, 4)
            answer(notifier, records.pop(3), outcome)
            assert ends == []  # it waits for all
            machine.admit(records)
        assert type(ends[0]) is error
        assert sentence in str(ends[0])
        with reading(memory, [(page, 1) for page in (11, 13, 15, 17)]) as ends:
            machine.admit(asked(notifier, 4))
        assert ends == [b"".join(map(content, (11, 13, 15, 17)))]


def test_pages_that_do_not_come_in_time_are_released_and_their_credits_come_back_with_the_answers():
    with device_and_ram(4, timeout=0.05) as (memory, notifier, bitmap, ram):
        machine = Machine(notifier, bitmap, ram)
        with reading(memory, [(page, 1) for page in (1, 3, 5, 7)]) as ends:
            records = asked(notifier, 4)
            machine.admit({1: records.pop(1)})
        assert type(ends[0]) is BusyError
        assert "000 was not made present within 0.05 seconds" in str(ends[0])
        notifier.settimeout(SOON)
        late = {record.token for record in records.values()}
        while late:  # the first may have been late too, in a thread that has had no turn
            record = unpack(notifier.recv(RECORD_SIZE), EPOCH)
            assert record.kind is Kind.RELEASE
            late.discard(record.token)
        memory._timeout = 0.5
        with reading(memory, [(20, 1), (22, 1)]) as ends:  # one credit is left
            assert sorted(asked(notifier, 1)) == [20]
        assert type(ends[0]) is BusyError
        for record in records.values():
            answer(notifier, record, Outcome.CANCELLED)
        memory._timeout = None
        with reading(memory, [(30, 1), (32, 1), (34, 1)]) as ends:
            assert unpack(notifier.recv(RECORD_SIZE), EPOCH).kind is Kind.RELEASE  # of page 20
            for _ in range(3):  # as soon as one credit is back it asks
                machine.admit(asked(notifier, 1))
        assert ends == [content(30) + content(32) + content(34)]


@pytest.mark.parametrize("how", ["frozen", "cancelled", "gone"])
def test_who_waits_for_many_is_turned_away_at_once(how):
    with device_and_ram(64) as (memory, notifier, _bitmap, _ram):
        with reading(memory, [(page, 1) for page in SCATTERED]) as ends:
            records = asked(notifier, 64)
            if how == "frozen":
                notifier.send(Record(Kind.FREEZE, 9).pack(EPOCH))
            elif how == "cancelled":
                memory.cancel()
            else:
                notifier.close()
        wanted = {"frozen": FrozenError, "cancelled": CancelledError, "gone": PagingError}
        assert type(ends[0]) is wanted[how]
        if how != "gone":
            came = [unpack(notifier.recv(RECORD_SIZE), EPOCH) for _ in range(64 + (how == "frozen"))]
            released = {record.token for record in came if record.kind is Kind.RELEASE}
            assert released == {record.token for record in records.values()}
            assert [record.token for record in came if record.kind is Kind.ACK] == [9] * (how == "frozen")


def test_two_threads_that_read_many_pages_share_the_credits():
    with device_and_ram(6) as (memory, notifier, bitmap, ram):
        machine, done = Machine(notifier, bitmap, ram), 0
        first, second = SCATTERED[:20], SCATTERED[20:40]
        with (
            reading(memory, [(page, 1) for page in first]) as ends,
            reading(memory, [(page, 1) for page in second]) as others,
        ):
            while done < 40:
                machine.admit(asked(notifier, 1))
                done += 1
        assert ends == [b"".join(map(content, first))]
        assert others == [b"".join(map(content, second))]


def test_an_access_that_is_not_to_wait_asks_for_nothing():
    with device(64) as (memory, notifier):
        with pytest.raises(BusyError, match="the page at gpa 0x1000 is not present"):
            memory.read(0, 8 * PAGE_SIZE, nowait=True)
        nothing_comes(notifier)


@pytest.mark.parametrize("how", ["frozen", "cancelled"])
def test_the_answer_to_a_release_is_not_taken_for_a_stop_of_the_machine(how):
    with device(1) as (memory, machine):
        send = memory._send

        def send_and_be_answered(record):
            send(record)
            if record.kind is Kind.RELEASE:
                answer(machine, record, Outcome.CANCELLED)
                deadline = time.monotonic() + SOON
                while memory._faults._open:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)

        memory._send = send_and_be_answered
        with reading(memory, [(5, 1)]) as ends:
            asked(machine, 1)
            if how == "frozen":
                machine.send(Record(Kind.FREEZE, 9).pack(EPOCH))
            else:
                memory.cancel()
        if how == "frozen":
            assert type(ends[0]) is FrozenError
        else:
            assert "have been called off" in str(ends[0])
