"""One machine's session with a handler: workers that take its faults, fill its RAM in place, and answer.

Nothing is written before the machine has asked for it. Nothing the machine does holds up anything but its own session:
each worker waits in a receive, which the session's end breaks off; answers are sent without waiting, for a machine has
room for all that it asked for.

Workers come as faults do: while one waits for the next fault there are enough of them. So a machine that asks for
nothing costs one thread, and where there can be no more threads fewer faults are in flight.

Units: bytes.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable

from kvmdp.page import PAGE_SIZE, Origin, Outcome
from kvmdp.peers.wire.endpoint import Peer
from kvmdp.peers.wire.handover import Descriptors, Handover, HandoverError, Role
from kvmdp.peers.wire.records import RECORD_SIZE, Kind, Record, RecordError, unpack
from kvmdp.shortage import NoThreadError, in_words
from kvmdp.source.base import PageSource, SourceError, fetch
from kvmdp.source.request import FetchRequest
from kvmdp.thread import JoinableThread

_MOST_WORKERS = 16  # faults in flight: as many as a machine has vCPUs
_AT_ONCE = 32 << 20  # bytes filled before it is looked whether the session lasts


class _MuteError(Exception):
    """The machine does not read its answers."""


class MachineSession:
    """Serves one machine from `source`, from its hand-over until `over`.

    Owns `descriptors` from now on, and `peer` once it is made. `report` is told in a sentence of what goes wrong,
    `ended` is called once when the last worker has gone; both from any thread, and neither may block.

    Raises HandoverError if what was handed over cannot be served, OSError.
    """

    def __init__(
        self,
        peer: Peer,
        terms: Handover,
        descriptors: Descriptors,
        source: PageSource,
        report: Callable[[str], None],
        ended: Callable[[], None],
    ) -> None:
        self.peer = peer
        self.ending = False  # nothing is received or sent any more
        self._terms = terms
        self._source = source
        self._report = report
        self._ended = ended
        self._mutex = threading.Lock()  # guards what follows
        self._workers: list[JoinableThread] = []
        self._working = self._waiting = 0  # workers that have not left; those of them that want a fault
        self._pages: Counter[Origin] = Counter()
        self._failed = 0
        with contextlib.closing(descriptors):
            self._memory = _map(terms, descriptors.ram)
            # HugeTLB memory has blocks of its pages' size.
            self._copies = os.fstatvfs(descriptors.ram).f_bsize > PAGE_SIZE
            self._notifier = socket.socket(fileno=descriptors.notifier)
            descriptors.notifier = -1
        self._notifier.setblocking(True)  # whatever the machine has left it as

    def start(self) -> None:
        """Begin to serve. Raises NoThreadError; the session is over then."""
        self._add_worker()

    def end(self) -> None:
        """Wake every worker: there is nothing more to receive, and nothing more is sent. Does not wait."""
        self.ending = True
        with contextlib.suppress(OSError):  # ENOTCONN: the machine has closed its end
            self._notifier.shutdown(socket.SHUT_RDWR)

    @property
    def over(self) -> bool:
        """Whether the last worker has gone: then `close` does not wait."""
        return not self._working

    def close(self) -> None:
        """End the session; returns when each worker is done with the fill that it is at. A second call does nothing."""
        self.end()
        for worker in self._workers:  # a worker that another adds meanwhile is listed before that one leaves
            worker.join()
        self._notifier.close()
        self._memory.release()
        self.peer.close()

    def summary(self) -> str:
        """Return whose faults were answered, in words."""
        with self._mutex:
            counts = ", ".join(
                f"{self._pages[origin]} {name}"
                for origin, name in ((Origin.VCPU, "vCPU"), (Origin.DEVICE, "device"), (Origin.HOST, "host"))
            )
            return f"{counts} faults" + (f", {self._failed} of them failed" if self._failed else "")

    # The workers

    def _add_worker(self) -> None:
        """Start a worker. Raises NoThreadError."""
        with self._mutex:
            worker = JoinableThread(self._work, f"fault-{len(self._workers)}", self._broke)
            self._workers.append(worker)
            self._working += 1
            self._waiting += 1
        try:
            worker.start()
        except NoThreadError:
            with self._mutex:
                self._workers.remove(worker)
                self._working -= 1
                self._waiting -= 1
            raise

    def _work(self) -> None:
        try:
            while (record := self._next()) is not None:
                outcome = self._fill(record)
                if outcome is None:
                    break
                self._send(record, outcome)
                with self._mutex:
                    self._waiting += 1
        except (BrokenPipeError, ConnectionResetError):
            pass  # the machine has gone; what was filled is of no use to it any more
        except RecordError as error:
            self._report(f"it sent {error}; it was cut off")
        except _MuteError:
            self._report("it does not read its answers; it was cut off")
        except OSError as error:  # what was handed over is a socket, but cannot carry records
            self._report(f"its notifier does not work ({error.strerror}); it was cut off")
        finally:
            self._leave()

    def _broke(self, error: BaseException) -> None:
        self._report(f"serving it broke: {in_words(error)}; it was cut off")

    def _leave(self) -> None:
        self.end()
        with self._mutex:
            self._working -= 1
            last = not self._working
        if last:
            self._ended()

    def _next(self) -> Record | None:
        """Return the next fault, None at the end; sees to it that others can be taken meanwhile. Raises RecordError."""
        while (message := self._notifier.recv(RECORD_SIZE + 1)) and not self.ending:
            record = unpack(message, self._terms.epoch)
            if record.kind is Kind.FAULT:
                self._replace()
                return record
            if record.kind is Kind.BYE:
                return None
            # A fault that is wanted no more is being filled already: its answer is on its way.
            if record.kind is not Kind.RELEASE:
                raise RecordError(f"a {record.kind.name}, which is not for a handler")
        return None

    def _replace(self) -> None:
        """Have another worker wait for the next fault, if none does and there may be more."""
        with self._mutex:
            self._waiting -= 1
            wanted = not self._waiting and self._working < _MOST_WORKERS
        if wanted:
            # No more threads: the next fault waits until a worker is done.
            with contextlib.suppress(NoThreadError):
                self._add_worker()

    def _send(self, fault: Record, outcome: Outcome) -> None:
        """Answer a fault. Raises _MuteError, OSError if the machine has gone."""
        answer = Record(Kind.DONE, fault.token, fault.gpa, fault.size, outcome=outcome)
        try:
            self._notifier.send(answer.pack(self._terms.epoch), socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise _MuteError from None

    def _fill(self, fault: Record) -> Outcome | None:
        """Fill what a fault asks for; returns how that ended, None if the session ends first. Raises RecordError."""
        offset = self._offset_of(fault)
        outcome = Outcome.PRESENT
        try:
            for start in range(offset, offset + fault.size, _AT_ONCE):
                if self.ending:  # it may have asked for all of a large RAM
                    return None  # and gets no answer: not all of it is there
                self._fill_part(start, min(_AT_ONCE, offset + fault.size - start))
        except Exception as error:  # a source that breaks costs the machine this page, not the session
            outcome = Outcome.FAILED
            why = error if isinstance(error, SourceError | ValueError) else repr(error)
            self._report(f"the fault on gpa {fault.gpa:#x} failed: {why}")
        with self._mutex:
            self._pages[fault.origin] += 1
            self._failed += outcome is Outcome.FAILED
        return outcome

    def _fill_part(self, offset: int, size: int) -> None:
        with self._memory[offset : offset + size] as destination:
            if self._copies:
                _fill_by_copy(self._source, offset, destination)
            else:
                fetch(self._source, FetchRequest(offset), destination)

    def _offset_of(self, fault: Record) -> int:
        for gpa, size, offset in self._terms.regions:
            if gpa <= fault.gpa and fault.gpa + fault.size <= gpa + size:
                return offset + fault.gpa - gpa
        raise RecordError(f"a FAULT for {fault.size} bytes at gpa {fault.gpa:#x}, which are not RAM")


def _map(terms: Handover, ram: int) -> memoryview:
    """Map RAM for writing; unmapped when the view and its slices have gone. Raises HandoverError, OSError."""
    if terms.role is not Role.HANDLER:
        raise HandoverError(f"it wants a {terms.role.name.lower()}, and this is a handler")
    return memoryview(mmap.mmap(ram, terms.memory_bytes))


def _fill_by_copy(source: PageSource, offset: int, destination: memoryview) -> None:
    """Fill HugeTLB memory. Raises SourceError, ValueError.

    A machine can hand over pages that are not there, or return them to the pool at any time. A store to them ends the
    process that makes it with a SIGBUS; a copy that the kernel makes is an error. So the bytes go by way of a file.
    """
    length = destination.nbytes
    try:
        file = os.memfd_create("kvmdp-fill", os.MFD_CLOEXEC)
        try:
            os.ftruncate(file, length)
            with mmap.mmap(file, length) as mapping, memoryview(mapping) as content:
                fetch(source, FetchRequest(offset), content)
            done = 0
            while done < length:
                done += os.preadv(file, [destination[done:]], done)
        finally:
            os.close(file)
    except OSError as error:
        what = (
            "the machine's RAM has no huge page for them" if error.errno == errno.EFAULT else error.strerror
        )
        raise SourceError(source.name, offset, length, str(what)) from None
