import random

import numpy as np
import pytest

from kvmdp.source.base import SourceError, read_pages
from kvmdp.source.patched import PatchedSource
from kvmdp.source.request import FetchRequest

PAGE = 4096


class SparseSource:
    """Data in some pages only; asking it for anything else fails the test."""

    name = "sparse"

    def __init__(self, pages, data_pages):
        self.size = pages * PAGE
        self.image = bytearray(self.size)
        self.data_pages = set(data_pages)
        self.closed = False
        for page in data_pages:
            self.image[page * PAGE : (page + 1) * PAGE] = bytes([page % 250 + 1]) * PAGE

    def fetch(self, request, destination):
        offset = request.offset
        assert offset % PAGE == 0
        assert len(destination) % PAGE == 0
        assert len(destination) > 0
        assert set(range(offset // PAGE, (offset + len(destination)) // PAGE)) <= self.data_pages
        destination[:] = self.image[offset : offset + len(destination)]

    def extents(self):
        extents = []
        for page in sorted(self.data_pages):
            if extents and sum(extents[-1]) == page * PAGE:
                extents[-1] = (extents[-1][0], extents[-1][1] + PAGE)
            else:
                extents.append((page * PAGE, PAGE))
        return extents

    def close(self):
        self.closed = True


def fill(source, first, count):
    destination = bytearray(b"\xee" * (count * PAGE))
    source.fetch(FetchRequest(first * PAGE), memoryview(destination))
    return bytes(destination)


def test_patches_replace_their_bytes_and_no_others():
    inner = SparseSource(4, range(4))
    source = PatchedSource(inner, [(PAGE + 10, b"abc"), (2 * PAGE - 1, b"xy")])
    expected = bytearray(inner.image)
    expected[PAGE + 10 : PAGE + 13] = b"abc"
    expected[2 * PAGE - 1 : 2 * PAGE + 1] = b"xy"
    assert fill(source, 0, 4) == expected
    for page in range(4):
        assert fill(source, page, 1) == expected[page * PAGE : (page + 1) * PAGE]
    assert source.name == "sparse"
    assert source.size == 4 * PAGE


def test_a_patch_in_a_hole_makes_its_page_data():
    source = PatchedSource(SparseSource(8, [0, 1]), [(5 * PAGE + 1, b"code")])
    assert source.extents() == [(0, 2 * PAGE), (5 * PAGE, PAGE)]
    assert fill(source, 5, 1) == b"\0code" + bytes(PAGE - 5)


def test_a_patch_beyond_the_end_grows_the_source():
    source = PatchedSource(SparseSource(2, [0, 1]), [(3 * PAGE, b"far"), (2 * PAGE - 1, b"ab")])
    assert source.size == 4 * PAGE
    assert source.extents() == [(0, 4 * PAGE)]
    assert fill(source, 0, 4) == (
        bytes([1]) * PAGE + bytes([2]) * (PAGE - 1) + b"ab" + bytes(PAGE - 1) + b"far" + bytes(PAGE - 3)
    )


def test_an_empty_source_can_be_patched():
    source = PatchedSource(SparseSource(2, []), [(0, b"x")])
    assert source.extents() == [(0, PAGE)]
    assert fill(source, 0, 1) == b"x" + bytes(PAGE - 1)


def test_without_patches_nothing_changes():
    inner = SparseSource(4, [1, 2])
    source = PatchedSource(inner, [])
    assert (source.size, source.extents()) == (inner.size, inner.extents())
    assert fill(source, 1, 2) == inner.image[PAGE : 3 * PAGE]
    assert PatchedSource(SparseSource(4, []), []).size == 4 * PAGE


@pytest.mark.parametrize("seed", range(20))
def test_random_patches_agree_with_a_patched_copy(seed):
    rng = random.Random(seed)
    inner = SparseSource(32, [page for page in range(32) if rng.random() < 0.5])
    expected = inner.image + bytes(8 * PAGE)
    patches, position = [], 0
    while (position := position + rng.choice([0, 1, 500, 3 * PAGE, 9 * PAGE])) < 39 * PAGE:
        data = rng.randbytes(rng.choice([1, 7, 600, PAGE]))
        expected[position : position + len(data)] = data
        patches.append((position, data))
        position += len(data)
    rng.shuffle(patches)
    source = PatchedSource(inner, patches)
    for offset, length in source.extents():
        assert fill(source, offset // PAGE, length // PAGE) == expected[offset : offset + length]
        for page in range(offset // PAGE, (offset + length) // PAGE):
            assert fill(source, page, 1) == expected[page * PAGE : (page + 1) * PAGE]
    assert read_pages(source, np.arange(40)).tobytes() == expected
    shuffled = np.array(rng.sample(range(40), 40))
    assert read_pages(source, shuffled).tobytes() == b"".join(
        expected[page * PAGE : (page + 1) * PAGE] for page in shuffled
    )


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        ([(10, b"abc"), (12, b"x")], "the patch at offset 0xc overlaps the one that ends at 0xd"),
        ([(10, b"abc"), (10, b"abc")], "overlaps"),
        ([(10, b"")], "a patch of 0 bytes at offset 10 replaces no byte of RAM"),
        ([(-1, b"ab")], "a patch of 2 bytes at offset -1 replaces no byte of RAM"),
    ],
)
def test_unusable_patches_are_refused(patches, message):
    with pytest.raises(ValueError, match=message):
        PatchedSource(SparseSource(4, range(4)), patches)


def test_errors_of_the_inner_source_come_through():
    inner = SparseSource(4, range(4))

    def fail(request, destination):
        raise SourceError("sparse", request.offset, len(destination), "it is broken", transient=True)

    inner.fetch = fail
    source = PatchedSource(inner, [(PAGE, b"x")])
    for page in (0, 1):
        with pytest.raises(SourceError, match=f"offset {page * PAGE:#x} of sparse: it is broken") as caught:
            fill(source, page, 1)
        assert caught.value.transient


def test_a_range_beyond_the_size_is_refused():
    source = PatchedSource(SparseSource(2, [0, 1]), [(2 * PAGE, b"x")])
    with pytest.raises(ValueError, match="inside the 12288 bytes of sparse"):
        fill(source, 2, 2)


def test_close_closes_the_inner_source():
    inner = SparseSource(1, [0])
    PatchedSource(inner, []).close()
    assert inner.closed
