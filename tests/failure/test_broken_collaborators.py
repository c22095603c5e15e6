"""What the pager calls raises, whenever: no claim and no pin is left, and nothing is said to be so that is not.

No kernel involved. After each failure all that a guest and a device could want still goes on.
"""

import contextlib
import threading

import pytest
from fakes import PAGES, content, fill, page_of, pager_of, started

from kvmdp.errors import BusyError, PagingError
from kvmdp.page import PAGE_SIZE, Outcome, PageFault
from kvmdp.paging.claim import State, Waiter
from kvmdp.paging.jobs import Job, Observer
from kvmdp.paging.store import FileSink
from kvmdp.vcpu import gate

SOON = 5.0  # seconds that nothing here needs, unless something was left behind
TIMEOUT = 60


class BrokenError(Exception):
    """What nobody expects."""


def breaks(*_arguments):
    raise BrokenError("it is broken")


def check_all_goes_on(pager):
    assert pager.ledger.claims == []
    assert pager.error is None
    for page in range(PAGES):
        if pager.ledger.states[page] == State.POISON:
            pager.unpoison(page, content(page))
    with pager.frozen(SOON):
        pass
    assert pager.mark_present(0, PAGES) is Outcome.PRESENT
    assert set(pager.trap.entered) == {1}
    assert all(page_of(pager, page) == content(page) for page in range(PAGES))
    assert pager.mark_nonpresent(0, PAGES, timeout=SOON) == PAGES
    assert set(pager.trap.entered) == {0}
    assert pager.mark_present(0, PAGES) is Outcome.PRESENT
    pager.disable()


# Those who wait


def test_a_waiter_that_breaks_when_it_is_notified_keeps_no_other_from_being_notified():
    with pager_of() as pager:
        told = []
        claim = pager.begin(PageFault(3))
        for notify in (breaks, lambda: told.append("second"), breaks, lambda: told.append("fourth")):
            assert pager.resolve_or_park(PageFault(3), Waiter(notify)) is None
        waiter = started(lambda: pager.resolve(PageFault(3), SOON))
        while pager.counters.waits < 5:
            pass
        fill(pager, claim)
        with pytest.raises(BrokenError):
            pager.commit(claim)
        waiter.join(TIMEOUT)
        assert not waiter.is_alive()
        assert told == ["second", "fourth"]
        assert pager.ledger.states[3] == State.PRESENT
        check_all_goes_on(pager)


def test_a_waiter_that_breaks_when_the_machine_stops_keeps_no_other_from_being_notified():
    with pager_of() as pager:
        told = []
        claim = pager.begin(PageFault(3))
        for notify in (breaks, lambda: told.append("second")):
            assert pager.resolve_or_park(PageFault(3), Waiter(notify)) is None
        with pytest.raises(BrokenError):
            pager.cancel()
        assert told == ["second"]
        pager.reopen()
        fill(pager, claim)
        pager.commit(claim)
        check_all_goes_on(pager)


# vCPUs


class StuckVcpu:
    """One that does not come out of KVM_RUN."""

    index = 5
    immediate_exit = False

    def kick(self):
        pass


@pytest.mark.parametrize("take", ["mark_nonpresent", "evict", "discard", "poison"])
def test_pages_are_present_as_before_if_a_vcpu_cannot_be_kept_out(monkeypatch, take):
    monkeypatch.setattr(gate, "_PATIENCE_SECONDS", 0.02)
    with pager_of(needs_quiesce=True) as pager:
        pager.mark_present(0, 8)
        stuck = StuckVcpu()
        pager.gate.enter(stuck)
        arguments = (3,) if take == "poison" else (0, 8)
        with pytest.raises(PagingError, match="vCPU 5 did not leave KVM_RUN"):
            getattr(pager, take)(*arguments)
        assert set(pager.ledger.states[0:8]) == {State.PRESENT}
        assert pager.bitmap.test_range(0, 8)
        assert set(pager.trap.entered[0:8]) == {1}
        assert pager.counters.pages_revoked == 0
        pager.gate.leave(stuck)
        check_all_goes_on(pager)


# Peers


@pytest.mark.parametrize("error", [BusyError("it does not let go"), BrokenError("it is broken")])
def test_pages_are_present_as_before_if_a_peer_does_not_let_go(error):
    class Peers:
        def invalidate(self, first, count, deadline):
            raise error

    with pager_of() as pager:
        pager.mark_present(0, 8)
        pager.peers = Peers()
        with pytest.raises(type(error)):
            pager.evict(0, 8)
        assert set(pager.ledger.states[0:8]) == {State.PRESENT}
        pager.peers = None
        check_all_goes_on(pager)


# The trap


def test_memory_that_cannot_be_freed_pauses_the_machine_and_the_pages_are_where_they_went():
    with pager_of() as pager:
        pager.mark_present(0, 8)

        def forget(first, count):
            raise OSError(5, "Input/output error")

        pager.trap.forget = forget
        assert pager.evict(0, 8) == 8
        assert set(pager.ledger.states[0:8]) == {State.SINK}
        assert pager.ledger.claims == []
        assert "cannot be freed" in str(pager.error)


