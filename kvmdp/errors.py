"""Errors: each message is one sentence that says what, where, why, and what to do."""

from __future__ import annotations


class KvmdpError(Exception):
    """What this package raises for reasons that lie outside the program; its message is meant for a user."""


class UnsupportedError(KvmdpError):
    """This host lacks what is wanted: the message says what, and what would provide it."""


class PagingError(KvmdpError):
    """Demand paging cannot go on: the message says where, why, and what to do."""


class BusyError(PagingError):
    """It cannot be done now, and waiting was not wanted, or took too long. Nothing has changed: try again later."""


class FrozenError(PagingError):
    """Accesses that no vCPU makes are frozen: nothing was touched. Try again once they are thawed."""


class CancelledError(PagingError):
    """The wait for a page was called off: the machine is stopping, or the access was withdrawn."""


class PoisonedError(PagingError):
    """The page is poisoned: what was in it is lost. Nothing was touched."""


class SwitchedOffError(PagingError):
    """Demand paging is switched off: nothing can be taken away. Nothing was touched."""
