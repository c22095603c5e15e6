"""Faults and how they end: the event of `kvmdp.peers.wire.records`, and the errors of paging."""

from __future__ import annotations

from kvmdp.memory.unsupported import UnsupportedError
from kvmdp.peers.wire.records import Access, Origin, Outcome, PageFault
from kvmdp.shortage import in_words

__all__ = [
    "Access",
    "BusyError",
    "CancelledError",
    "FrozenError",
    "Origin",
    "Outcome",
    "PageFault",
    "PagingError",
    "PoisonedError",
    "SwitchedOffError",
    "UnsupportedError",
    "broken",
]


class PagingError(Exception):
    """Demand paging cannot go on: the message says where, why, and what to do."""


def broken(what: str, error: BaseException) -> PagingError:
    """Return what to pause with because `error` came up: a PagingError is its own sentence, else `what` begins one."""
    if isinstance(error, PagingError):
        return error
    paused = PagingError(f"{what}: {in_words(error)}")
    paused.__cause__ = error
    return paused


class BusyError(PagingError):
    """It cannot be done now, and waiting was not wanted, or took too long. Nothing has changed: try again later."""


class FrozenError(PagingError):
    """Accesses that no vCPU makes are frozen: nothing was touched. Try again once they are thawed."""


class CancelledError(PagingError):
    """The wait for a page was called off: the machine is stopping, or somebody withdrew the access."""


class PoisonedError(PagingError):
    """The page is poisoned: what was in it is lost. Nothing was touched."""


class SwitchedOffError(PagingError):
    """Demand paging is switched off: nothing can be taken away. Nothing was touched."""
