"""The ledger: the state of every page, the claims, the pins, and their waiters. Pure: no lock, no clock, no call.

The pager calls every method under its mutex and notifies, outside it, the waiters that a method returns. A test
calls them in any order it likes: what is said here about wake-ups holds by the order of calls alone.

Why no wake-up is lost: a waiter is queued while its claim is listed (`queue`). Each way for a claim to be over with
(`end`) and each way to give up waiting (`withdraw`, `cancel`) takes the waiter out of the queue and sets its reason in
one step. So it is in one queue or has a reason, never both and never neither, and gets one reason only.

Why no page is filled over: a claim takes only pages whose state says that no other thread touches their bytes, and
makes that state INFLIGHT in the same step.

Why an exception between any two steps (an interruption) harms nothing: a claim is listed before its pages' states
change, and taken off the list after that; each call that does so can be made again, and then does what is left of it.
Its owner has made the `Claim` and does so (`kvmdp.paging.admission`). What must not be done twice, the sums, comes in
one row with the end of the list's entry, in which there is no call at which Python would look for a signal.

Units: RAM pages. A *unit* is the block of pages the trap can flip on its own (1 page, or a granule).
"""

from __future__ import annotations

from collections.abc import Sequence

from kvmdp.memory.bitmap import PresentBitmap
from kvmdp.page import Outcome
from kvmdp.paging.claim import Claim, Counters, State, Waiter, Wake
from kvmdp.paging.initial import present_runs
from kvmdp.paging.pins import Pins, Retained
from kvmdp.paging.takeable import PASS_OVER, REVOKE, WAIT, takeable

# Looked up in the hot path, where an enum member costs an attribute access and a comparison by method.
_SOURCE, _INFLIGHT, _PRESENT, _BACKED, _ZERO, _EVICTING, _ADMITTING, _SINK, _POISON = (
    bytes([state]) for state in State
)
_CLAIMABLE = frozenset((State.SOURCE, State.BACKED, State.ZERO, State.SINK))
_LOST = bytes.maketrans(_BACKED + _SOURCE + _SINK, _ZERO * 3)
_DISCARDED = bytes.maketrans(_PRESENT + _BACKED + _SOURCE + _SINK, _ZERO * 4)
_PRESENT_BYTE = int(State.PRESENT)
_ADMITTING_BYTE = int(State.ADMITTING)
_INFLIGHT_BYTE = int(State.INFLIGHT)
_EVICTING_BYTE = int(State.EVICTING)
_POISON_BYTE = int(State.POISON)
_AT_REST = takeable(*_CLAIMABLE)
_LOOKED_AT = 1 << 16  # pages that are looked at in one step for what can be taken


