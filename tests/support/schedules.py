"""A test scheduler for the ledger: actors who call it as the pager does, interleaved at random, and a model beside it.

An actor is a generator. From one `yield` to the next it does what the pager does under its mutex in one go; a
`yield` of a waiter sleeps until that is notified. Which actor goes on is drawn from the seed, and with it all else.

The model knows what every page's state has to be, which claims there are, who waits for which, and why whoever was
woken should have been. It learns from the ledger only which pages a claim took, and checks that it might.
"""

import collections
import random

from kvmdp.memory.bitmap import PresentBitmap
from kvmdp.page import Outcome
from kvmdp.paging.claim import Claim, State, Waiter, Wake
from kvmdp.paging.ledger import Ledger
from kvmdp.paging.pins import Pin
from kvmdp.paging.takeable import takeable

SOURCE, INFLIGHT, PRESENT, BACKED, ZERO, EVICTING, ADMITTING, SINK, POISON = State
CLAIMABLE = (SOURCE, BACKED, ZERO, SINK)
IN_RAM = (PRESENT, BACKED)
# What takes pages away: from which states, beside PRESENT, and what they are afterwards
TAKES = {
    "shut off": ((), BACKED),
    "evict": ((BACKED,), SINK),
    "discard": ((BACKED, SOURCE, SINK), ZERO),
    "poison": (CLAIMABLE, POISON),
}
HAS_BIT = bytes(state in (PRESENT, ADMITTING) for state in range(256))
IS_CLAIMED = bytes(state in (INFLIGHT, EVICTING, ADMITTING) for state in range(256))
# Around the border of two words of the bitmap, and of two stretches of RAM; the last unit is half of one.
FIRST, BORDER, END = 56, 60, 66
BOUNDS = ((0, BORDER), (BORDER, END))
AT_REST = (*CLAIMABLE, PRESENT)


class ByteBitmap:
    """What the ledger uses of PresentBitmap, without a memory file."""

    def __init__(self, pages):
        self.pages = pages
        self.bytes = bytearray(pages)

    def set_range(self, first, count):
        self.bytes[first : first + count] = b"\1" * count

    def clear_range(self, first, count):
        self.bytes[first : first + count] = bytes(count)

    def next_present_run(self, start, limit):
        first = self.bytes.find(1, start, limit)
        if first < 0:
            return None
        end = self.bytes.find(0, first, limit)
        return first, (limit if end < 0 else end) - first

    def close(self):
        pass


class RealBitmap(PresentBitmap):
    @property
    def bytes(self):
        return bytes(self.test(page) for page in range(self.pages))


class Sleeper(Waiter):
    """`expected` is what the model says that it was woken for. One that is impatient may give up at any time."""

    def __init__(self, impatient):
        super().__init__(self._notified)
        self.impatient = impatient
        self.notified = 0
        self.called_off = False
        self.expected = None

    def _notified(self):
        assert self.reason is not None, "notified without a reason"
        self.notified += 1


