"""Pages that another process brings: a fault handler, which writes them straight into RAM through a mapping of its own.

A fill sends a FAULT record and sleeps until its DONE is there; many may be under way at once, and are answered in any
order. One thread, the *supervisor*, receives the answers and sees to the handler's end:

    handler dies          its faults stay outstanding, so threads that want them wait, outside KVM_RUN; a handler that
                          listens at the same path within the time-out is handed RAM and sent them again
    it closes, but lives  the same, once it has died: as long as it lives it can write into RAM
    it breaks the         it is cut off and every fill fails, now and from then on: what it has mapped cannot be taken
    protocol, or is mute  from it, so no other handler may come after it

A handler fills a page again that its predecessor may have half filled. That is sound because the predecessor's death
is confirmed (pidfd) before the hand-over: nothing of it can land later.

Nothing is written into RAM here. Protocol: `offer`, `handover` and `records` in `kvmdp.peers.wire`.

Units: bytes for offsets and sizes; seconds, by a clock that stands still while this process does.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading
from collections.abc import Callable, Sequence

from kvmdp.own_clock import OwnClock
from kvmdp.page import PAGE_SIZE, Outcome, PageFault
from kvmdp.peers.handler.session import Session, SessionEndedError
from kvmdp.peers.wire.endpoint import EndpointError
from kvmdp.peers.wire.offer import Offer
from kvmdp.peers.wire.records import UNKNOWN_NUMBER, Kind, Record, RecordError
from kvmdp.shortage import in_words
from kvmdp.source.base import SourceError, check_range
from kvmdp.source.request import FetchRequest
from kvmdp.thread import JoinableThread
from kvmdp.waiting import Condition, Latch

DEFAULT_TIMEOUT: float = 30

_GRACE_SECONDS = 1.0  # a process that is killed closes its sockets before it counts as dead
_RETRY_SECONDS = 0.05  # between attempts to find a new handler


class _BrokenError(Exception):
    """No page can be had any more; the message says why."""


class _Request:
    """A FAULT without its DONE. `reason` is set before `answered` if it cannot be had."""

    __slots__ = ("answered", "reason", "record", "since")

    def __init__(self, record: Record, since: float) -> None:
        self.record = record
        self.since = since  # when it was sent, or began to wait for a handler
        self.answered = Latch()
        self.reason: str | None = None

    def end(self, reason: str | None) -> None:
        """Wake the thread that waits for the answer."""
        self.reason = reason
        self.answered.set()


class HandlerSource:
    """The image of the handler that listens at `path`; a `kvmdp.source.base.RamSource`, without holes.

    `timeout` bounds, in seconds, the wait for an answer, for a handler's end and for its successor. `report` is told
    in a sentence, from another thread, what the machine waits for and when it goes on.

    Attributes: `name`; `size`; `low_ram_end`, where the hole begins of the machine that the image is of (gpa), or None.
    Raises EndpointError if there is no handler that can be used, ValueError for a time-out
    that is not positive.
    """

    def __init__(
        self, path: str, timeout: float = DEFAULT_TIMEOUT, report: Callable[[str], None] = lambda text: None
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"a time-out of {timeout:g} seconds for a handler: give more than 0 seconds")
        self.name = f"the handler at {path}"
        self._path = path
        self._timeout = timeout
        self._report = report
        self._clock = OwnClock(timeout)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._supervisor: JoinableThread | None = None
        self._ram = self._bitmap = -1  # duplicates: a new handler may be wanted as long as this object is
        self._address = 0  # of RAM's first byte
        self._regions: tuple[tuple[int, int, int], ...] = ()
        # Guards all below. Held for a few statements, among them the send of a record, which never waits.
        self._mutex = threading.RLock()
        self._changed = Condition(self._mutex)
        self._outstanding: dict[int, _Request] = {}  # by token, the oldest first
        self._token = 0
        self._session: Session | None = None  # that faults are sent to; none while there is no handler
        self._broken: str | None = None
        try:
            self._first = Session(path, self._wake, timeout, self._clock)
        except BaseException:
            os.close(self._wake)
            raise
        self.size, self.low_ram_end = self._first.offer

    def bind(
        self, memory: memoryview, ram: int, bitmap: int, regions: Sequence[tuple[int, int, int]]
    ) -> None:
        """Hand RAM over to the handler, and to those that may come after it; once, before the first fill.

        `memory` is the mapping of RAM through which it will be filled, `ram` its file, `bitmap` the present bitmap's
        file, `regions` the (gpa, bytes, offset in the file) of its parts. Descriptors stay the caller's. Raises
        ValueError for RAM that is no file, and a second time.
        """
        if ram < 0:
            raise ValueError(
                "RAM that is private to this process cannot be handed to a handler in another: use --backing memfd"
            )
        if self._supervisor is not None:
            raise ValueError(f"{self.name} fills the RAM of one machine: open it again for another")
        self._address = _address_of(memory)
        self._regions = tuple(regions)
        self._ram, self._bitmap = os.dup(ram), os.dup(bitmap)
        self._supervisor = JoinableThread(self._supervise, "handler", self._supervisor_broke)
        self._supervisor.start()

    def extents(self) -> list[tuple[int, int]]:
        """Return the one extent there is: a handler writes the zeros of its holes."""
        return [(0, self.size)]

    @property
    def concurrency(self) -> int:
        """How many faults the handler takes before it has answered one."""
        return self._first.credits

    def fetch(self, request: FetchRequest, destination: memoryview) -> None:
        """Have the handler write the pages into RAM, where `destination` must lie.

        A fetch that is called off ends all others too, and for good: the handler may write these pages at any time
        later, when they would be admitted already. Raises SourceError if the handler does not deliver, or says that it
        cannot; ValueError for a range that is not whole pages inside `size`, or a destination elsewhere.
        """
        offset, length = request.offset, destination.nbytes
        check_range(self, offset, length)
        if not self._address or _address_of(destination) != self._address + offset:
            raise ValueError(f"{self.name} writes into RAM and nowhere else: its pages cannot be read apart")
        with request.cancel.waking(self.cancel):
            reason = self._ask(self._gpa_of(offset, length), length, request.fault or PageFault(0))
        if reason is not None:
            raise SourceError(self.name, offset, length, reason)

    def _gpa_of(self, offset: int, length: int) -> int:
        for gpa, size, start in self._regions:
            if start <= offset and offset + length <= start + size:
                return gpa + offset - start
        raise ValueError(f"{length} bytes at offset {offset:#x} are not in one region of RAM")

    def _ask(self, gpa: int, size: int, fault: PageFault) -> str | None:
        """Send a FAULT and wait for its DONE; returns why the pages cannot be had, None if they are there."""
        number = UNKNOWN_NUMBER if fault.number < 0 else fault.number
        with self._mutex:
            while len(self._outstanding) >= self._first.credits and self._broken is None:
                self._changed.wait()
            if self._broken is not None:
                return self._broken
            self._token += 1
            record = Record(Kind.FAULT, self._token, gpa, size, fault.access, fault.origin, number)
            request = _Request(record, self._clock.now())
            self._outstanding[self._token] = request
            if self._session is not None:
                self._session.send(request.record)
        try:
            request.answered.wait()
        except BaseException:
            # The handler may still write these pages, when they have been fetched anew and admitted.
            self._fail("a fetch was interrupted whose pages the handler may still write")
            raise
        return request.reason

    def cancel(self) -> None:
        """The machine is stopping: end every fill that waits, now and for good."""
        with self._mutex:  # a descriptor that is closed may be another object's by now
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
        self._fail("the machine is stopping")

    def close(self) -> None:
        """End the session and give everything back; a second call does nothing."""
        if self._wake < 0:
            return
        self.cancel()
        if self._supervisor is not None:
            self._supervisor.join()
            os.close(self._ram)
            os.close(self._bitmap)
        self._first.close()  # no supervisor may have come to it
        with self._mutex:
            wake, self._wake = self._wake, -1
        os.close(wake)

    def _fail(self, reason: str) -> None:
        """Let every fill end with `reason`, those to come too, unless there is a reason already."""
        with self._mutex:
            if self._broken is not None:
                return
            self._broken = reason
            self._session = None
            requests = list(self._outstanding.values())
            self._outstanding.clear()
            self._changed.notify_all()
        for request in requests:
            request.end(reason)

    # The supervisor

    def _supervise(self) -> None:
        """Serve one handler after another until none comes any more, or the machine stops."""
        session: Session | None = self._first
        while session is not None:
            try:
                self._serve(session)
                self._confirm_death(session)
            finally:
                with self._mutex:
                    self._session = None
                session.end()
                session.close()
            session = self._find_successor(session)

    def _supervisor_broke(self, error: BaseException) -> None:
        self._fail(str(error) if isinstance(error, _BrokenError) else f"serving it broke: {in_words(error)}")

    def _serve(self, session: Session) -> None:
        """Hand RAM over, send what is outstanding, receive answers; returns when the session has ended."""
        pages = sum(size for _, size, _ in self._regions) // PAGE_SIZE
        try:
            session.hand_over(pages, self._regions, self._ram, self._bitmap)
        except SessionEndedError:
            return
        except OSError as error:
            raise _BrokenError(
                f"RAM could not be handed to process {session.peer.pid}: {error.strerror}"
            ) from None
        self._send_again(session)
        try:
            while self._broken is None:
                record = session.receive(self._patience(session))
                if record is not None and record.kind is Kind.BYE:
                    return
                if record is not None:
                    self._take(session, record)
        except SessionEndedError:
            return
        except RecordError as error:
            raise _BrokenError(f"process {session.peer.pid} sent {error}; it was cut off") from None

    def _send_again(self, session: Session) -> None:
        """From now on faults go to this session: those that are outstanding at once, others as they come."""
        with self._mutex:
            if self._broken is not None:
                return
            self._session = session
            now = self._clock.now()
            for request in self._outstanding.values():
                request.since = now
                session.send(request.record)

    def _patience(self, session: Session) -> float:
        """Return how long to wait for the next record. Raises _BrokenError if the oldest fault has waited too long.

        What is sent meanwhile is due later than that.
        """
        oldest, _ = self._waiting()
        if oldest is None:
            return self._clock.longest_wait
        left = oldest.since + self._timeout - self._clock.now()
        if left <= 0:
            raise _BrokenError(
                f"process {session.peer.pid} has not answered the fault on gpa {oldest.record.gpa:#x} within "
                f"{self._timeout:g} seconds; it was cut off"
            )
        return min(left, self._clock.longest_wait)

    def _waiting(self) -> tuple[_Request | None, int]:
        """Return the fault that has waited longest, and how many there are."""
        with self._mutex:
            return next(iter(self._outstanding.values()), None), len(self._outstanding)

    def _take(self, session: Session, record: Record) -> None:
        """Deal with a record. Raises _BrokenError if it is not the answer to a fault that is outstanding."""
        process = f"process {session.peer.pid}"
        if record.kind is not Kind.DONE:
            raise _BrokenError(f"{process} sent a {record.kind.name}, which no handler may; it was cut off")
        with self._mutex:
            request = self._outstanding.get(record.token)
            if request is None:
                if self._broken is not None:
                    return
                raise _BrokenError(
                    f"{process} sent a DONE for token {record.token}, which is no fault's, or was answered before; "
                    "it was cut off"
                )
            asked = request.record
            if (record.gpa, record.size) != (asked.gpa, asked.size):
                raise _BrokenError(
                    f"{process} sent a DONE for {record.size} bytes at gpa {record.gpa:#x}, where {asked.size} bytes "
                    f"at gpa {asked.gpa:#x} had been asked for; it was cut off"
                )
            if record.outcome not in (Outcome.PRESENT, Outcome.FAILED):
                raise _BrokenError(
                    f"{process} sent a DONE with outcome {record.outcome.name}, which no handler may; it was cut off"
                )
            del self._outstanding[record.token]
            self._changed.notify_all()
        failed = record.outcome is Outcome.FAILED
        request.end(f"{process} says that it cannot bring them: see what it printed" if failed else None)

    def _confirm_death(self, session: Session) -> None:
        """Return once the handler's process has ended. Raises _BrokenError if it lives on for the time-out."""
        if self._broken is not None or session.wait_dead(_GRACE_SECONDS):
            return
        with self._mutex:
            self._session = None
        pid = session.peer.pid
        self._report(
            f"paused: handler {pid} has closed its session and lives on; waiting up to {self._timeout:g} s for its end"
        )
        if not session.wait_dead(self._timeout) and self._broken is None:
            raise _BrokenError(
                f"process {pid} has closed its session, but has not ended within {self._timeout:g} seconds, and may "
                "write into RAM as long as it lives: end it"
            )

    def _find_successor(self, dead: Session) -> Session | None:
        """Return a session with a new handler; None if the machine stops first.

        As long as no thread wants a page there is no hurry. Raises _BrokenError if one has waited for the time-out.
        """
        with self._mutex:
            now = self._clock.now()
            for request in self._outstanding.values():
                request.since = now
        announced = False
        why = ""
        while self._broken is None:
            oldest, count = self._waiting()
            if oldest is not None and not announced:
                announced = True
                self._report(
                    f"paused: handler {dead.peer.pid} has died; gpa {oldest.record.gpa:#x}"
                    + (f" and {count - 1} more faults wait" if count > 1 else " waits")
                    + f" up to {self._timeout:g} s for another handler at {self._path}"
                )
            left = self._timeout if oldest is None else oldest.since + self._timeout - self._clock.now()
            if left <= 0:
                raise _BrokenError(
                    f"process {dead.peer.pid} has died, and within {self._timeout:g} seconds no other has taken its "
                    f"place ({why})"
                )
            try:
                session = Session(self._path, self._wake, left, self._clock)
            except EndpointError as error:
                why = str(error)
                self._pause()
                continue
            return self._accept(session, count)
        return None

    def _pause(self) -> None:
        """Wait a little before the next attempt, less if the machine stops."""
        poll = select.poll()  # select takes no descriptor above 1,023
        poll.register(self._wake, select.POLLIN)
        poll.poll(_RETRY_SECONDS * 1000)

    def _accept(self, session: Session, count: int) -> Session:
        """Take a new handler, if its image can be the same."""
        offer = session.offer
        if offer != self._first.offer:
            session.close()
            raise _BrokenError(
                f"process {session.peer.pid} has taken the handler's place with {_memory(offer)}, where the machine "
                f"began with {_memory(self._first.offer)}"
            )
        faults = f"{count} fault{'' if count == 1 else 's'}"
        self._report(f"going on: handler {session.peer.pid} has taken over, {faults} sent again")
        return session


def _memory(offer: Offer) -> str:
    hole = "" if offer.low_ram_end is None else f" and a hole at {offer.low_ram_end:#x}"
    return f"an image of {offer.image_bytes} bytes{hole}"


def _address_of(memory: memoryview) -> int:
    """Return where the first byte of a writable buffer lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
