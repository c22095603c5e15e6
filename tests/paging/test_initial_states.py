"""Pages that begin in several states, as a snapshot or an incoming machine has left them."""

from pathlib import Path

import pytest
from fakes import PAGES, FakeSink, FakeSource, FakeTrap, content, page_of, pager_of

from kvmdp.errors import PagingError
from kvmdp.memory.layout import GuestLayout
from kvmdp.memory.mapping import Mapping
from kvmdp.page import PAGE_SIZE, Outcome, PageFault
from kvmdp.paging.claim import State
from kvmdp.paging.initial import initial_states, present_runs
from kvmdp.paging.pager import Pager
from kvmdp.paging.policy import FaultAround
from kvmdp.vcpu.gate import VcpuGate

POSSIBLE = (State.SOURCE, State.PRESENT, State.BACKED, State.ZERO, State.SINK, State.POISON)
NAMES = "SOURCE, PRESENT, BACKED, ZERO, SINK, POISON"
ZEROS = bytes(PAGE_SIZE)


def mixed(pages=PAGES, unit=1):
    """States one after the other, a unit each."""
    return bytes(POSSIBLE[page // unit % len(POSSIBLE)] for page in range(pages))


def in_ram(page):
    return bytes((0x80 + page % 100,)) * PAGE_SIZE


def in_sink(page):
    return bytes((page % 99 + 2,)) * PAGE_SIZE


@pytest.mark.parametrize("unit", [1, 4])
def test_pages_are_in_the_states_that_were_given_and_all_that_follows_from_them_is_right(unit):
    states = mixed(unit=unit)
    present = [state == State.PRESENT for state in states]
    with pager_of(granule=unit * PAGE_SIZE, states=states) as pager:
        assert pager.ledger.states == states
        assert [pager.bitmap.test(page) for page in range(PAGES)] == present
        assert [each == 1 for each in pager.trap.entered] == present  # as the trap finds it when it is armed
        assert pager.ledger.resident == present.count(True) + states.count(State.BACKED)
        assert pager.ledger.claims == []
        assert pager.counters.pages_admitted == 0


@pytest.mark.parametrize("unit", [1, 4])
def test_each_page_goes_on_from_its_state(unit):
    states = mixed(unit=unit)
    wanted = {
        State.SOURCE: content,
        State.PRESENT: in_ram,
        State.BACKED: in_ram,
        State.ZERO: lambda _: ZEROS,
        State.SINK: in_sink,
    }
    outcomes = {State.PRESENT: Outcome.PRESENT, State.POISON: Outcome.POISONED}
    with pager_of(granule=unit * PAGE_SIZE, states=states) as pager:
        for page in range(PAGES):
            pager.trap.fill_view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = in_ram(page)
        pager.sink = FakeSink(PAGES)
        pager.sink.stored = {page: in_sink(page) for page in range(PAGES)}
        for page in range(0, PAGES, unit):
            state = State(states[page])
            assert pager.resolve(PageFault(page)) is outcomes.get(state, Outcome.ADMITTED)
            for each in range(page, min(page + unit, PAGES)):
                if state in wanted:
                    assert page_of(pager, each) == wanted[state](each)
        counters = pager.counters
        assert counters.pages_fetched == states.count(State.SOURCE)
        assert counters.pages_backed == states.count(State.BACKED)
        assert counters.pages_zeroed == states.count(State.ZERO)
        assert counters.pages_refetched == states.count(State.SINK)
        assert pager.bitmap.count() == pager.ledger.resident == PAGES - states.count(State.POISON)
        for page in range(0, PAGES, unit):
            if states[page] == State.POISON:
                count = min(unit, PAGES - page)
                pager.unpoison(page, b"\1" * (count * PAGE_SIZE))
        assert pager.bitmap.count() == pager.ledger.resident == PAGES
        assert pager.evict(0, PAGES) == PAGES
        assert pager.ledger.resident == 0


def test_without_states_all_is_at_the_source_or_a_hole_of_it():
    with pager_of(extents=[(2, 5), (100, PAGES - 100)]) as pager:
        states = pager.ledger.states
        assert [page for page in range(PAGES) if states[page] == State.SOURCE] == [
            *range(2, 7),
            *range(100, PAGES),
        ]
        assert states.count(State.ZERO) == PAGES - states.count(State.SOURCE)
        assert states == initial_states(PAGES, [(2, 5), (100, PAGES - 100)])
    assert initial_states(3, []) == bytes((State.ZERO,)) * 3


def test_states_that_are_given_count_and_not_the_extents_of_the_source():
    states = bytearray((State.ZERO,)) * PAGES
    states[7] = State.SOURCE
    with pager_of(extents=[(0, PAGES)], states=states) as pager:
        states[8] = State.POISON  # the caller's array is the caller's
        assert pager.mark_present(0, PAGES) is Outcome.PRESENT
        assert pager.source.fills == [(7, 1)]
        assert states[7] == State.SOURCE


def test_all_may_be_present_and_then_it_can_be_switched_off():
    with pager_of(states=bytes((State.PRESENT,)) * PAGES) as pager:
        pager.disable()
        pager.enable()
        assert pager.mark_nonpresent(3, 1) == 1
    with pager_of(states=mixed()) as pager, pytest.raises(PagingError, match="of them are poisoned"):
        pager.disable()


@pytest.mark.parametrize(
    ("states", "unit", "sentence"),
    [
        (bytes(PAGES - 1), 1, "511 initial states for 512 pages of RAM: give one a page"),
        (bytes(PAGES + 1), 1, "513 initial states for 512 pages of RAM: give one a page"),
        *(
            (
                bytes(7) + bytes((state,)) + bytes(PAGES - 8),
                1,
                f"a page cannot begin in state {int(state)}: give one of {NAMES}",
            )
            for state in (State.INFLIGHT, State.EVICTING, State.ADMITTING, 9, 255)
        ),
        *(
            (
                bytes(4) + bytes((state,)) * 6 + bytes(PAGES - 10),
                4,
                f"pages 4 to 9 begin as {state.name}, which cuts a unit of 4 pages in two: give whole units",
            )
            for state in (State.PRESENT, State.POISON)
        ),
        (
            bytes(6) + bytes((State.PRESENT,)) * 6 + bytes(PAGES - 12),
            4,
            "pages 6 to 11 begin as PRESENT, which cuts a unit of 4 pages in two: give whole units",
        ),
    ],
)
def test_states_that_cannot_be_are_refused_and_nothing_is_left_behind(states, unit, sentence):
    with Mapping.anonymous(PAGES * PAGE_SIZE) as memory:
        trap = FakeTrap(PAGES, unit * PAGE_SIZE, memory)
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(ValueError, match=r"^" + sentence + r"$"):
            Pager(GuestLayout(PAGES * PAGE_SIZE), trap, FakeSource(PAGES), FaultAround(), VcpuGate(), states)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_last_unit_may_be_cut_by_the_end_of_ram():
    states = bytes((State.PRESENT,)) * 6
    assert present_runs(states, 6, 4) == [(0, 6)]
    with pytest.raises(ValueError, match="pages 5 to 5 begin as PRESENT"):
        present_runs(bytes(5) + states[:1], 6, 4)
    with pager_of(PAGES + 3, granule=4 * PAGE_SIZE, states=bytes((State.PRESENT,)) * (PAGES + 3)) as pager:
        assert pager.bitmap.count() == PAGES + 3
        assert pager.mark_nonpresent(PAGES, 1) == 3


def test_units_may_begin_in_several_absent_states():
    states = bytes((State.SOURCE, State.ZERO, State.BACKED, State.SINK)) + bytes(PAGES - 4)
    with pager_of(granule=4 * PAGE_SIZE, states=states) as pager:
        pager.sink = FakeSink(PAGES)
        pager.sink.stored = {3: in_sink(3)}
        pager.trap.fill_view[2 * PAGE_SIZE : 3 * PAGE_SIZE] = in_ram(2)
        assert pager.resolve(PageFault(1)) is Outcome.ADMITTED
        assert [page_of(pager, page) for page in range(4)] == [content(0), ZEROS, in_ram(2), in_sink(3)]
