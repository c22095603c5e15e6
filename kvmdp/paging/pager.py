"""The pager: the one way in which a page becomes present or stops being so.

A page is claimed before its bytes or its trap change, and a claim has one owner. What spans a system call is the
claim, never a mutex: the mutex below is held for a few statements, to change the ledger (`kvmdp.paging.ledger`, which
knows states, claims and waiters). Order of a commit: bytes in RAM, then state and bit, then `trap.admit`, then wake.
Order of a revocation: state and bit, peers and pins drained, then `trap.revoke` (with every vCPU out of KVM_RUN where
the trap needs that), then the new state, then wake.

Units: RAM pages, seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from kvmdp.memory.bitmap import PresentBitmap, Words, runs_of
from kvmdp.memory.layout import PAGE_SIZE, GuestLayout
from kvmdp.paging.access_gate import AccessGate
from kvmdp.paging.claim import Claim, State, Wait, Waiter, Wake
from kvmdp.paging.fault import BusyError, CancelledError, Outcome, PageFault, PagingError
from kvmdp.paging.gate import VcpuGate
from kvmdp.paging.ledger import Ledger
from kvmdp.paging.policy import FaultPolicy
from kvmdp.paging.trap.base import Trap
from kvmdp.source.base import PageSource, SourceError, asking, ram_source

_RETRY_SECONDS = (0.001, 0.004, 0.016, 0.064, 0.256)
_MAX_CLAIM = 512  # pages claimed at once when a range is made present: 2 MiB
_REVOKE_BATCH = 512  # pages revoked at once: bounds how long vCPUs are kept out of KVM_RUN

_SOURCE_BYTE = int(State.SOURCE)
_ONE_AT_SOURCE = bytes((State.SOURCE,))


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


class Cancellation:
    """Calls off, from another thread, what a thread waits for in `DemandPager.resolve`; for good."""

    def __init__(self, pager: DemandPager) -> None:
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


class DemandPager:
    """Decides what happens to an access to an absent page.

    Arguments: where RAM lies; the trap, not yet armed; the source; the policy; the gate the vCPUs pass.
    `bitmap` is the projection of the states: bit set if and only if the guest may enter, or is about to be let in.
    `error` is None until the source has failed for good; from then on nothing absent becomes present. `observer`, if
    set, is told of each fault that was resolved, the claim that did it, and when that began (time.perf_counter_ns);
    it must not block. `peers`, if set, is asked before pages are taken away, and before accesses are frozen.
    `accesses` is the gate of those that no vCPU makes, `vcpu_accesses` of what is done on a vCPU's account: never shut.

    `mutex` guards the ledger, `error`, `enabled` and the gates. `kvmdp.paging.access` takes it too, for a copy of a
    page at the most.
    """

    def __init__(
        self, layout: GuestLayout, trap: Trap, source: PageSource, policy: FaultPolicy, gate: VcpuGate
    ) -> None:
        if source.size > layout.memory_bytes:
            raise ValueError(
                f"{source.name} has {source.size} bytes, RAM only {layout.memory_bytes}: make RAM at least as large"
            )
        self.layout = layout
        self.trap = trap
        self.gate = gate
        self.bitmap = PresentBitmap(layout.pages)
        self.ledger = Ledger(
            self.bitmap,
            trap.granule // PAGE_SIZE,
            [(each.offset // PAGE_SIZE, (each.offset + each.size) // PAGE_SIZE) for each in layout.regions],
            [(offset // PAGE_SIZE, length // PAGE_SIZE) for offset, length in source.extents()],
        )
        self.counters = self.ledger.counters
        self.error: PagingError | None = None
        self.enabled = False
        self.observer: Callable[[PageFault, Claim, int], None] | None = None
        self.peers: Peers | None = None
        self.mutex = threading.Lock()
        self._unpinned = threading.Condition(self.mutex)
        self.accesses = AccessGate(self.ledger, self._unpinned)
        self.vcpu_accesses = AccessGate(self.ledger, self._unpinned)
        self._source = source
        self._policy = policy
        self._fill_view = trap.fill_view

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
                return self._carry_out(step, fault)
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

        For userfaultfd readers and servers of other processes. Returns None if the page is claimed: then `waiter` is
        notified when that claim has ended in whatever way, or when it is withdrawn.
        """
        step = self.begin(fault, waiter)
        if isinstance(step, Claim):
            return self._carry_out(step, fault)
        return None if isinstance(step, Waiter) else step

    def begin(self, fault: PageFault, waiter: Waiter | None = None) -> Claim | Waiter | Outcome:
        """Claim the pages that a fault is to fetch, or say why not.

        Never sleeps. Whoever gets a Claim fills it and commits, or fails it. If somebody else has the page, `waiter`
        is queued and returned, or else a new Wait.
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
            self._fetch(offset, self._fill_view[offset : offset + PAGE_SIZE])
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
                self._fetch(offset, destination)
            elif state == State.ZERO:
                destination[:] = bytes(length)
            start = end

    def _fetch(self, offset: int, destination: memoryview) -> None:
        """Read from the source, again if it says that this may help."""
        for pause in _RETRY_SECONDS:
            try:
                return self._source.fill(offset, destination)
            except SourceError as error:
                if not error.transient or self.ledger.cancelled:
                    raise
            with self.mutex:
                self.counters.retries += 1
            time.sleep(pause)
        return self._source.fill(offset, destination)

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

    # Pins: a present page that is held stays present

    def hold(self, page: int) -> bool:
        """Pin a page that is present and admitted; False if it is not. Undo with `release`."""
        with self.mutex:
            return self.ledger.pin(page)

    def release(self, page: int) -> None:
        """Undo one `hold`."""
        with self.mutex:
            if self.ledger.unpin(page):
                self._unpinned.notify_all()

    @contextlib.contextmanager
    def held(self, fault: PageFault) -> Iterator[Outcome]:
        """Make the page present and keep it so for the time of the block.

        Yields PRESENT, or the outcome that kept it from becoming present; then nothing is pinned.
        """
        outcome = Outcome.PRESENT
        while outcome in (Outcome.PRESENT, Outcome.ADMITTED):
            if self.hold(fault.page):
                try:
                    yield Outcome.PRESENT
                finally:
                    self.release(fault.page)
                return
            outcome = self.resolve(fault)
        yield outcome

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

    def discarded(self, first: int, count: int) -> None:
        """Take note that the bytes of these pages are gone, or going: those nobody has claimed read as zeros now.

        Somebody discarded them behind the pager's back (a balloon). Pages that are claimed are left to whoever
        has them: a revocation drops pages too, and is announced in the same way.
        """
        with self.mutex:
            self.ledger.discarded(first, count)

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
        switched off, CancelledError if the machine stops while somebody keeps a page.
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
                self._revoke(claim, deadline)
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

    def abort(self, error: PagingError) -> None:
        """Pause with `error`: something that serves faults has broken."""
        with self.mutex:
            if self.error is None:
                self.error = error

    def close(self) -> None:
        """Give the bitmap back; nobody may use the pager any more."""
        self.bitmap.close()
