"""The watchdog of vCPUs: finds those on which KVM spins without an exit.

Units: seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvmdp.machine.vcpu_thread import VcpuThread
from kvmdp.vcpu.gate import VcpuGate

_STALL_SECONDS = 1.0  # in KVM_RUN without an exit, before a vCPU is suspected


class StallWatch:
    """Has a vCPU that has not come out of the guest for long look at the instruction it is at; again and again."""

    def __init__(self, threads: Sequence[VcpuThread], gate: VcpuGate) -> None:
        self._gate = gate
        self._since = {thread: (0, time.monotonic()) for thread in threads}  # entries, and since when so many

    def look(self) -> None:
        """Look at every vCPU; to be called several times a second."""
        now = time.monotonic()
        for thread, (entries, since) in self._since.items():
            if thread.entries != entries or not self._gate.is_inside(thread.vcpu):
                self._since[thread] = (thread.entries, now)
            elif now - since >= _STALL_SECONDS:
                self._since[thread] = (entries, now)
                thread.suspect_stall()
