"""Handlers that break the protocol: each is cut off with one sentence, and RAM has nothing on its word."""

import contextlib
import fcntl
import mmap
import os
import socket
import threading

import pytest
from handlers import MEMORY, scripted

from kvmdp.memory.backing import MemfdBacking
from kvmdp.memory.bitmap import PresentBitmap
from kvmdp.page import Outcome
from kvmdp.peers.handler.source import HandlerSource
from kvmdp.peers.wire import handover, offer
from kvmdp.peers.wire.endpoint import EndpointError, Listener
from kvmdp.peers.wire.records import Kind, Record, unpack
from kvmdp.source.base import SourceError
from kvmdp.source.request import FetchRequest

PAGE = 4096


@contextlib.contextmanager
def bound(path, timeout=20.0, report=lambda text: None):
    """A source with RAM to fill; yields it and RAM's mapping."""
    source = HandlerSource(str(path), timeout, report)
    try:
        with MemfdBacking(MEMORY) as ram, PresentBitmap(MEMORY // PAGE) as bitmap:
            source.bind(ram.vmm.view, ram.fd, bitmap.fd, [(0, MEMORY, 0)])
            yield source, ram.vmm.view
            source.cancel()
    finally:
        source.close()


def fill(source, memory, page):
    with memory[page * PAGE : (page + 1) * PAGE] as destination:
        source.fetch(FetchRequest(page * PAGE), destination)


def ask(notifier, terms):
    return unpack(notifier.recv(64), terms.epoch)


def done(record, **changes):
    fields = {"token": record.token, "gpa": record.gpa, "size": record.size} | changes
    return Record(Kind.DONE, **fields)


def answers(make):
    """A handler that takes one fault, sends the messages that `make` returns, and waits for the end."""

    def session(notifier, terms, ram):
        asked = ask(notifier, terms)
        for message in make(asked, terms.epoch):
            notifier.send(message)
        while notifier.recv(64):
            pass

    return session


BAD = {
    "garbage": (lambda asked, epoch: [os.urandom(64)], "version|session"),
    "half a record": (lambda asked, epoch: [done(asked).pack(epoch)[:32]], "a message of 32 bytes"),
    "a wrong version": (
        lambda asked, epoch: [b"\x07\0" + done(asked).pack(epoch)[2:]],
        "a record of version 7",
    ),
    "a reserved bit": (
        lambda asked, epoch: [done(asked).pack(epoch)[:63] + b"\x80"],
        "a record with reserved bits set",
    ),
    "another size": (
        lambda asked, epoch: [done(asked, size=2 * PAGE).pack(epoch)],
        "a DONE for 8192 bytes at gpa 0x3000, where 4096",
    ),
    "another session": (lambda asked, epoch: [done(asked).pack(epoch + 1)], "a record of session"),
    "an unknown token": (lambda asked, epoch: [done(asked, token=999).pack(epoch)], "a DONE for token 999"),
    "not RAM": (lambda asked, epoch: [done(asked, gpa=1 << 40).pack(epoch)], "at gpa 0x10000000000, where"),
    "an outcome": (
        lambda asked, epoch: [done(asked, outcome=Outcome.ADMITTED).pack(epoch)],
        "outcome ADMITTED",
    ),
    "a kind": (
        lambda asked, epoch: [Record(Kind.INVALIDATE, 1, 0, PAGE).pack(epoch)],
        "a INVALIDATE, which no handler may",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_handler_that_breaks_the_protocol_is_cut_off(name, socket_path):
    make, sentence = BAD[name]
    with scripted(socket_path, answers(make)), bound(socket_path) as (source, memory):
        with pytest.raises(SourceError, match=rf"process {os.getpid()} sent .*({sentence}).*cut off"):
            fill(source, memory, 3)
        assert bytes(memory) == bytes(MEMORY)
        with pytest.raises(SourceError, match="cut off"):
            fill(source, memory, 4)


def test_a_second_answer_to_the_same_fault(socket_path):
    def twice(asked, epoch):
        return [done(asked).pack(epoch)] * 2

    with scripted(socket_path, answers(twice)), bound(socket_path) as (source, memory):
        fill(source, memory, 3)
        with pytest.raises(SourceError, match="answered before; it was cut off"):
            fill(source, memory, 4)


def test_a_handler_that_cannot_bring_a_page_says_so(socket_path):
    def failed(asked, epoch):
        return [done(asked, outcome=Outcome.FAILED).pack(epoch)]

    with (
        scripted(socket_path, answers(failed)),
        bound(socket_path) as (source, memory),
        pytest.raises(SourceError, match="says that it cannot bring them"),
    ):
        fill(source, memory, 3)


def test_a_handler_that_never_answers(socket_path):
    with (
        scripted(socket_path, answers(lambda asked, epoch: [])),
        bound(socket_path, timeout=0.2) as (source, memory),
        pytest.raises(SourceError, match=r"not answered the fault on gpa 0x3000 within 0\.2 seconds"),
    ):
        fill(source, memory, 3)


def test_a_handler_that_closes_and_lives_is_not_replaced(socket_path):
    said = []
    with (
        scripted(socket_path, lambda notifier, terms, ram: ask(notifier, terms)),
        bound(socket_path, 0.2, said.append) as (source, memory),
        pytest.raises(SourceError, match=r"has not ended within 0\.2 seconds, and may write into RAM"),
    ):
        fill(source, memory, 3)
    assert "lives on; waiting up to 0.2 s for its end" in said[0]


def test_cancelling_wakes_a_fill_that_waits(socket_path):
    asked = threading.Event()

    def mute(notifier, terms, ram):
        ask(notifier, terms)
        asked.set()
        while notifier.recv(64):
            pass

    errors = []

    def waiting():
        try:
            fill(source, memory, 3)
        except SourceError as error:
            errors.append(str(error))

    with scripted(socket_path, mute), bound(socket_path) as (source, memory):
        thread = threading.Thread(target=waiting)
        thread.start()
        assert asked.wait(60)
        source.cancel()
        thread.join()
    assert "the machine is stopping" in errors[0]


def test_answers_come_in_any_order_and_no_more_is_asked_than_there_are_credits(socket_path):
    count = 100

    def backwards(notifier, terms, ram):
        taken = [ask(notifier, terms) for _ in range(terms.credits)]
        notifier.setblocking(False)
        with pytest.raises(BlockingIOError):
            notifier.recv(64)
        notifier.setblocking(True)
        with mmap.mmap(ram, terms.memory_bytes) as memory:
            for served in range(count):
                record = taken.pop()
                memory[record.gpa : record.gpa + 8] = record.gpa.to_bytes(8, "little")
                notifier.send(done(record).pack(terms.epoch))
                if served < count - terms.credits:
                    taken.append(ask(notifier, terms))

    with scripted(socket_path, backwards), bound(socket_path) as (source, memory):
        threads = [threading.Thread(target=fill, args=(source, memory, page)) for page in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [int.from_bytes(memory[page * PAGE :][:8], "little") for page in range(count)] == [
            page * PAGE for page in range(count)
        ]


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (b"hello", "a message of 5 bytes, which is no offer"),
        (bytes(32), "does not begin as an offer does"),
        (b"KVMDPOFR" + b"\2\0\0\0" + bytes(20), "an offer of version 2"),
        (b"KVMDPOFR" + b"\1\0\0\0" + bytes(4) + (5000).to_bytes(8, "little") + bytes(8), "not whole pages"),
        (b"", "closed before the offer"),
    ],
)
def test_an_offer_that_is_none(message, sentence, socket_path):
    def body():
        with listener.accept(60) as connection:
            if message:
                connection.send(message)

    with Listener(str(socket_path)) as listener:
        thread = threading.Thread(target=body)
        thread.start()
        with pytest.raises(EndpointError, match=sentence):
            HandlerSource(str(socket_path))
        thread.join()


def test_a_listener_that_says_nothing(socket_path):
    with (
        Listener(str(socket_path)),
        pytest.raises(EndpointError, match=r"has made no offer within 0\.1 seconds"),
    ):
        HandlerSource(str(socket_path), 0.1)


def test_pages_of_a_handler_cannot_be_read_apart(socket_path):
    def until_the_end(notifier, terms, ram):
        assert ask(notifier, terms).kind is Kind.BYE

    with scripted(socket_path, until_the_end), bound(socket_path) as (source, _):
        with pytest.raises(ValueError, match="writes into RAM and nowhere else"):
            source.fetch(FetchRequest(0), memoryview(bytearray(PAGE)))
        with pytest.raises(ValueError, match="fills the RAM of one machine"):
            source.bind(memoryview(bytearray(PAGE)), 0, 0, [])


def test_a_source_that_is_closed_can_be_cancelled(socket_path):
    with scripted(socket_path, answers(lambda asked, epoch: [])), bound(socket_path) as (source, _):
        source.close()
        source.cancel()  # as the machine may, in another thread


def test_private_ram_is_refused_with_the_reason(socket_path):
    def body():
        with listener.accept(60) as connection:
            offer.send(connection, offer.Offer(MEMORY, None))
            connection.recv(1)

    with Listener(str(socket_path)) as listener:
        thread = threading.Thread(target=body)
        thread.start()
        source = HandlerSource(str(socket_path))
        try:
            with pytest.raises(ValueError, match="private to this process cannot be handed"):
                source.bind(memoryview(bytearray(PAGE)), -1, -1, [])
        finally:
            source.close()
        thread.join()


def test_a_socket_of_another_type(socket_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(socket_path))
        other.listen()
        with pytest.raises(EndpointError, match="a socket of another type"):
            HandlerSource(str(socket_path))


def test_a_handler_can_change_neither_the_bitmap_nor_the_size_of_ram_nor_their_seals(socket_path):
    done = []

    def attempt(what, call):
        with contextlib.suppress(OSError):
            call()
            done.append(what)

    def body():
        with listener.accept(60) as connection:
            offer.send(connection, offer.Offer(MEMORY, None))
            terms, descriptors = handover.receive(connection)
            ram, bitmap = descriptors.ram, descriptors.bitmap
            attempt("map the bitmap", lambda: mmap.mmap(bitmap, 64))
            attempt("write the bitmap", lambda: os.write(bitmap, bytes(8)))
            attempt("cut the bitmap", lambda: os.ftruncate(bitmap, 0))
            attempt("cut RAM", lambda: os.ftruncate(ram, PAGE))
            attempt("extend RAM", lambda: os.ftruncate(ram, 2 * MEMORY))
            for fd in (ram, bitmap):
                for seal in (fcntl.F_SEAL_SEAL, fcntl.F_SEAL_WRITE, 0x10):  # F_SEAL_FUTURE_WRITE
                    attempt(f"seal {seal:#x}", lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal))  # noqa: B023
            attempt("map RAM", lambda: mmap.mmap(ram, MEMORY).close())
            with socket.socket(fileno=descriptors.notifier) as notifier:
                descriptors.notifier = -1
                descriptors.close()
                assert ask(notifier, terms).kind is Kind.BYE

    with Listener(str(socket_path)) as listener:
        thread = threading.Thread(target=body)
        thread.start()
        with bound(socket_path):
            pass
        thread.join()
    assert done == ["map RAM"]
