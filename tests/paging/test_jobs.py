"""Jobs beside the guest: which hooks are called, by whom, in which order, and when no more."""

import threading
import time

import pytest
from fakes import PAGES, in_threads, pager_of, started

from kvmdp.page import Outcome, PageFault
from kvmdp.paging.claim import Waiter
from kvmdp.paging.jobs import Job, Jobs, Observer

LONG = 30  # seconds that nothing here takes


class Noted(Job):
    """Notes each call of its hooks in `calls`."""

    def __init__(self, name, calls, agrees=True):
        self.name, self.calls, self.agrees = name, calls, agrees

    def admitted(self, fault, claim, began):
        self.calls.append((self.name, "admitted", fault.page, claim.first, claim.count))

    def after_fault(self):
        self.calls.append((self.name, "after fault"))

    def seconds_held(self, since):
        self.calls.append((self.name, "seconds held", since))
        return 0 if self.agrees else 0.1

    def close(self):
        self.calls.append((self.name, "close"))


class Working(Job):
    """Does `work` after a fault."""

    def __init__(self, work):
        self.after_fault = work

    def after_fault(self):
        pass


class AtOnce(Job):
    def __init__(self, most):
        self.most_at_once = most


def test_jobs_of_a_kind_are_all_called_in_the_order_in_which_they_were_added():
    calls = []
    with pager_of(fault_around=4) as pager:
        for name in "bca":
            pager.jobs.add(Noted(name, calls))
        assert pager.resolve(PageFault(5)) is Outcome.ADMITTED
        assert calls == [
            *((name, "admitted", 5, 4, 4) for name in "bca"),
            *((name, "after fault") for name in "bca"),
        ]
        del calls[:]
        assert pager.resolve(PageFault(5)) is Outcome.PRESENT
        assert calls == []
        assert pager.jobs.may_admit(77)
        assert calls == [(name, "seconds held", 77) for name in "bca"]
        del calls[:]
    assert calls == [(name, "close") for name in "acb"]


def test_who_may_not_sleep_does_no_work_after_a_fault():
    calls = []
    with pager_of() as pager:
        pager.jobs.add(Noted("a", calls))
        assert pager.resolve_or_park(PageFault(5), Waiter(lambda: None)) is Outcome.ADMITTED
        assert calls == [("a", "admitted", 5, 5, 1)]


def test_what_comes_and_goes_by_ranges_is_told_too():
    calls = []
    with pager_of() as pager:
        pager.jobs.add(Noted("a", calls))
        pager.mark_present(0, 4)
        pager.mark_nonpresent(0, 2)
        pager.evict(2, 1)
        pager.poison(3)
        pager.unpoison(3, b"\1" * 4096)
        assert calls == [
            ("a", "admitted", 0, 0, 4),
            *[("a", "after fault")] * 4,
            ("a", "admitted", 3, 3, 1),
            ("a", "after fault"),
        ]


def test_a_job_is_added_once():
    with pager_of() as pager:
        job = Noted("a", [])
        pager.jobs.add(job)
        with pytest.raises(ValueError, match="has been added before: add it once"):
            pager.jobs.add(job)
        pager.resolve(PageFault(5))
        assert len(job.calls) == 2
        pager.jobs.remove(job)
        pager.jobs.remove(job)
        pager.resolve(PageFault(6))
        assert len(job.calls) == 2
        pager.jobs.add(job)  # it may come back
        pager.resolve(PageFault(7))
        assert len(job.calls) == 4
        pager.jobs.remove(job)
    assert ("a", "close") not in job.calls  # it was not there any more


def test_hooks_that_no_job_overrides_are_called_by_nobody():
    with pager_of() as pager:
        pager.jobs.add(Job())
        pager.jobs.add(AtOnce(3))
        jobs = pager.jobs
        assert jobs.on_admitted == jobs.on_after_fault == jobs.on_seconds_held == []
        told = []
        pager.jobs.add(Observer(lambda fault, claim, began: told.append((fault.page, claim.count, began))))
        assert len(jobs.on_admitted) == 1
        assert jobs.on_after_fault == []
        before = time.perf_counter_ns()
        pager.resolve(PageFault(5))
        assert told[0][:2] == (5, 1)
        assert before <= told[0][2] <= time.perf_counter_ns()


def test_one_access_may_need_the_least_of_what_all_jobs_say():
    jobs = Jobs(threading.RLock(), lambda: True)
    assert jobs.most_at_once is None
    few, more, none = AtOnce(4), AtOnce(9), Job()
    for job, most in ((none, None), (more, 9), (few, 4)):
        jobs.add(job)
        assert jobs.most_at_once == most
    for job, most in ((few, 9), (none, 9), (more, None)):
        jobs.remove(job)
        assert jobs.most_at_once == most


