"""Faults and how they end: the event of `kvmdp.wire.records`, and the errors of paging."""

from __future__ import annotations

from kvmdp.wire.records import Access, Origin, Outcome, PageFault

__all__ = ["Access", "Origin", "Outcome", "PageFault", "PagingError", "UnsupportedError"]


class PagingError(Exception):
    """Demand paging cannot go on: the message says where, why, and what to do."""


class UnsupportedError(Exception):
    """This host lacks what is wanted: the message says what, and what would provide it."""
