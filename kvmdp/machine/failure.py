"""Why a part of something larger failed, in words: a cell of a table, a contender's turn. The other parts go on."""

from __future__ import annotations

from kvmdp.machine.runloop import GuestError
from kvmdp.paging.fault import PagingError, UnsupportedError
from kvmdp.source.base import SourceError

# Their messages are sentences for users.
_SENTENCES = (PagingError, GuestError, SourceError, UnsupportedError, OSError)


def in_words(error: Exception) -> str:
    """Return the sentence of an error that has one; another is a fault of ours, and is shown as it is."""
    return str(error) if isinstance(error, _SENTENCES) else f"internal error: {error!r}"
