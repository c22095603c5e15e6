"""Policies from outside: what they propose is cut to what can be claimed, and what they must not do is refused.

No kernel involved.
"""

import numpy as np
import pytest
from fakes import PAGES, content, page_of, pager_of, source_error, started

from kvmdp.memory.layout import LOW_RAM_END
from kvmdp.page import PAGE_SIZE, Access, Origin, Outcome, PageFault
from kvmdp.paging.claim import State, Waiter
from kvmdp.paging.policy import PolicyError

LOW_PAGES = LOW_RAM_END // PAGE_SIZE
TIMEOUT = 60


class Proposes:
    """Proposes the same for every fault, and notes the faults; raises if it is to propose an exception."""

    def __init__(self, window):
        self.window_of_all = window
        self.faults = []

    def window(self, fault):
        self.faults.append(fault)
        if isinstance(self.window_of_all, Exception):
            raise self.window_of_all
        return self.window_of_all


def test_a_policy_is_asked_with_the_whole_fault_once_for_each_that_fetches():
    policy = Proposes((8, 4))
    with pager_of(policy=policy) as pager:
        fault = PageFault(9, Origin.DEVICE, 3, Access.WRITE)
        assert pager.resolve(fault) is Outcome.ADMITTED
        assert pager.resolve(PageFault(10)) is Outcome.PRESENT
        assert policy.faults == [fault]
        assert pager.source.fills == [(8, 4)]


@pytest.mark.parametrize(
    ("page", "window", "run"),
    [
        (3, (-100, 104), (0, 4)),
        (PAGES - 1, (PAGES - 2, 512), (PAGES - 2, 2)),
        (0, (np.int64(0), np.int64(512)), (0, 512)),
        (7, (7, 1), (7, 1)),
    ],
)
def test_a_window_is_cut_to_ram(page, window, run):
    with pager_of(policy=Proposes(window)) as pager:
        claim = pager.begin(PageFault(page))
        assert (claim.first, claim.count) == run
        pager.admission.end(claim, claim.before)


def test_a_window_is_cut_to_one_stretch_of_ram():
    for page, run in ((LOW_PAGES - 1, (LOW_PAGES - 8, 8)), (LOW_PAGES, (LOW_PAGES, 8))):
        with pager_of(LOW_PAGES + 1024, policy=Proposes((LOW_PAGES - 8, 16))) as pager:
            claim = pager.begin(PageFault(page))
            assert (claim.first, claim.count) == run
            pager.admission.end(claim, claim.before)


def test_a_window_is_cut_to_absent_pages_and_widened_to_whole_units():
    policy = Proposes((20, 1))
    with pager_of(granule=4 * PAGE_SIZE, policy=policy) as pager:
        pager.resolve(PageFault(20))
        policy.window_of_all = (10, 20)
        pager.resolve(PageFault(17))
        assert pager.source.fills == [(20, 4), (8, 12)]


def cut(first, count):
    raise source_error(first, count)


REFUSED = [
    ((4, 4), "proposes 4 pages from 4 on for a fault on page 3"),
    ((0, 3), "proposes 3 pages from 0 on for a fault on page 3"),
    ((3, 0), "proposes 0 pages from 3 on for a fault on page 3"),
    ((5, -4), "proposes -4 pages from 5 on for a fault on page 3"),
    ((0, 513), "proposes 513 pages from 0 on for a fault on page 3"),
    ((3, 1.0), "internal error: TypeError"),
    ((3,), "internal error: ValueError"),
    (None, "internal error: TypeError"),
    (ZeroDivisionError("division by zero"), "internal error: ZeroDivisionError('division by zero')"),
]


@pytest.mark.parametrize("granule", [PAGE_SIZE, 4 * PAGE_SIZE])
@pytest.mark.parametrize(("window", "sentence"), REFUSED)
def test_what_a_policy_must_not_do_ends_the_fault_and_claims_nothing(window, sentence, granule):
    policy = Proposes(window)
    with pager_of(granule=granule, policy=policy) as pager:
        assert pager.resolve(PageFault(3)) is Outcome.FAILED
        assert isinstance(pager.error, PolicyError)
        assert str(pager.error).startswith("the policy Proposes ")
        assert sentence in str(pager.error)
        assert pager.ledger.claims == []
        assert set(pager.ledger.states) == {State.SOURCE}
        assert not pager.bitmap.count()
        assert pager.source.fills == []
        assert pager.counters.claims == 0
        policy.window_of_all = (0, 8)  # it is not asked any more
        assert pager.resolve(PageFault(3)) is Outcome.FAILED
        assert pager.resolve_or_park(PageFault(3), Waiter(lambda: None)) is Outcome.FAILED
        assert len(policy.faults) == 1


def test_a_policy_that_breaks_in_a_thread_that_must_not_wait_fails_its_fault():
    with pager_of(policy=Proposes((0, 1))) as pager:
        assert pager.resolve_or_park(PageFault(3), Waiter(lambda: None)) is Outcome.FAILED
        assert "proposes 1 pages from 0 on" in str(pager.error)
        assert pager.ledger.claims == []


def test_faults_that_a_pause_holds_fail_when_the_policy_breaks():
    policy = Proposes((3, 1))
    with pager_of(policy=policy) as pager:
        pager.holds = True
        pager.resolve(PageFault(3))
        pager.mark_nonpresent(3, 1)
        pager.source.before = cut
        policy.window_of_all = (4, 1)
        outcomes = []
        held = started(lambda: outcomes.append(pager.resolve(PageFault(4))))
        while not pager.counters.waits:
            pass
        assert pager.resolve(PageFault(3)) is Outcome.FAILED  # its bytes are in RAM, so no pause concerns it
        held.join(TIMEOUT)
        assert not held.is_alive()
        assert outcomes == [Outcome.FAILED]


def test_a_policy_is_not_asked_for_what_a_device_has_named_itself():
    policy = Proposes((0, 1))
    with pager_of(policy=policy) as pager:
        assert pager.resolve_or_park(PageFault(8), Waiter(lambda: None), 4) is Outcome.ADMITTED
        assert pager.source.fills == [(8, 4)]
        assert page_of(pager, 11) == content(11)
        assert policy.faults == []
