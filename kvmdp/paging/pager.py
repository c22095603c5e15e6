"""The pager: every page's state, and the one way in which a page becomes present or stops being so.

A page is claimed before its bytes or its trap change, and a claim has one owner. What spans a system call is the
claim, never a mutex: the mutex below is held for a few statements, to change states and to find out who owns
what. Order of a commit: bytes in RAM, then state and bit, then `trap.admit`, then wake. Order of a revocation:
state, bit, pins drained, then `trap.revoke` (with every vCPU out of KVM_RUN where the trap needs that), then
the new state, then wake.

Why no wake-up is lost: a waiter gets hold of the claim under the mutex, while the claim is still listed; the
owner takes it off the list under the mutex and sets its event afterwards. So the event a waiter sleeps on is
always set after the waiter got it.

Why no page is filled over: a claim takes only pages whose state says that nobody else touches their bytes, and
makes that state INFLIGHT in the same critical section.

Units: RAM pages. A *unit* is the block of pages the trap can flip on its own (1 page, or a granule).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from kvmdp.memory.bitmap import PresentBitmap, Words, runs_of
from kvmdp.memory.layout import PAGE_SIZE, GuestLayout
from kvmdp.paging.claim import Claim, Counters, State, Wait
from kvmdp.paging.fault import Outcome, PageFault, PagingError
from kvmdp.paging.gate import VcpuGate
from kvmdp.paging.policy import FaultPolicy
from kvmdp.paging.trap.base import Trap
from kvmdp.source.base import PageSource, SourceError

_RETRY_SECONDS = (0.001, 0.004, 0.016, 0.064, 0.256)
_MAX_CLAIM = 512  # pages claimed at once when a range is made present: 2 MiB
_REVOKE_BATCH = 512  # pages revoked at once: bounds how long vCPUs are kept out of KVM_RUN


# Looked up in the hot path, where an enum member costs an attribute access and a comparison by method.
_SOURCE, _INFLIGHT, _PRESENT, _BACKED, _ZERO, _EVICTING = (bytes([state]) for state in State)
_CLAIMABLE = frozenset((State.SOURCE, State.BACKED, State.ZERO))
_IN_RAM = frozenset((State.PRESENT, State.BACKED))
_PRESENT_BYTE = int(State.PRESENT)
_SOURCE_BYTE = int(State.SOURCE)


class DemandPager:
    """Decides what happens to an access to an absent page.

    Arguments: where RAM lies; the trap, not yet armed; the source; the policy; the gate the vCPUs pass.
    `bitmap` is the projection of the states: bit set if and only if PRESENT. `error` is None until the source
    has failed for good; from then on nothing absent becomes present. `observer`, if set, is told of each fault that
    was resolved, the claim that did it, and when that began (time.perf_counter_ns); it must not block.
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
        self.counters = Counters()
        self.error: PagingError | None = None
        self.enabled = False
        self.observer: Callable[[PageFault, Claim, int], None] | None = None
        self._source = source
        self._policy = policy
        self._unit = trap.granule // PAGE_SIZE
        self._states = bytearray(_ZERO * layout.pages)
        for offset, length in source.extents():
            first, count = offset // PAGE_SIZE, length // PAGE_SIZE
            self._states[first : first + count] = _SOURCE * count
        # Guards the states, the bitmap, the claims, the pins and the counters.
        self._mutex = threading.Lock()
        self._unpinned = threading.Condition(self._mutex)
        self._claims: list[Claim] = []  # as many as threads that resolve: a list beats any tree
        self._pins: dict[int, int] = {}
        self._retained: list[tuple[int, int]] = []  # (first, end) of pages that never become non-present
        self._cancelled = False

    # A fault

    def resolve(self, fault: PageFault) -> Outcome:
        """Make the faulting page present, or wait for whoever is at it.

        For threads that may sleep: vCPU threads, devices in this process, the VMM itself.
        """
        while True:
            step = self.begin(fault)
            if isinstance(step, Claim):
                return self._carry_out(step, fault)
            if isinstance(step, Outcome):
                return step
            step.wait()

    def resolve_or_park(self, fault: PageFault, wake: Callable[[], None]) -> Outcome | None:
        """Make the faulting page present, but never wait for whoever is at it.

        For userfaultfd readers and servers of other processes. Returns None if the page is claimed: then `wake` is
        called, from another thread, when the claim has ended in whatever way.
        """
        step = self.begin(fault, wake)
        if isinstance(step, Claim):
            return self._carry_out(step, fault)
        return None if isinstance(step, Wait) else step

    def begin(self, fault: PageFault, wake: Callable[[], None] | None = None) -> Claim | Wait | Outcome:
        """Claim the pages that a fault is to fetch, or say why not.

        Never sleeps. Whoever gets a Claim fills it and commits, or fails it. Whoever gets a Wait waits, or has
        left `wake` to be called instead.
        """
        page = fault.page
        with self._mutex:
            step = self._obstacle(page)
            if step is not None:
                if wake is not None and isinstance(step, Wait):
                    step.claim.park(wake)
                return step
            self.counters.claims += 1
            first, count = self._policy.window(page)
            return self._claim(page, first, count)

    def _obstacle(self, page: int) -> Wait | Outcome | None:
        """Return why `page` cannot be claimed now, None if it can. Under the mutex."""
        state = self._states[page]
        if self._cancelled and state != _PRESENT_BYTE:
            return Outcome.CANCELLED
        # PRESENT with a claim on it: the bit is set before the trap admits, and until then the access would
        # only fault again.
        claim = None if state in _CLAIMABLE else self._claim_over(page)
        if claim is not None:
            self.counters.waits += 1
            return Wait(claim)
        if state == _PRESENT_BYTE:
            return Outcome.PRESENT
        return Outcome.FAILED if self.error is not None else None

    def _claim_over(self, page: int) -> Claim | None:
        for claim in self._claims:
            if claim.first <= page < claim.first + claim.count:
                return claim
        return None

    def _claim(self, page: int, first: int, count: int) -> Claim:
        """Claim the claimable run around `page` inside the window, in whole units. Under the mutex."""
        unit = self._unit
        if count == 1 == unit:
            before = bytes((self._states[page],))
            self._states[page] = State.INFLIGHT
            claim = Claim(page, 1, before)
        else:
            start, end = self._claimable_run(page, first, first + count)
            claim = Claim(start, end - start, bytes(self._states[start:end]))
            self._states[start:end] = _INFLIGHT * (end - start)
        self._claims.append(claim)
        return claim

    def _claimable_run(self, page: int, start: int, end: int) -> tuple[int, int]:
        """Cut [start, end), widened to units, to the stretch around `page` that can be claimed as one."""
        unit, states = self._unit, self._states
        first = page // unit * unit
        last = min(first + unit, self.layout.pages)
        low, high = self._bounds(page)
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

    def _bounds(self, page: int) -> tuple[int, int]:
        for region in self.layout.regions:
            low, high = region.offset // PAGE_SIZE, (region.offset + region.size) // PAGE_SIZE
            if low <= page < high:
                return low, high
        raise IndexError(f"page {page} is not one of the {self.layout.pages} of RAM")

    # Carrying out a claim

    def _carry_out(self, claim: Claim, fault: PageFault) -> Outcome:
        began = 0 if self.observer is None else time.perf_counter_ns()
        try:
            self.fill(claim)
        except SourceError as error:
            self.fail(claim, self._source_failed(error))
            return Outcome.FAILED
        except BaseException as error:
            self.fail(claim, PagingError(f"filling page {claim.first} broke: {error!r}"))
            raise
        self.commit(claim)
        if self.observer is not None:
            self.observer(fault, claim, began)
        return Outcome.ADMITTED

    def fill(self, claim: Claim) -> None:
        """Put the bytes of a claim's pages where the trap wants them. Raises SourceError.

        Pages whose bytes are in RAM already (BACKED) are left alone.
        """
        first, before = claim.first, claim.before
        start, count = 0, claim.count
        while start < count:
            state = before[start]
            end = start + 1
            while end < count and before[end] == state:
                end += 1
            offset, length = (first + start) * PAGE_SIZE, (end - start) * PAGE_SIZE
            destination = self.trap.fill_view[offset : offset + length]
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
                if not error.transient or self._cancelled:
                    raise
            with self._mutex:
                self.counters.retries += 1
            time.sleep(pause)
        return self._source.fill(offset, destination)

    def _source_failed(self, error: SourceError) -> PagingError:
        gpa = self.layout.gpa_of_page(error.offset // PAGE_SIZE)
        return PagingError(f"paused: the page at gpa {gpa:#x} cannot be fetched: {error}")

    def commit(self, claim: Claim) -> None:
        """Admit a filled claim: state and bit, then the trap, then whoever waits."""
        first, count, before = claim.first, claim.count, claim.before
        with self._mutex:
            self._states[first : first + count] = _PRESENT * count
            self.bitmap.set_range(first, count)
        try:
            self.trap.admit(first, count)
        except BaseException as error:
            # The bytes are in RAM; what is broken is the trap.
            self._end(claim, _BACKED * count, PagingError(f"pages could not be admitted: {error}"))
            raise
        with self._mutex:
            counters = self.counters
            fetched = before.count(_SOURCE)
            counters.pages_admitted += count
            counters.pages_fetched += fetched
            if fetched != count:
                counters.pages_zeroed += before.count(_ZERO)
                counters.pages_backed += before.count(_BACKED)
            self._claims.remove(claim)
        claim.wake()

    def fail(self, claim: Claim, error: PagingError) -> None:
        """Give a claim up: its pages are as absent as before, and the pager is paused with `error`."""
        self._end(claim, claim.before, error)

    def _end(self, claim: Claim, states: bytes, error: PagingError | None) -> None:
        first, count = claim.first, claim.count
        with self._mutex:
            self._states[first : first + count] = states
            if states.count(_PRESENT) != count:
                self.bitmap.clear_range(first, count)
            if error is not None and self.error is None:
                self.error = error
            self._claims.remove(claim)
        claim.wake()

    # Pins: a present page that is held stays present

    def hold(self, page: int) -> bool:
        """Pin a page that is present and admitted; False if it is not. Undo with `release`."""
        with self._mutex:
            if self._states[page] != _PRESENT_BYTE or self._claim_over(page):
                return False
            self._pins[page] = self._pins.get(page, 0) + 1
            return True

    def release(self, page: int) -> None:
        """Undo one `hold`."""
        with self._mutex:
            left = self._pins[page] - 1
            if left:
                self._pins[page] = left
                return
            del self._pins[page]
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

        For pages of which KVM keeps what it has read: live page tables. A pin would make a revocation wait; these it
        passes over. A revocation that has begun ends first.
        """
        first, end = self._checked(first, count)
        unit = self._unit
        with self._mutex:
            self._retained.append((first // unit * unit, -(-end // unit) * unit))

    def discarded(self, first: int, count: int) -> None:
        """Take note that the bytes of these pages are gone, or going: those nobody has claimed read as zeros now.

        Somebody discarded them behind the pager's back (a balloon). Pages that are claimed are left to whoever
        has them: a revocation drops pages too, and is announced in the same way.
        """
        with self._mutex:
            for page in range(first, min(first + count, self.layout.pages)):
                if self._states[page] in _IN_RAM and self._claim_over(page) is None:
                    self._states[page] = State.ZERO
                    self.bitmap.clear_range(page, 1)

    def reassert(self, page: int) -> None:
        """Have the trap admit a present page once more: an access has trapped although it is present.

        Under a claim, so that the trap is neither disarmed nor the page revoked meanwhile.
        """
        first = page // self._unit * self._unit
        count = min(self._unit, self.layout.pages - first)
        with self._mutex:
            if not self.enabled or self._states[page] != _PRESENT_BYTE or self._claim_over(page):
                return
            claim = Claim(first, count, _PRESENT * count)
            self._claims.append(claim)
        try:
            self.trap.reassert(first, count)
        finally:
            self._end(claim, claim.before, None)

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
        with self._mutex:
            step = self._obstacle(page) or self._claim(page, page, count)
        if isinstance(step, Claim):
            return self._carry_out(step, PageFault(page))
        if isinstance(step, Wait):
            step.wait()
            return Outcome.PRESENT
        return step

    def mark_nonpresent(self, first: int, count: int) -> int:
        """Shut the guest out of a range: its bytes stay in RAM, the next access traps and costs no fetch.

        vCPUs may run meanwhile. The range is widened to whole units; pages that are retained are passed over. Returns
        how many pages were shut off. Raises PagingError while demand paging is switched off.
        """
        page, end = self._checked(first, count)
        unit = self._unit
        page, end = page // unit * unit, min(-(-end // unit) * unit, self.layout.pages)
        revoked = 0
        while page < end:
            step, page = self._begin_revoke(page, end)
            if isinstance(step, Wait):
                step.wait()
            elif step is not None:
                self._revoke(step)
                revoked += step.count
        return revoked

    def _begin_revoke(self, page: int, end: int) -> tuple[Claim | Wait | None, int]:
        """Claim the next present run of [page, end) for revocation; returns it and where to go on."""
        with self._mutex:
            if self._cancelled:
                return None, end
            if not self.enabled:
                raise PagingError(
                    "pages cannot be marked while demand paging is switched off: enable it first"
                )
            run = self.bitmap.next_present_run(page, end)
            if run is None:
                return None, end
            first = run[0]
            last = min(first + min(run[1], max(_REVOKE_BATCH, self._unit)), self._bounds(first)[1])
            for kept, kept_end in self._retained:
                if kept <= first < kept_end:
                    return None, kept_end
                if first < kept < last:
                    last = kept
            # Present, and yet claimed: being admitted at this moment.
            for other in self._claims:
                if other.first <= first < other.first + other.count:
                    self.counters.waits += 1
                    return Wait(other), first
                if first < other.first < last:
                    last = other.first
            claim = Claim(first, last - first, _PRESENT * (last - first))
            self._states[first:last] = _EVICTING * (last - first)
            self.bitmap.clear_range(first, last - first)
            self._claims.append(claim)
            # Pins taken before the state changed; none can be added now.
            while any(first <= pinned < last for pinned in self._pins):
                self._unpinned.wait()
            return claim, last

    def _revoke(self, claim: Claim) -> None:
        count = claim.count
        quiesced = self.gate.quiesced() if self.trap.needs_quiesce else contextlib.nullcontext()
        try:
            with quiesced:
                self.trap.revoke(claim.first, count)
        except BaseException as error:
            self._end(claim, _BACKED * count, PagingError(f"pages could not be revoked: {error}"))
            raise
        with self._mutex:
            self.counters.pages_revoked += count
        self._end(claim, _BACKED * count, None)

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
            with self._mutex:
                absent = self.layout.pages - self.bitmap.count()
                if absent:
                    raise PagingError(
                        f"demand paging cannot be switched off while {absent} pages are absent: "
                        "make them present first"
                    )
                if not self._claims:
                    self.enabled = False
                    return
                ended = self._claims[0].event()
            ended.wait()

    def cancel(self) -> None:
        """Begin no more claims: every fault on an absent page ends as CANCELLED.

        Claims under way end in their own time. Whoever waits for one is woken now, but for pages that are present
        already and only being admitted; so is whoever sleeps in the kernel on an absent page.
        """
        with self._mutex:
            self._cancelled = True
            absent = [claim for claim in self._claims if self._states[claim.first] != _PRESENT_BYTE]
            waiting = [claim.event() for claim in absent]
            self._unpinned.notify_all()
        for event in waiting:
            event.set()
        if self.enabled:
            self.trap.release_sleepers()

    def abort(self, error: PagingError) -> None:
        """Pause with `error`: something that serves faults has broken."""
        with self._mutex:
            if self.error is None:
                self.error = error

    def close(self) -> None:
        """Give the bitmap back; nobody may use the pager any more."""
        self.bitmap.close()
