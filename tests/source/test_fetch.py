"""One way of reading a source, for a fault and for everything else: what may succeed again is tried again."""

import numpy as np
import pytest

from kvmdp.source.base import SourceError, fetch, read_pages
from kvmdp.source.request import FetchRequest

PAGE = 4096


class Failing:
    """A source of pages of ones whose reads fail `failures` times each, as `transient` has it."""

    name, size = "the failing source", 4 * PAGE

    def __init__(self, failures, transient=True):
        self.calls = []
        self._failures, self._transient = failures, transient

    def extents(self):
        return [(0, self.size)]

    def fetch(self, request, destination):
        offset = request.offset
        self.calls.append(offset)
        if self.calls.count(offset) <= self._failures:
            destination[:] = b"\xa5" * len(destination)
            raise SourceError(self.name, offset, len(destination), "try again", transient=self._transient)
        destination[:] = b"\1" * len(destination)

    def close(self):
        pass


def test_a_transient_error_is_tried_again_five_times():
    source, page = Failing(5), memoryview(bytearray(PAGE))
    fetch(source, FetchRequest(0), page)
    assert bytes(page) == b"\1" * PAGE
    with pytest.raises(SourceError, match="try again"):
        fetch(Failing(6), FetchRequest(0), page)


def test_another_error_is_not():
    source = Failing(1, transient=False)
    with pytest.raises(SourceError, match="try again"):
        fetch(source, FetchRequest(0), memoryview(bytearray(PAGE)))
    assert source.calls == [0]


def test_the_caller_is_asked_before_each_further_attempt():
    asked = []
    fetch(Failing(3), FetchRequest(0), memoryview(bytearray(PAGE)), lambda: asked.append(None) is None)
    assert len(asked) == 3
    source = Failing(3)
    with pytest.raises(SourceError):
        fetch(source, FetchRequest(0), memoryview(bytearray(PAGE)), lambda: False)
    assert source.calls == [0]


def test_pages_that_are_read_for_a_comparison_are_fetched_like_that():
    source = Failing(2)
    assert (read_pages(source, np.array([3, 0])).view(np.uint8) == 1).all()
    assert source.calls == [3 * PAGE] * 3 + [0] * 3
