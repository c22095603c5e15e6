"""What runs beside the guest: jobs that watch pages come, do work after a fault, or hold faults back.

A job may change what the trap has set up (merge memslots, put pages together), and nothing in the ledger says so. So
the threads that do a job's work after a fault are counted, and a thread that switches demand paging off waits until
there is none (`Pager.disable`).

Readers and servers of other processes do no work after a fault. They ask the jobs before it, and hold it back where one
says so. Such a thread lists itself (`Jobs.tell`), asks again, and sleeps until it is told to ask once more
(`Jobs.ask_again`), or the time is over that the job has named.

Why it misses no word. `ask_again` follows a change that may let a fault go on: pages have gone, the gate closes, a job
ends. It looks at the list under the mutex under which a thread lists itself. If the thread was listed by then, it is
told. If not, the change comes before the listing, and so before the thread asks again: it finds the change. The list
may be looked at without that mutex after a change under the pager's mutex, for a thread lists itself under both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvmdp.interruption import undone
from kvmdp.page import PageFault
from kvmdp.paging.claim import Claim
from kvmdp.waiting import Condition


class Job:
    """Base class of a job: a subclass overrides the hooks that it wants, and the pager calls no others.

    `most_at_once`, if set, is how many pages one access may need at the same time: a job that takes pages away sets it,
    lest an access lose its first page before it has its last.
    """

    most_at_once: int | None = None

    def admitted(self, fault: PageFault, claim: Claim, began: int) -> None:
        """Take note that `claim` has been committed for `fault`, or for what stands for one (a mark, a heal).

        `began` is when its owner began to fetch (time.perf_counter_ns). Called by every thread that makes pages
        present; must not wait.
        """

    def after_fault(self) -> None:
        """Work after a page has come or gone, in a thread that may sleep and has no claim.

        It may stop the vCPUs, but waits for no claim and no pin for more than a moment: its thread may hold a view of
        pages. Not called while demand paging is switched off.
        """

    def seconds_held(self, since: int) -> float:
        """Return for how long, from now, a fault of time `since` (time.perf_counter_ns) is held back at the most.

        0: it may bring pages in now. Must not wait. Readers and servers of other processes ask before each fault, for
        they do no work after it. They ask again when that time is over, whatever becomes of the job's own work, or
        when the job calls `Jobs.ask_again`, because the answer may be another now.
        """
        return 0

    def close(self) -> None:
        """End the job; a second call does nothing."""


class Observer(Job):
    """Calls `told(fault, claim, began)` as `Job.admitted` is called."""

    def __init__(self, told: Callable[[PageFault, Claim, int], None]) -> None:
        self._told = told

    def admitted(self, fault: PageFault, claim: Claim, began: int) -> None:
        """Pass the word on."""
        self._told(fault, claim, began)


class Jobs:
    """The jobs of one pager; a hook that no job overrides costs nothing.

    `mutex` is the pager's and guards the list of workers. `may_begin` is asked under it whether a thread may begin now.

    `on_admitted`, `on_after_fault` and `on_seconds_held` are the hooks to call, in the order in which jobs were added:
    to look at them is all that a fault pays where there is none. `told` are the threads that hold faults back, as what
    tells each of them to ask again.
    """

    def __init__(self, mutex: threading.RLock, may_begin: Callable[[], bool]) -> None:
        self._jobs: tuple[Job, ...] = ()
        self._mutex = mutex
        self._may_begin = may_begin
        self._workers: list[object] = []  # one of each thread that is in `work`
        self._idle = Condition(mutex)
        self._this_thread = threading.local()
        # The last of all mutexes: guards `told`, and is held while they are told.
        self._telling = threading.Lock()
        self.told: tuple[Callable[[], None], ...] = ()
        self._sort_out()

    def add(self, job: Job) -> None:
        """Call the hooks of `job` from now on. Raises ValueError for a job that is there."""
        with self._mutex:
            if job in self._jobs:
                raise ValueError(f"the job {job} has been added before: add it once")
            self._jobs = (*self._jobs, job)
            self._sort_out()

    def remove(self, job: Job) -> None:
        """Call the hooks of `job` no more, but for calls that are under way; does nothing if it is not there."""
        with self._mutex:
            self._jobs = tuple(each for each in self._jobs if each is not job)
            self._sort_out()

    def _sort_out(self) -> None:
        jobs = self._jobs
        self.on_admitted = [job.admitted for job in jobs if type(job).admitted is not Job.admitted]
        self.on_after_fault = [
            job.after_fault for job in jobs if type(job).after_fault is not Job.after_fault
        ]
        self.on_seconds_held = [
            job.seconds_held for job in jobs if type(job).seconds_held is not Job.seconds_held
        ]
        self.most_at_once = min(
            (job.most_at_once for job in jobs if job.most_at_once is not None), default=None
        )

    def may_admit(self, since: int) -> bool:
        """Return whether all jobs let a fault of time `since` (time.perf_counter_ns) bring pages in; does not wait."""
        return not self.on_seconds_held or not self.seconds_held(since)

    def seconds_held(self, since: int) -> float:
        """Return for how many seconds from now a job holds a fault of time `since` back at the most; 0 if none does."""
        return max((seconds_held(since) for seconds_held in self.on_seconds_held), default=0)

    def tell(self, ask: Callable[[], None]) -> None:
        """List a thread that holds faults back, which asks after this and then sleeps; `ask` wakes it.

        `ask` must not block, nor take a mutex. It is called more often than there is news.
        """
        with self._mutex, self._telling:
            self.told = (*self.told, ask)

    def tell_no_more(self, ask: Callable[[], None]) -> None:
        """Undo `tell`; no call of `ask` is under way when this returns. Does nothing if it is not listed."""
        with self._mutex, self._telling:
            self.told = tuple(each for each in self.told if each is not ask)

    def ask_again(self) -> None:
        """Have the threads that hold faults back ask whether they may go on. Takes no other mutex."""
        with self._telling:
            for ask in self.told:
                ask()

    def work(self) -> None:
        """Do what is to be done after a fault; nothing where this thread is at it already, or may not begin."""
        if getattr(self._this_thread, "works", False) or not self.on_after_fault:
            return
        worker = object()
        with undone(lambda: self._leave(worker)):
            with self._mutex:
                if not self._may_begin():
                    return
                self._workers.append(worker)
            self._this_thread.works = True
            for after_fault in self.on_after_fault:
                after_fault()

    def _leave(self, worker: object) -> None:
        self._this_thread.works = False
        with self._mutex:
            if worker in self._workers:
                self._workers.remove(worker)
            if not self._workers:
                self._idle.notify_all()

    def await_idle(self) -> None:
        """Wait, with the mutex held, until no thread is at a job's work."""
        while self._workers:
            self._idle.wait()

    def close(self) -> None:
        """Close all jobs, the last first."""
        for job in reversed(self._jobs):
            job.close()
            self.remove(job)
