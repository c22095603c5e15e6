"""The pager: the one way in which a page becomes present (`kvmdp.paging.resolver`) or stops being so.

Order of a revocation: state and bit, peers and pins drained, then `trap.revoke` (with every vCPU out of KVM_RUN where
the trap needs that), then the new state, then wake.

Units: RAM pages, seconds.
"""

from __future__ import annotations

import contextlib
import time
from typing import Protocol

import numpy as np

from kvmdp.memory.bitmap import Words, runs_of
from kvmdp.memory.layout import GuestLayout
from kvmdp.paging.claim import Claim, State, Wait
from kvmdp.paging.fault import BusyError, CancelledError, Outcome, PageFault, PagingError
from kvmdp.paging.gate import VcpuGate
from kvmdp.paging.policy import FaultPolicy
from kvmdp.paging.resolver import Resolver
from kvmdp.paging.trap.base import Trap
from kvmdp.source.base import PageSource, ram_source

_MAX_CLAIM = 512  # pages claimed at once when a range is made present: 2 MiB
_REVOKE_BATCH = 512  # pages revoked at once: bounds how long vCPUs are kept out of KVM_RUN


class Peers(Protocol):
    """Those in other processes who access RAM by themselves wherever its bit is set."""

    def invalidate(self, first: int, count: int, deadline: float | None) -> None:
        """Return when no peer accesses these pages any more; their bits are cleared.

        `deadline` is of time.monotonic. Raises BusyError if a peer does not let go.
        """
        ...

    def freeze(self, deadline: float | None) -> None:
        """Return when no peer accesses RAM any more, or will before `thaw`; who comes meanwhile is told too.

        Raises BusyError if a peer does not let go; `thaw` follows.
        """
        ...

    def thaw(self) -> None:
        """Let the peers go on."""
        ...


