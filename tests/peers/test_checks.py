"""Every check of the wire fires: each `raise` in `kvmdp/peers/wire` is met by a message, a descriptor or a path."""

import ast
import contextlib
import errno
import fcntl
import inspect
import os
import socket
import struct
import threading
import traceback
from pathlib import Path

import pytest

from kvmdp.page import Access, Origin, Outcome
from kvmdp.peers.wire import endpoint, handover, offer, records
from kvmdp.peers.wire.endpoint import EndpointError, Listener, Peer, connect
from kvmdp.peers.wire.handover import Handover, HandoverError, Role
from kvmdp.peers.wire.offer import OfferError
from kvmdp.peers.wire.records import Kind, Record, RecordError, unpack

PAGE = 4096
EPOCH = 7


def record(offset=0, value=b"", kind=Kind.FAULT, size=PAGE, gpa=0):
    """A record with some of its bytes changed."""
    message = bytearray(Record(kind, 1, gpa, size).pack(EPOCH))
    message[offset : offset + len(value)] = value
    return bytes(message)


def u32(value):
    return struct.pack("<I", value)


RECORDS = {
    "half": (record()[:32], "a message of 32 bytes, where a record has 64"),
    "nothing": (b"", "a message of 0 bytes"),
    "too long": (record() + b"x", "a message of 65 bytes"),
    "a version": (record(0, b"\2"), "a record of version 2, where version 1 is spoken"),
    "an epoch": (record(4, u32(8)), "a record of session 8, where this is session 7"),
    "no kind": (record(2, b"\0"), "a field out of its range: 0 is not a valid Kind"),
    "a kind": (record(2, b"\x0b"), "11 is not a valid Kind"),
    "an access": (record(32, u32(4)), "4 is not a valid Access"),
    "an origin": (record(36, u32(3)), "3 is not a valid Origin"),
    "an outcome": (record(44, u32(7)), "7 is not a valid Outcome"),
    "an outcome of callers": (record(44, u32(6)), "outcome TIMED_OUT, which no peer is told"),
    "a gpa": (record(gpa=100), "a FAULT of 4096 bytes at gpa 0x64, which are not whole pages"),
    "a size": (record(size=100), "a FAULT of 100 bytes at gpa 0x0, which are not whole pages"),
    "no size": (record(size=0), "a FAULT of 0 bytes"),
    "no range": (record(kind=Kind.INVALIDATE, size=0), "a INVALIDATE of 0 bytes"),
    # Each bit of what is reserved, for a field that nobody looks at cannot be given a meaning later.
    **{
        f"bit {bit}": (record(48 + bit // 8, bytes([1 << bit % 8])), "a record with reserved bits set")
        for bit in range(128)
    },
}


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_no_record(name):
    message, sentence = RECORDS[name]
    with pytest.raises(RecordError, match=sentence):
        unpack(message, EPOCH)


@pytest.mark.parametrize("kind", Kind)
def test_what_is_one(kind):
    sent = Record(kind, 3, 2 * PAGE, PAGE, Access.WRITE, Origin.VCPU, 5, Outcome.FROZEN)
    assert unpack(sent.pack(EPOCH), EPOCH) == sent


TERMS = Handover(EPOCH, Role.DEVICE, 64, 512, ((0, 512 * PAGE, 0),))


def terms(offset=0, value=b"", given=TERMS):
    """The message of a hand-over with some of its bytes changed."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        handover.send(here, given, handover.Descriptors(0, 0, 0))
        message = bytearray(there.recv(65536))
    message[offset : offset + len(value)] = value
    return bytes(message)


def regions(*all_of_them, pages=512):
    return terms(given=Handover(EPOCH, Role.DEVICE, 64, pages, all_of_them))


HANDOVERS = {
    "nothing": (b"", "the connection was closed before the hand-over"),
    "short": (terms()[:39], "a message of 39 bytes, which is no hand-over"),
    "magic": (terms(0, b"X"), "does not begin as a hand-over does"),
    "version": (terms(8, u32(2)), "of version 2, where version 1 is spoken"),
    "cut": (terms()[:-1], "of 63 bytes that announces 1 regions"),
    "more regions": (terms(36, u32(2)), "that announces 2 regions"),
    "65 regions": (
        regions(*((PAGE * each, PAGE, PAGE * each) for each in range(65)), pages=65),
        "that announces 65 regions",
    ),
    "page size": (terms(32, u32(0)), "with pages of 0 bytes, where they have 4096"),
    "region's gpa": (regions((1, 512 * PAGE, 0)), "region at gpa 0x1 is not whole pages in file order"),
    "region's size": (regions((0, 512 * PAGE + 1, 0)), "is not whole pages in file order"),
    "region's offset": (regions((0, 512 * PAGE, PAGE)), "is not whole pages in file order"),
    "an empty region": (regions((0, 0, 0)), "is not whole pages in file order"),
    "fewer pages": (regions((0, 511 * PAGE, 0)), "of 512 pages, with regions of 2093056 bytes"),
    "no pages": (regions(pages=0), "of 0 pages, with regions of 0 bytes"),
    "no credits": (terms(20, u32(0)), "a hand-over without credits"),
    "role": (terms(16, u32(3)), "for role 3, which there is none of"),
}


def hand_over(message, ram=None, notifier=None, count=3):
    """Send a message with three descriptors, good ones if they are not given, and receive it."""
    with contextlib.ExitStack() as stack:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(here)
        stack.enter_context(there)
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(one)
        stack.enter_context(other)
        ram = memory(stack) if ram is None else ram
        given = [ram, ram, one.fileno() if notifier is None else notifier, *range(3)][:count]
        if message:
            socket.send_fds(here, [message], given)
        here.close()
        received, descriptors = handover.receive(there)
        descriptors.close()
        return received


def memory(stack, pages=512, seals=2):
    """A memory file, sealed against shrinking."""
    ram = os.memfd_create("ram", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    stack.callback(os.close, ram)
    os.ftruncate(ram, pages * PAGE)
    fcntl.fcntl(ram, fcntl.F_ADD_SEALS, seals)
    return ram


def test_what_is_a_hand_over():
    assert hand_over(terms()) == TERMS


@pytest.mark.parametrize("name", HANDOVERS)
def test_what_is_no_hand_over(name):
    message, sentence = HANDOVERS[name]
    with pytest.raises(HandoverError, match=sentence):
        hand_over(message)


def with_ram(**options):
    with contextlib.ExitStack() as stack:
        hand_over(terms(), ram=memory(stack, **options))


def with_notifier(kind):
    here, there = socket.socketpair(socket.AF_UNIX, kind)
    with here, there:
        hand_over(terms(), notifier=here.fileno())


DESCRIPTORS = {
    "too few": (lambda: hand_over(terms(), count=2), "with 2 descriptors, where 3 belong to it"),
    "too many": (lambda: hand_over(terms(), count=4), "with 4 descriptors"),
    "RAM that can be cut": (lambda: with_ram(seals=4), "is not sealed against shrinking"),
    "RAM that is no file": (lambda: hand_over(terms(), ram=0), "is not sealed against shrinking"),
    "RAM that is short": (lambda: with_ram(pages=511), "a RAM file with less than 2097152 bytes"),
    "a notifier that is a file": (lambda: hand_over(terms(), notifier=0), "a notifier that is no socket"),
    "a DGRAM notifier": (lambda: with_notifier(socket.SOCK_DGRAM), "is no Unix SEQPACKET socket"),
    "a STREAM notifier": (lambda: with_notifier(socket.SOCK_STREAM), "is no Unix SEQPACKET socket"),
}


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_descriptors_that_are_not_what_they_should_be(name):
    attempt, sentence = DESCRIPTORS[name]
    with pytest.raises(HandoverError, match=sentence):
        attempt()


def an_offer(offset=0, value=b"", size=PAGE):
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        offer.send(here, offer.Offer(size, None))
        message = bytearray(there.recv(100))
    message[offset : offset + len(value)] = value
    return bytes(message)


def take_offer(message):
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        if message:
            here.send(message)
        here.close()
        return offer.receive(there)


OFFERS = {
    "nothing": (b"", "the connection was closed before the offer"),
    "short": (an_offer()[:-1], "a message of 31 bytes, which is no offer"),
    "long": (an_offer() + b"x", "a message of 33 bytes, which is no offer"),
    "magic": (an_offer(0, b"X"), "does not begin as an offer does"),
    "version": (an_offer(8, u32(2)), "an offer of version 2, where version 1 is spoken"),
    "reserved": (an_offer(12, u32(1)), "an offer with 0x1 in a field that is reserved"),
    "no image": (an_offer(size=0), "an offer of 0 bytes, which are not whole pages"),
    "half a page": (an_offer(size=2048), "an offer of 2048 bytes"),
    "hole": (an_offer(24, (2048).to_bytes(8, "little")), "a hole at 0x800, which is not where a page begins"),
}


def test_what_is_an_offer():
    assert take_offer(an_offer(size=5 * PAGE)) == offer.Offer(5 * PAGE, None)


@pytest.mark.parametrize("name", OFFERS)
def test_what_is_no_offer(name):
    message, sentence = OFFERS[name]
    with pytest.raises(OfferError, match=sentence):
        take_offer(message)


# Paths and processes


def at_a_full_queue(folder):
    with Listener(f"{folder}/full") as listener, contextlib.ExitStack() as stack:
        listener.socket.listen(0)
        stack.enter_context(connect(listener.path))
        connect(listener.path)


def beside_a_listener(folder, kind=socket.SOCK_SEQPACKET):
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(f"{folder}/taken")
        if kind != socket.SOCK_DGRAM:
            other.listen()
        Listener(f"{folder}/taken")


def at_a_socket_of_another_type(folder):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(f"{folder}/stream")
        other.listen()
        connect(f"{folder}/stream")


def at_a_file(folder, what):
    (folder / "file").touch()
    what(f"{folder}/file")


def behind_a_file(folder, what):
    (folder / "file").touch()
    what(f"{folder}/file/socket")


ENDPOINTS = {
    "no socket": (lambda folder: connect(f"{folder}/none"), "there is no socket"),
    "a file": (lambda folder: at_a_file(folder, connect), "is not a socket: name the one"),
    "a folder that is a file": (lambda folder: behind_a_file(folder, connect), "cannot look at"),
    "a full queue": (at_a_full_queue, "too many others wait there already"),
    "another type": (at_a_socket_of_another_type, "a socket of another type"),
    "a long path": (lambda folder: connect("x" * 108), "a socket path has 1 to 107 bytes, this one has 108"),
    "to listen at a file": (lambda folder: at_a_file(folder, Listener), "is not a socket: name another path"),
    "to listen in a file": (lambda folder: behind_a_file(folder, Listener), "cannot look at"),
    "to listen in no folder": (lambda folder: Listener(f"{folder}/none/socket"), "cannot listen at"),
    "to listen beside another": (beside_a_listener, "a process listens at"),
    "to listen beside another type": (
        lambda folder: beside_a_listener(folder, socket.SOCK_STREAM),
        f"is there already ({os.strerror(errno.EPROTOTYPE)})",
    ),
}
# What takes another user or another PID namespace: tests/failure/test_other_users.py, test_peer_identity.py.
ELSEWHERE = {
    "is in another PID namespace",
    "belongs to user",
    "run both sides as the same user",
    "has ended before its session began",
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(endpoint, "_CROWDED_SECONDS", 0.02)


@pytest.mark.parametrize("name", ENDPOINTS)
def test_paths_at_which_nobody_can_be_met(name, tmp_path):
    attempt, sentence = ENDPOINTS[name]
    with pytest.raises(EndpointError) as error:
        attempt(tmp_path)
    assert sentence in str(error.value)


def test_a_listener_whose_queue_is_full_is_met_at_once(tmp_path):
    errors = []

    def listen_there_too(path):
        try:
            Listener(path)
        except EndpointError as error:
            errors.append(str(error))

    with Listener(f"{tmp_path}/full") as listener:
        listener.socket.listen(0)
        thread = threading.Thread(target=listen_there_too, args=(listener.path,))
        with connect(listener.path):
            thread.start()
            thread.join(10)
            waited = thread.is_alive()
            listener.accept(10).close()
            thread.join()
    assert not waited
    assert len(errors) == 1
    assert "a process listens at" in errors[0]


def test_a_full_queue_is_waited_for_a_little(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "_CROWDED_SECONDS", 20)
    with Listener(f"{tmp_path}/full") as listener:
        listener.socket.listen(0)
        with connect(listener.path):
            monkeypatch.setattr(endpoint.time, "sleep", lambda _: listener.accept(20).close())
            connect(listener.path).close()


def test_this_process_is_a_peer():
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, contextlib.closing(Peer.of(here)) as peer:
        assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())
        assert not peer.wait_dead(0)


# All of them


def raised(attempt):
    """Where the error of `attempt` was raised: (file, line)."""
    try:
        attempt()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Path(frame.filename).name, frame.lineno
    return None


def raises_of(module):
    """The lines of each `raise` with a new error in a module, and its text: {(file, line): text}."""
    path = Path(inspect.getsourcefile(module))
    source = path.read_text()
    return {
        (path.name, line): ast.get_source_segment(source, node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        for line in range(node.lineno, node.end_lineno + 1)
    }


def test_no_check_is_left_out(tmp_path):
    attempts = [lambda each=each: unpack(each[0], EPOCH) for each in RECORDS.values()]
    attempts += [lambda each=each: hand_over(each[0]) for each in HANDOVERS.values()]
    attempts += [each[0] for each in DESCRIPTORS.values()]
    attempts += [lambda each=each: take_offer(each[0]) for each in OFFERS.values()]
    for number, each in enumerate(ENDPOINTS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        attempts.append(lambda each=each, folder=folder: each[0](folder))
    met = {raised(attempt) for attempt in attempts}
    checks = {
        where: text
        for module in (records, handover, offer, endpoint)
        for where, text in raises_of(module).items()
    }
    hit = {checks[where] for where in met if where in checks}
    left_out = {text for text in checks.values() if not any(known in text for known in ELSEWHERE)} - hit
    assert left_out == set()
    assert len(hit) > 30
