"""The other side of `kvmdp.source.handler`: serves the faults of one machine after another from a source.

Fills RAM in place through a mapping of its own; several threads each take a fault, fill, answer. Nothing is written
before the machine has asked for it, and nothing after the session's end.

Units: bytes, seconds.
"""

from __future__ import annotations

import fcntl
import mmap
import socket
import threading
from collections import Counter
from collections.abc import Callable
from typing import NoReturn

from kvmdp.source.base import PageSource, SourceError, fetch
from kvmdp.thread import JoinableThread
from kvmdp.wire import handover, offer
from kvmdp.wire.endpoint import EndpointError, Listener, Peer
from kvmdp.wire.handover import Descriptors, Handover, HandoverError, Role
from kvmdp.wire.records import RECORD_SIZE, Kind, Origin, Outcome, Record, RecordError, unpack

_WORKERS = 16  # faults in flight: as many as a machine has vCPUs
_PATIENCE_SECONDS = 60.0  # from the offer to the hand-over: a large machine takes a while to make


def serve(
    listener: Listener, source: PageSource, report: Callable[[str], None], low_ram_end: int | None = None
) -> NoReturn:
    """Serve machines from `source`, one at a time, for ever. Both stay the caller's.

    `low_ram_end` is the gpa at which the hole begins of the machine that the source is of, None if it is of none.
    `report` is told in a sentence of each session's beginning and end, from any thread.
    """
    while True:
        with listener.accept() as connection:
            try:
                peer = Peer.of(connection)
            except EndpointError as error:
                report(f"a machine was refused: {error}")
                continue
            try:
                serve_machine(connection, peer.pid, source, report, low_ram_end)
            except (HandoverError, OSError) as error:
                report(f"machine {peer.pid} was given up: {error}")
            finally:
                peer.close()


def serve_machine(
    connection: socket.socket,
    pid: int,
    source: PageSource,
    report: Callable[[str], None],
    low_ram_end: int | None = None,
) -> None:
    """Serve the machine at the other end of a new connection to its end.

    Raises HandoverError if what comes is no hand-over that can be served, or nothing comes; OSError.
    """
    connection.settimeout(_PATIENCE_SECONDS)
    offer.send(connection, offer.Offer(source.size, low_ram_end))
    try:
        terms, descriptors = handover.receive(connection)
    except TimeoutError:
        raise HandoverError(f"nothing was handed over within {_PATIENCE_SECONDS:g} seconds") from None
    try:
        notifier = _notifier_of(descriptors)
    except BaseException:
        descriptors.close()
        raise
    with notifier:
        try:
            memory = _map(terms, descriptors.ram)
        finally:
            descriptors.close()
        try:
            session = _Serving(notifier, terms, memory, source, lambda text: report(f"machine {pid}: {text}"))
            report(f"machine {pid} has come: session {terms.epoch}, {terms.memory_bytes >> 20} MiB of RAM")
            session.run()
            report(f"machine {pid} has gone: {session.summary()}")
        finally:
            memory.release()


def _notifier_of(descriptors: Descriptors) -> socket.socket:
    """Take the notifier out of the descriptors. Raises HandoverError if it is no socket."""
    try:
        notifier = socket.socket(fileno=descriptors.notifier)
    except OSError:
        raise HandoverError("a notifier that is no socket") from None
    descriptors.notifier = -1
    notifier.setblocking(True)  # whatever the machine has left it as
    return notifier


def _map(terms: Handover, ram: int) -> memoryview:
    """Map RAM for writing; unmapped when the view and its slices have gone."""
    if terms.role is not Role.HANDLER:
        raise HandoverError(f"it wants a {terms.role.name.lower()}, and this is a handler")
    try:
        sealed = fcntl.fcntl(ram, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:  # EINVAL: no memfd
        sealed = 0
    if not sealed:
        raise HandoverError("RAM whose file is not sealed against shrinking, which could end this process")
    try:
        return memoryview(mmap.mmap(ram, terms.memory_bytes))
    except (ValueError, OverflowError):
        raise HandoverError(f"a RAM file with less than {terms.memory_bytes} bytes") from None


class _Serving:
    """One session: threads that take faults, fill RAM and answer."""

    def __init__(
        self,
        notifier: socket.socket,
        terms: Handover,
        memory: memoryview,
        source: PageSource,
        report: Callable[[str], None],
    ) -> None:
        self._notifier = notifier
        self._terms = terms
        self._memory = memory
        self._source = source
        self._report = report
        self._mutex = threading.Lock()  # guards what follows
        self._pages: Counter[Origin] = Counter()
        self._failed = 0

    def run(self) -> None:
        """Serve until the machine ends the session or dies, or does what it must not."""
        workers = [JoinableThread(self._work, f"fault-{number}") for number in range(_WORKERS)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:  # interrupted: let them finish the fill they are at, and begin no other
            self._end()
            for worker in workers:
                worker.join()

    def summary(self) -> str:
        """Return whose faults were answered, in words."""
        with self._mutex:
            counts = ", ".join(
                f"{self._pages[origin]} {name}"
                for origin, name in ((Origin.VCPU, "vCPU"), (Origin.DEVICE, "device"), (Origin.HOST, "host"))
            )
            return f"{counts} faults" + (f", {self._failed} of them failed" if self._failed else "")

    def _end(self) -> None:
        """Wake every worker: there is nothing more to receive, and nothing more can be sent."""
        try:
            self._notifier.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the machine has closed its end

    def _work(self) -> None:
        try:
            while (record := self._next()) is not None:
                outcome = self._fill(record)
                answer = Record(Kind.DONE, record.token, record.gpa, record.size, outcome=outcome)
                self._notifier.send(answer.pack(self._terms.epoch))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the machine has gone; what was filled is of no use to anybody
        except RecordError as error:
            self._report(f"it sent {error}; it was cut off")
        except OSError as error:  # what was handed over is a socket, but cannot carry records
            self._report(f"its notifier does not work ({error.strerror}); it was cut off")
        finally:
            self._end()

    def _next(self) -> Record | None:
        """Return the next fault, None at the end. Raises RecordError."""
        while True:
            message = self._notifier.recv(RECORD_SIZE + 1)
            if not message:
                return None
            record = unpack(message, self._terms.epoch)
            if record.kind is Kind.FAULT:
                return record
            if record.kind is Kind.BYE:
                return None
            # A fault that is wanted no more is being filled already: its answer is on its way.
            if record.kind is not Kind.RELEASE:
                raise RecordError(f"a {record.kind.name}, which is not for a handler")

    def _fill(self, record: Record) -> Outcome:
        """Fill what a fault asks for. Raises RecordError if that is not RAM."""
        offset = self._offset_of(record)
        outcome = Outcome.PRESENT
        try:
            with self._memory[offset : offset + record.size] as destination:
                fetch(self._source, offset, destination)
        except (SourceError, ValueError) as error:
            outcome = Outcome.FAILED
            self._report(f"the fault on gpa {record.gpa:#x} failed: {error}")
        with self._mutex:
            self._pages[record.origin] += 1
            self._failed += outcome is Outcome.FAILED
        return outcome

    def _offset_of(self, record: Record) -> int:
        for gpa, size, offset in self._terms.regions:
            if gpa <= record.gpa and record.gpa + record.size <= gpa + size:
                return offset + record.gpa - gpa
        raise RecordError(f"a FAULT for {record.size} bytes at gpa {record.gpa:#x}, which are not RAM")