def test_a_trap_that_breaks_as_it_frees_memory_leaves_the_pages_where_they_went():
    with pager_of() as pager:
        pager.mark_present(0, 8)
        forget, pager.trap.forget = pager.trap.forget, breaks
        with pytest.raises(BrokenError):
            pager.evict(0, 8)
        assert set(pager.ledger.states[0:8]) == {State.SINK}
        pager.trap.forget = forget
        check_all_goes_on(pager)


def test_a_trap_that_breaks_as_it_revokes_pauses_the_machine_and_leaves_no_claim():
    with pager_of() as pager:
        pager.mark_present(0, 8)
        pager.trap.revoke = breaks
        with pytest.raises(BrokenError):
            pager.evict(0, 8)
        assert pager.ledger.claims == []
        assert not pager.bitmap.test(0)
        assert "could not be revoked: internal error: BrokenError" in str(pager.error)


@pytest.mark.parametrize("call", ["collapse", "reassert"])
def test_a_trap_that_breaks_at_present_pages_leaves_them_present(call):
    with pager_of() as pager:
        pager.mark_present(0, PAGES)
        works = getattr(pager.trap, call)
        setattr(pager.trap, call, breaks)
        with pytest.raises(BrokenError):
            pager.collapse(0, PAGES) if call == "collapse" else pager.reassert(3)
        assert set(pager.ledger.states) == {State.PRESENT}
        setattr(pager.trap, call, works)
        check_all_goes_on(pager)


def test_a_trap_that_cannot_be_armed_leaves_demand_paging_off():
    with pager_of() as pager:
        pager.mark_present(0, PAGES)
        pager.disable()
        arm, pager.trap.arm = pager.trap.arm, breaks
        with pytest.raises(BrokenError):
            pager.enable()
        assert not pager.enabled
        pager.trap.arm = arm
        pager.enable()
        check_all_goes_on(pager)


# Where bytes come from and go to


class BrokenSink(FileSink):
    def store(self, offset, content):
        if offset >= 4 * PAGE_SIZE:
            breaks()
        super().store(offset, content)


def test_a_sink_that_breaks_half_way_has_what_it_took_and_the_rest_stays_in_ram():
    with pager_of() as pager, contextlib.closing(BrokenSink(PAGES * PAGE_SIZE)) as sink:
        pager.mark_present(0, 8)
        pager.sink = sink
        assert pager.evict(0, 4) == 4
        with pytest.raises(BrokenError):
            pager.evict(0, 8)
        assert set(pager.ledger.states[0:4]) == {State.SINK}
        assert set(pager.ledger.states[4:8]) == {State.BACKED}
        check_all_goes_on(pager)


def test_a_fetch_that_is_interrupted_pauses_nothing():
    with pager_of() as pager:

        def interrupt(first, count):
            pager.source.before = lambda first, count: None
            raise KeyboardInterrupt

        pager.source.before = interrupt
        with pytest.raises(KeyboardInterrupt):
            pager.resolve(PageFault(3))
        assert pager.ledger.states[3] == State.SOURCE
        check_all_goes_on(pager)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (bytes(10), ValueError),
        (bytes(PAGE_SIZE + 1), ValueError),
        (memoryview(bytes(PAGE_SIZE)).cast("c"), ValueError),
        ("x" * PAGE_SIZE, TypeError),
        (None, TypeError),
    ],
)
def test_new_bytes_of_a_wrong_kind_leave_the_page_poisoned(wrong, error):
    with pager_of() as pager:
        pager.poison(3)
        with pytest.raises(error):
            pager.unpoison(3, wrong)
        assert pager.resolve(PageFault(3), SOON) is Outcome.POISONED
        check_all_goes_on(pager)


# Those who look on


def test_an_observer_that_breaks_has_broken_no_fault():
    with pager_of() as pager:
        observer = Observer(breaks)
        pager.jobs.add(observer)
        with pytest.raises(BrokenError):
            pager.resolve(PageFault(3))
        assert pager.resolve(PageFault(3)) is Outcome.PRESENT
        pager.jobs.remove(observer)
        check_all_goes_on(pager)


class Worker(Job):
    """A job whose work is `work`."""

    def __init__(self, work):
        self._work = work

    def after_fault(self):
        self._work()


def test_a_job_that_breaks_is_over_and_keeps_no_thread_from_switching_off():
    with pager_of() as pager:
        worker = Worker(breaks)
        pager.jobs.add(worker)
        for take in (lambda: pager.resolve(PageFault(3)), lambda: pager.mark_nonpresent(3, 1)):
            with pytest.raises(BrokenError):
                take()
        pager.jobs.remove(worker)
        done = []
        pager.jobs.add(Worker(lambda: done.append(True)))
        pager.resolve(PageFault(4))
        assert done, "the thread is said to be at the job still"
        check_all_goes_on(pager)


def test_somebody_else_may_switch_after_one_who_could_not():
    with pager_of() as pager:
        with pytest.raises(PagingError, match="pages are absent"):
            pager.disable()
        pager.mark_present(0, PAGES)
        other = threading.Thread(target=pager.disable)
        other.start()
        other.join(TIMEOUT)
        assert not other.is_alive()
        pager.enable()
        check_all_goes_on(pager)
