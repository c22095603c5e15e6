"""How a page becomes present: a fault claims it, the source fills it, the trap admits it, whoever waits is woken.

A page is claimed before its bytes or its trap change, and a claim has one owner. What spans a system call is the
claim, never a mutex: the mutex below is held for a few statements, to change the ledger (`kvmdp.paging.ledger`, which
knows states, claims and waiters). Order of a commit: bytes in RAM, then state and bit, then `trap.admit`, then wake.

A claim ends whatever exception its owner meets, and where: its owner makes the `Claim`, has the ledger list it, and on
any exception ends it as far as it had got (`owning`, and `resolve`, where a `with` would be too dear). An interruption
between two steps of that end is one more exception, and comes once (`kvmdp.interruption`): it is met a second time.

Units: RAM pages, seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from kvmdp.errors import PagingError
from kvmdp.interruption import Uninterrupted, undone
from kvmdp.memory.bitmap import PresentBitmap
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE, Origin, Outcome, PageFault
from kvmdp.paging.access_gate import AccessGate
from kvmdp.paging.broken import broken
from kvmdp.paging.cancellation import Cancellation
from kvmdp.paging.claim import Claim, State, Wait, Waiter, Wake, notify
from kvmdp.paging.housekeeping import Housekeeping
from kvmdp.paging.ledger import Ledger
from kvmdp.paging.pins import Pin
from kvmdp.paging.policy import FaultPolicy
from kvmdp.paging.ports import Trap
from kvmdp.paging.store import Sink
from kvmdp.shortage import ShortageError
from kvmdp.source.base import PageSource, SourceError, asking, fetch
from kvmdp.waiting import Condition

_SOURCE_BYTE = int(State.SOURCE)
_ONE_AT_SOURCE = bytes((State.SOURCE,))


class Resolver:
    """The half of `DemandPager` that makes pages present.

    `accesses` is the gate of those that no vCPU makes, `vcpu_accesses` of what is done on a vCPU's account: never shut.
    `mutex` guards the ledger, `error` and the gates; the rest is as the pager has it. `housekeeping` is called after
    each fault that was resolved by a thread that may sleep, and after pages were taken away, with no claim held and no
    pin, while demand paging is `enabled`; `reminders` are called after each other fault and must not wait for anybody.
    `room` is as `ForReaders.room` has it. `most_at_once`, if set, is how many pages an access may need at the same
    time, because pages are taken away again lest there be too many.
    """

    def __init__(self, layout: GuestLayout, trap: Trap, source: PageSource, policy: FaultPolicy) -> None:
        if source.size > layout.memory_bytes:
            wanted = f"{source.name} has {source.size} bytes, RAM only {layout.memory_bytes}"
            raise ValueError(f"{wanted}: make RAM at least as large")
        self.layout = layout
        self.trap = trap
        self.bitmap = PresentBitmap(layout.pages)
        self.ledger = Ledger(
            self.bitmap,
            trap.granule // PAGE_SIZE,
            [(each.offset // PAGE_SIZE, (each.offset + each.size) // PAGE_SIZE) for each in layout.regions],
            [(offset // PAGE_SIZE, length // PAGE_SIZE) for offset, length in source.extents()],
        )
        self.counters = self.ledger.counters
        self.enabled = False
        self.error: PagingError | None = None
        self.observer: Callable[[PageFault, Claim, int], None] | None = None
        self.mutex = threading.RLock()
        self._unpinned = Condition(self.mutex)
        self.accesses = AccessGate(self.ledger, self.mutex, self._unpinned)
        self.vcpu_accesses = AccessGate(self.ledger, self.mutex, self._unpinned)
        self._source = source
        self._policy = policy
        self._fill_view = trap.fill_view
        self._populate = trap.populate
        self.sink: Sink | None = None
        self.reminders: list[Callable[[], None]] = []
        self.room: Callable[[int], bool] = lambda _since: True
        self.most_at_once: int | None = None
        self.house = Housekeeping(self.mutex, lambda: self.enabled)

    @property
    def housekeeping(self) -> list[Callable[[], None]]:
        """What is called after a commit by threads that may sleep."""
        return self.house.works

    @property
    def is_limited(self) -> bool:
        """Whether pages are taken away again because there must not be too many of them."""
        return self.most_at_once is not None

    def resolve(
        self, fault: PageFault, timeout: float | None = None, cancellation: Cancellation | None = None
    ) -> Outcome:
        """Make the faulting page present, or wait for whoever is at it.

        For threads that may sleep: vCPU threads, devices in this process, the VMM itself. Waiting ends after
        `timeout` seconds (TIMED_OUT) or when `cancellation` is cancelled (CANCELLED); a fetch of one's own does not.
        """
        deadline = None
        while True:
            claim = Claim()
            try:
                step = self.begin(fault, claim=claim)
                if step is claim:
                    done = self._carry_out(claim, fault)
            except BaseException:
                self._settle(claim)
                raise
            if step is claim:
                if self.house.works:
                    self.house.keep()
                return done
            if isinstance(step, Outcome):
                return step
            assert isinstance(step, Wait)
            if timeout is not None and deadline is None:
                deadline = time.monotonic() + timeout
            outcome = self._sleep(step, deadline, cancellation)
            if outcome is not None:
                return outcome

    def _sleep(
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

    def resolve_or_park(self, fault: PageFault, waiter: Waiter) -> Outcome | None:
        """Make the faulting page present, but never wait for whoever is at it.

        For userfaultfd readers and servers of other processes, who ask `room` first. Returns None if the page is
        claimed: then `waiter` is notified when that claim has ended in whatever way, or when it is withdrawn.
        """
        claim = Claim()
        try:
            step = self.begin(fault, waiter, claim)
            if step is claim:
                done = self._carry_out(claim, fault)
        except BaseException:
            self._settle(claim)
            raise
        if step is claim:
            for remind in self.reminders:
                remind()
            return done
        return step if isinstance(step, Outcome) else None

    def begin(
        self, fault: PageFault, waiter: Waiter | None = None, claim: Claim | None = None
    ) -> Claim | Waiter | Outcome:
        """Claim the pages that a fault is to fetch, or say why not.

        Never sleeps. Whoever gets a Claim, which is `claim` if that is given, fills it and commits, or fails it. If
        somebody else has the page, `waiter` is queued and returned, or else a new Wait; but to a vCPU's fault with a
        `waiter` a page that is being healed is POISONED still.
        """
        page, ledger = fault.page, self.ledger
        with self.mutex:
            step = ledger.obstacle(page)
            if step is None:
                if self.error is not None:
                    return Outcome.FAILED
                ledger.counters.claims += 1
                first, count = self._policy.window(page)
                return ledger.claim(page, first, count, claim)
            if isinstance(step, Outcome):
                return step
            # A vCPU that sleeps in userfaultfd is told what the page is until it is healed, for it may have to get on
            # with it first: while KVM finishes an access to this page, the heal waits for that.
            if waiter is not None and fault.origin is Origin.VCPU and ledger.is_heal(step):
                return Outcome.POISONED
            waiter = waiter or Wait()
            ledger.queue(step, waiter)
            return waiter

    def withdraw(self, waiter: Waiter, reason: Wake = Wake.CANCELLED) -> bool:
        """Give up waiting for somebody: the waiter is notified, now, with `reason`; False if it had been woken."""
        with self.mutex:
            if not self.ledger.withdraw(waiter, reason):
                return False
        waiter.notify()
        return True

    # Carrying out a claim

    def _carry_out(self, claim: Claim, fault: PageFault) -> Outcome:
        began = 0 if self.observer is None else time.perf_counter_ns()
        asking.fault = fault
        try:
            self.fill(claim)
        except (SourceError, ShortageError) as error:
            if self.ledger.cancelled:  # it was told to give up, and the machine stops for another reason
                self._end(claim, claim.before)
                return Outcome.CANCELLED
            self.fail(claim, self._lacking(claim, error))
            return Outcome.FAILED
        except Exception as error:
            self.fail(claim, broken(f"filling page {claim.first} broke", error))
            raise
        finally:
            asking.fault = None
        try:
            self.commit(claim)
        except ShortageError:
            return Outcome.FAILED  # the machine is paused by now, and has the reason
        if self.observer is not None:
            self.observer(fault, claim, began)
        return Outcome.ADMITTED

    def fill(self, claim: Claim) -> None:
        """Put the bytes of a claim's pages where the trap wants them. Raises SourceError, ShortageError.

        Pages whose bytes are in RAM already (BACKED) are left alone.
        """
        first, before = claim.first, claim.before
        if self._populate is not None:
            self._populate(first * PAGE_SIZE, claim.count * PAGE_SIZE)
        if before == _ONE_AT_SOURCE:  # the usual fault
            offset = first * PAGE_SIZE
            fetch(self._source, offset, self._fill_view[offset : offset + PAGE_SIZE], self._may_retry)
            return
        start, count = 0, claim.count
        while start < count:
            state = before[start]
            end = start + 1
            while end < count and before[end] == state:
                end += 1
            offset, length = (first + start) * PAGE_SIZE, (end - start) * PAGE_SIZE
            destination = self._fill_view[offset : offset + length]
            if state == _SOURCE_BYTE:
                fetch(self._source, offset, destination, self._may_retry)
            elif state == State.ZERO:
                destination[:] = bytes(length)
            elif state == State.SINK:
                assert self.sink is not None
                self.sink.fill(offset, destination)
            start = end

    def _may_retry(self) -> bool:
        """Count one more attempt to read from the source; False if the machine is stopping."""
        if self.ledger.cancelled:
            return False
        with self.mutex:
            self.counters.retries += 1
        return True

    def _lacking(self, claim: Claim, error: SourceError | ShortageError) -> PagingError:
        page = error.offset // PAGE_SIZE if isinstance(error, SourceError) else claim.first
        return broken(f"paused: the page at gpa {self.layout.gpa_of_page(page):#x} cannot be fetched", error)

    def commit(self, claim: Claim) -> None:
        """Admit a filled claim: state and bit, then the trap, then whoever waits. Can be made again.

        What somebody discards until the bits are set is zeroed before that; later, but before the claim has ended, the
        trap is told once more, for there may be nothing of the page left.
        """
        if not claim.is_admitted:
            self._set_present(claim)
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

    def _set_present(self, claim: Claim) -> None:
        while True:
            with self.mutex:
                discarded = () if claim.is_filled else claim.discarded[claim.zeroed :]
                if not discarded:
                    self.ledger.admit(claim)
                    return
            self._zero(claim, discarded)

    def _zero(self, claim: Claim, runs: Sequence[tuple[int, int]]) -> None:
        for first, count in runs:
            length = count * PAGE_SIZE
            self._fill_view[first * PAGE_SIZE : first * PAGE_SIZE + length] = bytes(length)
            claim.zeroed += 1

    def _admit(self, claim: Claim, discarded: Sequence[tuple[int, int]] = ()) -> None:
        """Tell the trap of pages whose bits are set, or once more of those that have been `discarded` since."""
        with Uninterrupted():
            try:
                if not claim.is_admitted:
                    self.trap.admit(claim.first, claim.count)
                for first, count in discarded:
                    self.trap.reassert(first, count)
                    claim.zeroed += 1
            except BaseException as error:
                # The bytes are in RAM; what is broken is the trap.
                self._end(claim, State.BACKED, broken("pages could not be admitted", error))
                raise
            claim.is_admitted = True

    def fail(self, claim: Claim, error: PagingError) -> None:
        """Give a claim up: its pages are as absent as before, and the pager is paused with `error`."""
        self._end(claim, claim.before, error)

    def _end(self, claim: Claim, states: bytes | State, error: PagingError | None = None) -> None:
        """End a claim otherwise than by a commit, with the pages in `states`."""
        if isinstance(states, State):
            states = bytes((states,)) * claim.count
        with self.mutex:
            self.error = self.error or error
            self.ledger.end(claim, states, Wake.REVOKED if error is None else Wake.FAILED)
        notify(claim.woken)

    @contextlib.contextmanager
    def owning(self) -> Iterator[Claim]:
        """Yield a claim that is still to be had; what the block has not ended of it when it is left is ended then."""
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
            self._end(claim, claim.before if claim.after is None else claim.after)

    # Pins: a present page that is held stays present, a poisoned one poisoned

    def hold(self, page: int) -> bool:
        """Pin a page that is present and admitted; False if it is not. Undo with `release`."""
        with self.mutex:
            return self.ledger.pins.pin(page)

    def release(self, page: int) -> None:
        """Undo one `hold`."""
        with self.mutex:
            if self.ledger.pins.unpin(page):
                self._unpinned.notify_all()

    @contextlib.contextmanager
    def held(self, fault: PageFault) -> Iterator[Outcome]:
        """Make the page present and keep it so for the time of the block; a poisoned page is kept poisoned.

        Yields PRESENT or POISONED, or another outcome that kept it from becoming present; then nothing is pinned.
        Whoever holds a poisoned page waits for no page: two who did, and two heals, could wait for each other.
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
            self._unpinned.notify_all()

    def discarded(self, first: int, count: int) -> None:
        """Take note that the bytes of these pages are gone, or going: they read as zeros from now on.

        Somebody discards them behind the pager's back (a balloon). Pages that are claimed are left to whoever has them,
        which is told so.
        """
        with self.mutex:
            self.ledger.discarded(first, count)

    def abort(self, error: PagingError) -> None:
        """Pause with `error`: something that serves faults has broken."""
        with self.mutex:
            self.error = self.error or error
