"""Which pages are fetched on a fault besides the one that was touched.

A policy proposes; the pager cuts the proposal to pages that are absent and lie in one stretch of
guest-physical space. `MachineOptions.policy` takes any object with the one method below. Units: RAM pages.
"""

from __future__ import annotations

from typing import Protocol

from kvmdp.page import PageFault

MAX_FAULT_AROUND = 512


class FaultPolicy(Protocol):
    """Proposes the run of pages to fetch for a fault."""

    def window(self, fault: PageFault) -> tuple[int, int]:
        """Return (first, count), a run of at most 512 pages that holds `fault.page`.

        `fault` says which page, what touched it (`origin`, and `number` for which vCPU or device, -1 where the kernel
        does not tell) and how (`access`). Called under the pager's mutex, once for each fault that fetches: it must
        neither wait nor call the pager.
        """
        ...


class FaultAround:
    """Fetch the aligned block of `pages` pages around the fault: a power of two, from 1 to 512.

    Raises ValueError for any other number.
    """

    def __init__(self, pages: int = 1) -> None:
        if not 1 <= pages <= MAX_FAULT_AROUND or pages & (pages - 1):
            raise ValueError(
                f"fault-around of {pages} pages: give a power of two from 1 to {MAX_FAULT_AROUND}"
            )
        self.pages = pages
        self._mask = ~(pages - 1)

    def window(self, fault: PageFault) -> tuple[int, int]:
        """Return the aligned block that holds the page."""
        return fault.page & self._mask, self.pages
