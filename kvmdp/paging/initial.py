"""The states that pages begin in: all at the source, or as a snapshot or an incoming machine has left them.

Units: RAM pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvmdp.paging.claim import State

_POSSIBLE = frozenset((State.SOURCE, State.PRESENT, State.BACKED, State.ZERO, State.SINK, State.POISON))


def initial_states(pages: int, data: Iterable[tuple[int, int]]) -> bytearray:
    """Return the states of a machine that begins with nothing in RAM, a byte a page.

    `data` has the runs (first, count) of pages whose bytes are at the source; all others are zeros.
    """
    states = bytearray((State.ZERO,)) * pages
    for first, count in data:
        states[first : first + count] = bytes((State.SOURCE,)) * count
    return states


def present_runs(states: bytes | bytearray, pages: int, unit: int) -> list[tuple[int, int]]:
    """Return the runs (first, end) of pages that begin present, in RAM of `pages` that come and go by `unit`.

    Raises ValueError for states that no page can begin in, or that cut a unit in two.
    """
    if len(states) != pages:
        raise ValueError(f"{len(states)} initial states for {pages} pages of RAM: give one a page")
    if strange := set(states) - _POSSIBLE:
        possible = ", ".join(each.name for each in sorted(_POSSIBLE))
        raise ValueError(f"a page cannot begin in state {min(strange)}: give one of {possible}")
    for state in (State.PRESENT, State.POISON):  # what the guest may enter, or not, by whole units
        for first, end in _runs_of(states, state):
            if first % unit or (end % unit and end != pages):
                raise ValueError(
                    f"pages {first} to {end - 1} begin as {state.name}, which cuts a unit of {unit} pages in two: "
                    "give whole units"
                )
    return list(_runs_of(states, State.PRESENT))


def _runs_of(states: bytes | bytearray, state: State) -> Iterator[tuple[int, int]]:
    """Yield the runs (first, end) of pages in a state."""
    wanted = bytes((state,))
    end = 0
    while (first := states.find(wanted, end)) >= 0:
        rest = states[first:]
        end = first + len(rest) - len(rest.lstrip(wanted))
        yield first, end