@pytest.mark.parametrize("disagrees", "abc")
def test_all_jobs_have_to_agree_that_a_page_may_come(disagrees):
    jobs, calls = Jobs(threading.RLock(), lambda: True), []
    assert jobs.may_admit(1)
    for name in "abc":
        jobs.add(Noted(name, calls, name != disagrees))
    assert not jobs.may_admit(1)
    for job in list(jobs._jobs):
        if job.name == disagrees:
            jobs.remove(job)
    assert jobs.may_admit(1)


def test_work_after_a_fault_that_brings_pages_in_is_not_done_again_by_that():
    with pager_of() as pager:
        calls = []

        def work():
            calls.append(1)
            pager.resolve(PageFault(len(calls) + 20))

        pager.jobs.add(Working(work))
        pager.resolve(PageFault(1))
        assert calls == [1]
        pager.resolve(PageFault(2))
        assert calls == [1, 1]


def test_a_job_that_breaks_breaks_what_it_works_for_and_works_again():
    with pager_of() as pager:
        calls = []

        def work():
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("a bug")

        pager.jobs.add(Working(work))
        with pytest.raises(RuntimeError, match="a bug"):
            pager.resolve(PageFault(1))
        assert pager.bitmap.test(1)
        pager.resolve(PageFault(2))
        assert calls == [1, 1]
        pager.mark_present(0, PAGES)
        pager.disable()  # nobody is taken to be at work still


def test_a_job_may_be_removed_or_added_during_a_call():
    with pager_of() as pager:
        calls = []

        class Leaves(Noted):
            def after_fault(self):
                super().after_fault()
                pager.jobs.remove(self)
                pager.jobs.add(Noted("new", calls))

        pager.jobs.add(Leaves("leaves", calls))
        pager.jobs.add(Noted("stays", calls))
        pager.resolve(PageFault(1))
        assert [call for call in calls if call[1] == "after fault"] == [
            ("leaves", "after fault"),
            ("stays", "after fault"),
        ]
        del calls[:]
        pager.resolve(PageFault(2))
        assert [name for name, what, *_ in calls] == ["stays", "new"] * 2


def test_a_job_that_is_removed_while_it_works_ends_its_work():
    with pager_of() as pager:
        there, go_on, done = threading.Event(), threading.Event(), []

        def work():
            there.set()
            assert go_on.wait(LONG)
            done.append(1)

        job = Working(work)
        pager.jobs.add(job)
        fault = started(lambda: pager.resolve(PageFault(1)))
        assert there.wait(LONG)
        pager.jobs.remove(job)
        pager.resolve(PageFault(2))
        assert done == []
        go_on.set()
        fault.join(LONG)
        assert done == [1]


def test_switching_off_waits_for_work_and_no_work_is_done_afterwards():
    with pager_of() as pager:
        there, go_on, ends, calls = threading.Event(), threading.Event(), [], []

        def work():
            calls.append(pager.enabled)
            if len(calls) == 1:
                there.set()
                assert go_on.wait(LONG)
                ends.append("work")

        pager.mark_present(0, PAGES - 1)
        pager.jobs.add(Working(work))
        fault = started(lambda: pager.resolve(PageFault(PAGES - 1)))
        assert there.wait(LONG)

        def off():
            pager.disable()
            ends.append("off")

        switch = started(off)
        switch.join(0.05)
        assert ends == []
        assert pager.trap.armed
        go_on.set()
        for thread in (fault, switch):
            thread.join(LONG)
        assert ends == ["work", "off"]
        pager.jobs.work()  # what a thread would do that comes late
        assert calls == [True]
        pager.enable()
        assert calls == [True, True]


def test_threads_that_add_remove_and_work_at_the_same_time_leave_nothing():
    with pager_of() as pager:
        calls = []

        def come_and_go(number):
            for _ in range(200):
                job = Noted(number, calls)
                pager.jobs.add(job)
                pager.jobs.remove(job)

        def fault():
            for page in range(PAGES):
                pager.resolve(PageFault(page))

        in_threads(fault, *(lambda number=number: come_and_go(number) for number in range(4)))
        assert pager.jobs.on_admitted == pager.jobs.on_after_fault == []
        assert pager.bitmap.count() == PAGES
        pager.disable()


def test_closing_closes_each_once_and_leaves_none():
    jobs, calls = Jobs(threading.RLock(), lambda: True), []
    for name in "ab":
        jobs.add(Noted(name, calls))
    jobs.close()
    jobs.close()
    assert calls == [("b", "close"), ("a", "close")]
    assert jobs.on_admitted == []
    assert jobs.may_admit(1)
    jobs.work()
    assert len(calls) == 2
