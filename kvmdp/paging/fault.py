"""The one event for every access to guest memory that is not present, whoever made it.

Plain data. Addresses are guest-physical bytes, pages are RAM page numbers (order of the RAM file).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Origin(enum.Enum):
    """Who touched the page."""

    VCPU = "vcpu"
    DEVICE = "device"
    HOST = "host"  # the VMM itself: marking pages present, reading results


@dataclass(frozen=True, slots=True)
class PageFault:
    """An access to RAM page `page`; `number` tells vCPUs (or devices) apart."""

    page: int
    origin: Origin = Origin.HOST
    number: int = 0


class Outcome(enum.Enum):
    """How a fault ended."""

    PRESENT = "present"  # nothing to do: somebody else had admitted the page
    ADMITTED = "admitted"
    POISONED = "poisoned"
    FAILED = "failed"  # the source cannot deliver; the pager is paused, see DemandPager.error
    CANCELLED = "cancelled"  # the machine is stopping


class PagingError(Exception):
    """Demand paging cannot go on: the message says where, why, and what to do."""


class UnsupportedError(Exception):
    """This host lacks what is wanted: the message says what, and what would provide it."""