class Schedule:
    """One interleaving, from its seed. `log(sentence)`, if given, is told of every step."""

    def __init__(self, seed, make=Ledger, log=None):
        self.chance = chance = random.Random(seed)
        self.unit = unit = (1, 4)[seed % 2]
        self.log = log
        self.bitmap = (RealBitmap if seed % 50 < 2 else ByteBitmap)(END)
        self.states = bytearray([ZERO]) * END
        for first in range(FIRST, END, unit):  # it begins in the middle
            count = min(unit, END - first)
            state = chance.choice((SOURCE, ZERO, PRESENT, PRESENT, BACKED, SINK, POISON))
            self.states[first : first + count] = bytes([state]) * count
            if state == SOURCE and chance.random() < 0.3:  # data of the source ends within a unit
                self.states[first] = ZERO
        self.ledger = make(self.bitmap, unit, BOUNDS, self.states)
        self.queues = {}  # who waits, by claim
        self.discarded = {}  # pages of which the bytes have been thrown away, by claim
        self.admitting = set()  # claims on pages that are present
        self.sleepers = []
        self.error = self.cancelled = False
        self.admitted = self.healed = self.waits = 0
        self.pins, self.pinned_pages = collections.Counter(), collections.Counter()
        self.retained = []
        self.holds = chance.random() < 0.5  # whether a fetch that fails pauses, or is the end
        self.paused = self.resuming = False
        self.held = []  # who waits for the end of the pause

    # What happens to one and the other

    def set(self, claim, state):
        self.states[claim.first : claim.first + claim.count] = bytes([state]) * claim.count

    def begun(self, claim, state):
        first, end = claim.first, claim.first + claim.count
        assert first % self.unit == 0
        assert end % self.unit == 0 or end == END
        assert (first < BORDER) == (end <= BORDER), "over the border"
        assert claim.before == self.states[first:end]
        self.queues[claim] = []
        self.discarded[claim] = set()
        self.set(claim, state)

    def woken(self, claim, waiters, reason):
        """The ledger says that these are woken: all of the claim's queue is."""
        queue = self.queues[claim]
        assert len(waiters) == len(queue)
        assert set(waiters) == set(queue), f"others than those who wait are woken: {reason}"
        for each in queue:
            each.expected = reason

    def end(self, claim, states, reason, pauses=False):
        """`Admission.end`; with `pauses` a fetch has failed, and what the pause concerns is held."""
        if pauses:
            self.ledger.pause_fetches()
            self.paused = True
        was_evicted = self.states[claim.first] == EVICTING
        waiters = self.ledger.end(claim, states, reason)
        self.woken(claim, waiters, reason)
        del self.queues[claim]
        self.admitting.discard(claim)
        self.states[claim.first : claim.first + claim.count] = states
        for page in self.discarded[claim]:
            self.throw_away(page, (BACKED, SOURCE, SINK, *[PRESENT] * was_evicted))
        if reason is Wake.FAILED and not pauses:  # for good
            self.error = True
            waiters = waiters + self.resume_fetches()
        yield from self.notify(waiters)

    def resume_fetches(self):
        """All who were held are woken, to look again."""
        waiters, held = self.ledger.resume_fetches(), self.held
        self.paused, self.held = False, []
        assert len(waiters) == len(held)
        assert set(waiters) == set(held), "others than those who are held are woken"
        for each in held:
            each.expected = Wake.REVOKED
        return waiters

    def notify(self, waiters):
        if waiters:
            yield  # outside the mutex
            for each in waiters:
                each.notify()

    def queue(self, claim, impatient=False):
        sleeper = Sleeper(impatient)
        self.ledger.queue(claim, sleeper)
        (self.held if claim is self.ledger.pause else self.queues[claim]).append(sleeper)
        self.sleepers.append(sleeper)
        self.waits += 1
        return sleeper

    def withdraw(self, sleeper, reason):
        waits = sleeper.expected is None
        assert self.ledger.withdraw(sleeper, reason) == waits
        if not waits:
            return []
        sleeper.expected = reason
        next(queue for queue in (self.held, *self.queues.values()) if sleeper in queue).remove(sleeper)
        return [sleeper]

    def claim_on(self, page):
        return next(each for each in self.queues if each.first <= page < each.first + each.count)

    def obstacle(self, page):
        """What the ledger has to answer."""
        state = self.states[page]
        if state == PRESENT:
            return Outcome.PRESENT
        if state != ADMITTING and self.cancelled:
            return Outcome.CANCELLED
        if state == POISON:
            return Outcome.POISONED
        if state not in CLAIMABLE:
            return self.claim_on(page)
        return self.ledger.pause if self.paused and not self.is_in_ram(page) else None

    def unit_of(self, page):
        first = page // self.unit * self.unit
        return first, min(self.unit, END - first)

    def is_in_ram(self, page):
        """Whether nothing has to be fetched for an absent page."""
        first, count = self.unit_of(page)
        return set(self.states[first : first + count]) == {BACKED}

    # Actors

    def fault(self, page, impatient, first, count):
        """`Pager.resolve`; `resolve_or_park` and `_make_present` differ in who sleeps, and in the window."""
        while True:
            step = self.ledger.obstacle(page)
            assert step is self.obstacle(page)
            if isinstance(step, Outcome) or (step is None and self.error):
                return
            if step is None:
                if not (yield from self.fetch(page, first, count)):
                    return
                continue
            sleeper = self.queue(step, impatient)
            yield sleeper
            if not sleeper.notified:
                yield from self.notify(self.withdraw(sleeper, Wake.TIMED_OUT))
            if sleeper.reason is Wake.TIMED_OUT or sleeper.called_off:
                return

    def fetch(self, page, first, count):
        chance = self.chance.random
        claim = self.ledger.claim(page, first, count)
        assert claim.first <= page < claim.first + claim.count
        states = self.states[claim.first : claim.first + claim.count]
        assert all(state in CLAIMABLE for state in states)
        if self.paused:
            assert (claim.first, claim.count) == self.unit_of(page), "more than what was asked for"
            assert self.is_in_ram(page), "fetched during a pause"
        self.begun(claim, INFLIGHT)
        yield
        while claim.count > self.unit and chance() < 0.5:
            piece = self.split(claim)
            yield
            if not (yield from self.admit(piece)):  # and the rest is fetched no more
                yield from self.end(claim, claim.before, Wake.FAILED)
                return False
        if chance() < 0.15 + 0.15 * self.holds:
            if self.cancelled:
                yield from self.end(claim, claim.before, Wake.REVOKED)
                return False
            pauses = self.holds and not self.error
            yield from self.end(claim, claim.before, Wake.FAILED, pauses)
            return self.holds and not self.error and not self.cancelled  # whether it is to look again
        yield from self.admit(claim)
        return False

    def split(self, claim):
        """The first pages of a claim have landed: they are a claim of their own, with all that concerns them."""
        first, end, before, queue = claim.first, claim.first + claim.count, claim.before, self.queues[claim]
        units = -(-claim.count // self.unit)
        count = self.unit * self.chance.randrange(1, units)
        border = first + count
        piece = self.ledger.split(claim, count)
        assert piece is not claim
        assert (piece.first, piece.count, piece.before) == (first, count, before[:count])
        assert (claim.first, claim.count, claim.before) == (border, end - border, before[count:])
        self.queues[piece], self.queues[claim] = queue, []
        gone = self.discarded[claim]
        self.discarded[piece] = {page for page in gone if page < border}
        self.discarded[claim] = {page for page in gone if page >= border}
        return piece

    def admit(self, claim):
        """`Admission.commit`; True if it went well."""
        chance = self.chance.random
        self.ledger.admit(claim)
        self.set(claim, ADMITTING)
        self.admitting.add(claim)
        yield
        if chance() < 0.1:
            yield from self.end(claim, bytes([BACKED]) * claim.count, Wake.FAILED)
            return False
        waiters = self.ledger.commit(claim)
        self.woken(claim, waiters, Wake.COMMITTED)
        del self.queues[claim]
        self.admitting.remove(claim)
        self.set(claim, PRESENT)
        self.admitted += claim.count
        yield from self.notify(waiters)
        return True

    def take(self, page, end, most, away, state):
        """`Removal._take_away`."""
        while page < end:
            claim, in_the_way, page = self.begin_take(page, end, most, away)
            if in_the_way is not None:
                yield self.queue(in_the_way)
            elif claim is not None:
                yield
                states = bytearray(claim.before)
                if states[0] == PRESENT:
                    while self.pinned(claim):
                        if self.chance.random() < 0.3:  # in use for too long
                            yield from self.end(claim, claim.before, Wake.REVOKED)
                            return
                        yield
                    yield
                    assert not self.pinned(claim), "pinned while it is taken away"
                    states = bytearray([BACKED]) * claim.count
                    if self.chance.random() < 0.05:  # the trap is broken
                        yield from self.end(claim, bytes(states), Wake.FAILED)
                        return
                for index, before in enumerate(claim.before):
                    if before == PRESENT or before in away:
                        if state == SINK and self.chance.random() < 0.03:  # which is full
                            break
                        states[index] = state
                yield from self.end(claim, bytes(states), Wake.REVOKED)

    def begin_take(self, page, end, most, away):
        found = claim, in_the_way, go_on = self.ledger.begin_take(page, end, most, takeable(*away))
        # Who only shuts the guest out waits for an admit; who evicts, for another revocation too; who wants the bytes
        # gone wherever they are, for a fetch as well.
        waits = (ADMITTING, *[EVICTING] * bool(away), *[INFLIGHT] * (SOURCE in away))
        states, stops = self.states, (*waits, PRESENT, *away)
        first = next((each for each in range(page, end) if states[each] in stops), end)
        if self.cancelled or first == end:
            assert found == (None, None, end)
        elif states[first] in waits:
            assert found == (None, self.claim_on(first), first)
        elif states[first] == PRESENT and self.is_retained(first):
            assert (claim, in_the_way) == (None, None)
            assert all(map(self.is_retained, range(first, go_on)))
            assert go_on > first
        else:
            self.check_taken(first, end, most, away, found)
            self.begun(claim, EVICTING)
        return found

    def check_taken(self, first, end, most, away, found):
        """A run from `first` on: of present pages, or of absent ones in `away` and what else is in their units."""
        claim, in_the_way, go_on = found
        unit, states = self.unit, self.states
        stop = min(end, first + max(most, unit), BORDER if first < BORDER else END)
        last, present = first, states[first] == PRESENT
        while last < stop and (
            states[last] == PRESENT and not self.is_retained(last) if present else states[last] in away
        ):
            last += 1
        if not present:
            first, last = first // unit * unit, min(-(-last // unit) * unit, END)
        assert in_the_way is None
        assert claim is not None
        assert (claim.first, claim.count, go_on) == (first, last - first, last)

    def heal(self, page):
        """`Removal.unpoison`."""
        poisoned = self.states[page] == POISON
        claim = self.ledger.begin_heal(page)
        assert (claim is not None) == poisoned, "healed, and was not poisoned"
        if claim is None:
            return
        assert claim.first <= page < claim.first + claim.count
        self.begun(claim, INFLIGHT)
        assert claim.before == bytes([POISON]) * claim.count
        while self.pinned(claim):
            assert self.ledger.is_heal(claim)
            yield
        yield
        assert not self.pinned(claim), "pinned while it is healed"
        if self.chance.random() < 0.15:  # too few bytes
            yield from self.end(claim, claim.before, Wake.REVOKED)
        elif (yield from self.admit(claim)):
            self.healed += claim.count

    def pinned(self, claim):
        pinned = any(self.pinned_pages[page] for page in range(claim.first, claim.first + claim.count))
        assert self.ledger.pins.hold(claim) == pinned
        return pinned

    def is_retained(self, page):
        return any(first <= page < end for first, end in self.retained)

    def reassert(self, page):
        present = self.states[page] == PRESENT
        claim = self.ledger.begin_reassert(page)
        assert (claim is not None) == present
        if claim is not None:
            assert claim.first <= page < claim.first + claim.count
            self.begun(claim, ADMITTING)
            self.admitting.add(claim)
            yield
            yield from self.end(claim, claim.before, Wake.REVOKED)

    def look(self, page, end, most):
        """`Pager.content`."""
        while page < end:
            claim, state = Claim(), self.states[page]
            obstacle = self.ledger.begin_look(page, min(end, page + most), claim)
            if state not in AT_REST:
                assert obstacle is (Outcome.POISONED if state == POISON else self.claim_on(page))
                if state == POISON:
                    return
                yield self.queue(obstacle)
                continue
            assert obstacle is None
            first = last = self.unit_of(page)[0]  # whole units, all of them present or none
            stop = min(end, page + most, BORDER if page < BORDER else END)
            while last < stop and self.states[last] in ((PRESENT,) if state == PRESENT else CLAIMABLE):
                last += sum(self.unit_of(last)) - last
            assert (claim.first, claim.count) == (first, last - first)
            assert claim.before == self.states[first:last]
            self.queues[claim], self.discarded[claim] = [], set()
            self.set(claim, ADMITTING if state == PRESENT else INFLIGHT)
            if state == PRESENT:
                self.admitting.add(claim)
            for _ in range(self.chance.randrange(1, 4)):
                yield
            page = last
            yield from self.end(claim, claim.before, Wake.REVOKED)

    def resume(self):
        """`Admission.resume`."""
        self.resuming = False
        yield from self.notify(self.resume_fetches())

    def view(self, runs):
        """`AccessGate.enter`: all of the runs, or none."""
        pages = [page for first, count in runs for page in range(first, first + count)]
        pin = Pin(runs, self)
        absent = next((page for page in pages if self.states[page] != PRESENT), None)
        assert self.ledger.pins.add(pin) == absent
        if absent is not None:
            return
        assert pin in self.ledger.pins.of(self)
        self.pinned_pages.update(pages)
        for _ in range(self.chance.randrange(1, 4)):
            yield
        self.pinned_pages.subtract(pages)
        self.ledger.pins.remove(pin)
        self.ledger.pins.remove(pin)  # as an interruption may have it done twice

    def hold(self, first, count):
        """Whoever else pins."""
        pages, run = range(first, first + count), (first, count)
        assert self.ledger.pins.pin(first, count) == all(self.states[page] == PRESENT for page in pages)
        if self.states[first : first + count] != bytes([PRESENT]) * count:
            return
        self.pins[run] += 1
        self.pinned_pages.update(pages)
        for _ in range(self.chance.randrange(1, 4)):
            yield
        self.pins[run] -= 1
        self.pinned_pages.subtract(pages)
        assert self.ledger.pins.unpin(first, count) == (self.pins[run] == 0)

    def hold_settled(self, page):
        """A vCPU that gets an access out of the way."""
        outcome = {PRESENT: Outcome.PRESENT, POISON: Outcome.POISONED}.get(self.states[page])
        pin = Pin(((page, 1),))
        assert self.ledger.pins.add_settled(pin) is outcome
        if outcome is not None:
            self.pinned_pages[page] += 1
            for _ in range(self.chance.randrange(1, 4)):
                yield
            self.pinned_pages[page] -= 1
            self.ledger.pins.remove(pin)

    def retain(self, first, end):
        unit = self.unit
        kept = first // unit * unit, min(-(-end // unit) * unit, END)
        self.ledger.retained.add(self.ledger.whole_units(first, end))
        self.retained.append(kept)
        for _ in range(self.chance.randrange(1, 6)):
            yield
        self.ledger.retained.remove(self.ledger.whole_units(first, end))
        self.retained.remove(kept)

    def call_off(self):
        """`Cancellation.cancel` and RELEASE: it comes at any time, for those too who have been woken."""
        for _ in range(4):
            yield
            if self.sleepers:
                sleeper = self.chance.choice(self.sleepers)
                waiters = self.withdraw(sleeper, Wake.CANCELLED)
                if waiters:
                    sleeper.called_off = True
                    yield from self.notify(waiters)

    def cancel(self):
        for _ in range(self.chance.randrange(8)):
            yield
        self.cancelled = True
        waiters = self.ledger.cancel()
        absent = [claim for claim in self.queues if claim not in self.admitting]
        assert len(waiters) == len(set(waiters))
        held, self.held = self.held, []
        assert set(held) <= set(waiters), "who is held is not cancelled"
        for each in held:
            each.expected = Wake.CANCELLED
        for claim in absent:
            self.woken(claim, [each for each in waiters if each in self.queues[claim]], Wake.CANCELLED)
        assert len(waiters) == len(held) + sum(len(self.queues[claim]) for claim in absent), (
            "admitted pages are cancelled"
        )
        for claim in absent:
            self.queues[claim] = []
        yield from self.notify(waiters)

    def discard(self, first, count):
        self.ledger.discarded(first, count)
        for page in range(first, min(first + count, END)):
            self.throw_away(page, (PRESENT, BACKED, SOURCE, SINK))
            for claim in self.queues:
                if claim.first <= page < claim.first + claim.count:
                    self.discarded[claim].add(page)
        return
        yield

    def throw_away(self, page, states):
        if self.states[page] in states:
            self.states[page] = ZERO

    def switch_off(self):
        """`Pager._switch_off`."""
        while all(HAS_BIT[state] for state in self.states[FIRST:]) and self.ledger.claims:
            yield self.queue(self.ledger.claims[0])

    def cast(self):
        """Draw the actors."""
        chance, unit = self.chance, self.unit
        draw, real = chance.randrange, chance.random
        page = draw(FIRST, END)  # many meet at one page
        for _ in range(draw(3, 6)):
            at = page if real() < 0.7 else draw(FIRST, END)
            first = at - draw(3) if real() < 0.5 else at
            yield "fault", self.fault(at, real() < 0.3, first, at - first + draw(1, 9))
        for _ in range(draw(4)):
            first = (page if real() < 0.5 else draw(FIRST, END)) // unit * unit
            end = min(first + unit * draw(1, 4), END)
            kind = chance.choice(("shut off", *TAKES))
            yield kind, self.take(first, end, chance.choice((1, 4, 512)), *TAKES[kind])
        if real() < 0.4:
            yield "heal", self.heal(page if real() < 0.7 else draw(FIRST, END))
        at = draw(FIRST, END)
        run = at, min(draw(1, 4), END - at)
        yield "hold", self.hold(*run)
        if real() < 0.3:
            yield "hold", self.hold(*run)
        for _ in range(draw(3)):
            yield "hold settled", self.hold_settled(page)
        if real() < 0.4:
            yield "view", self.view([(page, 1), run][: draw(1, 3)])
        if real() < 0.6:
            yield "call off", self.call_off()
        if real() < 0.5:
            yield "reassert", self.reassert(draw(FIRST, END))
        if real() < 0.3:
            yield "cancel", self.cancel()
        if real() < 0.3:
            at = draw(FIRST, END)
            yield "retain", self.retain(at, min(at + draw(1, 4), END))
        if real() < 0.4:
            at = page if real() < 0.7 else draw(FIRST, END)
            yield "discard", self.discard(at // unit * unit, unit)
        if real() < 0.2:
            yield "switch off", self.switch_off()
        for _ in range(draw(3)):
            at = page if real() < 0.5 else draw(FIRST, END)
            yield "look", self.look(at, min(at + draw(1, 6), END), chance.choice((1, 2, 512)))

    # The run

    def run(self):
        try:
            self._run()
        finally:
            self.bitmap.close()
        return self

    def _run(self):
        actors = [[name, steps, None] for name, steps in self.cast()]
        while actors:
            ready = [each for each in actors if each[2] is None or each[2].notified or each[2].impatient]
            if self.paused and not self.resuming and (not ready or self.chance.random() < 0.1):
                self.resuming = True
                actors.append(["resume", self.resume(), None])
                continue
            assert ready, "everybody sleeps: a wake-up is lost"
            actor = ready[int(self.chance.random() * len(ready))]
            if self.log is not None:
                self.log(f"{actor[0]:10} {' '.join(State(each).name for each in self.states[FIRST:])}")
            try:
                actor[2] = next(actor[1])
            except StopIteration:
                actors.remove(actor)
            self.check()
        self.check_end()

    def check(self):
        ledger, states = self.ledger, self.states
        assert ledger.states == states
        assert self.bitmap.bytes == states.translate(HAS_BIT), "a bit is not what the state says"
        claims = ledger.claims
        assert len(claims) == len(self.queues)
        ram = sum(map(states.count, IN_RAM)) + sum(
            each.before.count(state) for each in claims for state in IN_RAM
        )
        assert ledger.resident == ram, "pages in RAM are not counted right"
        claimed = states.translate(IS_CLAIMED)
        for claim in claims:
            first, count = claim.first, claim.count
            assert claimed[first : first + count] == b"\1" * count, "claims overlap, or hold free pages"
            claimed[first : first + count] = bytes(count)
            gone = {page for start, length in claim.discarded for page in range(start, start + length)}
            assert gone == self.discarded[claim], "what has been discarded is forgotten"
            assert claim.waiters == self.queues[claim]
            for each in claim.waiters:
                assert each.claim is claim
        assert 1 not in claimed, "a page is claimed by nobody"
        assert (ledger.pause is not None) == self.paused
        assert self.held == ([] if ledger.pause is None else ledger.pause.waiters)
        for each in self.held:
            assert each.claim is ledger.pause
        for each in self.sleepers:
            assert each.reason is each.expected, f"woken as {each.reason}, not {each.expected}"
            assert (each.claim is None) == (each.reason is not None)

    def check_end(self):
        ledger, counters = self.ledger, self.ledger.counters
        assert ledger.claims == []
        assert [each.notified for each in self.sleepers] == [1] * len(self.sleepers)
        assert not any(ledger.pins.pin(page) and not ledger.pins.unpin(page) for page in range(FIRST, END))
        assert counters.waits == self.waits
        assert counters.pages_admitted == self.admitted
        found = (
            counters.pages_fetched + counters.pages_zeroed + counters.pages_backed + counters.pages_refetched
        )
        assert found + self.healed == self.admitted


def replay(seed, make=Ledger):
    """Run one schedule, for somebody who looks for what went wrong: prints each step and the states before it."""
    Schedule(seed, make, print).run()
