"""A thread with a descriptor table of its own: what it opens is in no child that another thread of the process forks.

A fork copies the table of the thread that forks, which all threads of a process share, and a child keeps its copies
until it execs or closes them. Where a file must be gone when its last descriptor is closed, close-on-exec is too late:
any library may run a program in any thread, at any moment. No fork happens here, so what is opened here has no copy.

Nor does the thread have copies of others': it gives up all of them as it makes the table its own, but for the one that
it is to work with. Else the peer at the other end of a socket would never learn that it was closed. What other
threads open later is not in its table anyway.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from kvmdp.abi.close_range import CLOSE_RANGE_UNSHARE, NR_close_range
from kvmdp.abi.libc import syscall
from kvmdp.thread import JoinableThread

_LAST = 0xFFFFFFFF  # the highest number there can be
_LOOK_SECONDS = 1.0  # from one look whether a job has ended to the next: it is woken for that, as a rule
_NO_THREAD = (
    "the thread that this needs has ended, or this is a child, which has none of its parent's other threads"
)


# Garbage that is found in a secluded thread is cleared away there: a file in it would close its number in the wrong
# table, and stay open in the right one. So the collector rests for the time of a job, for all threads.
class _Collector:
    """Python's cyclic garbage collector, which several threads may want to rest at the same time."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards what follows
        self._resting = 0
        self._was_enabled = False
        os.register_at_fork(after_in_child=self._wake)

    @contextlib.contextmanager
    def rests(self) -> Iterator[None]:
        """Have no thread look for garbage by itself during the block."""
        with self._mutex:
            if not self._resting:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._resting += 1
        try:
            yield
        finally:
            with self._mutex:
                self._resting -= 1
                if not self._resting and self._was_enabled:
                    gc.enable()

    def _wake(self) -> None:
        """Put right what a fork in another thread's block has left to the child, which has no such thread."""
        self._mutex = threading.Lock()
        if self._resting and self._was_enabled:
            gc.enable()
        self._resting = 0


_collector = _Collector()


class _Job:
    """A piece of work, and how it ended."""

    __slots__ = ("_ending", "_work", "ended", "error")

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._ending = threading.Lock()
        self._ending.acquire()
        self.ended = False
        self.error: BaseException | None = None

    def carry_out(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._ending.release()

    def wait(self, thread: JoinableThread) -> None:
        """Return when it has ended; may be called again, wherever an interruption has left it.

        Raises RuntimeError if `thread`, which was to do it, has ended before.
        """
        while not self.ended:
            if thread.join(0) and not self.ended:
                raise RuntimeError(_NO_THREAD)
            self._ending.acquire(timeout=_LOOK_SECONDS)


class SecludedThread:
    """Does work with descriptors that no other thread has; owns the thread, which runs from now on.

    `descriptor` is the one that the thread has too, under the same number, until `close`: of its file, not of the
    number, so this is closed before that. All else is closed there, the standard streams too: work says
    nothing but by what it raises, and opens what it uses.

    Raises OSError where the process may not have several descriptor tables (close_range, Linux 5.9, which a container's
    seccomp profile may refuse).
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._is_secluded = False
        self._one_at_a_time = threading.Lock()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._errors: list[BaseException] = []
        self._thread = JoinableThread(self._main, name, self._errors.append)
        try:
            self._thread.start()
            self.do(self._seclude)
        except BaseException:
            self.close()
            raise

    def do(self, work: Callable[[], None]) -> None:
        """Have the thread do `work`, and wait for its end; raises what it raised.

        An interruption of the caller is raised when the work has ended, too. Raises RuntimeError after `close`, and in
        a child of the process: a fork takes no other thread along.
        """
        if self._thread.join(0):  # in a child the lock below may be held for ever
            raise RuntimeError(_NO_THREAD)
        job = _Job(work)
        with self._one_at_a_time, _collector.rests():
            try:
                self._jobs.put(job)
                job.wait(self._thread)
            finally:  # an interruption of the wait
                job.wait(self._thread)
        error, job.error = job.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # no cycle with its traceback, which is of frames that hold what the work held

    def close(self) -> None:
        """End the thread, and with it its copy of the descriptor; a second call does nothing. Raises OSError."""
        with _collector.rests():  # the end of a thread takes a few steps of Python's
            self._jobs.put(None)
            self._thread.join()
        if self._errors:
            raise self._errors.pop()

    def _main(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.carry_out()
        if self._is_secluded:
            # The thread is joined before the kernel has taken it, and its table, apart.
            os.close(self._descriptor)

    def _seclude(self) -> None:
        # A handler of Python's would write to the wake-up descriptor of the others, which is not here.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        above = self._descriptor + 1
        syscall(NR_close_range, above, _LAST, CLOSE_RANGE_UNSHARE, what="close_range")
        self._is_secluded = True
        os.closerange(0, self._descriptor)
