"""Units of several pages whose pages are in several states: nothing is done to a part of one.

A unit is in several states where its pages began so, where the data of the source ends within it, or where the sink was
full in the middle of it.
"""

import threading

import pytest
from fakes import PAGES, content, page_of, pager_of, source_error, started

from kvmdp.errors import BusyError
from kvmdp.page import PAGE_SIZE, Outcome, PageFault
from kvmdp.paging.claim import State

UNIT = 4
LONG = 30  # seconds that nothing here takes


def in_units(**options):
    return pager_of(granule=UNIT * PAGE_SIZE, **options)


def test_a_fault_on_a_unit_of_which_a_page_is_being_read_waits_for_that():
    with in_units() as pager:
        reading, go_on = threading.Event(), threading.Event()

        def before(first, count):
            if (first, count) == (1, 1):
                reading.set()
                assert go_on.wait(LONG)

        pager.source.before = before
        copy = bytearray(PAGE_SIZE)
        reader = started(lambda: pager.content(1, 1, memoryview(copy)))
        try:
            assert reading.wait(LONG)
            assert pager.resolve(PageFault(0), timeout=0) is Outcome.TIMED_OUT
        finally:
            go_on.set()
            reader.join(LONG)
        assert copy == content(1)
        assert pager.resolve(PageFault(0)) is Outcome.ADMITTED
        assert [page_of(pager, page) for page in range(UNIT)] == [content(page) for page in range(UNIT)]


def test_a_unit_of_which_a_page_is_being_read_is_not_taken_away_in_part():
    with in_units() as pager:
        pager.mark_present(0, UNIT)
        with pager.owning() as claim:
            assert pager.ledger.begin_look(1, 2, claim) is None
            with pytest.raises(BusyError):
                pager.mark_nonpresent(0, UNIT, timeout=0)
        assert pager.mark_nonpresent(0, UNIT) == UNIT


def test_a_unit_that_is_in_ram_in_part_is_held_by_a_pause():
    states = bytes((State.BACKED, State.SOURCE, State.SOURCE, State.SOURCE)) + bytes(PAGES - UNIT)
    with in_units(states=states) as pager:
        pager.holds = True
        asked = []

        def fail(first, count):
            asked.append(first)
            assert len(asked) < 10, "the source is asked again and again"
            raise source_error(first, count)

        pager.source.before = fail
        assert pager.resolve(PageFault(7), timeout=0) is Outcome.TIMED_OUT
        assert pager.resolve(PageFault(0), timeout=0) is Outcome.TIMED_OUT
        pager.source.before = lambda first, count: None
        pager.resume()
        assert pager.resolve(PageFault(0)) is Outcome.ADMITTED
        assert page_of(pager, 0) == bytes(PAGE_SIZE)
        assert page_of(pager, 1) == content(1)
