"""What a source is asked with: a request tells of pieces, has a rest, and can be called off."""

import threading

import pytest
from fakes import in_threads, started

from kvmdp.page import PAGE_SIZE, PageFault
from kvmdp.source.base import SourceError, fetch
from kvmdp.source.request import NEVER, FetchCancel, FetchRequest, Urgency

LONG = 30  # seconds that nothing here takes


def test_a_request_says_where_for_whom_and_how_urgently():
    plain = FetchRequest(3 * PAGE_SIZE)
    assert (plain.offset, plain.fault, plain.urgency) == (3 * PAGE_SIZE, None, Urgency.DEMAND)
    assert plain.cancel is NEVER
    assert not NEVER.is_set
    assert Urgency.DEMAND < Urgency.BACKGROUND


def test_pieces_are_passed_on():
    told = []
    request = FetchRequest(0, on_landed=told.append)
    for length in (PAGE_SIZE, 3 * PAGE_SIZE):
        request.landed(length)
        assert request.done == length
    assert told == [PAGE_SIZE, 3 * PAGE_SIZE]


def test_a_request_that_nobody_wants_pieces_of_has_no_rest_but_all():
    request = FetchRequest(PAGE_SIZE)
    request.landed(PAGE_SIZE)
    assert request.done == 0
    assert request.rest() is request


def test_the_rest_is_what_has_not_landed_and_tells_of_pieces_of_the_whole():
    told, cancel, fault = [], FetchCancel(), PageFault(7)
    request = FetchRequest(PAGE_SIZE, fault, cancel, Urgency.BACKGROUND, told.append)
    whole = request.rest()
    assert (whole.offset, whole.done) == (PAGE_SIZE, 0)
    request.landed(2 * PAGE_SIZE)
    rest = request.rest()
    assert (rest.offset, rest.done) == (3 * PAGE_SIZE, 0)
    assert rest.fault is fault
    assert rest.cancel is cancel
    assert rest.urgency is Urgency.BACKGROUND
    rest.landed(PAGE_SIZE)
    last = rest.rest()
    assert last.offset == 4 * PAGE_SIZE
    last.landed(5 * PAGE_SIZE)
    assert told == [2 * PAGE_SIZE, 3 * PAGE_SIZE, 8 * PAGE_SIZE]


def test_a_part_is_another_place_and_tells_of_nothing():
    told, cancel, fault = [], FetchCancel(), PageFault(7)
    request = FetchRequest(PAGE_SIZE, fault, cancel, Urgency.BACKGROUND, told.append)
    part = request.part(9 * PAGE_SIZE)
    part.landed(PAGE_SIZE)
    assert told == []
    assert request.done == 0
    assert (part.offset, part.fault, part.urgency) == (9 * PAGE_SIZE, fault, Urgency.BACKGROUND)
    assert part.cancel is cancel


class Broken:
    """A source that breaks after each piece of two pages, `failures` times."""

    name, size, concurrency = "the broken source", 64 * PAGE_SIZE, 1

    def __init__(self, failures, lands=True):
        self.asked = []
        self._failures, self._lands = failures, lands

    def fetch(self, request, destination):
        self.asked.append((request.offset // PAGE_SIZE, len(destination) // PAGE_SIZE))
        piece = min(2 * PAGE_SIZE, len(destination))
        destination[:piece] = bytes((len(self.asked),)) * piece
        if self._lands:
            request.landed(piece)
        if len(self.asked) <= self._failures:
            destination[piece:] = b"\xa5" * (len(destination) - piece)
            raise SourceError(self.name, request.offset, len(destination), "again", transient=True)
        destination[piece:] = bytes((len(self.asked),)) * (len(destination) - piece)


@pytest.mark.parametrize("wanted", [True, False])
def test_what_has_landed_is_not_fetched_again(wanted):
    source, told, pages = Broken(2), [], bytearray(8 * PAGE_SIZE)
    fetch(source, FetchRequest(PAGE_SIZE, on_landed=told.append if wanted else None), memoryview(pages))
    if wanted:
        assert source.asked == [(1, 8), (3, 6), (5, 4)]
        assert told == [2 * PAGE_SIZE, 4 * PAGE_SIZE, 6 * PAGE_SIZE]
        assert pages[::PAGE_SIZE] == bytes((1, 1, 2, 2, 3, 3, 3, 3))
    else:
        assert source.asked == [(1, 8)] * 3
        assert told == []
        assert pages == b"\3" * len(pages)


def test_a_source_that_has_told_of_nothing_is_asked_for_all_again():
    source, told, pages = Broken(1, lands=False), [], bytearray(8 * PAGE_SIZE)
    fetch(source, FetchRequest(PAGE_SIZE, on_landed=told.append), memoryview(pages))
    assert source.asked == [(1, 8)] * 2
    assert pages == b"\2" * len(pages)


# Calling off


def test_a_sleep_ends_by_itself_or_when_it_is_called_off():
    cancel, ends = FetchCancel(), []
    assert cancel.sleep(0)
    assert cancel.sleep(0.001)
    threads = [started(lambda: ends.append(cancel.sleep(10 * LONG))) for _ in range(4)]
    cancel.set()
    for thread in threads:
        thread.join(LONG)
    assert ends == [False] * 4
    assert cancel.is_set
    assert not cancel.sleep(10 * LONG)  # for good


def test_wakers_are_called_once_and_only_during_their_block():
    cancel, calls = FetchCancel(), []
    with cancel.waking(lambda: calls.append("early")):
        pass
    with cancel.waking(lambda: calls.append("a")), cancel.waking(lambda: calls.append("b")):
        assert calls == []
        cancel.set()
        assert sorted(calls) == ["a", "b"]
        cancel.set()
        with cancel.waking(lambda: calls.append("late")):
            assert calls[-1] == "late"
    assert len(calls) == 3


def test_a_block_that_raises_leaves_no_waker():
    cancel, calls = FetchCancel(), []
    with pytest.raises(RuntimeError), cancel.waking(lambda: calls.append("a")):
        raise RuntimeError("a bug")
    cancel.set()
    assert calls == []


def test_the_same_waker_may_wait_twice():
    cancel, calls = FetchCancel(), []

    def wake():
        calls.append(1)

    with cancel.waking(wake):
        with cancel.waking(wake):
            pass
        cancel.set()
    assert calls == [1]


def test_each_of_many_sleepers_is_woken_whenever_it_begins():
    for _ in range(50):
        cancel, begun, ends = FetchCancel(), threading.Barrier(6), []

        def sleep(cancel=cancel, begun=begun, ends=ends):
            begun.wait(LONG)
            ends.append(cancel.sleep(10 * LONG))

        def call_off(cancel=cancel, begun=begun):
            begun.wait(LONG)
            cancel.set()

        in_threads(call_off, *[sleep] * 5)
        assert ends == [False] * 5
