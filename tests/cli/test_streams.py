"""stderr that takes nothing costs what was to be said; stdout that takes nothing is an error once all is written."""

import errno
import os
import threading

import deaf
import pytest

from kvmdp.cli import streams
from kvmdp.cli.streams import Diagnostics, Results


@pytest.fixture
def pipe():
    made = deaf.Pipe()
    yield made
    made.close()


@pytest.fixture
def full():
    with deaf.full() as descriptor:
        yield descriptor


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(streams, "_PATIENCE_SECONDS", 0.05)


def test_diagnostics_are_written_at_once_and_whole(pipe):
    stream = Diagnostics(pipe.writer, "utf-8")
    texts = [f"{number} {'x' * 100}" for number in range(50)]
    threads = [threading.Thread(target=stream.write, args=(f"{text}\n",)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(pipe.drain().splitlines()) == sorted(texts)


def test_a_diagnostic_longer_than_a_pipe_takes_at_once_arrives(pipe):
    text = "0123456789" * 4000 + "\n"  # of the pipe's 64 KiB
    assert Diagnostics(pipe.writer, "utf-8").write(text) == len(text)
    assert pipe.drain() == text


def test_characters_that_the_encoding_lacks_are_escaped(pipe):
    Diagnostics(pipe.writer, "ascii").write("░ \udcff\n")
    assert pipe.drain() == "\\u2591 \\udcff\n"


def test_a_stderr_that_cannot_be_written_costs_what_was_said(full, pipe):
    closed = os.dup(full)
    os.close(closed)
    pipe.close_reader()
    for descriptor in (full, closed, pipe.writer):
        stream = Diagnostics(descriptor, "utf-8")
        print("a line", file=stream, flush=True)
        stream.close()


def test_what_was_lost_is_counted_and_said_when_there_is_room_again(pipe):
    stream = Diagnostics(pipe.writer, "utf-8")
    pipe.fill()
    for number in range(3):
        stream.write(f"lost {number}\n")
    assert "lost" not in pipe.drain()
    stream.write("got through\n")
    stream.write("and this\n")
    assert pipe.drain() == (
        "3 lines could not be written here: its reader took nothing\ngot through\nand this\n"
    )


def test_a_reader_that_takes_nothing_is_waited_for_once(pipe, monkeypatch):
    waits = []
    has_room = streams._has_room

    def watched(descriptor, timeout):
        waits.append(timeout)
        return has_room(descriptor, timeout)

    monkeypatch.setattr(streams, "_has_room", watched)
    pipe.fill()
    stream = Diagnostics(pipe.writer, "utf-8")
    for _ in range(3):
        stream.write("a line\n")
    assert waits == [0.05, 0, 0]


def test_a_reader_that_is_slow_loses_nothing(pipe, monkeypatch):
    monkeypatch.setattr(streams, "_PATIENCE_SECONDS", 60)
    pipe.fill()
    thread = threading.Thread(target=Diagnostics(pipe.writer, "utf-8").write, args=("a line\n",))
    thread.start()
    while "a line" not in pipe.drain():
        pass
    thread.join()


def test_a_signal_handler_may_speak_in_the_middle_of_what_is_said(pipe, monkeypatch):
    stream = Diagnostics(pipe.writer, "utf-8")
    has_room = streams._has_room
    told = []

    def interrupted(descriptor, timeout):
        if not told:
            told.append(True)
            stream.write("by the handler\n")
        return has_room(descriptor, timeout)

    monkeypatch.setattr(streams, "_has_room", interrupted)
    stream.write("by the main thread\n")
    assert pipe.drain() == "by the handler\nby the main thread\n"


def test_results_are_written_when_they_are_flushed(pipe):
    stream = Results(pipe.writer, "utf-8")
    print("a result", file=stream)
    assert pipe.drain() == ""
    stream.flush()
    assert pipe.drain() == "a result\n"


def test_printing_a_result_never_fails_and_flushing_says_once_that_it_did(full, pipe):
    pipe.close_reader()
    for descriptor, number in ((full, errno.ENOSPC), (pipe.writer, errno.EPIPE)):
        stream = Results(descriptor, "utf-8")
        print("x" * 1_000_000, file=stream)
        print("more", file=stream)
        with pytest.raises(OSError, match=os.strerror(number)):
            stream.flush()
        print("more", file=stream)
        stream.flush()
        stream.close()


def test_results_wait_for_their_reader_also_where_the_pipe_does_not(pipe):
    os.set_blocking(pipe.writer, False)
    text = "0123456789" * 100_000
    stream = Results(pipe.writer, "utf-8")
    thread = threading.Thread(target=lambda: (stream.write(text), stream.flush()))
    thread.start()
    while len(pipe.drain()) < len(text):
        pass
    thread.join()
    assert pipe.text == text


def test_results_in_characters_that_the_encoding_lacks_are_escaped(pipe):
    stream = Results(pipe.writer, "ascii")
    stream.write("\udcff░")
    stream.flush()
    assert pipe.drain() == "\\udcff\\u2591"
