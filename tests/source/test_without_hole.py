"""A source with its hole left out: the same pages, those behind the hole at once behind those before it."""

import numpy as np
import pytest

from kvmdp.source.base import SourceError, read_pages
from kvmdp.source.request import FetchRequest
from kvmdp.source.without_hole import WithoutHole

PAGE = 4096
PAGES = 12
START, END = 4, 7  # the hole, in pages


class Numbered:
    """A source in which each byte of page n is n + 1; pages outside `data` are holes of the file, and not asked for."""

    name = "numbers"
    size = PAGES * PAGE

    def __init__(self, data=((0, PAGES),), failing=None):
        self._data = data
        self._failing = failing

    def extents(self):
        return [(first * PAGE, (end - first) * PAGE) for first, end in self._data]

    def fetch(self, request, destination):
        offset = request.offset
        for page in range(offset // PAGE, (offset + len(destination)) // PAGE):
            assert any(first <= page < end for first, end in self._data), page
            if page == self._failing:
                raise SourceError(self.name, offset, len(destination), "no such luck", transient=True)
            at = page * PAGE - offset
            destination[at : at + PAGE] = bytes([page + 1]) * PAGE

    def close(self):
        pass


def without_hole(inner, end=END):
    return WithoutHole(inner, START * PAGE, end * PAGE)


LEFT = [*range(START), *range(END, PAGES)]


@pytest.mark.parametrize("first", range(len(LEFT)))
def test_every_run_of_pages_is_the_right_one(first):
    source = without_hole(Numbered())
    assert source.size == len(LEFT) * PAGE
    for last in range(first + 1, len(LEFT) + 1):
        destination = bytearray((last - first) * PAGE)
        source.fetch(FetchRequest(first * PAGE), memoryview(destination))
        assert list(destination[::PAGE]) == [page + 1 for page in LEFT[first:last]]


@pytest.mark.parametrize(
    ("data", "extents"),
    [
        ([(0, 12)], [(0, 9)]),
        ([(0, 2), (5, 6), (9, 10)], [(0, 2), (6, 7)]),
        ([(3, 8)], [(3, 5)]),
        ([(4, 7)], []),
        ([(2, 4), (7, 8)], [(2, 5)]),
        ([(6, 9)], [(4, 6)]),
    ],
)
def test_holes_of_the_file_stay_holes(data, extents):
    source = without_hole(Numbered(data))
    assert source.extents() == [(first * PAGE, (end - first) * PAGE) for first, end in extents]
    has_data = [any(first <= page < end for first, end in data) for page in LEFT]
    expected = [page + 1 if there else 0 for page, there in zip(LEFT, has_data, strict=True)]
    assert read_pages(source, np.arange(len(LEFT))).view(np.uint8)[:, 0].tolist() == expected


def test_a_hole_to_the_end_leaves_what_is_before_it():
    source = without_hole(Numbered(), end=PAGES + 3)
    assert source.size == START * PAGE
    assert source.extents() == [(0, START * PAGE)]
    with pytest.raises(ValueError, match="not whole 4096-byte pages inside"):
        source.fetch(FetchRequest(START * PAGE), memoryview(bytearray(PAGE)))


@pytest.mark.parametrize(("failing", "place"), [(2, 2), (9, 6)])
def test_an_error_names_the_place_in_ram_and_that_in_the_file(failing, place):
    source = without_hole(Numbered(failing=failing))
    with pytest.raises(SourceError) as caught:
        source.fetch(FetchRequest(place * PAGE), memoryview(bytearray(PAGE)))
    assert (caught.value.offset, caught.value.transient) == (place * PAGE, True)
    hole = f" (with its hole: offset {failing * PAGE:#x})" if failing >= END else ""
    assert (
        str(caught.value)
        == f"cannot read 4096 bytes at offset {place * PAGE:#x} of numbers: no such luck{hole}"
    )


@pytest.mark.parametrize(("start", "end"), [(0, 2), (3, 3), (5, 2), (12, 14)])
def test_a_hole_that_is_none_is_refused(start, end):
    with pytest.raises(ValueError, match="no hole from"):
        WithoutHole(Numbered(), start * PAGE, end * PAGE)
