"""The gate every vCPU passes before KVM_RUN, and how all of them are kept out (stopped).

Some changes to guest memory are exact only while no vCPU is in KVM_RUN. A vCPU thread *enters* the gate before
KVM_RUN and *leaves* after it. A thread that needs a stop closes the gate, kicks the vCPUs inside, and waits until they
are out: `quiesced` for a block of its own, `while_stopped` for one call, in a stop that it shares with other threads.
A thread that resolves a fault is outside, so it never has to finish before the gate can close.

What a thread may wait for while it holds what (left before right):

- a pin of the pager -> the gate. Never the other way round, and a quiescer has drained the pins of its own pages before
  it closes the gate. So no vCPU inside waits for a quiescer.
- A claim on pages -> their pins -> the gate closed -> a claim on memslots (a revocation); and a claim on memslots ->
  the gate closed (a cut, a merge). These two are opposite, and no deadlock only because the gate counts its closers
  instead of letting in one at a time: a thread that closes a closed gate waits for no other thread that has closed it.
  So the thread that has the memslots gets on, and with it the one that waits for them at the closed gate.
- The gate closed -> the turn at the thread that makes closed memslots (`kvmdp.secluded`) -> the map of memslots.

Mutexes, held for a few statements each, one inside the other: the gate's -> a vCPU's kick lock; `ResidentLimit`'s ->
the pager's; `DeviceServer`'s turn -> its own -> a session's -> the counters'; the gate's or the pager's -> the list of
threads that hold faults back (`kvmdp.paging.jobs`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from kvmdp.errors import PagingError
from kvmdp.interruption import undone
from kvmdp.kvm import Vcpu
from kvmdp.waiting import Condition

_REKICK_SECONDS = 0.1
_PATIENCE_SECONDS = 30.0
_GRACE_SECONDS = 100e-6  # longer than a fault's way into the guest and out again
_MOST_SKIPPED = 63  # stops without grace after one in which it was for nothing
_MOST_SHARED = 64  # calls in one stop: it takes milliseconds at the most


class _Turn:
    """One call of `VcpuGate.while_stopped`, from the thread that wants it to the thread that makes it."""

    __slots__ = ("error", "is_done", "woken", "work")

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.is_done = False
        self.error: BaseException | None = None
        self.woken = threading.Lock()  # released when the call is done, or when its thread is to lead
        self.woken.acquire()


class _Closer:
    """A thread that keeps the vCPUs out, from before it closes the gate."""

    __slots__ = ("began", "is_stop")

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.is_stop = False  # whether it counts as one


class VcpuGate:
    """Counts the vCPUs in KVM_RUN and can keep them out.

    `stops` is how often the gate was closed, `longest_stop` the longest time in seconds. A call of `while_stopped` that
    finds every vCPU outside is no stop.
    """

    def __init__(self) -> None:
        # Guards everything below. Held for a few statements only, never while a vCPU runs.
        # Taken as itself on the way of every exit: a Condition's is a call in Python.
        self._mutex = threading.RLock()
        self._changed = Condition(self._mutex)
        self._inside: set[Vcpu] = set()
        self._closers: list[_Closer] = []  # one of each thread that keeps the vCPUs out
        self._stopping = False
        self._turns: deque[_Turn] = deque()
        self._is_led = False  # a thread makes the calls of `_turns`, or is about to
        self._skip = self._backoff = (
            0  # stops without grace: still to come, and after the last one for nothing
        )
        self.stops = 0
        self.longest_stop = 0.0
        self._told: list[Callable[[], None]] = []

    def tell(self, closing: Callable[[], None]) -> None:
        """Call `closing`, with the gate's mutex held, whenever a thread waits for a vCPU that is inside.

        By then `is_closed` says so. `closing` must not block.
        """
        with self._mutex:
            self._told.append(closing)

    def enter(self, vcpu: Vcpu, *, only_complete: bool = False) -> bool:
        """Wait until the gate is open, and pass. Returns False if the machine is stopping.

        Clears the vCPU's `immediate_exit`, so that a kick from now on takes effect. With `only_complete` sets it, so
        that KVM_RUN completes the pending access and returns without entering the guest: that passes at a stop too,
        for the vCPU must not be left in the middle of an instruction.
        """
        with self._mutex:
            while self._closers and (only_complete or not self._stopping):
                self._changed.wait()
            if self._stopping and not only_complete:
                return False
            vcpu.immediate_exit = only_complete
            self._inside.add(vcpu)
            return True

    def leave(self, vcpu: Vcpu) -> None:
        """Say that the vCPU is out of KVM_RUN."""
        with self._mutex:
            self._inside.discard(vcpu)
            if self._closers:
                self._changed.notify_all()

    @property
    def is_closed(self) -> bool:
        """Whether a closer keeps the vCPUs out, or waits until they are."""
        return bool(self._closers)

    def is_inside(self, vcpu: Vcpu) -> bool:
        """Return whether the vCPU is in KVM_RUN, or about to be."""
        return vcpu in self._inside

    @contextlib.contextmanager
    def quiesced(self) -> Iterator[None]:
        """Keep every vCPU out of KVM_RUN for the time of the `with` block.

        Raises PagingError if one does not come out in 30 seconds.
        """
        closer = _Closer()
        with undone(lambda: self._open(closer)):
            self._close(closer, grace=False)
            closer.is_stop = True
            yield

    def while_stopped(self, work: Callable[[], None]) -> None:
        """Call `work` while every vCPU is out of KVM_RUN, perhaps in another thread; threads that come together share.

        The first thread that asks stops the vCPUs and *leads*: it makes the calls of all threads that have asked by
        then, each in turn. `work` must not wait for anything but the kernel. Raises what `work` raises, and PagingError
        as `quiesced`.

        A kick costs the other vCPU an exit for nothing, and vCPUs that fault are out again soon by themselves. So they
        get a moment first; if one stays longer, the next stops do without. On Linux 6.18 (PVM, two cores), touching
        16 MiB under `memory-fault`, a fault takes as long as without any stop, with 2 and with 4 vCPUs (ratio 0.98 and
        1.00); with a kick each time 1.2 and 1.6 times as long.
        """
        with self._mutex:
            is_leader = not self._is_led
            if is_leader:
                self._is_led = True
            else:
                turn = _Turn(work)
                self._turns.append(turn)
        if is_leader:
            self._lead(work)
            return
        try:
            turn.woken.acquire()
        except BaseException:
            self._withdraw(turn)
            raise
        if not turn.is_done:
            self._lead(work)
        elif turn.error is not None:
            raise turn.error

    def _lead(self, work: Callable[[], None]) -> None:
        """Stop the vCPUs, make this thread's call and those of the threads that wait, and pass the lead on."""
        closer = _Closer()
        # What `kvmdp.interruption.undone` does, without the price of a context manager on the way of each fault.
        try:
            try:
                self._close(closer, grace=True)
                work()
                self._make_calls()
            finally:
                self._open(closer)
        except BaseException:
            self._open(closer)
            raise
        finally:
            self._pass_lead()

    def _pass_lead(self) -> None:
        """Have the next thread that waits stop the vCPUs itself: it came late, or this thread has failed."""
        with self._mutex:
            following = self._turns.popleft() if self._turns else None
            self._is_led = following is not None
        if following is not None:
            following.woken.release()

    def _withdraw(self, turn: _Turn) -> None:
        """Give up a call whose thread was interrupted: it is not made any more, or has been made."""
        with self._mutex:
            if turn in self._turns:
                self._turns.remove(turn)
                return
        turn.woken.acquire()  # in the hands of another thread, for the moment that its calls take
        if not turn.is_done:
            self._pass_lead()

    def _make_calls(self) -> None:
        """Make the calls that wait; those that come in the meantime too, up to a bound."""
        for _ in range(_MOST_SHARED):
            with self._mutex:
                if not self._turns:
                    return
                turn = self._turns.popleft()
            try:
                turn.work()
            except Exception as error:
                turn.error = error
            except BaseException as error:  # meant for this thread, in the middle of another one's call
                turn.error = PagingError(
                    f"the thread that had stopped the vCPUs for this was ended: {error!r}"
                )
                raise
            finally:
                turn.is_done = True
                turn.woken.release()

    def _close(self, closer: _Closer, *, grace: bool) -> None:
        """Close the gate and return once no vCPU is inside. `grace` gives them a moment. Raises PagingError."""
        with self._mutex:
            self._closers.append(closer)
            closer.is_stop = bool(self._inside)
        if closer.is_stop:
            self._await_empty(closer.began + _PATIENCE_SECONDS, grace)

    def _open(self, closer: _Closer) -> None:
        """Undo `_close`, however far it has got; a second call does nothing."""
        with self._mutex:
            if closer not in self._closers:
                return
            if closer.is_stop:
                self.stops += 1
                self.longest_stop = max(self.longest_stop, time.monotonic() - closer.began)
            self._closers.remove(closer)
            self._changed.notify_all()

    def _await_empty(self, deadline: float, grace: bool) -> None:
        with self._mutex:
            if grace:
                self._give_grace()
            if self._inside:
                for closing in self._told:
                    closing()
            while self._inside:
                if time.monotonic() > deadline:
                    stuck = ", ".join(str(vcpu.index) for vcpu in self._inside)
                    raise PagingError(
                        f"vCPU {stuck} did not leave KVM_RUN within {_PATIENCE_SECONDS:.0f} seconds: "
                        "it sleeps or spins inside KVM"
                    )
                # Once is enough but for instructions on which KVM itself spins; those want another.
                for vcpu in self._inside:
                    vcpu.kick()
                self._changed.wait(_REKICK_SECONDS)

    def _give_grace(self) -> None:
        """Wait a moment for the vCPUs inside to come out by themselves, unless that was for nothing of late."""
        if self._skip:
            self._skip -= 1
            return
        end = time.monotonic() + _GRACE_SECONDS
        while self._inside and (left := end - time.monotonic()) > 0:
            self._changed.wait(left)
        self._backoff = min(2 * self._backoff + 1, _MOST_SKIPPED) if self._inside else 0
        self._skip = self._backoff

    def forget_stops(self) -> None:
        """Count the stops anew from now on."""
        with self._mutex:
            self.stops, self.longest_stop = 0, 0.0

    def stop(self) -> None:
        """Let no vCPU in any more and get all of them out; does not wait."""
        with self._mutex:
            self._stopping = True
            for vcpu in self._inside:
                vcpu.kick()
            self._changed.notify_all()

    def reopen(self) -> None:
        """Undo `stop`; no vCPU may be inside."""
        with self._mutex:
            assert not self._inside
            self._stopping = False
