"""One session with a device in another process, as the machine sees it: reads its records, asks it, sees its end.

Nothing the peer does, or leaves undone, holds a thread of the machine longer than that thread chose to wait. Its
records are taken by a thread that never waits; sends never wait, for there is room for all that the protocol allows.
A peer that does anything else is *cut off*: one sentence says what it did, and nothing is done on its word.

A device that has left is not gone. A process that has closed its notifier, or is cut off, still has RAM mapped. Only
its BYE, by which it says that it touches RAM no more, or its death, seen on its pidfd, lets the machine take pages away
again.

What a device does of its own accord has no deadline here. Whether it does its work is for its owner to judge, by
`rung`, `waits_for` and `steps`, and to end with `cut_off`.

Units: bytes, seconds of time.monotonic; a peer's patience is counted by a clock that stands still while the machine's
process does.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import threading
import time
from collections.abc import Callable

from kvmdp.errors import BusyError
from kvmdp.memory.layout import GuestLayout
from kvmdp.own_clock import OwnClock
from kvmdp.page import PAGE_SHIFT, Outcome
from kvmdp.paging.broken import broken
from kvmdp.paging.pager import Pager
from kvmdp.peers.requests import FaultRequests, PeerCounters
from kvmdp.peers.wire.endpoint import Peer
from kvmdp.peers.wire.records import RECORD_SIZE, Kind, Record, RecordError, unpack
from kvmdp.shortage import in_words
from kvmdp.thread import JoinableThread
from kvmdp.waiting import Condition

_DEATH_SECONDS = 2.0  # between the end of a process's notifier and its death: it is being torn down
_MOMENT_SECONDS = 0.1  # a caller that has no longer does not wait for a death that has not come for long
_TICK_SECONDS = 0.1  # how often a session that waits for a death looks whether the machine is closing


class DeviceSession:
    """A session; made by `kvmdp.peers.peers.DeviceServer`, which owns it.

    Arguments: the peer and the machine's end of its notifier, which belong to the session from now on; epoch and
    credits; the machine's RAM; `patience`, the seconds a peer has for an ACK; `frozen()`, whether accesses are frozen;
    `report(sentence)`, told of the end if it is not an orderly one; `on_completed(count)`, told of the requests it has
    finished. Neither may block.

    `ending` is None while it lasts, then a sentence. `rung` is whether a DOORBELL has not been answered yet; `steps`
    grows with each COMPLETED, and with each page that was brought because the device asked for it.
    """

    def __init__(
        self,
        peer: Peer,
        notifier: socket.socket,
        epoch: int,
        credits: int,
        layout: GuestLayout,
        pager: Pager,
        counters: PeerCounters,
        patience: float,
        frozen: Callable[[], bool],
        report: Callable[[str], None],
        on_completed: Callable[[int], None],
    ) -> None:
        self.peer = peer
        self.epoch = epoch
        self.credits = credits
        self.ending: str | None = None
        self.rung = False
        self.steps = 0
        self._frozen = frozen
        self._notifier = notifier
        self._layout = layout
        self._pager = pager
        self._counters = counters
        self._patience = patience
        self._report = report
        self._on_completed = on_completed
        # Guards what follows, and each send: they never sleep. Notified at every ACK and at the session's end.
        self._mutex = threading.RLock()
        self._changed = Condition(self._mutex)
        self._clock = OwnClock(patience)
        # Tokens of open INVALIDATEs and FREEZEs: when patience ends, by that clock; oldest first.
        self._asked: dict[int, float] = {}
        self._last_token = 0
        self._left = False  # its BYE has come
        self._ended = math.inf  # when the session ended
        self._gone = False
        self._closing = False
        self._silent = False  # the machine has ended it
        self._to_ring: dict[int, int] = {}  # number: gpa of DOORBELLs that follow it
        # The reader's own.
        self._faults_taken = self._releases_taken = self._completed = 0
        name = f"device-{peer.pid}"
        threads = min(credits, pager.contents.source.concurrency)
        self._requests = FaultRequests(
            pager, counters, self._answer, self._pager_broke, f"{name}-faults", threads
        )
        self._thread = JoinableThread(
            self._main, name, lambda error: pager.abort(broken(f"the thread {name} broke", error))
        )

    def __str__(self) -> str:
        return f"device process {self.peer.pid}"

    # For other threads of the machine

    def start(self) -> None:
        """Begin to take records. Whatever it raises, the session has to be ended and joined."""
        self._requests.start()
        self._thread.start()

    def ask(self, kind: Kind, gpa: int = 0, size: int = 0, deadline: float | None = None) -> int | None:
        """Send an INVALIDATE or FREEZE; returns its token, or None if the session has ended. Raises BusyError."""
        with self._mutex:
            while self.ending is None and len(self._asked) >= self.credits:
                self._wait_for_acks(next(iter(self._asked)), deadline)
            if self.ending is not None:
                return None
            self._last_token += 1
            self._asked[self._last_token] = self._clock.now() + self._patience
            self._counters.count("invalidates")
            self._send(Record(kind, self._last_token, gpa, size))
            return self._last_token

    def await_ack(self, token: int | None, deadline: float | None) -> None:
        """Return when the peer has obeyed the question `token`, or cannot touch RAM any more.

        Raises BusyError when `deadline` has passed, or its patience, after which it is cut off, or if it has left
        without a BYE and lives on.
        """
        with self._mutex:
            while token in self._asked and self.ending is None:
                self._wait_for_acks(token, deadline)
            if token is not None and token not in self._asked:
                return
            until = self._death_is_due(deadline)
            while not self._gone:
                left = until - time.monotonic()
                if left <= 0:
                    raise BusyError(
                        f"{self} is not obeyed any more but has RAM mapped, so no page can be taken away: "
                        f"end process {self.peer.pid}"
                    )
                self._changed.wait(left)

    def _death_is_due(self, deadline: float | None) -> float:
        """Return until when to wait for the peer's death, with the mutex held and the session ended.

        It may be dying at this moment, because of what has ended the session or because a user has ended it since. But
        as long as it lives callers come again and again: to those with a moment only it must not cost that each time.
        """
        now = time.monotonic()
        if deadline is None or deadline - now > _MOMENT_SECONDS:
            due = now + _DEATH_SECONDS
        else:
            due = self._ended + _DEATH_SECONDS
        return due if deadline is None else min(due, deadline)

    def _wait_for_acks(self, token: int, deadline: float | None) -> None:
        """Wait for a change, with the mutex held; cuts off a peer that has not acknowledged `token` in time."""
        patience = self._asked[token] - self._clock.now()
        time_left = math.inf if deadline is None else deadline - time.monotonic()
        if time_left <= 0:
            raise BusyError(f"{self} does not let go of memory: an access is under way there, or a view open")
        if patience <= 0:
            self._end(f"is cut off: it did not let go of memory within {self._patience:g} seconds")
        else:
            self._changed.wait(min(patience, time_left, self._clock.longest_wait))

    def tell(self, kind: Kind) -> None:
        """Send a THAW or BYE, if the session lasts."""
        with self._mutex:
            if self.ending is None:
                self._send(Record(kind))

    def ring(self, number: int, gpa: int) -> None:
        """Send a DOORBELL for ring `number`, at `gpa`; while one is not yet answered by COMPLETED it has to wait."""
        with self._mutex:
            self._to_ring[number] = gpa
            self._ring_next()

    def _ring_next(self) -> None:
        if self.ending is None and not self.rung and self._to_ring:
            number = next(iter(self._to_ring))
            self._send(Record(Kind.DOORBELL, gpa=self._to_ring.pop(number), number=number))
            self.rung = True

    @property
    def waits_for(self) -> object:
        """What the device waits for: to be thawed, or the page of one FAULT or another; None if for nothing."""
        return Kind.THAW if self._frozen() else self._requests.oldest

    def cut_off(self, what: str) -> None:
        """End the session because of what the device does, or does not: it "is cut off: " `what`."""
        self._finish(f"is cut off: {what}")

    def wait_ended(self, timeout: float | None = None) -> bool:
        """Wait for the session's end; False if it lasts longer than `timeout` seconds."""
        with self._mutex:
            return self._changed.wait_for(lambda: self.ending is not None, timeout)

    def wait_gone(self, patiently: bool) -> bool:
        """Return whether the peer cannot touch RAM any more, after a little wait if it is `patiently` waited for.

        The session has ended.
        """
        with self._mutex:
            left = self._ended + _DEATH_SECONDS - time.monotonic() if patiently else 0
            return self._changed.wait_for(lambda: self._gone, max(left, 0))

    def end(self) -> None:
        """End the session with a BYE; does not wait."""
        self.tell(Kind.BYE)
        with self._mutex:
            self._closing = True
            self._end(None)

    def join(self, deadline: float) -> bool:
        """Join the threads of a session that `end` has ended, and close it; False if a fetch holds one until then."""
        if not self._thread.join(max(deadline - time.monotonic(), 0)):
            return False
        self._requests.close()  # the thread has done so, if it ever ran
        joined = self._requests.join(max(deadline - time.monotonic(), 0))
        with self._mutex:
            self._gone = True
            self._changed.notify_all()
            if self._notifier.fileno() >= 0:
                self._notifier.close()
                self.peer.close()
        return joined

    # Under the mutex

    def _send(self, record: Record) -> None:
        """Send without waiting; a peer whose queue is full has broken the rules and is cut off."""
        try:
            self._notifier.send(record.pack(self.epoch), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self._end("is cut off: it does not read what it is sent")
        except OSError:
            pass  # it has closed its end, which the reader is about to see

    def _end(self, what: str | None) -> None:
        """End the session, for the reader to wind up; the first reason counts. None: the machine ends it."""
        if self.ending is not None:
            return
        self.ending = f"{self} {what or 'is let go: the machine ends the session'}"
        self._ended = time.monotonic()
        self._silent = what is None
        with contextlib.suppress(OSError):  # ENOTCONN: the peer has closed its end
            self._notifier.shutdown(socket.SHUT_RDWR)  # wakes the reader
        self._changed.notify_all()

    # The thread of the requests

    def _answer(self, token: int, outcome: Outcome) -> None:
        with self._mutex:
            self.steps += outcome is Outcome.ADMITTED
            if self.ending is None:
                self._send(Record(Kind.DONE, token, outcome=outcome))

    def _pager_broke(self, error: Exception) -> None:
        self._report(f"a fault of {self} could not be resolved: {in_words(error)}")

    # The reader

    def _main(self) -> None:
        try:
            self._read_until_end()
        except Exception as error:  # a fault of ours: the peer must not be taken for one that is served
            self.cut_off(f"serving it broke: {in_words(error)}")
        self._requests.close()
        if not self._left:
            self._await_death()
        with self._mutex:
            self._gone = True
            self._changed.notify_all()

    def _read_until_end(self) -> None:
        poll = select.poll()
        poll.register(self._notifier, select.POLLIN)
        poll.register(self.peer.pidfd, select.POLLIN)
        while self.ending is None:
            died = any(fd == self.peer.pidfd for fd, _ in poll.poll())
            taken = self._take_batch()
            if died and not taken:  # what it had sent before counts
                self._finish("has died")

    def _finish(self, what: str) -> None:
        with self._mutex:
            self._end(what)

    def _take_batch(self) -> bool:
        """Take what has come, a bounded number of records; False if there was nothing."""
        for number in range(self.credits):
            if self.ending is not None:
                return True
            try:
                message = self._notifier.recv(RECORD_SIZE + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return number > 0
            except ConnectionResetError:
                continue  # it has closed its end with records unread; what it had sent is still there
            if not message:
                self._closed()
                return True
            try:
                self._take(unpack(message, self.epoch))
            except RecordError as error:
                self.cut_off(f"it sent {error}")
        return True

    def _closed(self) -> None:
        """The other end of the notifier is closed: by death, as a rule."""
        if self.peer.wait_dead(_DEATH_SECONDS):
            self._finish("has died")
        else:
            self._finish("has closed its notifier without a BYE")

    def _take(self, record: Record) -> None:
        kind = record.kind
        if kind is Kind.FAULT:
            self._take_fault(record)
        elif kind is Kind.ACK:
            self._take_ack(record.token)
        elif kind is Kind.RELEASE:
            # Its DONE may have crossed it, so that nothing is known of the token any more; the count is known.
            self._releases_taken += 1
            if self._releases_taken > self._faults_taken:
                raise RecordError("a RELEASE more than it sent FAULTs")
            self._requests.release(record.token)
        elif kind is Kind.COMPLETED:
            self._take_completed(record.size)
        elif kind is Kind.BYE:
            self._left = True
            self._finish("has ended its session")
        else:
            raise RecordError(f"a {kind.name}, which is not a device's to send")

    def _take_fault(self, record: Record) -> None:
        first = self._first_page(record.gpa, record.size)
        count = record.size >> PAGE_SHIFT
        if self._requests.is_open(record.token):
            raise RecordError(f"a second FAULT with token {record.token} before the DONE of the first")
        if self._requests.open >= self.credits:
            raise RecordError(f"a FAULT beyond its {self.credits} credits")
        self._faults_taken += 1
        self._counters.count("requests")
        if self._frozen():
            self._counters.count("replies")
            self._answer(record.token, Outcome.FROZEN)
        else:
            self._requests.submit(record.token, first, count, record.access, record.number)

    def _first_page(self, gpa: int, size: int) -> int:
        """Return the RAM page at `gpa`. Raises RecordError unless all of the range is RAM, contiguous."""
        for region in self._layout.regions:
            if region.gpa <= gpa and gpa + size <= region.gpa + region.size:
                return (region.offset + gpa - region.gpa) >> PAGE_SHIFT
        raise RecordError(f"a FAULT for {size} bytes at gpa {gpa:#x}, which are not RAM")

    def _take_ack(self, token: int) -> None:
        with self._mutex:
            if self._asked.pop(token, None) is None:
                raise RecordError(f"an ACK of {token}, which is no open question")
            self._counters.count("acks")
            self._changed.notify_all()

    def _take_completed(self, count: int) -> None:
        if count < self._completed:
            raise RecordError(f"a COMPLETED of {count} requests after one of {self._completed}")
        self._completed = count
        with self._mutex:
            self.rung = False
            self.steps += 1
            self._ring_next()
        self._on_completed(count)

    def _await_death(self) -> None:
        """Say how it ended; stay until the process is dead, or the machine closes."""
        dead = self.peer.wait_dead(0)
        if not self._silent:
            self._report(
                f"{self.ending}"
                if dead
                else f"{self.ending}; no page can be taken away until process {self.peer.pid}, which has RAM mapped, "
                "has ended: end it"
            )
        while not dead and not self._closing:
            dead = self.peer.wait_dead(_TICK_SECONDS)
