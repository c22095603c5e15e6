"""The gate every vCPU passes before KVM_RUN, and how all of them are kept out (quiesced).

Some changes to guest memory are exact only while no vCPU is in KVM_RUN. A vCPU thread *enters* the gate before
KVM_RUN and *leaves* after it; `quiesced` closes the gate, kicks whoever is inside, and waits until they are out.
A thread that resolves a fault is outside, so it never has to finish before the gate can close.

Lock order: pins of the pager are taken before the gate is entered, never the other way round; a quiescer has
drained the pins of its own pages before it closes the gate. So nobody inside waits for a quiescer.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from kvmdp.interruption import undone
from kvmdp.kvm import Vcpu
from kvmdp.paging.fault import PagingError

_REKICK_SECONDS = 0.1
_PATIENCE_SECONDS = 30.0


class VcpuGate:
    """Counts the vCPUs in KVM_RUN and can keep them out.

    `longest_stop` is the longest time in seconds the gate was closed, `stops` how often.
    """

    def __init__(self) -> None:
        # Guards everything below. Held for a few statements only, never while a vCPU runs.
        self._mutex = (
            threading.Lock()
        )  # taken as itself on the way of every exit: a Condition's is a call in Python
        self._changed = threading.Condition(self._mutex)
        self._inside: set[Vcpu] = set()
        self._closers: list[object] = []  # one of each thread that keeps the vCPUs out
        self._stopping = False
        self.stops = 0
        self.longest_stop = 0.0

    def enter(self, vcpu: Vcpu, *, only_complete: bool = False) -> bool:
        """Wait until the gate is open, and pass. Returns False if the machine is stopping.

        Clears the vCPU's `immediate_exit`, so that a kick from now on takes effect; with `only_complete` sets
        it, so that KVM_RUN completes the pending access and returns.
        """
        with self._mutex:
            while self._closers and not self._stopping:
                self._changed.wait()
            if self._stopping:
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
        """Whether somebody keeps the vCPUs out, or waits until they are."""
        return bool(self._closers)

    def is_inside(self, vcpu: Vcpu) -> bool:
        """Return whether the vCPU is in KVM_RUN, or about to be."""
        return vcpu in self._inside

    @contextlib.contextmanager
    def quiesced(self) -> Iterator[None]:
        """Keep every vCPU out of KVM_RUN for the time of the `with` block.

        Raises PagingError if one does not come out in 30 seconds.
        """
        started, closer = time.monotonic(), object()
        with undone(lambda: self._open(closer, started)):
            with self._mutex:
                self._closers.append(closer)
            self._await_empty(started + _PATIENCE_SECONDS)
            yield

    def _open(self, closer: object, started: float) -> None:
        with self._mutex:
            if closer in self._closers:
                self.stops += 1
                self.longest_stop = max(self.longest_stop, time.monotonic() - started)
                self._closers.remove(closer)
            self._changed.notify_all()

    def _await_empty(self, deadline: float) -> None:
        with self._mutex:
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

    def forget_stops(self) -> None:
        """Count the stops anew from now on."""
        with self._mutex:
            self.stops, self.longest_stop = 0, 0.0

    def stop(self) -> None:
        """Let nobody in any more and get everybody out; does not wait."""
        with self._changed:
            self._stopping = True
            for vcpu in self._inside:
                vcpu.kick()
            self._changed.notify_all()

    def reopen(self) -> None:
        """Undo `stop`; nobody may be inside."""
        with self._changed:
            assert not self._inside
            self._stopping = False
