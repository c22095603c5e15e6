"""A source at the far end of a network: what it delivers, piece by piece, and that it can be called off."""

import time

import pytest
from fakes import PAGES, FakeSource, content, pager_of, started

from kvmdp.page import PAGE_SIZE, Outcome, PageFault
from kvmdp.source.base import SourceError
from kvmdp.source.network import NetworkSource, parse_bandwidth, parse_latency
from kvmdp.source.request import FetchCancel, FetchRequest

LONG = 20  # seconds that nothing here takes
FOR_EVER = 30.0  # seconds of latency: who waits for them waits too long
PIECE = 16  # pages


def bytes_of(first, count):
    return b"".join(map(content, range(first, first + count)))


@pytest.mark.parametrize(("latency", "bandwidth"), [(0.0, 0.0), (1e-4, 0.0), (1e-4, 1e9), (0.0, 1e8)])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 100])
def test_each_piece_has_its_bytes_when_it_is_told_of_and_all_are_there_in_the_end(latency, bandwidth, count):
    source = NetworkSource(FakeSource(PAGES), latency, bandwidth)
    pages, told = bytearray(b"\xa5" * (count * PAGE_SIZE)), []

    def landed(length):
        assert pages[:length] == bytes_of(3, length // PAGE_SIZE)
        told.append(length // PAGE_SIZE)

    source.fetch(FetchRequest(3 * PAGE_SIZE, on_landed=landed), memoryview(pages))
    assert pages == bytes_of(3, count)
    assert told == list(range(PIECE, count, PIECE))


def test_it_tells_of_no_pieces_that_nobody_wants():
    inner = FakeSource(PAGES)
    inner.pieces = 1
    pages = bytearray(40 * PAGE_SIZE)
    NetworkSource(inner, 0.0).fetch(FetchRequest(0), memoryview(pages))
    assert pages == bytes_of(0, 40)


def test_pieces_of_the_inner_source_are_not_there_before_the_network_has_delivered_them():
    inner, told = FakeSource(PAGES), []
    inner.pieces = 1
    pages = bytearray(20 * PAGE_SIZE)
    NetworkSource(inner, 0.0).fetch(FetchRequest(0, on_landed=told.append), memoryview(pages))
    assert told == [PIECE * PAGE_SIZE]


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("set_before", [False, True])
def test_a_fetch_that_takes_long_ends_when_it_is_called_off(count, set_before):
    source, cancel, errors = NetworkSource(FakeSource(PAGES), FOR_EVER), FetchCancel(), []

    def fetch():
        request = FetchRequest(PAGE_SIZE, cancel=cancel, on_landed=told.append)
        try:
            source.fetch(request, memoryview(bytearray(count * PAGE_SIZE)))
        except SourceError as error:
            errors.append(error)

    told = []
    if set_before:
        cancel.set()
    threads = [started(fetch) for _ in range(3)]
    cancel.set()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    assert [(each.offset, each.transient, each.reason) for each in errors] == [
        (PAGE_SIZE, False, "the fetch was called off")
    ] * 3
    assert told == []


def test_a_fetch_that_is_called_off_on_its_way_keeps_what_has_landed():
    source = NetworkSource(FakeSource(PAGES), 0.0, 10 * PIECE * PAGE_SIZE)  # 0.1 s for each piece
    cancel, told, pages = FetchCancel(), [], bytearray(4 * PIECE * PAGE_SIZE)

    def landed(length):
        assert pages[:length] == bytes_of(0, length // PAGE_SIZE)
        told.append(length // PAGE_SIZE)
        cancel.set()

    with pytest.raises(SourceError, match="called off"):
        source.fetch(FetchRequest(0, cancel=cancel, on_landed=landed), memoryview(pages))
    assert told == [PIECE]


@pytest.mark.parametrize("around", [1, 64])
def test_a_machine_that_stops_does_not_wait_for_the_network(around):
    with pager_of(fault_around=around) as pager:
        pager.contents.source, ends = NetworkSource(pager.source, FOR_EVER), []
        threads = [
            started(lambda page=page: ends.append(pager.resolve(PageFault(page)))) for page in (0, 0, 100)
        ]
        marker = started(lambda: ends.append(pager.mark_present(200, 100)))
        deadline = time.monotonic() + LONG
        while pager.counters.claims < 2 or pager.counters.waits < 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        pager.cancel()
        for thread in (*threads, marker):
            thread.join(LONG)
            assert not thread.is_alive()
        assert ends == [Outcome.CANCELLED] * 4
        assert pager.bitmap.count() == 0
        assert pager.ledger.claims == []
        assert pager.error is pager.paused is None


def test_more_fetches_are_worth_their_while_than_of_the_inner_source():
    few, many = FakeSource(PAGES), FakeSource(PAGES)
    many.concurrency = 1000
    assert NetworkSource(few, 0.0).concurrency > few.concurrency
    assert NetworkSource(many, 0.0).concurrency == 1000


def test_what_the_inner_source_says_is_passed_on():
    source = NetworkSource(FakeSource(PAGES, [(3, 5)]), 0.0)
    assert (source.name, source.size) == ("the fake source", PAGES * PAGE_SIZE)
    assert source.extents() == [(3 * PAGE_SIZE, 5 * PAGE_SIZE)]
    for negative in ((-1e-9, 0.0), (0.0, -1.0)):
        with pytest.raises(ValueError, match="cannot be negative"):
            NetworkSource(FakeSource(PAGES), *negative)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30us", 3e-5), ("0.5ms", 5e-4), ("7ns", 7e-9), ("2s", 2.0), ("0", 0.0), (" 0 ", 0.0)],
)
def test_latencies(text, seconds):
    assert parse_latency(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "bytes_a_second"),
    [("10Gbit", 1.25e9), ("1Mbit", 125e3), ("8Kbit", 1000), ("80bit", 10), ("1tbit", 125e9), ("0", 0)],
)
def test_bandwidths(text, bytes_a_second):
    assert parse_bandwidth(text) == pytest.approx(bytes_a_second)


@pytest.mark.parametrize("text", ["", "30", "us", "-1ms", "1e3ms", "1 ms", "nan", "1min"])
def test_what_is_no_latency_is_said(text):
    with pytest.raises(ValueError, match="is not a latency: give a number with ns, us, ms or s"):
        parse_latency(text)


@pytest.mark.parametrize("text", ["", "10", "bit", "-1Gbit", "10Gbyte", "1 Gbit"])
def test_what_is_no_bandwidth_is_said(text):
    with pytest.raises(ValueError, match="is not a bandwidth: give a number with Kbit, Mbit, Gbit or Tbit"):
        parse_bandwidth(text)
