"""How a page stops being present: shut off, evicted, discarded or poisoned; and how a poisoned one is healed.

Order: state EVICTING and bit, peers and pins drained, then `trap.revoke` (with every vCPU out of KVM_RUN where the trap
needs that), then the bytes saved or dropped, then the new state, then wake. No thread can write to a page after
`trap.revoke`, and an access to it waits for the claim: so no write between save and removal is lost.

Units: RAM pages, seconds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from kvmdp.errors import BusyError, CancelledError, PagingError, SwitchedOffError
from kvmdp.interruption import Uninterrupted
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE, PageFault
from kvmdp.paging.admission import Admission
from kvmdp.paging.broken import broken
from kvmdp.paging.claim import Claim, State, Wait
from kvmdp.paging.ports import Peers, Quiescer, Trap
from kvmdp.paging.store import FileSink
from kvmdp.paging.takeable import runs_to_take, takeable
from kvmdp.shortage import ShortageError, in_words
from kvmdp.source.base import SourceError, WritableSource

_REVOKE_BATCH = 512  # pages revoked at once: bounds how long vCPUs are kept out of KVM_RUN

_PRESENT = int(State.PRESENT)
_SHUT_OFF = takeable()
_EVICTABLE = takeable(State.BACKED)
_SHUT_OFF_EVICTABLE = takeable(State.BACKED, present=False)
_DISCARDABLE = takeable(State.BACKED, State.SOURCE, State.SINK)
_POISONABLE = takeable(State.BACKED, State.SOURCE, State.SINK, State.ZERO)


class Removal:
    """Takes pages away, and heals poisoned ones.

    Arguments: where RAM lies; the trap; what makes the pages present that this takes away; the gate the vCPUs pass.
    `peers`, if set, is asked before pages are taken away.
    """

    def __init__(self, layout: GuestLayout, trap: Trap, admission: Admission, gate: Quiescer) -> None:
        self.peers: Peers | None = None
        self._layout = layout
        self._trap = trap
        self._admission = admission
        self._ledger = admission.ledger
        self._mutex = admission.mutex
        self._contents = admission.contents
        self._gate = gate

    # Pages that stay

    def retain(self, first: int, count: int) -> None:
        """Never make these pages non-present from now on, once they are present; widened to whole units.

        For pages that KVM uses without an access that could trap: live page tables, of which it keeps what it has
        read, and pages it writes to by itself. A pin would make a revocation wait; these it passes over. One that has
        begun ends first: a caller that wants the pages present makes them so afterwards. Undone by `let_go`; counted.
        """
        first, end = self._layout.check_pages(first, count)
        with self._mutex:
            self._ledger.retained.add(self._ledger.whole_units(first, end))

    def let_go(self, first: int, count: int) -> None:
        """Undo one `retain` of the same pages."""
        first, end = self._layout.check_pages(first, count)
        with self._mutex:
            self._ledger.retained.remove(self._ledger.whole_units(first, end))

    def note_discarded(self, first: int, count: int) -> None:
        """Take note that the bytes of these pages are gone, or going: they read as zeros from now on.

        For memory that is discarded without asking the pager (a balloon). Claimed pages are left to the claim's owner,
        which is told so.
        """
        with self._mutex:
            self._ledger.discarded(first, count)

    # Taking away. All may be called while vCPUs and devices run.

    def mark_nonpresent(self, first: int, count: int, timeout: float | None = None) -> int:
        """Shut the guest out of a range: its bytes stay in RAM, the next access traps and costs no fetch.

        The range is widened to whole units; pages that are retained are passed over. Returns how many pages were shut
        off. Raises BusyError if an access or a claim keeps a page for longer than `timeout` seconds (None waits): what
        was taken away before that stays away, the rest is present. SwitchedOffError while demand paging is switched
        off. When the machine stops nothing more is taken away: it returns then too.
        """
        return self._take_away(first, count, timeout, _SHUT_OFF, self._keep)

    def evict(self, first: int, count: int, timeout: float | None = None) -> int:
        """Move the bytes of a range out of RAM: the next access brings back exactly those.

        They go to the sink, a FileSink unless another was set before the first eviction. Pages whose bytes
        are not in RAM are left alone. Returns how many pages were evicted; widened, passed over and raising as
        `mark_nonpresent`, and raises PagingError if the sink takes no more: those pages stay in RAM.
        """
        self._have_sink()
        return self._take_away(first, count, timeout, _EVICTABLE, self._store)

    def evict_shut_off(self, first: int, count: int, timeout: float | None = None) -> int:
        """Evict those pages of a range that are shut off, and leave alone what has been admitted again since."""
        self._have_sink()
        return self._take_away(first, count, timeout, _SHUT_OFF_EVICTABLE, self._store)

    def write_back(self, first: int, count: int, timeout: float | None = None) -> int:
        """Evict a range into the source it came from; as `evict`.

        Raises PagingError if the source takes no pages (`kvmdp.source.base.WritableSource`), or ends before the range.
        """
        source = self._contents.source
        if not isinstance(source, WritableSource):
            raise PagingError(
                f"{source.name} takes no pages back: evict them to a sink, or open the image for writing"
            )
        _, end = self._widened(first, count)
        if end * PAGE_SIZE > source.size:
            raise PagingError(
                f"{source.name} ends at {source.size:#x}, before page {end - 1} of RAM: "
                "evict the pages behind its end to a sink"
            )
        return self._take_away(first, count, timeout, _EVICTABLE, self._give_back)

    def discard(self, first: int, count: int, timeout: float | None = None) -> int:
        """Throw the bytes of a range away, wherever they are: the next access finds zeros, as after a balloon.

        Returns how many pages had other bytes before, or might have; widened, passed over and raising as
        `mark_nonpresent`.
        """
        return self._take_away(first, count, timeout, _DISCARDABLE, self._drop)

    def poison(self, page: int, timeout: float | None = None) -> tuple[int, int]:
        """Make a page, and its unit, unusable: its bytes are lost, the next access is a machine check.

        Returns the unit, (first, count). Raises PagingError if it is poisoned already or retained, BusyError as
        `mark_nonpresent`.
        """
        first, end = self._widened(page, 1)
        count = end - first
        taken = self._take_away(first, count, timeout, _POISONABLE, self._spoil)
        if taken != count and not self._ledger.cancelled:
            why = "poisoned already" if self._ledger.states[page] == State.POISON else "in use by KVM itself"
            raise PagingError(
                f"the page at gpa {self._layout.gpa_of_page(page):#x} cannot be poisoned: it is {why}"
            )
        return first, count

    def unpoison(self, page: int, content: bytes) -> None:
        """Give a poisoned page, with its unit, new bytes, and admit it.

        `content` is as long as the unit. Raises PagingError if the page is not poisoned. Waits until KVM is done with
        each access to it that it has half emulated: so a vCPU's thread that is at one must not call this, nor a thread
        that keeps the vCPUs out of KVM_RUN (`quiesced`). A stop of the machine does not end it: the page is healed.
        """
        self._layout.check_pages(page, 1)
        admission = self._admission
        with admission.owning() as claim:
            began = self._heal(page, content, claim)
        # As when any other page becomes present: it may be the last of a region.
        for admitted in admission.jobs.on_admitted:
            admitted(PageFault(page), claim, began)
        admission.jobs.work()

    def _heal(self, page: int, content: bytes, claim: Claim) -> int:
        """Carry out `unpoison`; returns when the page had its bytes (time.perf_counter_ns)."""
        gpa = self._layout.gpa_of_page(page)
        with self._mutex:
            was_poisoned = self._ledger.begin_heal(page, claim) is not None
        if not was_poisoned:
            raise PagingError(f"the page at gpa {gpa:#x} is not poisoned: there is nothing to heal")
        length = claim.count * PAGE_SIZE
        if len(content) != length:
            raise ValueError(
                f"{len(content)} bytes for gpa {gpa:#x}, where {length} are poisoned: give all of them"
            )
        # Since the claim no new access is at the page: those that come wait for it. A vCPU that holds it (`held`) has
        # an access of KVM's emulator to get out of the way, in a KVM_RUN that does not enter the guest. Until that is
        # done KVM may store once more, and must find the page poisoned.
        #
        # That it ends: such a vCPU waits for the gate and for no page, and a stop makes it turn round at the gate. The
        # thread that has closed the gate does not wait for this claim: `disable` finds the page absent and raises,
        # others wait for no claim. Should the vCPU sleep on this page in that KVM_RUN (userfaultfd), the reader tells
        # it at once that it is poisoned (`begin`), and does not wait for this claim.
        with self._mutex:
            while self._ledger.pins.hold(claim):
                self._admission.unpinned.wait()
        self._contents.put(claim.first, content)
        began = time.perf_counter_ns()
        self._admission.commit(claim)
        return began

    def _have_sink(self) -> None:
        with self._mutex:
            missing = self._contents.sink is None
        if missing:
            with Uninterrupted():  # or its file would be closed by the garbage collector at best
                self._make_sink()

    def _make_sink(self) -> None:
        try:
            sink = FileSink(self._layout.memory_bytes)
        except OSError as error:
            raise PagingError(f"no page can be evicted: {in_words(error)}") from error
        with self._mutex:
            if self._contents.sink is None:
                self._contents.sink = sink
                return
        sink.close()  # another thread was faster

    def _take_away(
        self,
        first: int,
        count: int,
        timeout: float | None,
        kinds: bytes,
        finish: Callable[[int, int], State],
    ) -> int:
        """Take the pages of a range away that `kinds` names; returns how many.

        `finish` is told of each run of them that was in one state, (first, count), and says what they are now.
        """
        page, end = self._widened(first, count)
        deadline = None if timeout is None else time.monotonic() + timeout
        taken = 0
        while page < end:
            with self._admission.owning() as claim:
                wait, page = self._begin_take(page, end, kinds, claim, deadline)
                if wait is not None:
                    self._await(wait, deadline, page)
                    continue
                if not claim.count:
                    continue
                try:
                    taken += self._take(claim, deadline, kinds, finish)
                except CancelledError:
                    break  # as before a claim was had: the pages are as they were
            self._admission.jobs.work()
        return taken

    def _await(self, wait: Wait, deadline: float | None, page: int) -> None:
        """Wait for the end of a claim on a page. Raises BusyError."""
        if self._admission.sleep(wait, deadline) is not None:
            gpa = self._layout.gpa_of_page(page)
            raise BusyError(f"the page at gpa {gpa:#x} is being fetched or taken away by another thread")

    def _begin_take(
        self, page: int, end: int, kinds: bytes, claim: Claim, deadline: float | None
    ) -> tuple[Wait | None, int]:
        """Claim the next run of [page, end) that `kinds` names, if nothing is in its way; returns what is."""
        with self._mutex:
            end = self._give_way(page, end, deadline)
            if not self._admission.enabled:
                raise SwitchedOffError(
                    "pages cannot be marked while demand paging is switched off: enable it first"
                )
            _, in_the_way, page = self._ledger.begin_take(page, end, _REVOKE_BATCH, kinds, claim)
            wait = None
            if in_the_way is not None:
                wait = Wait()
                self._ledger.queue(in_the_way, wait)
            return wait, page

    def _give_way(self, page: int, end: int, deadline: float | None) -> int:
        """Wait, with the mutex held, until no access insists on `page`; returns where one does, or the `end`.

        That it ends: an access that insists waits for claims alone, and this thread has none. Each that is there ends,
        with the page present, and no thread takes that away again. Raises BusyError.
        """
        unit = self._ledger.unit
        while (found := self._ledger.pins.first_insisted(page, end)) is not None:
            if self._ledger.cancelled:
                break
            if found // unit * unit > page:
                return found // unit * unit
            gpa = self._layout.gpa_of_page(found)
            self._await_pins(
                deadline, f"the page at gpa {gpa:#x} is wanted by an access that had lost it before"
            )
        return end

    def _await_pins(self, deadline: float | None, busy: str) -> None:
        """Wait, with the mutex held, for a change of pins. Raises BusyError that says `busy`."""
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise BusyError(busy)
        self._admission.unpinned.wait(left)

    def _take(
        self,
        claim: Claim,
        deadline: float | None,
        kinds: bytes,
        finish: Callable[[int, int], State],
    ) -> int:
        if claim.before[0] == _PRESENT:
            self._revoke(claim, deadline)
        states = bytearray(claim.before if claim.after is None else claim.after)
        taken = 0
        gone: list[tuple[int, int]] = []  # whose bytes need not be in RAM any more
        try:
            for start, count in runs_to_take(claim.before, kinds):
                done = finish(claim.first + start, count)
                with Uninterrupted():  # or memory would be freed of which it is said that the bytes are there
                    if states[start] == State.BACKED and done is not State.BACKED:
                        gone.append((claim.first + start, count))
                    states[start : start + count] = bytes((done,)) * count
                    claim.after = bytes(states)
                taken += count
        except (OSError, ShortageError, SourceError) as error:
            gpa = self._layout.gpa_of_page(claim.first)
            raise PagingError(
                f"pages from gpa {gpa:#x} on stay in RAM, they cannot be saved: {in_words(error)}"
            ) from error
        finally:
            with Uninterrupted():  # or memory would not be freed of which it is said that nothing is there
                self._admission.end(claim, bytes(states), self._forget(gone))
        return taken

    def _forget(self, runs: list[tuple[int, int]]) -> PagingError | None:
        """Free the memory of pages that are still claimed; returns what to pause the machine with if that fails."""
        try:
            for first, count in runs:
                self._trap.forget(first, count)
        except OSError as error:
            return broken("the memory of pages that were taken away cannot be freed", error)
        return None

    def _revoke(self, claim: Claim, deadline: float | None) -> None:
        """Shut all accesses out of present pages. Raises with the pages as before, unless it is the trap that fails."""
        self._drain(claim, deadline)
        quiesced = self._gate.quiesced() if self._trap.needs_quiesce else contextlib.nullcontext()
        with quiesced, Uninterrupted():
            try:
                self._trap.revoke(claim.first, claim.count)
            except BaseException as error:
                self._admission.end(claim, State.BACKED, broken("pages could not be revoked", error))
                raise
            claim.after = bytes((State.BACKED,)) * claim.count  # what they are until they are finished
            with self._mutex:
                self._ledger.counters.pages_revoked += claim.count

    def _drain(self, claim: Claim, deadline: float | None) -> None:
        """Wait until no access of user space is at the pages; none can begin any more.

        Raises BusyError, CancelledError.
        """
        if self.peers is not None:
            self.peers.invalidate(claim.first, claim.count, deadline)
        with self._mutex:
            while self._ledger.pins.hold(claim):
                if self._ledger.cancelled:
                    raise CancelledError("the machine is stopping: pages in use are not taken away any more")
                gpa = self._layout.gpa_of_page(claim.first)
                self._await_pins(
                    deadline, f"the {claim.count} pages from gpa {gpa:#x} are in use: a view of them is open"
                )

    # What becomes of the bytes of pages that no access can touch

    def _keep(self, _first: int, _count: int) -> State:
        return State.BACKED

    def _store(self, first: int, count: int) -> State:
        assert self._contents.sink is not None
        self._contents.store(self._contents.sink, first, count)
        with self._mutex:
            self._ledger.counters.pages_evicted += count
        return State.SINK

    def _give_back(self, first: int, count: int) -> State:
        assert isinstance(self._contents.source, WritableSource)
        self._contents.store(self._contents.source, first, count)
        with self._mutex:
            self._ledger.counters.pages_evicted += count
        return State.SOURCE

    def _drop(self, _first: int, count: int) -> State:
        with self._mutex:
            self._ledger.counters.pages_discarded += count
        return State.ZERO

    def _spoil(self, _first: int, count: int) -> State:
        with self._mutex:
            self._ledger.counters.pages_discarded += count
        return State.POISON

    def _widened(self, first: int, count: int) -> tuple[int, int]:
        """Return the (first, end) pages of the whole units that hold a range. Raises ValueError outside RAM."""
        first, end = self._layout.check_pages(first, count)
        unit = self._ledger.unit
        return first // unit * unit, min(-(-end // unit) * unit, self._layout.pages)
