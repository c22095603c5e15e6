"""How a page becomes present: a fault claims it, the source fills it, the trap admits it, its waiters are woken.

A page is claimed before its bytes or its trap change, and a claim has one owner. What spans a system call is the
claim, never a mutex: the mutex below is held for a few statements, to change the ledger (`kvmdp.paging.ledger`, which
knows states, claims and waiters). Order of a commit: bytes in RAM, then state and bit, then `trap.admit`, then wake.

A claim ends whatever exception its owner meets, and where: its owner makes the `Claim`, has the ledger list it, and on
any exception ends it as far as it had got (`owning`, and `resolve`, where a `with` would be too dear). An interruption
between two steps of that end is one more exception, and comes once (`kvmdp.interruption`): it is met a second time.

If the source cannot deliver, paging is *paused*: pages that are in RAM come and go as ever, all others are not fetched
until `resume`. Faults on them are held until then, or fail, as `holds` says.

Units: RAM pages, seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

from kvmdp.errors import PagingError
from kvmdp.interruption import Uninterrupted, undone
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE, Origin, Outcome, PageFault
from kvmdp.paging.broken import broken
from kvmdp.paging.cancellation import Cancellation
from kvmdp.paging.claim import Claim, State, Wait, Waiter, Wake, notify
from kvmdp.paging.contents import Contents
from kvmdp.paging.jobs import Jobs
from kvmdp.paging.ledger import Ledger
from kvmdp.paging.pins import Pin
from kvmdp.paging.policy import FaultPolicy, PolicyError, checked
from kvmdp.paging.ports import Trap
from kvmdp.shortage import ShortageError
from kvmdp.source.base import PageSource, SourceError
from kvmdp.waiting import Condition


class Admission:
    """Makes pages present, and sees claims to their end.

    Arguments: where RAM lies; the ledger; the trap; the source; the policy.

    `mutex` guards the ledger, `enabled`, `error` and `paused`. `enabled` is whether the trap is armed. `error` is None
    until faults fail for good: something that serves them has broken, or the source cannot deliver and `holds` is
    False. `paused` is why the source could not deliver, None if it can. `holds` is whether a fault that a pause
    concerns is held until `resume`; set it before any fault. `unpinned` is notified when a pin is undone.
    """

    def __init__(
        self, layout: GuestLayout, ledger: Ledger, trap: Trap, source: PageSource, policy: FaultPolicy
    ) -> None:
        self.mutex = threading.RLock()
        self.unpinned = Condition(self.mutex)
        self.ledger = ledger
        self.jobs = Jobs(self.mutex, lambda: self.enabled)
        self.contents = Contents(source, trap, self._may_retry)
        self.enabled = False
        self.error: PagingError | None = None
        self.paused: PagingError | None = None
        self.holds = False
        self._layout = layout
        self._trap = trap
        self._window = checked(policy)

    def resolve(
        self, fault: PageFault, timeout: float | None = None, cancellation: Cancellation | None = None
    ) -> Outcome:
        """Make the faulting page present, or wait until the owner of a claim on it has.

        For threads that may sleep: vCPU threads, devices in this process, the VMM itself. Waiting ends after
        `timeout` seconds (TIMED_OUT) or when `cancellation` is cancelled (CANCELLED); a fetch of one's own does not.
        """
        deadline = None
        while True:
            claim = Claim()
            try:
                step = self.begin(fault, claim=claim)
                if step is claim:
                    done = self.carry_out(claim, fault)
            except BaseException:
                self._settle(claim)
                raise
            if step is claim:
                if done is Outcome.FAILED and self.is_held():
                    continue
                if self.jobs.on_after_fault:
                    self.jobs.work()
                return done
            if isinstance(step, Outcome):
                return step
            assert isinstance(step, Wait)
            if timeout is not None and deadline is None:
                deadline = time.monotonic() + timeout
            outcome = self.sleep(step, deadline, cancellation)
            if outcome is not None:
                return outcome

    def sleep(
        self, wait: Wait, deadline: float | None, cancellation: Cancellation | None = None
    ) -> Outcome | None:
        """Wait for a claim; returns the outcome if that settles it, None if it is time to look again."""
        if cancellation is not None:
            cancellation.attend(wait)
        if not wait.wait(None if deadline is None else max(deadline - time.monotonic(), 0)):
            self.withdraw(wait, Wake.TIMED_OUT)  # or it has been woken since, for a reason of its own
        if wait.reason is Wake.TIMED_OUT:
            return Outcome.TIMED_OUT
        if cancellation is not None and cancellation.cancelled:
            return Outcome.CANCELLED
        return None

    def resolve_or_park(
        self, fault: PageFault, waiter: Waiter, count: int = 1, had: Claim | None = None
    ) -> Outcome | None:
        """Make the faulting page present, but never wait for the owner of a claim on it, nor for the end of a pause.

        Of more than one page, `count` from the faulting one on, as many become present as one claim can have: after
        ADMITTED they end where `had` does, if that is given.
        For userfaultfd readers and servers of other processes, which ask `jobs.may_admit` first. Returns None if the
        page is claimed, or held by a pause: then `waiter` is notified when that has ended in whatever way, or when it
        is withdrawn.
        """
        while True:
            claim = Claim()
            try:
                step = self.begin(fault, waiter, claim, count)
                if step is claim:
                    done = self.carry_out(claim, fault)
            except BaseException:
                self._settle(claim)
                raise
            if step is not claim:
                return step if isinstance(step, Outcome) else None
            if done is not Outcome.FAILED or not self.is_held():
                if had is not None:
                    had.first, had.count = claim.first, claim.count
                return done

    def begin(
        self, fault: PageFault, waiter: Waiter | None = None, claim: Claim | None = None, wanted: int = 1
    ) -> Claim | Waiter | Outcome:
        """Claim the pages that a fault is to fetch, or `wanted` pages from the faulting one on, or say why not.

        Never sleeps. The owner of the Claim, which is `claim` if that is given, fills it and commits, or fails it. If
        the page has another owner, or a pause concerns it, `waiter` is queued and returned, or else a new Wait; but to
        a vCPU's fault with a `waiter` a page that is being healed is POISONED still.
        """
        ledger = self.ledger
        try:
            with self.mutex:
                step = ledger.obstacle(fault.page)
                if step is None:
                    if self.error is not None:
                        return Outcome.FAILED
                    first, count = self._window(fault) if wanted == 1 else (fault.page, wanted)
                    ledger.counters.claims += 1
                    return ledger.claim(fault.page, first, count, claim)
                if isinstance(step, Outcome):
                    return step
                # A vCPU that sleeps in userfaultfd is told what the page is until it is healed, for it may have to get
                # on with it first: while KVM finishes an access to this page, the heal waits for that.
                if waiter is not None and fault.origin is Origin.VCPU and ledger.is_heal(step):
                    return Outcome.POISONED
                waiter = waiter or Wait()
                ledger.queue(step, waiter)
                return waiter
        except PolicyError as error:
            self.abort(error)
            return Outcome.FAILED

    def withdraw(self, waiter: Waiter, reason: Wake = Wake.CANCELLED) -> bool:
        """Call a wait off: the waiter is notified, now, with `reason`; False if it had been woken."""
        with self.mutex:
            if not self.ledger.withdraw(waiter, reason):
                return False
        waiter.notify()
        return True

    # Pausing

    def _pause(self, claim: Claim, error: SourceError | ShortageError) -> None:
        """End a claim whose pages cannot be fetched, and pause."""
        page = error.offset // PAGE_SIZE if isinstance(error, SourceError) else claim.first
        gpa = self._layout.gpa_of_page(page)
        reason = broken(f"paused: the page at gpa {gpa:#x} cannot be fetched", error)
        with self.mutex:
            if self.error is None:  # else a trap has broken as a piece landed, or the like
                self.paused = reason
                if self.holds:
                    self.ledger.pause_fetches()
                else:
                    self.error = reason
        self.end(claim, claim.before, failed=True)

    def is_held(self) -> bool:
        """Whether a fault whose fetch has failed is to wait for the end of a pause."""
        return self.holds and self.error is None

    def resume(self) -> None:
        """End a pause: the pages that it concerned are fetched again. Does nothing if there is none.

        Faults that were held go on. If one cannot be served again, paging is paused again.
        """
        with self.mutex:
            if self.error is self.paused:
                self.error = None
            self.paused = None
            woken = self.ledger.resume_fetches()
        notify(woken)

    def abort(self, error: PagingError) -> None:
        """Fail all faults on absent pages from now on, with `error`: something that serves them has broken."""
        with self.mutex:
            held = self._break(error)
        notify(held)

    def _break(self, error: PagingError) -> list[Waiter]:
        """Do what `abort` does, under the mutex; returns the waiters to notify without it."""
        self.error = self.error or error
        self.jobs.ask_again()  # no job holds a fault back any more: each is to fail
        return self.ledger.resume_fetches()

    # Carrying out a claim

    def carry_out(self, claim: Claim, fault: PageFault) -> Outcome:
        """Fill a claim and commit it, for `fault`. Returns ADMITTED, FAILED or CANCELLED; raises what breaks."""
        observers = self.jobs.on_admitted
        if observers:
            claim.began = time.perf_counter_ns()
        try:
            self.contents.fill(claim, fault, self._land)
        except (SourceError, ShortageError) as error:
            if self.ledger.cancelled:  # the fetch was called off, and the machine stops for another reason
                self.end(claim, claim.before)
                return Outcome.CANCELLED
            self._pause(claim, error)
            return Outcome.FAILED
        except Exception as error:
            self.fail(claim, broken(f"filling page {claim.first} broke", error))
            raise
        try:
            self.commit(claim)
        except ShortageError:
            return Outcome.FAILED  # `error` has the reason by now
        for admitted in observers:
            admitted(fault, claim, claim.began)
        return Outcome.ADMITTED

    def _land(self, claim: Claim, fault: PageFault, page: int) -> None:
        """Commit the pages of a claim before `page` apart: their bytes are in place, the rest is still being fetched.

        The last unit stays, for the claim's own commit.
        """
        unit = self.ledger.unit
        count = min(page - claim.first, claim.count - 1) // unit * unit
        if count <= 0:
            return
        with Uninterrupted():  # two claims for a moment, and its owner knows of one
            with self.mutex:
                piece = self.ledger.split(claim, count)
            try:
                self.commit(piece)
            except BaseException:
                self._settle(piece)
                raise
        for admitted in self.jobs.on_admitted:
            admitted(fault, piece, piece.began)

    def _may_retry(self) -> bool:
        """Count one more attempt to read from the source; False if the machine is stopping."""
        if self.ledger.cancelled:
            return False
        with self.mutex:
            self.ledger.counters.retries += 1
        return True

    def commit(self, claim: Claim) -> None:
        """Admit a filled claim: state and bit, then the trap, then wake its waiters. Can be made again.

        What is discarded until the bits are set is zeroed before that; later, but before the claim has ended, the trap
        is told once more, for there may be nothing of the page left.
        """
        if not claim.is_admitted:
            while (
                True
            ):  # also of a claim that is filled: an interruption may have come before its bits were set
                with self.mutex:
                    discarded = () if claim.is_filled else claim.discarded[claim.zeroed :]
                    if not discarded:
                        self.ledger.admit(claim)
                        break
                self.contents.zero(discarded, claim)
            self._admit(claim)
        while True:
            with self.mutex:
                discarded = claim.discarded[claim.zeroed :]
                if not discarded:
                    self.ledger.commit(claim)
                    break
            self._admit(claim, discarded)
        if claim.woken:
            notify(claim.woken)

    def _admit(self, claim: Claim, discarded: Sequence[tuple[int, int]] = ()) -> None:
        """Tell the trap of pages whose bits are set, or once more of those that have been `discarded` since."""
        with Uninterrupted():
            try:
                if not claim.is_admitted:
                    self._trap.admit(claim.first, claim.count)
                for first, count in discarded:
                    self._trap.reassert(first, count)
                    claim.zeroed += 1
            except BaseException as error:
                # The bytes are in RAM; what is broken is the trap.
                self.end(claim, State.BACKED, broken("pages could not be admitted", error))
                raise
            claim.is_admitted = True

    # Ending claims

    def fail(self, claim: Claim, error: PagingError) -> None:
        """Give a claim up: its pages are as absent as before, and faults fail from now on with `error`."""
        self.end(claim, claim.before, error)

    def end(
        self, claim: Claim, states: bytes | State, error: PagingError | None = None, *, failed: bool = False
    ) -> None:
        """End a claim otherwise than by a commit, with the pages in `states`; with an `error`, as `abort` does.

        `failed` is whether its waiters are told that the pages could not be fetched.
        """
        if isinstance(states, State):
            states = bytes((states,)) * claim.count
        with self.mutex:
            self.ledger.end(claim, states, Wake.FAILED if failed or error is not None else Wake.REVOKED)
            held = [] if error is None else self._break(error)
        notify(claim.woken)
        notify(held)

    @contextlib.contextmanager
    def owning(self) -> Iterator[Claim]:
        """Yield a claim, for the block to have listed; what is left of it when the block is left is ended then."""
        claim = Claim()
        with undone(lambda: self._settle(claim)):
            yield claim

    def _settle(self, claim: Claim) -> None:
        """End a claim, if it is one, whose owner goes on otherwise: by how far it has got. Can be made again."""
        with self.mutex:
            is_to_be_committed = claim.is_filled and claim in self.ledger.claims
        if is_to_be_committed:
            self.commit(claim)  # peers may have been at its pages, and the guest too
        else:
            self.end(claim, claim.before if claim.after is None else claim.after)

    # Pins: a present page that is held stays present, a poisoned one poisoned

    def hold(self, page: int) -> bool:
        """Pin a page that is present and admitted; False if it is not. Undo with `release`."""
        with self.mutex:
            return self.ledger.pins.pin(page)

    def release(self, page: int) -> None:
        """Undo one `hold`."""
        with self.mutex:
            if self.ledger.pins.unpin(page):
                self.unpinned.notify_all()

    @contextlib.contextmanager
    def held(self, fault: PageFault) -> Iterator[Outcome]:
        """Make the page present and keep it so for the time of the block; a poisoned page is kept poisoned.

        Yields PRESENT or POISONED, or another outcome that kept it from becoming present; then nothing is pinned.
        A thread that holds a poisoned page waits for no page: two that did, and two heals, could wait for each other.
        """
        pin = Pin(((fault.page, 1),))
        with undone(lambda: self._unpin(pin)):
            outcome = Outcome.PRESENT
            while outcome in (Outcome.PRESENT, Outcome.ADMITTED, Outcome.POISONED):
                with self.mutex:
                    settled = self.ledger.pins.add_settled(pin)
                    if settled is None:
                        self.ledger.pins.insist(pin)
                    else:
                        self.ledger.pins.relent(pin)
                if settled is not None:
                    outcome = settled
                    break
                outcome = self.resolve(fault)
            yield outcome

    def _unpin(self, pin: Pin) -> None:
        with self.mutex:
            self.ledger.pins.remove(pin)
            self.unpinned.notify_all()
