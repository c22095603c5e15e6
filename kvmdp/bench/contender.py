"""The contenders of a comparison, by name: ways of demand paging, and the limits they are held against."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvmdp.paging.trap.registry import TRAPS
from kvmdp.paging.trap.userfaultfd import UffdOptions

PRESENT = "present"
SHARDED = "userfaultfd-sharded"
_READERS = re.compile(r"userfaultfd-r([1-9][0-9]?)")

# What is compared if the user names nothing.
DEFAULT = (PRESENT, "marker", "memory-fault", "mmio", "userfaultfd", "userfaultfd-r2", SHARDED)


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run the work.

    `trap` is None for `present`: all memory is in place and demand paging switched off. `readers` and `sharded` are
    for userfaultfd: threads a descriptor, and whether each vCPU's share of RAM has a descriptor of its own.
    """

    name: str
    trap: str | None
    readers: int = 1
    sharded: bool = False

    def uffd_options(self, vcpus: int) -> UffdOptions:
        """Return the options of the trap userfaultfd for a machine of `vcpus` vCPUs."""
        return UffdOptions(self.readers, vcpus if self.sharded else 1)


def contender(name: str) -> Contender:
    """Return the contender called `name`. Raises ValueError if there is none.

    Names are `present`, those of the traps, `userfaultfd-rN` (N readers) and `userfaultfd-sharded`.
    """
    if name == PRESENT:
        return Contender(name, None)
    if name in TRAPS:
        return Contender(name, name)
    if name == SHARDED:
        return Contender(name, "userfaultfd", sharded=True)
    readers = _READERS.fullmatch(name)
    if readers:
        return Contender(name, "userfaultfd", readers=int(readers[1]))
    known = ", ".join((PRESENT, *TRAPS, "userfaultfd-rN", SHARDED))
    raise ValueError(f"there is no contender {name!r}: choose from {known}")