class DemandPager(Resolver):
    """Decides what happens to an access to an absent page.

    Arguments: where RAM lies; the trap, not yet armed; the source; the policy; the gate the vCPUs pass.
    `bitmap` is the projection of the states: bit set if and only if the guest may enter, or is about to be let in.
    `error` is None until the source has failed for good; from then on nothing absent becomes present. `observer`, if
    set, is told of each fault that was resolved, the claim that did it, and when that began (time.perf_counter_ns);
    it must not block. `peers`, if set, is asked before pages are taken away, and before accesses are frozen.

    `mutex` guards the ledger, `error`, `enabled` and the gates of accesses. `kvmdp.paging.access` takes it too, for a
    copy of a page at the most.
    """

    def __init__(
        self, layout: GuestLayout, trap: Trap, source: PageSource, policy: FaultPolicy, gate: VcpuGate
    ) -> None:
        super().__init__(layout, trap, source, policy)
        self.gate = gate
        self.enabled = False
        self.peers: Peers | None = None

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

    def freeze(self, timeout: float | None = None) -> None:
        """Keep everybody out of RAM but the vCPUs, whose faults go on: accesses raise FrozenError until `thaw`.

        Returns once no such access is under way and no view is open, in this process or a peer's. Raises BusyError
        if that takes longer than `timeout` seconds (None waits), PagingError if accesses are frozen already: then
        nothing has changed. Pins that no access holds (page tables, what KVM writes by itself) do not count.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self.accesses.shut(deadline)
        if self.peers is None:
            return
        try:
            self.peers.freeze(deadline)
        except BaseException:
            self.thaw()
            raise

    def thaw(self) -> None:
        """Let frozen accesses go on; does nothing if none are. For whoever froze them."""
        if self.peers is not None:
            self.peers.thaw()
        self.accesses.open()

    def reassert(self, page: int) -> None:
        """Have the trap admit a present page once more: an access has trapped although it is present.

        Under a claim, so that the trap is neither disarmed nor the page revoked meanwhile.
        """
        with self.mutex:
            claim = self.ledger.begin_reassert(page) if self.enabled else None
        if claim is None:
            return
        try:
            self.trap.reassert(claim.first, claim.count)
        finally:
            self._end(claim, State.PRESENT)

    # Marking, both ways

    def mark_present(self, first: int, count: int) -> Outcome:
        """Make a range present, fetching what has to be fetched; vCPUs may run meanwhile."""
        page, end = self._checked(first, count)
        while True:
            run = self.bitmap.next_absent_run(page, end)
            if run is None:
                return Outcome.PRESENT
            page = run[0]
            outcome = self._make_present(page, min(run[1], _MAX_CLAIM))
            if outcome not in (Outcome.PRESENT, Outcome.ADMITTED):
                return outcome

    def _make_present(self, page: int, count: int) -> Outcome:
        """Make at least the first page of a run present, as much of it as can be had at once."""
        with self.mutex:
            step = self.ledger.obstacle(page)
            if isinstance(step, Outcome):
                return step
            if step is None:
                if self.error is not None:
                    return Outcome.FAILED
                claim = self.ledger.claim(page, page, count)
            else:
                wait = Wait()
                self.ledger.queue(step, wait)
        if step is None:
            return self._carry_out(claim, PageFault(page))
        return self._sleep(wait, None) or Outcome.PRESENT

    def mark_nonpresent(self, first: int, count: int, timeout: float | None = None) -> int:
        """Shut the guest out of a range: its bytes stay in RAM, the next access traps and costs no fetch.

        vCPUs may run meanwhile. The range is widened to whole units; pages that are retained are passed over. Returns
        how many pages were shut off. Raises BusyError if somebody keeps a page for longer than `timeout` seconds (None
        waits): what was taken away before that stays away, the rest is present. PagingError while demand paging is
        switched off. When the machine stops nothing more is taken away: it returns then too.
        """
        page, end = self._checked(first, count)
        unit = self.ledger.unit
        page, end = page // unit * unit, min(-(-end // unit) * unit, self.layout.pages)
        deadline = None if timeout is None else time.monotonic() + timeout
        revoked = 0
        while page < end:
            claim, wait, page = self._begin_revoke(page, end)
            if wait is not None:
                wait.wait()  # for an admit that is under way, which does not take long
            elif claim is not None:
                try:
                    self._revoke(claim, deadline)
                except CancelledError:
                    break  # as before a claim was had: the pages are as they were
                revoked += claim.count
        return revoked

    def _begin_revoke(self, page: int, end: int) -> tuple[Claim | None, Wait | None, int]:
        """Claim the next present run of [page, end) for revocation; returns it, or what is in the way."""
        with self.mutex:
            if not self.enabled:
                raise PagingError(
                    "pages cannot be marked while demand paging is switched off: enable it first"
                )
            claim, in_the_way, page = self.ledger.begin_revoke(page, end, _REVOKE_BATCH)
            wait = None
            if in_the_way is not None:
                wait = Wait()
                self.ledger.queue(in_the_way, wait)
            return claim, wait, page

    def _revoke(self, claim: Claim, deadline: float | None) -> None:
        try:
            self._drain(claim, deadline)
        except BaseException:
            self._end(claim, State.PRESENT)  # as before: neither bytes nor trap have been touched
            raise
        quiesced = self.gate.quiesced() if self.trap.needs_quiesce else contextlib.nullcontext()
        try:
            with quiesced:
                self.trap.revoke(claim.first, claim.count)
        except BaseException as error:
            self._end(claim, State.BACKED, PagingError(f"pages could not be revoked: {error}"))
            raise
        with self.mutex:
            self.counters.pages_revoked += claim.count
        self._end(claim, State.BACKED)

    def _drain(self, claim: Claim, deadline: float | None) -> None:
        """Wait until nobody in user space is at the pages; nobody can begin to be any more.

        Raises BusyError, CancelledError.
        """
        if self.peers is not None:
            self.peers.invalidate(claim.first, claim.count, deadline)
        with self.mutex:
            while self.ledger.pinned(claim):
                if self.ledger.cancelled:
                    raise CancelledError("the machine is stopping: pages in use are not taken away any more")
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    gpa = self.layout.gpa_of_page(claim.first)
                    raise BusyError(
                        f"the {claim.count} pages from gpa {gpa:#x} are in use: a view of them is open"
                    )
                self._unpinned.wait(left)

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

    def _checked(self, first: int, count: int) -> tuple[int, int]:
        if count < 1 or first < 0 or first + count > self.layout.pages:
            raise IndexError(
                f"pages {first} to {first + count - 1} are not all in the {self.layout.pages} of RAM"
            )
        return first, first + count

    # Switching on and off, stopping

    def enable(self) -> None:
        """Arm the trap: from now on an access to an absent page is a fault."""
        if self.enabled:
            return
        with self.gate.quiesced():
            self.trap.arm(self)
            with self.mutex:
                self.enabled = True

    def disable(self) -> None:
        """Disarm the trap: RAM is plain memory again, with no overhead left.

        Raises PagingError while pages are absent: nothing would fetch them any more.
        """
        if not self.enabled:
            return
        with self.gate.quiesced():
            self._let_nobody_begin()
            self.trap.disarm()

    def _let_nobody_begin(self) -> None:
        """Switch off once nobody is at a page; raises PagingError if a page is absent.

        Who is at a present page admits it, outside the gate, and needs nothing of a vCPU that the closed gate
        holds up. A revocation would (the pins), but its pages are absent from its beginning.
        """
        while True:
            with self.mutex:
                absent = self.layout.pages - self.bitmap.count()
                if absent:
                    raise PagingError(
                        f"demand paging cannot be switched off while {absent} pages are absent: "
                        "make them present first"
                    )
                if not self.ledger.claims:
                    self.enabled = False
                    return
                wait = Wait()
                self.ledger.queue(self.ledger.claims[0], wait)
            wait.wait()

    def cancel(self) -> None:
        """Begin no more claims: every fault on an absent page ends as CANCELLED.

        Claims under way end in their own time, at once if it is another process that fills them. Whoever waits for one
        is woken now, but for pages that are present already and only being admitted; so is whoever sleeps in the
        kernel on an absent page.
        """
        with self.mutex:
            woken = self.ledger.cancel()
            self._unpinned.notify_all()
        for waiter in woken:
            waiter.notify()
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
            self.trap.hold_sleepers()

    def close(self) -> None:
        """Give the bitmap back; nobody may use the pager any more."""
        self.bitmap.close()
