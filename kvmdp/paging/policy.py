"""Which pages are fetched on a fault besides the one that was touched.

A policy proposes; the pager cuts the proposal to pages that are absent and lie in one stretch of guest-physical space.
It refuses a proposal without the touched page, or of more than 512 pages: such a policy is broken, and so is one that
raises. Then faults fail with a sentence, and nothing has been claimed.

`MachineOptions.policy` takes any object with the one method below. Units: RAM pages.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Protocol

from kvmdp.errors import PagingError
from kvmdp.page import PageFault
from kvmdp.shortage import in_words

MAX_FAULT_AROUND = 512


class FaultPolicy(Protocol):
    """Proposes the run of pages to fetch for a fault."""

    def window(self, fault: PageFault) -> tuple[int, int]:
        """Return (first, count), a run of at most 512 pages that holds `fault.page`; it may reach beyond RAM.

        `fault` says which page, what touched it (`origin`, and `number` for which vCPU or device, -1 where the kernel
        does not tell) and how (`access`). Called by many threads, one at a time, under the pager's mutex, once for each
        fault that fetches: it needs no lock of its own, and must neither wait nor call the pager.
        """
        ...


class PolicyError(PagingError):
    """The policy is broken: it raised, or has proposed what it must not. Faults on absent pages fail from then on."""


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


def checked(policy: FaultPolicy) -> Callable[[PageFault], tuple[int, int]]:
    """Return the policy's `window`, which raises PolicyError for whatever it does that a policy must not.

    That of `FaultAround` is returned as it is: it is on the way of every fault, and is always right.
    """
    if type(policy) is FaultAround:
        return policy.window
    name = type(policy).__name__

    def window(fault: PageFault) -> tuple[int, int]:
        try:
            first, count = map(index, policy.window(fault))
        except Exception as error:
            raise PolicyError(f"the policy {name} broke at page {fault.page}: {in_words(error)}") from error
        if not first <= fault.page < first + count <= first + MAX_FAULT_AROUND:
            raise PolicyError(
                f"the policy {name} proposes {count} pages from {first} on for a fault on page {fault.page}: have it "
                f"propose 1 to {MAX_FAULT_AROUND} pages that hold it"
            )
        return first, count

    return window
