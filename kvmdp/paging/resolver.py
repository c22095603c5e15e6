"""How a page becomes present: a fault claims it, the source fills it, the trap admits it, whoever waits is woken.

A page is claimed before its bytes or its trap change, and a claim has one owner. What spans a system call is the
claim, never a mutex: the mutex below is held for a few statements, to change the ledger (`kvmdp.paging.ledger`, which
knows states, claims and waiters). Order of a commit: bytes in RAM, then state and bit, then `trap.admit`, then wake.

Units: RAM pages, seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from kvmdp.memory.bitmap import PresentBitmap
from kvmdp.memory.layout import PAGE_SIZE, GuestLayout
from kvmdp.paging.access_gate import AccessGate
from kvmdp.paging.claim import Claim, State, Wait, Waiter, Wake
from kvmdp.paging.fault import Origin, Outcome, PageFault, PagingError
from kvmdp.paging.ledger import Ledger
from kvmdp.paging.policy import FaultPolicy
from kvmdp.paging.sink import Sink
from kvmdp.paging.trap.base import Trap
from kvmdp.source.base import PageSource, SourceError, asking, fetch

_SOURCE_BYTE = int(State.SOURCE)
_ONE_AT_SOURCE = bytes((State.SOURCE,))


class Cancellation:
    """Calls off, from another thread, what a thread waits for in `Resolver.resolve`; for good."""

    def __init__(self, pager: Resolver) -> None:
        self._pager = pager
        self._mutex = threading.Lock()  # guards what follows
        self.cancelled = False
        self._wait: Wait | None = None

    def cancel(self) -> None:
        """Wake the thread if it waits, and let it wait no more."""
        with self._mutex:
            self.cancelled = True
            wait = self._wait
        if wait is not None:
            self._pager.withdraw(wait)

    def attend(self, wait: Wait) -> None:
        """Take note of what the thread is about to wait for."""
        with self._mutex:
            self._wait = wait
            cancelled = self.cancelled
        if cancelled:  # `cancel` came before it could see this one
            self._pager.withdraw(wait)


class Resolver:
    """The half of `DemandPager` that makes pages present.

    `accesses` is the gate of those that no vCPU makes, `vcpu_accesses` of what is done on a vCPU's account: never shut.
    `mutex` guards the ledger, `error` and the gates; the rest is as the pager has it. `housekeeping` is called after
    each fault that was resolved by a thread that may sleep, and after pages were taken away, with no claim held and no
    pin, while demand paging is `enabled`; `reminders` are called after each other fault and must not wait for anybody.
    `room` is as `Presence.room` has it. `most_at_once`, if set, is how many pages an access may need at the same time,
    because pages are taken away again lest there be too many.
    """

    def __init__(self, layout: GuestLayout, trap: Trap, source: PageSource, policy: FaultPolicy) -> None:
        if source.size > layout.memory_bytes:
            raise ValueError(
                f"{source.name} has {source.size} bytes, RAM only {layout.memory_bytes}: make RAM at least as large"
            )
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
        self.mutex = threading.Lock()
        self._unpinned = threading.Condition(self.mutex)
        self.accesses = AccessGate(self.ledger, self._unpinned)
        self.vcpu_accesses = AccessGate(self.ledger, self._unpinned)
        self._source = source
        self._policy = policy
        self._fill_view = trap.fill_view
        self.sink: Sink | None = None
        self.housekeeping: list[Callable[[], None]] = []
        self.reminders: list[Callable[[], None]] = []
        self.room: Callable[[int], bool] = lambda _since: True
        self.most_at_once: int | None = None
        self._this_thread = threading.local()
        self._housekeepers = 0  # threads in `_keep_house`
        self._nobody_keeps_house = threading.Condition(self.mutex)

    @property
    def is_limited(self) -> bool:
        """Whether pages are taken away again because there must not be too many of them."""
        return self.most_at_once is not None

    # A fault

    def resolve(
        self, fault: PageFault, timeout: float | None = None, cancellation: Cancellation | None = None
    ) -> Outcome:
        """Make the faulting page present, or wait for whoever is at it.

        For threads that may sleep: vCPU threads, devices in this process, the VMM itself. Waiting ends after
        `timeout` seconds (TIMED_OUT) or when `cancellation` is cancelled (CANCELLED); a fetch of one's own does not.
        """
        deadline = None
        while True:
            step = self.begin(fault)
            if isinstance(step, Claim):
                done = self._carry_out(step, fault)
                self._keep_house()
                return done
            if isinstance(step, Outcome):
                return step
            assert isinstance(step, Wait)
            if timeout is not None and deadline is None:
                deadline = time.monotonic() + timeout
            outcome = self._sleep(step, deadline, cancellation)
            if outcome is not None:
                return outcome

    def _keep_house(self) -> None:
        """Do what is left to be done with no claim held; not again where that takes pages away itself.

        It may change what the trap has set up, and nothing in the ledger says so: it is counted instead, and who
        switches demand paging off waits until nobody is at it (`DemandPager.disable`). Nobody begins after that.
        """
        if getattr(self._this_thread, "keeps_house", False) or not self.housekeeping:
            return
        with self.mutex:
            if not self.enabled:
                return
            self._housekeepers += 1
        self._this_thread.keeps_house = True
        try:
            for work in self.housekeeping:
                work()
        finally:
            self._this_thread.keeps_house = False
            with self.mutex:
                self._housekeepers -= 1
                if not self._housekeepers:
                    self._nobody_keeps_house.notify_all()

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
        step = self.begin(fault, waiter)
        if isinstance(step, Claim):
            done = self._carry_out(step, fault)
            for remind in self.reminders:
                remind()
            return done
        return None if isinstance(step, Waiter) else step

    def begin(self, fault: PageFault, waiter: Waiter | None = None) -> Claim | Waiter | Outcome:
        """Claim the pages that a fault is to fetch, or say why not.

        Never sleeps. Whoever gets a Claim fills it and commits, or fails it. If somebody else has the page, `waiter`
        is queued and returned, or else a new Wait; but to a vCPU's fault with a `waiter` a page that is being healed is
        POISONED still.
        """
        page, ledger = fault.page, self.ledger
        with self.mutex:
            step = ledger.obstacle(page)
            if step is None:
                if self.error is not None:
                    return Outcome.FAILED
                ledger.counters.claims += 1
                first, count = self._policy.window(page)
                return ledger.claim(page, first, count)
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
        except SourceError as error:
            if self.ledger.cancelled:  # it was told to give up, and the machine stops for another reason
                self._end(claim, claim.before)
                return Outcome.CANCELLED
            self.fail(claim, self._source_failed(error))
            return Outcome.FAILED
        except BaseException as error:
            self.fail(claim, PagingError(f"filling page {claim.first} broke: {error!r}"))
            raise
        finally:
            asking.fault = None
        self.commit(claim)
        if self.observer is not None:
            self.observer(fault, claim, began)
        return Outcome.ADMITTED

    def fill(self, claim: Claim) -> None:
        """Put the bytes of a claim's pages where the trap wants them. Raises SourceError.

        Pages whose bytes are in RAM already (BACKED) are left alone.
        """
        first, before = claim.first, claim.before
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

    def _source_failed(self, error: SourceError) -> PagingError:
        gpa = self.layout.gpa_of_page(error.offset // PAGE_SIZE)
        return PagingError(f"paused: the page at gpa {gpa:#x} cannot be fetched: {error}")

    def commit(self, claim: Claim) -> None:
        """Admit a filled claim: state and bit, then the trap, then whoever waits."""
        with self.mutex:
            self.ledger.admit(claim)
        try:
            self.trap.admit(claim.first, claim.count)
        except BaseException as error:
            # The bytes are in RAM; what is broken is the trap.
            self._end(claim, State.BACKED, PagingError(f"pages could not be admitted: {error}"))
            raise
        with self.mutex:
            woken = self.ledger.commit(claim)
        for waiter in woken:
            waiter.notify()

    def fail(self, claim: Claim, error: PagingError) -> None:
        """Give a claim up: its pages are as absent as before, and the pager is paused with `error`."""
        self._end(claim, claim.before, error)

    def _end(self, claim: Claim, states: bytes | State, error: PagingError | None = None) -> None:
        """End a claim otherwise than by a commit, with the pages in `states`."""
        if isinstance(states, State):
            states = bytes((states,)) * claim.count
        with self.mutex:
            if error is not None and self.error is None:
                self.error = error
            woken = self.ledger.end(claim, states, Wake.REVOKED if error is None else Wake.FAILED)
        for waiter in woken:
            waiter.notify()

    # Pins: a present page that is held stays present, a poisoned one poisoned

    def hold(self, page: int) -> bool:
        """Pin a page that is present and admitted; False if it is not. Undo with `release`."""
        with self.mutex:
            return self.ledger.pin(page)

    def hold_settled(self, page: int) -> Outcome | None:
        """Pin a page if it is PRESENT or POISONED, and return which; None if it is neither. Undo with `release`."""
        with self.mutex:
            return self.ledger.pin_settled(page)

    def release(self, page: int) -> None:
        """Undo one `hold` or `hold_settled`."""
        with self.mutex:
            if self.ledger.unpin(page):
                self._unpinned.notify_all()

    @contextlib.contextmanager
    def held(self, fault: PageFault) -> Iterator[Outcome]:
        """Make the page present and keep it so for the time of the block; a poisoned page is kept poisoned.

        Yields PRESENT or POISONED, or another outcome that kept it from becoming present; then nothing is pinned.
        Whoever holds a poisoned page waits for no page: two who did, and two heals, could wait for each other.
        """
        while True:
            settled = self.hold_settled(fault.page)
            if settled is not None:
                try:
                    yield settled
                finally:
                    self.release(fault.page)
                return
            outcome = self.resolve(fault)
            if outcome not in (Outcome.PRESENT, Outcome.ADMITTED, Outcome.POISONED):
                yield outcome
                return

    def discarded(self, first: int, count: int) -> None:
        """Take note that the bytes of these pages are gone, or going: those nobody has claimed read as zeros now.

        Somebody discarded them behind the pager's back (a balloon). Pages that are claimed are left to whoever
        has them: a revocation drops pages too, and is announced in the same way.
        """
        with self.mutex:
            self.ledger.discarded(first, count)

    def abort(self, error: PagingError) -> None:
        """Pause with `error`: something that serves faults has broken."""
        with self.mutex:
            if self.error is None:
                self.error = error