class Ledger:
    """States and claims of the pages of RAM.

    Arguments: `bitmap`, kept as the projection of the states: bit set if and only if PRESENT or ADMITTING; `unit`;
    `bounds`, the (first, end) pages of each stretch that is contiguous in guest-physical space, ascending: no claim
    reaches over their borders; `states`, the state of each page at the beginning, a byte a page (`initial_states`).

    `pause`, if not None, is what accesses to pages wait for whose bytes are not in RAM.

    Raises ValueError for initial states that no page can be in, or that cut a unit in two.
    """

    def __init__(
        self,
        bitmap: PresentBitmap,
        unit: int,
        bounds: Sequence[tuple[int, int]],
        states: bytes | bytearray,
    ) -> None:
        self.bitmap = bitmap
        self.pages = bitmap.pages
        self.unit = unit
        self.states = bytearray(states)
        self.counters = Counters()
        self.claims: list[Claim] = []  # as many as threads that resolve: a list beats any tree
        self.cancelled = False
        self.pause: Claim | None = None  # no claim: it has no pages, and is not listed
        # Pages whose bytes are in RAM, but for those that are being filled.
        self.resident = _in_ram(self.states)
        # Grows after pages have left PRESENT and before their bytes are touched (`kvmdp.paging.access` reads it).
        self.departures = 0
        self._bounds = tuple(bounds)
        self.pins = Pins(self.states)
        self.retained = Retained()
        for first, end in present_runs(states, self.pages, unit):
            bitmap.set_range(first, end - first)

    def adopt(self) -> None:
        """Take all pages for present: their bytes are in RAM, and nothing has begun."""
        self.states[:] = _PRESENT * self.pages
        self.bitmap.set_range(0, self.pages)
        self.resident = self.pages

    # Faults

    def obstacle(self, page: int) -> Claim | Outcome | None:
        """Return what keeps `page` from being claimed: the claim to wait for, or how the access ends. None: nothing."""
        state = self.states[page]
        if state == _PRESENT_BYTE:
            return Outcome.PRESENT
        if state == _ADMITTING_BYTE:  # until the trap has been told, the access would only fault again
            return self._claim_on(page)
        if self.cancelled:
            return Outcome.CANCELLED
        if state == _POISON_BYTE:
            return Outcome.POISONED
        if state not in _CLAIMABLE:
            return self._claim_on(page)
        return None if self.pause is None or self._is_in_ram(page) else self.pause

    def _is_in_ram(self, page: int) -> bool:
        """Whether all bytes of an absent page's unit are in RAM."""
        first, end = self.whole_units(page, page + 1)
        return self.states.count(_BACKED, first, end) == end - first

    def _claim_on(self, page: int) -> Claim:
        return next(each for each in self.claims if each.first <= page < each.first + each.count)

    def claim(self, page: int, first: int, count: int, claim: Claim | None = None) -> Claim:
        """Claim the claimable run around `page` inside the window [first, first + count), in whole units.

        `claim`, here and in what else begins one, is made that claim; without, a new one is.
        """
        claim = claim or Claim()
        if self.pause is not None:
            first, count = page, 1  # its neighbours may have to be fetched
        if count == 1 == self.unit:
            claim.first, claim.count, claim.before = page, 1, bytes((self.states[page],))
            self.claims.append(claim)
            self.states[page] = _INFLIGHT_BYTE
            return claim
        start, end = self._claimable_run(page, first, first + count)
        return self._list(claim, start, end, _INFLIGHT)

    def _list(self, claim: Claim | None, first: int, end: int, state: bytes) -> Claim:
        """Claim the pages [first, end), which are in `state` from now on."""
        claim = claim or Claim()
        claim.first, claim.count, claim.before = first, end - first, bytes(self.states[first:end])
        self.claims.append(claim)
        self.states[first:end] = state * (end - first)
        return claim

    def _claimable_run(self, page: int, start: int, end: int) -> tuple[int, int]:
        """Cut [start, end), widened to units, to the stretch around `page` that can be claimed as one."""
        unit, states = self.unit, self.states
        first = page // unit * unit
        last = min(first + unit, self.pages)
        low, high = self.bounds_of(page)
        start = max(start // unit * unit, low)
        end = min(-(-end // unit) * unit, high)
        if states.count(_SOURCE, start, end) == end - start:
            return start, end  # the common case, without a look at each page
        # All pages of a unit are claimable or none is: they are claimed, admitted and revoked as one.
        while first > start and states[first - 1] in _CLAIMABLE:
            first -= unit if unit > 1 else 1
        while last < end and states[last] in _CLAIMABLE:
            last = min(last + unit, high)
        return first, last

    def whole_units(self, first: int, end: int) -> tuple[int, int]:
        """Return the (first, end) pages of the units that hold the pages [first, end)."""
        return first // self.unit * self.unit, min(-(-end // self.unit) * self.unit, self.pages)

    def bounds_of(self, page: int) -> tuple[int, int]:
        """Return the (first, end) pages of the contiguous stretch that holds `page`. Raises ValueError."""
        for low, high in self._bounds:
            if low <= page < high:
                return low, high
        raise ValueError(f"page {page} is not one of the {self.pages} of RAM")

    def split(self, claim: Claim, count: int) -> Claim:
        """Make the first `count` pages of a claim that is not filled, whole units, a claim of its own, and return that.

        Its waiters go with that: they look again when it ends. The caller is not interrupted meanwhile.
        """
        piece = claim.split(count)
        self.claims.append(piece)
        return piece

    def admit(self, claim: Claim) -> None:
        """The bytes of a claim are in RAM: set state and bit. The claim goes on until the trap has been told."""
        claim.is_filled = True
        first, count = claim.first, claim.count
        self.states[first : first + count] = _ADMITTING * count
        self.bitmap.set_range(first, count)

    def commit(self, claim: Claim) -> list[Waiter]:
        """End a claim whose pages the trap has admitted; returns the waiters to notify."""
        if claim not in self.claims:
            return claim.end(Wake.COMMITTED)
        counters, count, before = self.counters, claim.count, claim.before
        fetched = before.count(_SOURCE)
        zeroed = refetched = backed = in_ram = 0
        if fetched != count:
            zeroed, refetched, backed = before.count(_ZERO), before.count(_SINK), before.count(_BACKED)
            in_ram = _in_ram(before)
        present = _PRESENT * count
        counters.pages_admitted += count
        counters.pages_fetched += fetched
        counters.pages_zeroed += zeroed
        counters.pages_refetched += refetched
        counters.pages_backed += backed
        self.resident += count - in_ram
        self.states[claim.first : claim.first + count] = present
        self.claims.remove(claim)
        return claim.end(Wake.COMMITTED)

    def end(self, claim: Claim, states: bytes, reason: Wake) -> list[Waiter]:
        """End a claim in any other way: its pages are in `states`, a byte each. Returns the waiters to notify.

        Those of them that were discarded meanwhile are ZERO, unless they are in use as before, or poisoned.
        """
        if claim not in self.claims:
            return claim.end(reason)
        first, count = claim.first, claim.count
        if states == _PRESENT * count:
            self.bitmap.set_range(first, count)
        else:
            self.bitmap.clear_range(first, count)
        if claim.discarded:
            states = self._without_discarded(claim, states)
        gained = _in_ram(states) - _in_ram(claim.before)
        self.resident += gained
        self.states[first : first + count] = states
        self.claims.remove(claim)
        return claim.end(reason)

    def _without_discarded(self, claim: Claim, states: bytes) -> bytes:
        """Return `states` with ZERO for what has been discarded; its bits are cleared where it is not PRESENT any more.

        Present pages that were about to go are as those that have no claim. Others (`begin_present`) stay present:
        the trap maps zeros where it finds nothing (`Trap.reassert`).
        """
        was_evicted = self.states[claim.first] == _EVICTING_BYTE
        found = bytearray(states)
        for first, count in claim.discarded:
            part = slice(first - claim.first, first - claim.first + count)
            found[part] = found[part].translate(_DISCARDED if was_evicted else _LOST)
            if was_evicted:
                self.bitmap.clear_range(first, count)
        return bytes(found)

    # Waiting

    def queue(self, claim: Claim, waiter: Waiter) -> None:
        """Have `waiter` woken when `claim`, which is listed, ends. It waits for nothing else."""
        self.counters.waits += 1
        waiter.claim, waiter.reason = claim, None
        claim.waiters.append(waiter)

    def withdraw(self, waiter: Waiter, reason: Wake) -> bool:
        """Take one waiter out of its queue, which the caller then notifies; False if it has been woken already."""
        if waiter.claim is None:
            return False
        waiter.claim.waiters.remove(waiter)
        waiter.claim, waiter.reason = None, reason
        return True

    def cancel(self) -> list[Waiter]:
        """Let no claim begin any more; returns the waiters to notify: all for pages that are absent.

        A waiter for a page that is only being admitted is woken by that.
        """
        self.cancelled = True
        woken: list[Waiter] = [] if self.pause is None else self.pause.wake(Wake.CANCELLED)
        for claim in self.claims:
            if self.states[claim.first] != _ADMITTING_BYTE:
                woken += claim.wake(Wake.CANCELLED)
        return woken

    def pause_fetches(self) -> None:
        """From now on accesses to pages whose bytes are not in RAM wait for `resume_fetches`."""
        self.pause = self.pause or Claim()

    def resume_fetches(self) -> list[Waiter]:
        """Undo `pause_fetches`, if it was called; returns the waiters to notify: they look again."""
        pause, self.pause = self.pause, None
        return [] if pause is None else pause.wake(Wake.REVOKED)

    # Taking away

    def begin_revoke(
        self, page: int, end: int, most: int, claim: Claim | None = None
    ) -> tuple[Claim | None, Claim | None, int]:
        """Claim the next present run of [page, end) to take it away: EVICTING, bits cleared.

        Returns (claim, claim in the way, page to go on at): the first is None if there is nothing to take, if the
        second has to end before, or if the run begins with retained pages. `most` bounds the run.
        """
        run = self.bitmap.next_present_run(page, end)
        if self.cancelled or run is None:
            return None, None, end
        first = run[0]
        last = min(first + min(run[1], max(most, self.unit)), self.bounds_of(first)[1])
        last = self.retained.first_between(first, last)
        if last == first:
            return None, None, self.retained.end_at(first)
        for other in self.claims:
            if other.first <= first < other.first + other.count:
                return None, other, first  # its bit is set: it is being admitted at this moment
            if first < other.first < last:
                last = other.first
        claim = self._list(claim, first, last, _EVICTING)
        self.departures += 1
        self.bitmap.clear_range(first, last - first)
        return claim, None, last

    def begin_take(
        self, page: int, end: int, most: int, kinds: bytes, claim: Claim | None = None
    ) -> tuple[Claim | None, Claim | None, int]:
        """Claim the next run of [page, end) that can be taken away, present or absent; `kinds` says what that is.

        `kinds` is of `takeable`. Returns what `begin_revoke` does. The run of a claim is present (as its `before` says)
        or absent as a whole, and then EVICTING all the same: a fault waits. Widened to whole units where it is
        absent, so some of its pages may be of a state that was not asked for: to be left as they were.
        """
        found = self.states[page : min(end, page + _LOOKED_AT)].translate(kinds)
        rest = found.lstrip(b".")
        first = page + len(found) - len(rest)
        if self.cancelled:
            return None, None, end
        if not rest:
            return None, None, first
        if rest[0] == WAIT:
            return None, self._claim_on(first), first
        if rest[0] == REVOKE:
            return self.begin_revoke(first, end, most, claim)
        low, high = self.bounds_of(first)
        count = min(len(rest) - len(rest.lstrip(b"A")), max(most, self.unit))
        first, last = self.whole_units(first, min(first + count, high))
        first, last = max(first, low), min(last, high)
        return self._list(claim, first, last, _EVICTING), None, last

    def begin_heal(self, page: int, claim: Claim | None = None) -> Claim | None:
        """Claim the unit of a poisoned page, to be given new bytes once no page of it is pinned; None if it is not.

        Also when no claim may begin any more (`cancel`): that is for faults and for taking away.
        """
        if self.states[page] != _POISON_BYTE:
            return None
        first, last = self.whole_units(page, page + 1)
        return self._list(claim, first, last, _INFLIGHT)

    def is_heal(self, claim: Claim) -> bool:
        """Whether the claim, which is listed, is that of `begin_heal`, and its page has not got its bytes yet."""
        return claim.before[:1] == _POISON and self.states[claim.first] == _INFLIGHT_BYTE

    def begin_look(self, page: int, end: int, claim: Claim) -> Claim | Outcome | None:
        """Claim the units from that of `page` on, at most up to that of `end`, so that their bytes stay where they are.

        All of them present, which they stay, or none; to be ended in the states that they had. Also after `cancel`.
        Returns None, or the claim to wait for first, or POISONED.
        """
        low, high = self.whole_units(page, end)
        bounds = self.bounds_of(page)
        low, high = max(low, bounds[0]), min(high, bounds[1])
        kinds = self.states[low:high].translate(_AT_REST)
        kind = kinds[page - low]
        if kind == WAIT:
            return self._claim_on(page)
        if kind == PASS_OVER:
            return Outcome.POISONED
        count = len(kinds) - len(kinds.lstrip(bytes((kind,))))
        self._list(claim, low, low + count, _ADMITTING if kind == REVOKE else _INFLIGHT)
        return None

    def begin_reassert(self, page: int, claim: Claim | None = None) -> Claim | None:
        """Claim the unit of a present page, which stays present, so that its trap can be told once more."""
        first, last = self.whole_units(page, page + 1)
        return self.begin_present(first, last - first, claim)

    def begin_present(self, first: int, count: int, claim: Claim | None = None) -> Claim | None:
        """Claim whole units of pages, which stay present; None if not every one is present and admitted."""
        if self.states.count(_PRESENT, first, first + count) != count:
            return None
        return self._list(claim, first, first + count, _ADMITTING)

    def discarded(self, first: int, count: int) -> None:
        """The bytes of these pages, whole units, are gone: they read as zeros from now on.

        Those that have a claim are noted in it: its owner sees to it (`Admission.commit`), or its end.
        """
        page, end = first, min(first + count, self.pages)
        claimed = sorted(self.claims, key=lambda each: each.first)
        for low, high, claim in (
            *((each.first, each.first + each.count, each) for each in claimed),
            (end, end, None),
        ):
            stop = min(low, end)
            if page < stop:  # without a claim: a bit is set where a page is PRESENT, and nowhere else
                self.resident -= _in_ram(self.states[page:stop])
                self.states[page:stop] = self.states[page:stop].translate(_DISCARDED)
                self.bitmap.clear_range(page, stop - page)
            start, stop = max(page, low), min(high, end)
            if claim is not None and start < stop:
                claim.discarded = (*claim.discarded, (start, stop - start))
            page = max(page, high)
        self.departures += 1


def _in_ram(states: bytes | bytearray) -> int:
    """Return how many of the states are of pages whose bytes are in RAM."""
    return states.count(_PRESENT) + states.count(_BACKED)
