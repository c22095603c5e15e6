"""A device beside the guest: a thread that reads pages of RAM, present or not, while the vCPUs run.

With a device view it makes plain loads on that, without one it asks `GuestMemory`.
"""

from __future__ import annotations

import time
from array import array

from kvmdp.errors import PagingError
from kvmdp.machine.machine import Machine
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.broken import broken
from kvmdp.thread import JoinableThread


class DeviceThread:
    """Reads `pages` pages, from the last of RAM down; ends by itself when the machine stops.

    `latencies` has the nanoseconds that each read took, one a page.
    """

    def __init__(self, machine: Machine, pages: int) -> None:
        self.latencies = array("Q")
        self._layout = machine.layout
        self._memory = machine.device_view or machine.memory_for_device(0)
        self._pages = pages
        self._thread = JoinableThread(
            self._read,
            "device",
            lambda error: machine.pager.abort(broken("the device's thread broke", error)),
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread's end; only once the machine is stopping, or has read all."""
        self._thread.join()

    def _read(self) -> None:
        for page in range(self._layout.pages - 1, self._layout.pages - 1 - self._pages, -1):
            gpa = self._layout.gpa_of_page(page)
            began = time.perf_counter_ns()
            try:
                self._memory.read(gpa, PAGE_SIZE)
            except PagingError:
                return  # the machine is stopping; if that is for a page that cannot be had, Machine.run says so
            self.latencies.append(time.perf_counter_ns() - began)
