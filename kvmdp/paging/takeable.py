"""Which pages are taken away, by their states: the table that `Ledger.begin_take` goes by."""

from __future__ import annotations

from collections.abc import Iterator

from kvmdp.paging.claim import State

PASS_OVER, TAKE, REVOKE, WAIT = b".APW"


def takeable(*absent: State, present: bool = True) -> bytes:
    """Return the table for `Ledger.begin_take`: which pages are taken, present ones and absent ones in these states.

    It also says whose claims are waited for: only those that leave a page in a state that was asked for. A page that is
    being fetched is none, unless pages are taken that were never fetched: else a caller that only wants the guest shut
    out would wait for the source.
    """
    table = bytearray((PASS_OVER,)) * 256
    for state in absent:
        table[state] = TAKE
    if present:
        table[State.PRESENT] = REVOKE
        table[State.ADMITTING] = WAIT
        if absent:
            table[State.EVICTING] = WAIT
        if State.SOURCE in absent:
            table[State.INFLIGHT] = WAIT
    return bytes(table)


def runs_to_take(before: bytes, kinds: bytes) -> Iterator[tuple[int, int]]:
    """Yield (start, count) of each run of pages in one state, of those that `kinds` names."""
    start = 0
    while start < len(before):
        state = before[start]
        count = len(before) - start - len(before[start:].lstrip(before[start : start + 1]))
        if kinds[state] in b"AP":
            yield start, count
        start += count
