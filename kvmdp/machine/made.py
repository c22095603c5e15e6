"""A machine for the time of a `with` block, which no interruption leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kvmdp.interruption import Uninterrupted, undone
from kvmdp.machine.machine import Machine, MachineOptions
from kvmdp.source.base import PageSource


@contextlib.contextmanager
def made_machine(options: MachineOptions, source: PageSource) -> Iterator[Machine]:
    """Make a machine and close it when the block is left; raises as `Machine`.

    `with Machine(...)` does so too, but for an interruption that comes between the making and the block, or at the very
    entry of `Machine.__exit__`: then its threads go on, and Python waits for them at its end.
    """
    made: list[Machine] = []

    def close() -> None:
        for machine in made:
            machine.close()

    with undone(close):
        with Uninterrupted():
            made.append(Machine(options, source))
        yield made[0]
