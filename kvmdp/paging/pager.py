"""The pager: how a page becomes present (`kvmdp.paging.admission`) or stops being so (`kvmdp.paging.removal`).

Here is what concerns all of RAM: switching demand paging on and off, freezing accesses, marking, stopping.

Units: RAM pages, seconds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator

import numpy as np

from kvmdp.errors import BusyError, PagingError, SwitchedOffError
from kvmdp.interruption import Uninterrupted, undone
from kvmdp.memory.bitmap import Words, runs_of
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import REGION, Outcome, PageFault
from kvmdp.paging.claim import State, Wait, notify
from kvmdp.paging.policy import FaultPolicy
from kvmdp.paging.ports import Quiescer, Trap
from kvmdp.paging.removal import Peers, Revoker
from kvmdp.paging.takeable import takeable
from kvmdp.source.base import PageSource, ram_source
from kvmdp.waiting import Condition

__all__ = ["DemandPager", "Peers"]

ANSWER_SECONDS = 0.005  # for a device in another process to answer, by who waits for nobody else
_MAX_CLAIM = 512  # pages claimed at once when a range is made present: 2 MiB
_ABSENT = takeable(State.SOURCE, State.BACKED, State.ZERO, State.SINK, State.POISON, present=False)


class DemandPager(Revoker):
    """Decides what happens to an access to an absent page.

    Arguments: where RAM lies; the trap, not yet armed; the source; the policy; the gate the vCPUs pass.
    `bitmap` is the projection of the states: bit set if and only if the guest may enter, or is about to be let in.
    `error` is None until the source has failed for good; from then on nothing absent becomes present. `observer`, if
    set, is told of each fault that was resolved, or what stands for it where a page was marked or healed, the claim
    that did it, and when that began (time.perf_counter_ns); it must not block. `peers`, if set, is asked before pages
    are taken away, and before accesses are frozen.

    `mutex` guards the ledger, `error`, `enabled` and the gates of accesses. `kvmdp.paging.access` takes it too, for a
    copy of a page at the most.
    """

    def __init__(
        self, layout: GuestLayout, trap: Trap, source: PageSource, policy: FaultPolicy, gate: Quiescer
    ) -> None:
        super().__init__(layout, trap, source, policy, gate)
        self._switcher: object = None  # who has the claim on `enabled`: to arm or disarm the trap
        self._switched = Condition(self.mutex)

    # Pages that stay

    def retain(self, first: int, count: int) -> None:
        """Never make these pages non-present from now on, once they are present; widened to whole units.

        For pages that KVM uses without an access that could trap: live page tables, of which it keeps what it has
        read, and pages it writes to by itself. A pin would make a revocation wait; these it passes over. One that has
        begun ends first: whoever wants the pages present makes them so afterwards. Undone by `let_go`; counted.
        """
        first, end = self._checked(first, count)
        with self.mutex:
            self.ledger.retain(first, end)

    def let_go(self, first: int, count: int) -> None:
        """Undo one `retain` of the same pages."""
        first, end = self._checked(first, count)
        with self.mutex:
            self.ledger.let_go(first, end)

    # Accesses that no vCPU makes

    @contextlib.contextmanager
    def frozen(self, timeout: float | None = None) -> Iterator[None]:
        """Keep everybody out of RAM but the vCPUs for the time of the block: accesses raise FrozenError.

        The block begins once no such access is under way and no view is open, in this process or a peer's. Raises
        BusyError if that takes longer than `timeout` seconds (None waits), PagingError if accesses are frozen already:
        then nothing has changed. Pins that no access holds (page tables, what KVM writes by itself) do not count.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        freezer = object()
        with undone(lambda: self._thaw(freezer)):
            self.accesses.shut(freezer, deadline)
            if self.peers is not None:
                self.peers.freeze(deadline)
            yield

    def _thaw(self, freezer: object) -> None:
        if not self.accesses.is_shut_by(freezer):
            return
        if self.peers is not None:
            self.peers.thaw()
        self.accesses.open()

    def reassert(self, page: int) -> bool:
        """Have the trap admit a present page once more: an access has trapped although it is present.

        Under a claim, so that the trap is neither disarmed nor the page revoked meanwhile. Returns whether there was
        something to mend.
        """
        with self.owning() as claim:
            with self.mutex:
                if not self.enabled or self.ledger.begin_reassert(page, claim) is None:
                    return False
            with Uninterrupted():
                mended = self.trap.reassert(claim.first, claim.count)
            self._end(claim, State.PRESENT)
            return mended

    def collapse(self, first: int, count: int) -> int:
        """Put present pages together into as large pieces as the trap can make of them: huge pages, memslots.

        Whole regions of 2 MiB (or whole units, if those are larger) inside the range of which every page is present;
        the others are passed over, as are all where `trap.collapses` is False. vCPUs may run, pages stay present, but
        who faults on one or asks for it meanwhile waits. Returns how many pages have been put together.
        """
        first, end = self._checked(first, count)
        size = max(REGION, self.ledger.unit)
        done = 0
        for page in range(-(-first // size) * size, end // size * size if self.trap.collapses else 0, size):
            with self.owning() as claim:
                with self.mutex:
                    if not self.enabled or self.ledger.begin_present(page, size, claim) is None:
                        continue
                with Uninterrupted():
                    done += size * self.trap.collapse(page, size)
                self._end(claim, State.PRESENT)
        return done

    # Marking, both ways

    def mark_present(self, first: int, count: int) -> Outcome:
        """Make a range present, fetching what has to be fetched; vCPUs may run meanwhile.

        Returns PRESENT once each page of it has been present since, or the outcome that ended it. What is taken away
        meanwhile, as by a resident limit of fewer pages, is absent again.
        """
        page, end = self._checked(first, count)
        while (run := self.bitmap.next_absent_run(page, end)) is not None:
            outcome, page = self._make_present(run[0], min(run[1], _MAX_CLAIM))
            if outcome is Outcome.ADMITTED:
                self.house.keep()
            elif outcome is not Outcome.PRESENT:
                return outcome
        return Outcome.PRESENT

    def _make_present(self, page: int, count: int) -> tuple[Outcome, int]:
        """Make at least the first page of a run present, as much of it as can be had at once.

        Returns ADMITTED, PRESENT if somebody else may have done it, or why not; and the page to go on at.
        """
        with self.owning() as claim:
            with self.mutex:
                step = self.ledger.obstacle(page)
                if isinstance(step, Outcome):
                    return step, page
                if step is None:
                    if self.error is not None:
                        return Outcome.FAILED, page
                    self.ledger.claim(page, page, count, claim)
                else:
                    wait = Wait()
                    self.ledger.queue(step, wait)
            if step is None:
                return self._carry_out(claim, PageFault(page)), min(claim.first + claim.count, page + count)
        return self._sleep(wait, None) or Outcome.PRESENT, page

    def shut_off(self, first: int, count: int) -> None:
        """Shut the guest out of a range, up to the first page that somebody is at.

        Waits for nobody but a device in another process, and for that a moment.
        """
        with contextlib.suppress(BusyError, SwitchedOffError):
            self.mark_nonpresent(first, count, timeout=0 if self.peers is None else ANSWER_SECONDS)

    def complete(self, first: int, count: int) -> Outcome:
        """Make present what nobody is at of a range, and pass over the rest: waits for no claim.

        Returns PRESENT, or FAILED or CANCELLED if that ended it.
        """
        page, end = self._checked(first, count)
        while (run := self.bitmap.next_absent_run(page, end)) is not None:
            page = run[0]
            with self.owning() as claim:
                with self.mutex:
                    step = self.ledger.obstacle(page)
                    if step is None and self.error is not None:
                        step = Outcome.FAILED
                    if step is None:
                        self.ledger.claim(page, page, min(run[1], _MAX_CLAIM), claim)
                if step is None:
                    step, page = self._carry_out(claim, PageFault(page)), claim.first + claim.count
                else:
                    page += 1
            if step is Outcome.FAILED or step is Outcome.CANCELLED:
                return step
        return Outcome.PRESENT

    def mark_bitmap_present(self, words: Words) -> Outcome:
        """Make the pages of a sparse bitmap (`kvmdp.memory.bitmap`) present."""
        for first, count in self._runs(words):
            outcome = self.mark_present(first, count)
            if outcome is not Outcome.PRESENT:
                return outcome
        return Outcome.PRESENT

    def mark_bitmap_nonpresent(self, words: Words) -> int:
        """Shut the guest out of the pages of a sparse bitmap; returns how many were present."""
        return sum(self.mark_nonpresent(first, count) for first, count in self._runs(words))

    def _runs(self, words: Words) -> list[tuple[int, int]]:
        if words.dtype != np.uint64 or words.shape != ((self.layout.pages + 63) // 64,):
            raise ValueError(
                f"a bitmap of {self.layout.pages} pages is uint64[{(self.layout.pages + 63) // 64}], "
                f"not {words.dtype}{list(words.shape)}"
            )
        return [(int(first), int(count)) for first, count in runs_of(words, self.layout.pages)]

    # Switching on and off, stopping

    def start_plain(self) -> None:
        """Begin as after `disable`, with nothing ever armed: the bytes of all RAM are in place; before any vCPU runs.

        For a trap that works by memslot; `enable` ends it.
        """
        with self.mutex:
            self.ledger.adopt()
        self.trap.disarm()

    def enable(self) -> None:
        """Arm the trap: from now on an access to an absent page is a fault. Does nothing if it is armed."""
        with self._switching():
            if self.enabled:
                return
            with self.gate.quiesced(), Uninterrupted():
                self.trap.arm(self)
                with self.mutex:
                    self.enabled = True
        for remind in self.reminders:  # all of RAM may be present
            remind()

    def disable(self) -> None:
        """Disarm the trap: RAM is plain memory again, with no overhead left. Does nothing if it is disarmed.

        Raises PagingError while pages are absent: nothing would fetch them any more. Not for who keeps house.
        """
        with self._switching():
            if not self.enabled:
                return
            with self.gate.quiesced():
                is_begun = False
                try:
                    self._let_nobody_begin()
                    with Uninterrupted():
                        is_begun = True
                        self.trap.disarm()
                except BaseException:
                    if not is_begun:  # an interruption came between the two
                        self.enabled = True
                    raise

    @contextlib.contextmanager
    def _switching(self) -> Iterator[None]:
        """Be the only one to arm or disarm the trap; who comes second waits and finds it done."""
        switcher = object()
        with undone(lambda: self._let_switch(switcher)):
            with self.mutex:
                while self._switcher is not None:
                    self._switched.wait()
                self._switcher = switcher
            yield

    def _let_switch(self, switcher: object) -> None:
        with self.mutex:
            if self._switcher is switcher:
                self._switcher = None
            self._switched.notify_all()

    def _let_nobody_begin(self) -> None:
        """Switch off once nobody is at a page or keeps house; raises PagingError if a page is absent.

        All pages are present is when the last regions of memslots are merged, with no claim held (`Housekeeping`): to
        disarm meanwhile would delete the same memslots. So who is at that is waited for as well, and nobody begins once
        `enabled` is False, which is set in the step that finds no page absent and no claim.

        Why it comes to an end although the caller keeps the vCPUs out: whoever is waited for is outside the gate, needs
        none of them to get on, and may stop them too (the gate counts who closes it). Who is at a present page admits
        it; a revocation would wait (for pins), but its pages are absent from its beginning. Who keeps house does not
        insist on a claim or a pin, so not on the views that the caller or the housekeeper itself may hold; it finds
        nothing absent to fetch, and is refused what it would take away. What was begun before is a claim and has ended.
        """
        while True:
            with self.mutex:
                absent = self.layout.pages - self.bitmap.count()
                if absent:
                    raise PagingError(
                        f"demand paging cannot be switched off while {absent} pages are absent: "
                        f"make them present first{self._remedy_for_poison()}"
                    )
                if not self.ledger.claims:
                    self.enabled = False
                    self.house.await_nobody()
                    return
                wait = Wait()
                self.ledger.queue(self.ledger.claims[0], wait)
            wait.wait()

    def _remedy_for_poison(self) -> str:
        poisoned = self.ledger.states.count(State.POISON)
        return (
            f"; {poisoned} of them are poisoned, and have to be given new bytes (unpoison)"
            if poisoned
            else ""
        )

    def cancel(self) -> None:
        """Begin no more claims: every fault on an absent page ends as CANCELLED.

        Claims under way end in their own time, at once if it is another process that fills them. Whoever waits for one
        is woken now, but for pages that are present already and only being admitted; so is whoever sleeps in the
        kernel on an absent page.
        """
        with self.mutex:
            woken = self.ledger.cancel()
            self._unpinned.notify_all()
        notify(woken)
        remote = ram_source(self._source)
        if remote is not None:
            remote.cancel()
        if self.enabled:
            self.trap.release_sleepers()

    def resume(self) -> None:
        """Undo `cancel`: an access to an absent page is a fault again. No vCPU may run.

        A source in another process that has been told to give up stays so: what it has not filled cannot be had.
        """
        with self.mutex:
            self.ledger.cancelled = False
        if self.enabled:
            with contextlib.closing(self._absent_runs()) as runs:
                self.trap.hold_sleepers(runs)

    def _absent_runs(self) -> Generator[tuple[int, int]]:
        """Yield the runs of pages that are absent, each claimed until the next is asked for.

        Somebody else's are passed over: what comes of those is admitted as ever, over whatever the trap has there.
        """
        page, pages = 0, self.layout.pages
        while page < pages:
            with self.owning() as claim:
                with self.mutex:
                    _, _, page = self.ledger.begin_take(page, pages, pages, _ABSENT, claim)
                if claim.count:
                    yield claim.first, claim.count

    def close(self) -> None:
        """Give bitmap and sink back; nobody may use the pager any more."""
        self.bitmap.close()
        if self.sink is not None:
            self.sink.close()
