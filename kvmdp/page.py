"""The words that all else is said in: pages, and the event of an access to one that is absent.

Units: bytes, unless a name says pages.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

PAGE_SIZE = 4096
PAGE_SHIFT = PAGE_SIZE.bit_length() - 1
HUGE_PAGE = 2 << 20  # what one entry of the second level of page tables can map
REGION = HUGE_PAGE // PAGE_SIZE  # the same in pages: what the host maps as one where it can


class Access(enum.IntEnum):
    """What was done to the memory. KVM does not tell it of vCPU faults."""

    UNKNOWN = 0
    READ = 1
    WRITE = 2
    FETCH = 3


class Origin(enum.IntEnum):
    """Who touched the memory."""

    VCPU = 0
    DEVICE = 1
    HOST = 2  # the VMM itself: marking pages present, reading results


class Outcome(enum.IntEnum):
    """How a fault ended."""

    PRESENT = 0  # nothing to do: another thread had admitted the page
    ADMITTED = 1
    POISONED = 2
    FAILED = 3  # the page cannot be had: the source failed, the machine is paused
    CANCELLED = 4  # the machine is stopping, or the thread that waited has given up
    FROZEN = 5  # no accesses until the machine thaws them
    TIMED_OUT = 6  # the caller, in the machine's own process, has waited long enough; never in a record


class PageFault(NamedTuple):
    """An access to RAM page `page` (order of the RAM file); `number` tells vCPUs or devices apart, -1 is unknown.

    The one event for every access to memory that is not present, of every kind. A tuple, because one is made a
    fault: it takes a third of the time of a frozen dataclass.
    """

    page: int
    origin: Origin = Origin.HOST
    number: int = 0
    access: Access = Access.UNKNOWN
