"""`RemoteMemory`: guest RAM as a device in a process of its own touches it, under the machine's present bitmap.

The device copies to and from RAM by itself where the bit is set, and asks on the notifier (`kvmdp.peers.wire.records`)
for the rest. It needs no /dev/kvm.

Why the machine can take a page away and no write is lost. An access tests the bits and copies under one mutex. The
machine clears a bit before it sends INVALIDATE; the receiver takes that record, and then the mutex, before it sends
ACK. So an access that found the bit set has let go of the mutex before the ACK, and one that comes later finds it
clear. A view outlives the mutex: it is listed, and the ACK is sent by the thread that closes the last one in the range.

A device that was stopped for long (SIGSTOP) may have been cut off, and have a successor. So an access that comes after
a while looks first whether the session lasts. What it was copying when it was stopped it copies on: only its death
ends that.

Units: bytes by guest-physical address (gpa), RAM pages, seconds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from kvmdp.abi.mman import MADV_DONTFORK
from kvmdp.closing import Closing
from kvmdp.errors import BusyError, CancelledError, FrozenError, PagingError
from kvmdp.interruption import Uninterrupted, undone
from kvmdp.memory.bitmap import PresentBitmapView
from kvmdp.memory.mapping import Mapping
from kvmdp.memory.ram_map import RamMap
from kvmdp.page import PAGE_SHIFT, PAGE_SIZE, Access, Origin
from kvmdp.peers.asked_faults import AskedFault, AskedFaults, absent_runs, check_outcome, seconds_left
from kvmdp.peers.machine_link import LinkEndedError, MachineLink
from kvmdp.peers.owed_acks import OwedAcks
from kvmdp.peers.wire.endpoint import Peer
from kvmdp.peers.wire.handover import Descriptors, Handover
from kvmdp.peers.wire.records import Kind, Record, RecordError
from kvmdp.shortage import in_words
from kvmdp.thread import JoinableThread
from kvmdp.waiting import Condition

BytesLike = bytes | bytearray | memoryview

_IN_PAGE = PAGE_SIZE - 1
_AT_ONCE = 2 << 20  # bytes copied under the mutex at once
_TRUST_SECONDS = 0.1  # for which an access takes the session to last because one before it has found that

_T = TypeVar("_T")


class RemoteMemory(Closing):
    """`kvmdp.paging.access.MemoryAccess` in a device process; owns the descriptors from now on.

    Arguments: what `kvmdp.peers.wire.handover.receive` returned; `number`, which device it is; `timeout`, how long an
    access waits for a page before it raises BusyError (None: as long as the session lasts); `machine`, the process
    whose death ends the session, and which belongs to this object (by default the one that made the notifier). May be
    used by several threads. Raises PagingError, at every access, once the session is over; ValueError for a bitmap
    that is none, EndpointError for a notifier of another user's process.

    A thread that holds a view does not wait for another page: a revocation of both would wait for the view.
    """

    def __init__(
        self,
        handover: Handover,
        descriptors: Descriptors,
        *,
        number: int = 0,
        timeout: float | None = None,
        machine: Peer | None = None,
    ) -> None:
        self.handover = handover
        self._number = number
        self._timeout = timeout
        self._map = RamMap(handover.regions)
        # Guards what follows, and with it every access to RAM. Notified for `wait_doorbell` and `await_thaw`.
        self._mutex = threading.RLock()
        self._changed = Condition(self._mutex)
        self._rung: Record | None = None
        self._faults = AskedFaults(handover.credits)
        self._acks = OwedAcks(handover.credits)
        self._frozen = self._cancelled = False
        self._over: str | None = None
        self._trusted_until = 0.0
        self._said_bye = self._closed = False
        with contextlib.ExitStack() as stack:
            stack.callback(descriptors.close)
            notifier = stack.enter_context(socket.socket(fileno=os.dup(descriptors.notifier)))
            self._link = MachineLink(notifier, handover.epoch, machine or Peer.of(notifier))
            stack.callback(self._link.close)
            self._ram = stack.enter_context(Mapping.shared(descriptors.ram, handover.memory_bytes))
            # A child that outlived this process would have RAM mapped, and the machine would not know.
            self._ram.advise(MADV_DONTFORK)
            self._bitmap = stack.enter_context(PresentBitmapView.attach(descriptors.bitmap, handover.pages))
            self._stack = stack.pop_all()
        descriptors.close()
        self._view = self._ram.view
        # What was sent before the hand-over is here by now, and counts before the first access: a FREEZE.
        self._receive(wait=False)
        self._receiver = JoinableThread(self._receive, "notifier", self._receiver_broke)
        try:
            self._receiver.start()
        except BaseException:  # an interruption: the thread may run
            self.close()
            raise

    # Accesses

    def read(self, gpa: int, length: int, *, nowait: bool = False) -> bytes:
        """Return `length` bytes at `gpa`."""
        return self._readv(((gpa, length),), nowait)

    def write(self, gpa: int, data: BytesLike, *, nowait: bool = False) -> None:
        """Write `data` at `gpa`."""
        self._writev(((gpa, len(data)),), data, nowait)

    def readv(self, segments: Sequence[tuple[int, int]]) -> bytes:
        """Return the bytes of all `segments`, (gpa, length) each, one after the other."""
        return self._readv(segments, False)

    def writev(self, segments: Sequence[tuple[int, int]], data: BytesLike) -> None:
        """Write `data`, as long as the `segments` together, into them one after the other."""
        if sum(length for _, length in segments) != len(data):
            raise ValueError(f"{len(data)} bytes for segments of another length")
        self._writev(segments, data, False)

    def _readv(self, segments: Sequence[tuple[int, int]], nowait: bool) -> bytes:
        def copy(batch: Sequence[tuple[int, int]]) -> bytes:
            return b"".join([self._view[offset : offset + length] for offset, length in batch])

        batches = self._map.batches(segments, _AT_ONCE)
        read = functools.partial(self._while_present, access=Access.READ, nowait=nowait)
        return b"".join([read(batch, work=functools.partial(copy, batch)) for batch in batches])

    def _writev(self, segments: Sequence[tuple[int, int]], data: BytesLike, nowait: bool) -> None:
        source, start = memoryview(data).cast("B"), 0

        def copy(batch: Sequence[tuple[int, int]]) -> None:
            nonlocal start
            for offset, length in batch:
                self._view[offset : offset + length] = source[start : start + length]
                start += length

        for batch in self._map.batches(segments, _AT_ONCE):
            self._while_present(batch, Access.WRITE, nowait, functools.partial(copy, batch))

    # One element of a memoryview of format Q is moved by one 8-byte load or store, which the CPU makes atomically
    # because it is aligned.

    def load64(self, gpa: int) -> int:
        """Return the 8 bytes at `gpa`, a multiple of 8, as one load."""
        offset = self._aligned(gpa)
        return self._while_present(
            [(offset, 8)], Access.READ, False, lambda: self._view[offset : offset + 8].cast("Q")[0]
        )

    def store64(self, gpa: int, value: int) -> None:
        """Store 8 bytes at `gpa`, a multiple of 8, as one store."""

        def store() -> None:
            self._view[offset : offset + 8].cast("Q")[0] = value

        offset = self._aligned(gpa)
        self._while_present([(offset, 8)], Access.WRITE, False, store)

    @contextlib.contextmanager
    def view(self, gpa: int, length: int) -> Iterator[memoryview]:
        """Give the bytes themselves, writable, for the time of a `with` block: none can become absent meanwhile."""
        stretch = offset, _ = self._map.offset_of(gpa, length), length
        pages = offset >> PAGE_SHIFT, (offset + length + _IN_PAGE) >> PAGE_SHIFT
        with undone(lambda: self._let_go(pages)):
            self._while_present([stretch], Access.WRITE, False, lambda: self._acks.views.append(pages))
            with self._view[offset : offset + length] as view:
                yield view

    def _let_go(self, pages: tuple[int, int]) -> None:
        """Take a view off the list, if it is there, and acknowledge what has waited for it."""
        with Uninterrupted():
            with self._mutex:
                self._acks.close_view(pages)
                payable = self._acks.payable()
            self._acknowledge(payable)

    # No context manager: the traceback of an interruption at its exit would keep the mutex, which the receiver needs.
    def _while_present(
        self, pieces: Sequence[tuple[int, int]], access: Access, nowait: bool, work: Callable[[], _T]
    ) -> _T:
        """Do `work` with the mutex held and every page of the pieces (offset in RAM, bytes) present."""
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        runs = [(at >> PAGE_SHIFT, (at + size + _IN_PAGE) >> PAGE_SHIFT) for at, size in pieces]
        while True:
            with self._mutex:
                self._check_open()
                if not (absent := absent_runs(self._bitmap, runs)):
                    return work()
                if nowait:
                    raise BusyError(f"the page at gpa {self._gpa_of(absent[0][0]):#x} is not present")
            self._fetch(absent, access, deadline)

    def _check_open(self) -> None:
        if self._over is not None:
            raise PagingError(self._over)
        if (now := time.monotonic()) > self._trusted_until:
            if self._link.is_cut():  # the receiver is about to find out how it has ended
                raise PagingError("the machine has closed the notifier: its memory cannot be used any more")
            self._trusted_until = now + _TRUST_SECONDS
        if self._cancelled:
            raise CancelledError("the accesses of this device have been called off")
        if self._frozen:
            raise FrozenError("accesses to guest memory are frozen: try again when they are thawed")

    def _fetch(self, absent: Sequence[tuple[int, int]], access: Access, deadline: float | None) -> None:
        """Ask for runs of pages, and sleep until they have been present, or it is time to look again.

        For the first run it waits for a credit; the others are asked for too as far as there are credits left.
        """
        asked: list[tuple[AskedFault, int]] = []  # with the gpa
        for first, count in absent:
            gpa = self._gpa_of(first)
            if not self._faults.wait_credit(0 if asked else seconds_left(deadline)):
                break
            with self._mutex:
                try:
                    self._check_open()
                except PagingError:
                    self._faults.give_back()
                    if asked:
                        break
                    raise
                fault = self._faults.begin()
            asked.append((fault, gpa))
            size = count << PAGE_SHIFT
            self._send(Record(Kind.FAULT, fault.token, gpa, size, access, Origin.DEVICE, self._number))
        if not asked:
            late = f"was not asked for within {self._timeout:g} seconds: others are waited for"
            raise BusyError(f"the page at gpa {self._gpa_of(absent[0][0]):#x} {late}")
        self._await_answers(asked, deadline)

    def _await_answers(self, asked: Sequence[tuple[AskedFault, int]], deadline: float | None) -> None:
        """Sleep until each FAULT has its DONE. Raises what the first means that is not the pages' presence.

        One without is released. The DONE that answers that brings its credit back, and says nothing of the page.
        """
        late, answers = None, []
        for fault, gpa in asked:
            if not fault.done.wait(seconds_left(deadline)) and late is None:
                late = gpa
            if (outcome := fault.outcome) is None:
                self._send(Record(Kind.RELEASE, fault.token))
            else:
                answers.append((outcome, gpa))
        if late is not None:
            raise BusyError(
                f"the page at gpa {late:#x} was not made present within {self._timeout:g} seconds"
            )
        for outcome, gpa in answers:
            check_outcome(outcome, f"the page at gpa {gpa:#x}")

    # Addresses

    def _aligned(self, gpa: int) -> int:
        if gpa % 8:
            raise ValueError(f"gpa {gpa:#x} is not a multiple of 8")
        return self._map.offset_of(gpa, 8)

    def _gpa_of(self, page: int) -> int:
        return self._map.gpa_at(page << PAGE_SHIFT)

    # The device's side of the session

    def wait_doorbell(self, timeout: float | None = None) -> Record | None:
        """Sleep until the guest has rung since the last call; None after `timeout` seconds or the machine's BYE.

        Its `number` and `gpa` tell which ring it was and where that lies. Raises PagingError if the session ended
        in another way.
        """
        with self._mutex:
            self._changed.wait_for(lambda: self._rung is not None or self._over is not None, timeout)
            if self._rung is not None:
                rung, self._rung = self._rung, None
                return rung
            if self._over is not None and not self._said_bye:
                raise PagingError(self._over)
            return None

    def await_thaw(self) -> None:
        """Sleep while accesses are frozen, until the session is over or `cancel`.

        Returns at once while a FREEZE is still on its way, though the machine has answered FROZEN.
        """
        with self._mutex:
            self._changed.wait_for(lambda: not self._frozen or self._cancelled or self._over is not None)

    @property
    def over(self) -> str | None:
        """Why the session is over, or None while it lasts."""
        return self._over

    def completed(self, count: int) -> None:
        """Tell the machine that `count` requests have been finished in all, in this session."""
        self._send(Record(Kind.COMPLETED, size=count))

    def cancel(self) -> None:
        """Call off, for good, the accesses that wait, and refuse new ones: they raise CancelledError."""
        with self._mutex:
            self._cancelled = True
            self._changed.notify_all()
            self._faults.turn_away()

    def close(self) -> None:
        """Unmap RAM, say BYE and close; a second call does nothing. No view may be open, no access under way."""
        with self._mutex:
            if self._acks.views:
                raise ValueError("a view of guest memory is open: close it first")
            if self._closed:
                return
            self._closed = True
            self._end("this device has ended the session")
        self._ram.close()  # before BYE, which says that nothing here touches RAM any more
        # Also if this side ended it, for a record that makes no sense: the machine has to learn that RAM is let go.
        if not self._said_bye:
            self._send(Record(Kind.BYE))
        self._link.shut()
        self._receiver.join()
        self._stack.close()

    # Records

    def _send(self, record: Record) -> None:
        """Send, without the mutex and without waiting."""
        if not self._link.send(record):
            self._end_once("the machine does not read what it is sent: the session is over")

    def _receive(self, wait: bool = True) -> None:
        """Take records until the session is over; without `wait` those that are here, at the most."""
        try:
            while self._over is None:
                record = self._link.receive(wait)
                if record is None:
                    return
                self._take(record)
            return
        except LinkEndedError as error:
            why = str(error)
        except RecordError as error:
            why = f"the machine sent {error}: the session is over"
        except ValueError as error:
            why = f"the machine sent a record that makes no sense ({error}): the session is over"
        self._end_once(why)

    def _receiver_broke(self, error: BaseException) -> None:
        self._end_once(f"taking the machine's records broke: {in_words(error)}")

    def _end_once(self, why: str) -> None:
        with self._mutex:
            self._end(why)

    def _end(self, why: str) -> None:
        """End the session, with the mutex held; the first reason counts."""
        if self._over is not None:
            return
        self._over = why
        self._faults.turn_away()
        self._changed.notify_all()

    def _take(self, record: Record) -> None:
        kind = record.kind
        with self._mutex:
            if kind is Kind.DONE:
                self._faults.end(record.token, record.outcome)
            elif kind is Kind.INVALIDATE:
                first = self._map.offset_of(record.gpa, record.size) >> PAGE_SHIFT
                self._acks.owe(record.token, first, first + (record.size >> PAGE_SHIFT))
            elif kind is Kind.FREEZE:
                self._frozen = True
                self._acks.owe(record.token, 0, self.handover.pages)
                self._faults.wake_all()
            elif kind is Kind.THAW:
                self._frozen = False
                self._changed.notify_all()
            elif kind is Kind.DOORBELL:
                self._rung = record
                self._changed.notify_all()
            elif kind is Kind.BYE:
                self._said_bye = True
                self._end("the machine has ended the session")
            else:
                raise RecordError(f"a {kind.name}, which is not a machine's to send")
            payable = self._acks.payable()
        self._acknowledge(payable)

    def _acknowledge(self, tokens: list[int]) -> None:
        for token in tokens:
            self._send(Record(Kind.ACK, token))
