"""The pager: how a page becomes present (`kvmdp.paging.admission`) or stops being so (`kvmdp.paging.removal`).

Here is what concerns all of RAM: switching demand paging on and off, freezing accesses, marking, reading pages wherever
their bytes are, stopping.

Units: RAM pages, seconds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator

from kvmdp.errors import PagingError, PoisonedError
from kvmdp.interruption import Uninterrupted, undone
from kvmdp.memory.bitmap import PresentBitmap
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE, REGION
from kvmdp.paging.access_gate import AccessGate
from kvmdp.paging.admission import Admission
from kvmdp.paging.claim import Claim, State, Wait, notify
from kvmdp.paging.initial import initial_states
from kvmdp.paging.ledger import Ledger
from kvmdp.paging.marking import Marking
from kvmdp.paging.policy import FaultPolicy
from kvmdp.paging.ports import Peers, Quiescer, Trap
from kvmdp.paging.removal import Removal
from kvmdp.paging.takeable import takeable
from kvmdp.source.base import PageSource, WritableSource
from kvmdp.source.request import FetchCancel
from kvmdp.waiting import Condition

_MAX_CLAIM = 512  # pages claimed at once when they are read: 2 MiB
_ABSENT = takeable(State.SOURCE, State.BACKED, State.ZERO, State.SINK, State.POISON, present=False)


class Pager:
    """Decides what happens to an access to an absent page.

    Arguments: where RAM lies; the trap, not yet armed; the source; the policy; the gate the vCPUs pass; `states`, the
    state of each page at the beginning, a byte a page (None: all is at the source, or a hole of it). Raises ValueError
    for a source that is larger than RAM, and for states that no page can begin in.

    It has a `ledger`, an `admission` and a `removal`; what they do is called by the pager's own names: `resolve`,
    `evict`, and so on. `bitmap` is the projection of the states: bit set if and only if the guest may enter, or is
    about to be let in. `jobs` run beside the guest. `accesses` is the gate of accesses that no vCPU makes,
    `vcpu_accesses` of what is done on a vCPU's account, which is never shut.

    `mutex` guards the ledger, `error`, `enabled` and the gates of accesses. `kvmdp.paging.access` takes it too, for a
    copy of a page at the most.
    """

    def __init__(
        self,
        layout: GuestLayout,
        trap: Trap,
        source: PageSource,
        policy: FaultPolicy,
        gate: Quiescer,
        states: bytes | bytearray | None = None,
    ) -> None:
        if source.size > layout.memory_bytes:
            wanted = f"{source.name} has {source.size} bytes, RAM only {layout.memory_bytes}"
            raise ValueError(f"{wanted}: make RAM at least as large")
        data = [(offset // PAGE_SIZE, length // PAGE_SIZE) for offset, length in source.extents()]
        self.layout = layout
        self.trap = trap
        self.gate = gate
        self.bitmap = PresentBitmap(layout.pages)
        try:
            self.ledger = Ledger(
                self.bitmap,
                trap.granule // PAGE_SIZE,
                [
                    (each.offset // PAGE_SIZE, (each.offset + each.size) // PAGE_SIZE)
                    for each in layout.regions
                ],
                initial_states(layout.pages, data) if states is None else states,
            )
        except BaseException:
            self.bitmap.close()
            raise
        self.counters = self.ledger.counters
        self.admission = admission = Admission(layout, self.ledger, trap, source, policy)
        self.removal = removal = Removal(layout, trap, admission, gate)
        marking = Marking(layout, admission, removal)
        self.contents = admission.contents
        self.jobs = admission.jobs
        self.mutex = admission.mutex
        self.accesses = AccessGate(self.ledger, self.mutex, admission.unpinned)
        self.vcpu_accesses = AccessGate(self.ledger, self.mutex, admission.unpinned)
        self._switcher: object = None  # the thread that has the claim on `enabled`: to arm or disarm the trap
        self._switched = Condition(self.mutex)
        gate.tell(self.jobs.ask_again)
        # Bound once: a method here that only handed on would be one more frame on the way of each fault.
        self.resolve, self.resolve_or_park = admission.resolve, admission.resolve_or_park
        self.begin, self.commit, self.fail = admission.begin, admission.commit, admission.fail
        self.withdraw, self.owning = admission.withdraw, admission.owning
        self.hold, self.release, self.held = admission.hold, admission.release, admission.held
        self.abort, self.resume = admission.abort, admission.resume
        self.mark_nonpresent, self.discard = removal.mark_nonpresent, removal.discard
        self.retain, self.let_go = removal.retain, removal.let_go
        self.note_discarded = removal.note_discarded
        self.evict, self.evict_shut_off, self.write_back = (
            removal.evict,
            removal.evict_shut_off,
            removal.write_back,
        )
        self.poison, self.unpoison = removal.poison, removal.unpoison
        self.mark_present, self.complete, self.shut_off = (
            marking.mark_present,
            marking.complete,
            marking.shut_off,
        )
        self.mark_bitmap_present, self.mark_bitmap_nonpresent = (
            marking.mark_bitmap_present,
            marking.mark_bitmap_nonpresent,
        )

    @property
    def enabled(self) -> bool:
        """Whether the trap is armed."""
        return self.admission.enabled

    @property
    def error(self) -> PagingError | None:
        """Why faults on absent pages fail for good; None as long as they do not."""
        return self.admission.error

    @property
    def paused(self) -> PagingError | None:
        """Why the source could not deliver; None if it can, or `resume` was called since."""
        return self.admission.paused

    @property
    def holds(self) -> bool:
        """Whether faults that a pause concerns wait for `resume`, instead of failing; to be set before any fault."""
        return self.admission.holds

    @holds.setter
    def holds(self, holds: bool) -> None:
        self.admission.holds = holds

    @property
    def sink(self) -> WritableSource | None:
        """What takes evicted pages; a FileSink of the pager's own from the first eviction on, unless set before."""
        return self.contents.sink

    @sink.setter
    def sink(self, sink: WritableSource) -> None:
        self.contents.sink = sink

    @property
    def peers(self) -> Peers | None:
        """Processes that access RAM by themselves: asked before pages go, and before accesses are frozen."""
        return self.removal.peers

    @peers.setter
    def peers(self, peers: Peers | None) -> None:
        self.removal.peers = peers

    # Accesses that no vCPU makes

    @contextlib.contextmanager
    def frozen(self, timeout: float | None = None) -> Iterator[None]:
        """Keep all accesses but those of vCPUs out of RAM for the time of the block: they raise FrozenError.

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
        with self.admission.owning() as claim:
            with self.mutex:
                if not self.enabled or self.ledger.begin_reassert(page, claim) is None:
                    return False
            with Uninterrupted():
                mended = self.trap.reassert(claim.first, claim.count)
            self.admission.end(claim, State.PRESENT)
            return mended

    def collapse(self, first: int, count: int) -> int:
        """Put present pages together into as large pieces as the trap can make of them: huge pages, memslots.

        Whole regions of 2 MiB (or whole units, if those are larger) inside the range of which every page is present;
        the others are passed over, as are all where `trap.collapses` is False. vCPUs may run, pages stay present, but
        an access that faults on one or asks for it meanwhile waits. Returns how many pages have been put together.
        """
        first, end = self.layout.check_pages(first, count)
        size = max(REGION, self.ledger.unit)
        done = 0
        for page in range(-(-first // size) * size, end // size * size if self.trap.collapses else 0, size):
            with self.admission.owning() as claim:
                with self.mutex:
                    if not self.enabled or self.ledger.begin_present(page, size, claim) is None:
                        continue
                with Uninterrupted():
                    done += size * self.trap.collapse(page, size)
                self.admission.end(claim, State.PRESENT)
        return done

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
                    self.admission.enabled = True
        self.jobs.work()  # all of RAM may be present

    def disable(self) -> None:
        """Disarm the trap: RAM is plain memory again, with no overhead left. Does nothing if it is disarmed.

        Raises PagingError while pages are absent: nothing would fetch them any more. Must not be called
        from a job.
        """
        with self._switching():
            if not self.enabled:
                return
            with self.gate.quiesced():
                is_begun = False
                try:
                    self._switch_off()
                    with Uninterrupted():
                        is_begun = True
                        self.trap.disarm()
                except BaseException:
                    if not is_begun:  # an interruption came between the two
                        self.admission.enabled = True
                    raise

    @contextlib.contextmanager
    def _switching(self) -> Iterator[None]:
        """Be the only thread to arm or disarm the trap; one that comes second waits and finds it done."""
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

    def _switch_off(self) -> None:
        """Switch off once no page has a claim and no thread is at a job; raises PagingError if a page is absent.

        When all pages are present the last regions of memslots are merged, by a job, with no claim held: to disarm
        meanwhile would delete the same memslots. So threads at a job are waited for as well, and none begins once
        `enabled` is False, which is set in the step that finds no page absent and no claim.

        Why it comes to an end although the caller keeps the vCPUs out: each thread that is waited for is outside the
        gate, needs none of them to get on, and may stop them too (the gate counts its closers). The owner of a claim on
        a present page admits it; a revocation would wait (for pins), but its pages are absent from its beginning. A job
        does not insist on a claim or a pin, so not on the views that the caller or the job's own thread may hold; it
        finds nothing absent to fetch, and is refused what it would take away. What was begun before is a claim and has
        ended.
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
                    self.admission.enabled = False
                    self.jobs.await_idle()
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

        Claims under way end in their own time, or as soon as their source gives up. Threads that wait for one are woken
        now, but for pages that are present already and only being admitted; so is a vCPU that sleeps in the kernel on
        an absent page.
        """
        with self.mutex:
            woken = self.ledger.cancel()
            self.admission.unpinned.notify_all()
        self.jobs.ask_again()  # no fault is held back any more
        notify(woken)
        self.contents.cancel.set()
        if self.enabled:
            self.trap.release_sleepers()

    def reopen(self) -> None:
        """Undo `cancel`: an access to an absent page is a fault again. No vCPU may run."""
        self.contents.cancel = FetchCancel()
        with self.mutex:
            self.ledger.cancelled = False
        if self.enabled:
            with contextlib.closing(self._absent_runs()) as runs:
                self.trap.hold_sleepers(runs)

    def _absent_runs(self) -> Generator[tuple[int, int]]:
        """Yield the runs of pages that are absent, each claimed until the next is asked for.

        Pages with another claim are passed over: what comes of those is admitted as ever, over whatever the trap has
        there.
        """
        page, pages = 0, self.layout.pages
        while page < pages:
            with self.admission.owning() as claim:
                with self.mutex:
                    _, _, page = self.ledger.begin_take(page, pages, pages, _ABSENT, claim)
                if claim.count:
                    yield claim.first, claim.count

    # Reading pages wherever their bytes are

    def content(self, first: int, count: int, into: memoryview) -> None:
        """Copy the bytes of a range to `into`, `count` * 4096 bytes, and leave its pages in the states they are in.

        Pages at the source or in the sink are fetched to `into` and not admitted. Claims that are in the way are waited
        for, as faults wait for this. vCPUs may run: a store to a page that they may enter is in the copy or is not.
        Pages of a source that another process fills RAM from are BACKED afterwards. Works after `cancel` too, but for
        such. Raises ValueError for a range outside RAM or an `into` of another size, PoisonedError for a range with a
        poisoned page, SourceError, ShortageError.
        """
        page, end = self.layout.check_pages(first, count)
        if len(into) != count * PAGE_SIZE:
            raise ValueError(f"{len(into)} bytes for {count} pages: give {count * PAGE_SIZE}")
        while page < end:
            with self.admission.owning() as claim:
                with self.mutex:
                    obstacle = self.ledger.begin_look(page, min(end, page + _MAX_CLAIM), claim)
                    if isinstance(obstacle, Claim):
                        wait = Wait()
                        self.ledger.queue(obstacle, wait)
                if obstacle is None:
                    stop = min(claim.first + claim.count, end)
                    self.contents.copy(
                        claim, page, into[(page - first) * PAGE_SIZE : (stop - first) * PAGE_SIZE]
                    )
                    page = stop
            if isinstance(obstacle, Claim):
                self.admission.sleep(wait, None)
            elif obstacle is not None:
                gpa = self.layout.gpa_of_page(page)
                raise PoisonedError(f"the page at gpa {gpa:#x} is poisoned: what was in it is lost")

    def close(self) -> None:
        """End the jobs, and give bitmap and sink back; the pager must not be used any more."""
        self.jobs.close()
        self.bitmap.close()
        self.contents.close()
