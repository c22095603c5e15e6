"""What demand paging is paused with when something that it relies on fails."""

from __future__ import annotations

from kvmdp.errors import PagingError
from kvmdp.shortage import in_words


def broken(what: str, error: BaseException) -> PagingError:
    """Return what to pause with because `error` came up: a PagingError is its own sentence, else `what` begins one."""
    if isinstance(error, PagingError):
        return error
    paused = PagingError(f"{what}: {in_words(error)}")
    paused.__cause__ = error
    return paused
