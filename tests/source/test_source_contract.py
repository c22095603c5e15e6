"""What holds of every source, whatever it is made of: `PageSource` says so, and this goes by its words.

A new source is one line here. The fake that other tests use has to keep the same rules.
"""

import contextlib
import itertools
import random
import threading

import numpy as np
import pytest
from fakes import FakeSource

import kvmdp.source.image
import kvmdp.source.network
from kvmdp.page import PAGE_SIZE
from kvmdp.source.base import read_pages
from kvmdp.source.image import ImageSource
from kvmdp.source.network import NetworkSource
from kvmdp.source.patched import PatchedSource
from kvmdp.source.request import FetchRequest
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.source.without_hole import WithoutHole

PAGES = 64
SIZE = PAGES * PAGE_SIZE
SEED = 12


def image(folder, size=SIZE):
    """A file with a hole, and an end in the middle of a page."""
    path = folder / "image"
    with open(path, "wb") as file:
        file.write(random.Random(SEED).randbytes(20 * PAGE_SIZE))
        file.truncate(40 * PAGE_SIZE)
        file.seek(40 * PAGE_SIZE)
        file.write(random.Random(SEED).randbytes(size - 40 * PAGE_SIZE - 100))
    return ImageSource(path)


SOURCES = {
    "synthetic": lambda _: SyntheticSource(SIZE, SEED),
    "image": image,
    "network": lambda folder: NetworkSource(image(folder), latency=1e-5, bandwidth=1e9),
    "patched": lambda _: PatchedSource(
        SyntheticSource(SIZE, SEED), [(PAGE_SIZE - 3, b"patched"), (9000, b"!")]
    ),
    "patched hole": lambda folder: PatchedSource(image(folder), [(30 * PAGE_SIZE, b"in a hole")]),
    "without a hole": lambda folder: WithoutHole(image(folder), 8 * PAGE_SIZE, 16 * PAGE_SIZE),
    "fake": lambda _: FakeSource(PAGES, [(0, 3), (10, 54)]),
}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    with contextlib.closing(SOURCES[request.param](tmp_path)) as source:
        yield source


def filled(source, offset, length):
    """The bytes that `fill` writes, over others."""
    destination = bytearray(b"\xa5" * length)
    source.fetch(FetchRequest(offset), memoryview(destination))
    return bytes(destination)


def page_by_page(source):
    """The bytes of each page that the source has, by its number."""
    return {
        page: filled(source, page * PAGE_SIZE, PAGE_SIZE)
        for offset, length in source.extents()
        for page in range(offset // PAGE_SIZE, (offset + length) // PAGE_SIZE)
    }


def test_it_has_a_name_and_a_size(source):
    assert isinstance(source.name, str)
    assert source.name
    assert source.size > 0


def test_extents_are_whole_pages_in_order_that_do_not_touch(source):
    extents = source.extents()
    assert extents
    assert all(offset % PAGE_SIZE == length % PAGE_SIZE == 0 < length for offset, length in extents)
    assert all(end < start for (end, start) in ((a + n, b) for (a, n), (b, _) in itertools.pairwise(extents)))
    assert extents[0][0] >= 0
    # The last page may be one that the file ends in.
    assert sum(extents[-1]) <= -(-source.size // PAGE_SIZE) * PAGE_SIZE


def test_a_run_is_its_pages_and_each_byte_is_written(source):
    pages = page_by_page(source)
    for offset, length in source.extents():
        first, count = offset // PAGE_SIZE, length // PAGE_SIZE
        assert filled(source, offset, length) == b"".join(pages[first + each] for each in range(count))


@pytest.mark.parametrize("piece", [1, 3, 8])
def test_what_it_says_has_landed_is_final(source, piece, monkeypatch):
    monkeypatch.setattr(kvmdp.source.image, "_PIECE", piece * PAGE_SIZE)
    monkeypatch.setattr(kvmdp.source.network, "_PIECE", piece * PAGE_SIZE)
    if isinstance(source, FakeSource):
        source.pieces = piece
    pages = page_by_page(source)
    for offset, length in source.extents():
        first, destination, told = offset // PAGE_SIZE, bytearray(b"\xa5" * length), [0]
        wanted = b"".join(pages[first + each] for each in range(length // PAGE_SIZE))

        def landed(done, destination=destination, told=told, wanted=wanted):
            assert done % PAGE_SIZE == 0
            assert told[-1] < done <= len(destination)
            assert destination[told[-1] : done] == wanted[told[-1] : done]
            destination[told[-1] : done] = b"\xee" * (done - told[-1])  # the guest goes on with it
            told.append(done)

        source.fetch(FetchRequest(offset, on_landed=landed), memoryview(destination))
        assert destination == b"\xee" * told[-1] + wanted[told[-1] :]


def test_the_same_page_has_the_same_bytes_each_time(source):
    assert page_by_page(source) == page_by_page(source)


def test_what_is_no_whole_page_inside_is_refused(source):
    end = -(-source.size // PAGE_SIZE) * PAGE_SIZE
    for offset, length in ((1, PAGE_SIZE), (0, 100), (-PAGE_SIZE, PAGE_SIZE), (end, PAGE_SIZE), (0, 0)):
        with pytest.raises(ValueError, match="not whole 4096-byte pages"):
            source.fetch(FetchRequest(offset), memoryview(bytearray(length)))


def test_pages_are_rows_and_holes_are_zeros(source):
    pages = page_by_page(source)
    rows = read_pages(source, np.arange(PAGES))
    assert all(rows[page].tobytes() == pages.get(page, bytes(PAGE_SIZE)) for page in range(PAGES))


def test_threads_that_fill_at_the_same_time_get_what_one_gets(source):
    pages, wrong = page_by_page(source), []

    def read(seed):
        numbers = sorted(pages)
        random.Random(seed).shuffle(numbers)
        for number in numbers:
            if filled(source, number * PAGE_SIZE, PAGE_SIZE) != pages[number]:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_closing_it_again_does_nothing(source):
    source.close()
    source.close()
