"""The ledger under 100,000 interleavings, each from its seed; and that broken ledgers do not get through them."""

import pytest
from schedules import Schedule

from kvmdp.page import Outcome
from kvmdp.paging.claim import State, Wake
from kvmdp.paging.ledger import Ledger
from kvmdp.paging.pins import Pins, Retained

SCHEDULES = 100_000
BLOCK = 5_000
SOON_FOUND = 1_000  # schedules in which a broken ledger has to be found


def run(seed, make=Ledger):
    try:
        return Schedule(seed, make).run()
    except Exception as error:
        error.add_note(f"seed {seed}: schedules.replay({seed}) shows its steps")
        raise


def goes_wrong(seed, make):
    try:
        Schedule(seed, make).run()
    except (AssertionError, LookupError, ValueError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize("first", range(0, SCHEDULES, BLOCK))
def test_everybody_is_woken_once_for_the_right_reason(first):
    reasons = set()
    for seed in range(first, first + BLOCK):
        reasons.update(each.reason for each in run(seed).sleepers)
    assert reasons == set(Wake)


def test_a_seed_says_all():
    steps = ([], [])
    for log in steps:
        Schedule(7, log=log.append).run()
    assert steps[0] == steps[1] != []


class CommitsWithoutWaking(Ledger):
    def commit(self, claim):
        waiters = claim.waiters
        super().commit(claim)
        return waiters[1:]


class LeavesTheWithdrawnInTheQueue(Ledger):
    def withdraw(self, waiter, reason):
        claim = waiter.claim
        done = super().withdraw(waiter, reason)
        if done:
            claim.waiters.append(waiter)
        return done


class WithdrawsWhoHasBeenWoken(Ledger):
    def withdraw(self, waiter, reason):
        if waiter.claim is None:
            waiter.reason = reason
            return True
        return super().withdraw(waiter, reason)


class CancelForgetsAQueue(Ledger):
    def cancel(self):
        last = self.claims.pop() if self.claims else None
        woken = super().cancel()
        if last is not None:
            self.claims.append(last)
        return woken


class CancelWakesWhoIsAboutToBeAdmitted(Ledger):
    def cancel(self):
        woken = super().cancel()
        for claim in self.claims:
            for waiter in tuple(claim.waiters):
                super().withdraw(waiter, Wake.CANCELLED)
                woken.append(waiter)
        return woken


class SaysCommittedOfAFailure(Ledger):
    def end(self, claim, states, reason):
        return super().end(claim, states, Wake.COMMITTED if reason is Wake.FAILED else reason)


class QueuesAtAnotherClaim(Ledger):
    def queue(self, claim, waiter):
        super().queue(self.claims[0], waiter)


class EndsWithTheBitSet(Ledger):
    def end(self, claim, states, reason):
        woken = super().end(claim, states, reason)
        self.bitmap.set_range(claim.first, 1)
        return woken


class LetsInBeforeTheTrapIsTold(Ledger):
    def admit(self, claim):
        super().admit(claim)
        self.states[claim.first : claim.first + claim.count] = bytes([State.PRESENT]) * claim.count


class TakesAwayWhatIsRetained(Ledger):
    def begin_revoke(self, *arguments):
        self.retained = Retained()
        return super().begin_revoke(*arguments)


def with_pins(broken):
    """A ledger whose pins are broken."""

    class BrokenPins(Ledger):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.pins = broken(self.states)

    BrokenPins.__name__ = broken.__name__
    return BrokenPins


class ForgetsASecondPin(Pins):
    def pin(self, first, count=1):
        if (first, count) in self._counted:
            return True
        return super().pin(first, count)

    def unpin(self, first, count=1):
        self._counted.pop((first, count), None)
        return True


class SeesNoOverlappingPin(Pins):
    def hold(self, claim):
        return (claim.first, claim.count) in self._counted


class ForgetsAPinOfSeveralRuns(Pins):
    def add(self, pin):
        absent = super().add(pin)
        if absent is None and len(pin.runs) > 1:
            self.remove(pin)
        return absent


class ClaimsHalfAUnit(Ledger):
    def claim(self, page, first, count):
        unit, self.unit = self.unit, 1
        try:
            return super().claim(page, first, count)
        finally:
            self.unit = unit


class ClaimsOverTheBorder(Ledger):
    def bounds_of(self, page):
        return 0, self.pages


class BeginsAfterCancel(Ledger):
    def obstacle(self, page):
        cancelled, self.cancelled = self.cancelled, False
        try:
            return super().obstacle(page)
        finally:
            self.cancelled = cancelled


class BeginsToTakeAfterCancel(Ledger):
    def begin_take(self, page, end, most, kinds):
        cancelled, self.cancelled = self.cancelled, False
        try:
            return super().begin_take(page, end, most, kinds)
        finally:
            self.cancelled = cancelled


class TakesPagesOfAnother(Ledger):
    def begin_take(self, page, end, most, kinds):
        return super().begin_take(page, end, most, kinds.replace(b"W", b"A"))


class PassesOverPagesOfAnother(Ledger):
    def begin_take(self, page, end, most, kinds):
        return super().begin_take(page, end, most, kinds.replace(b"W", b"."))


class LeavesAbsentPages(Ledger):
    def begin_take(self, page, end, most, kinds):
        return super().begin_take(page, end, most, kinds.replace(b"A", b"."))


class TakesHalfAUnit(Ledger):
    def begin_take(self, page, end, most, kinds):
        unit, self.unit = self.unit, 1
        try:
            return super().begin_take(page, end, most, kinds)
        finally:
            self.unit = unit


class LeavesTheBitOfWhatIsTaken(Ledger):
    def begin_take(self, page, end, most, kinds):
        found = super().begin_take(page, end, most, kinds)
        if found[0] is not None and found[0].before[0] == State.PRESENT:
            self.bitmap.set_range(found[0].first, 1)
        return found


class FetchesPoison(Ledger):
    def obstacle(self, page):
        found = super().obstacle(page)
        return None if found is Outcome.POISONED else found


class HealsWhatIsWell(Ledger):
    def begin_heal(self, page):
        claim = super().begin_heal(page)
        if claim is None and self.states[page] == State.BACKED:
            return self.claim(page, page, 1)
        return claim


class HealsHalfAUnit(Ledger):
    def begin_heal(self, page):
        unit, self.unit = self.unit, 1
        try:
            return super().begin_heal(page)
        finally:
            self.unit = unit


class LetsGoOfWhatIsPoisoned(Pins):
    def add_settled(self, pin):
        found = super().add_settled(pin)
        if found is Outcome.POISONED:
            self.remove(pin)
        return found


class CountsBackedPagesTwice(Ledger):
    def commit(self, claim):
        before = claim.before
        claim.before = before.replace(bytes([State.BACKED]), bytes([State.ZERO]))
        try:
            return super().commit(claim)
        finally:
            claim.before = before


class CountsWhatIsTakenAsInRam(Ledger):
    def end(self, claim, states, reason):
        resident = self.resident
        woken = super().end(claim, states, reason)
        self.resident = max(self.resident, resident)
        return woken


class CountsDiscardedPagesAsInRam(Ledger):
    def discarded(self, first, count):
        resident = self.resident
        super().discarded(first, count)
        self.resident = resident


class ForgetsADiscardOfWhatIsClaimed(Ledger):
    def discarded(self, first, count):
        super().discarded(first, count)
        for claim in self.claims:
            claim.discarded = ()


class LeavesADiscardedPagePresent(Ledger):
    def end(self, claim, states, reason):
        was_evicted = self.states[claim.first] == State.EVICTING
        if was_evicted and states == bytes([State.PRESENT]) * claim.count:
            claim.discarded = ()
        return super().end(claim, states, reason)


class ForgetsWhatCameFromTheSink(Ledger):
    def commit(self, claim):
        refetched = self.counters.pages_refetched
        woken = super().commit(claim)
        self.counters.pages_refetched = refetched
        return woken


class SplitForgetsWhoWaits(Ledger):
    def split(self, claim, count):
        piece = super().split(claim, count)
        piece.waiters = []
        return piece


class SplitLeavesWhoWaitsWithTheRest(Ledger):
    def split(self, claim, count):
        piece = super().split(claim, count)
        piece.waiters, claim.waiters = [], piece.waiters
        return piece


class SplitLeavesWhoWaitsWithoutAClaim(Ledger):
    def split(self, claim, count):
        piece = super().split(claim, count)
        for waiter in piece.waiters:
            waiter.claim = claim
        return piece


class SplitLosesADiscardOfThePiece(Ledger):
    def split(self, claim, count):
        piece = super().split(claim, count)
        piece.discarded = ()
        return piece


class SplitLosesADiscardOfTheRest(Ledger):
    def split(self, claim, count):
        piece = super().split(claim, count)
        claim.discarded = ()
        return piece


class SplitForgetsWhatTheRestWas(Ledger):
    def split(self, claim, count):
        piece = super().split(claim, count)
        claim.before = bytes([State.SOURCE]) * claim.count
        return piece


class SplitDoesNotListThePiece(Ledger):
    def split(self, claim, count):
        piece = super().split(claim, count)
        self.claims.remove(piece)
        return piece


class ALookForgetsWhatItFound(Ledger):
    def begin_look(self, page, end, claim):
        found = super().begin_look(page, end, claim)
        if claim.before[:1] == bytes([State.ZERO]):
            claim.before = bytes([State.SOURCE]) * claim.count
        return found


class ALookEndsPresentPagesAsBacked(Ledger):
    def end(self, claim, states, reason):
        if states == bytes([State.PRESENT]) * claim.count and self.states[claim.first] == State.ADMITTING:
            states = bytes([State.BACKED]) * claim.count
        return super().end(claim, states, reason)


class ALookShutsTheGuestOut(Ledger):
    def begin_look(self, page, end, claim):
        found = super().begin_look(page, end, claim)
        if claim.count:
            self.states[page : page + claim.count] = bytes([State.INFLIGHT]) * claim.count
        return found


class ALookGoesOnOverPagesThatArePresent(Ledger):
    def begin_look(self, page, end, claim):
        found = super().begin_look(page, end, claim)
        next_page = claim.first + claim.count
        if claim.count and next_page < end and self.states[next_page] == State.PRESENT:
            claim.count += 1
            claim.before += bytes([State.PRESENT])
            self.states[next_page] = self.states[page]
        return found


class ALookClaimsAPartOfAUnit(Ledger):
    def begin_look(self, page, end, claim):
        unit, self.unit = self.unit, 1
        try:
            return super().begin_look(page, end, claim)
        finally:
            self.unit = unit


class ALookSeesPoison(Ledger):
    def begin_look(self, page, end, claim):
        found = super().begin_look(page, end, claim)
        return None if found is Outcome.POISONED else found


class APauseLetsWhatIsAtTheSourceBeClaimed(Ledger):
    def obstacle(self, page):
        found = super().obstacle(page)
        is_held = found is not None and found is self.pause
        return None if is_held and self.states[page] == State.SOURCE else found


class APauseHoldsWhatIsInRam(Ledger):
    def obstacle(self, page):
        found = super().obstacle(page)
        return self.pause if found is None else found


class APauseLetsNeighboursBeClaimed(Ledger):
    def claim(self, page, first, count):
        pause, self.pause = self.pause, None
        try:
            return super().claim(page, first, count)
        finally:
            self.pause = pause


class ASecondPauseForgetsWhoIsHeld(Ledger):
    def pause_fetches(self):
        self.pause = None
        super().pause_fetches()


class AResumeWakesNobody(Ledger):
    def resume_fetches(self):
        super().resume_fetches()
        return []


class AResumeSaysThatItFailed(Ledger):
    def resume_fetches(self):
        woken = super().resume_fetches()
        for waiter in woken:
            waiter.reason = Wake.FAILED
        return woken


class AResumeGoesOnHolding(Ledger):
    def resume_fetches(self):
        pause = self.pause
        woken = super().resume_fetches()
        self.pause = pause
        return woken


class CancelForgetsWhoIsHeld(Ledger):
    def cancel(self):
        pause, self.pause = self.pause, None
        woken = super().cancel()
        self.pause = pause
        return woken


class APauseHoldsAfterCancel(Ledger):
    def obstacle(self, page):
        found = super().obstacle(page)
        return self.pause if found is Outcome.CANCELLED and self.pause is not None else found


@pytest.mark.parametrize(
    "broken",
    [
        CommitsWithoutWaking,
        LeavesTheWithdrawnInTheQueue,
        WithdrawsWhoHasBeenWoken,
        CancelForgetsAQueue,
        CancelWakesWhoIsAboutToBeAdmitted,
        SaysCommittedOfAFailure,
        QueuesAtAnotherClaim,
        EndsWithTheBitSet,
        LetsInBeforeTheTrapIsTold,
        TakesAwayWhatIsRetained,
        with_pins(ForgetsASecondPin),
        with_pins(SeesNoOverlappingPin),
        with_pins(ForgetsAPinOfSeveralRuns),
        ClaimsHalfAUnit,
        ClaimsOverTheBorder,
        BeginsAfterCancel,
        BeginsToTakeAfterCancel,
        TakesPagesOfAnother,
        PassesOverPagesOfAnother,
        LeavesAbsentPages,
        TakesHalfAUnit,
        LeavesTheBitOfWhatIsTaken,
        FetchesPoison,
        HealsWhatIsWell,
        HealsHalfAUnit,
        with_pins(LetsGoOfWhatIsPoisoned),
        CountsBackedPagesTwice,
        CountsWhatIsTakenAsInRam,
        CountsDiscardedPagesAsInRam,
        ForgetsADiscardOfWhatIsClaimed,
        LeavesADiscardedPagePresent,
        ForgetsWhatCameFromTheSink,
        SplitForgetsWhoWaits,
        SplitLeavesWhoWaitsWithTheRest,
        SplitLeavesWhoWaitsWithoutAClaim,
        SplitLosesADiscardOfThePiece,
        SplitLosesADiscardOfTheRest,
        SplitForgetsWhatTheRestWas,
        SplitDoesNotListThePiece,
        ALookForgetsWhatItFound,
        ALookEndsPresentPagesAsBacked,
        ALookShutsTheGuestOut,
        ALookGoesOnOverPagesThatArePresent,
        ALookClaimsAPartOfAUnit,
        ALookSeesPoison,
        APauseLetsWhatIsAtTheSourceBeClaimed,
        APauseHoldsWhatIsInRam,
        APauseLetsNeighboursBeClaimed,
        ASecondPauseForgetsWhoIsHeld,
        AResumeWakesNobody,
        AResumeSaysThatItFailed,
        AResumeGoesOnHolding,
        CancelForgetsWhoIsHeld,
        APauseHoldsAfterCancel,
    ],
    ids=lambda broken: broken.__name__,
)
def test_a_broken_ledger_is_found(broken):
    assert any(goes_wrong(seed, broken) for seed in range(SOON_FOUND))
