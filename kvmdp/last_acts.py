"""What is done at the end of a block whatever that end is, an interruption that ends the process at once among them.

That is for what outlives a process under a name, such as a socket's file or a temporary folder. For the main thread,
which alone is interrupted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from kvmdp.interruption import Uninterrupted

_acts: list[Callable[[], object]] = []


@contextlib.contextmanager
def last_act(act: Callable[[], object]) -> Iterator[None]:
    """Have `act` done at the end of the block. It is soon done, and may be done twice; it may raise OSError."""
    _acts.append(act)
    try:
        yield
    finally:
        # An interruption may come before this, or between the block and its beginning: then `act` is still listed.
        with Uninterrupted():
            act()
            _acts.remove(act)


def do_last_acts() -> None:
    """Do all that has not been done, the last first: the process ends."""
    for act in reversed(_acts):
        with contextlib.suppress(OSError):  # the next one is done all the same
            act()
