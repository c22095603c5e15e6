"""The contenders of a comparison, by name: ways of demand paging, and the limits they are held against.

A name may be followed by what this contender does otherwise than the rest: `marker:vcpus=2`,
`userfaultfd-r4:vcpus=4,bytes=16M`, `mmio:fault-around=16`, `mmio:device-view`. So anything can be
compared with anything in one interleaved run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvmdp.bench.work import Work
from kvmdp.memory.backings import BACKINGS
from kvmdp.page import PAGE_SIZE
from kvmdp.size import parse_size
from kvmdp.source.network import parse_bandwidth, parse_latency
from kvmdp.trap.fits import Together, check
from kvmdp.trap.registry import DEVICE_VIEW, TRAPS, check_renamed, trap_class
from kvmdp.trap.uffd.options import UffdOptions, parse_mode

PRESENT = "present"
OFF = "off-"
SHARDED = "userfaultfd-sharded"
MISSING = "userfaultfd-missing"
_READERS = re.compile(r"userfaultfd-r([1-9][0-9]?)")

# What is compared if the user names nothing.
DEFAULT = (PRESENT, "marker", "memory-fault", "mmio", "userfaultfd", "userfaultfd-r2", SHARDED)


_INTEGER = re.compile(r"-?[0-9]{1,18}")


def _number(value: str) -> int:
    """Return the whole number that `value` is. Raises ValueError."""
    if _INTEGER.fullmatch(value) is None:
        raise ValueError(f"{value!r} is not a whole number: give one, such as 2")
    return int(value)


# What a contender may do otherwise: key -> (field of Work, how its value is read)
_OVERRIDES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "vcpus": ("vcpus", _number),
    "bytes": ("bytes_per_vcpu", parse_size),
    "ring": ("ring", _number),
    "order": ("order", str),
    "touches": ("touches", _number),
    "backing": ("backing", str),
    "granule": ("granule", parse_size),
    "fault-around": ("fault_around", _number),
    "latency": ("latency", parse_latency),
    "bandwidth": ("bandwidth", parse_bandwidth),
    "uffd-mode": ("uffd_mode", parse_mode),
    "device": ("device_pages", _number),
    DEVICE_VIEW: ("device_view", bool),
}


_EXAMPLES = {
    "vcpus": "vcpus=2",
    "bytes": "bytes=16M",
    "ring": "ring=3",
    "order": "order=random",
    "touches": "touches=1000",
    "backing": "backing=memfd",
    "granule": "granule=64K",
    "fault-around": "fault-around=16",
    "latency": "latency=30us",
    "bandwidth": "bandwidth=10Gbit",
    "uffd-mode": "uffd-mode=missing",
    "device": "device=1000",
}


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to do some work.

    `trap` is None where all memory is in place, and nothing traps: for `present`, which never had demand paging, and
    where it has been switched off, with the trap `off`. `readers` and `sharded` are for userfaultfd: threads a
    descriptor, and whether each vCPU's share of RAM has a descriptor of its own.
    """

    name: str
    trap: str | None
    work: Work
    readers: int = 1
    sharded: bool = False
    off: str | None = None

    @property
    def uffd_options(self) -> UffdOptions:
        """The options of the trap userfaultfd."""
        return UffdOptions(self.readers, self.work.vcpus if self.sharded else 1, self.work.uffd_mode)


def contender(text: str, work: Work) -> Contender:
    """Return the contender that `text` names, which does `work` but for what `text` says.

    Names are `present`, those of the traps, `off-TRAP` (everything present, the trap switched off), `userfaultfd-rN`
    (N readers), `userfaultfd-sharded` and `userfaultfd-missing` (in that mode also where memory is shared). Raises
    ValueError, one sentence, for anything else, and for a device thread that reads more pages than there are.
    """
    name, _, overrides = text.partition(":")
    for override in filter(None, overrides.split(",")):
        key, equals, value = override.partition("=")
        if key not in _OVERRIDES:
            raise ValueError(f"{text!r}: a contender has no {key!r}; there are {', '.join(_OVERRIDES)}")
        field, read = _OVERRIDES[key]
        if read is bool:
            if equals:
                raise ValueError(f"{text!r}: {key} takes no value: leave {equals}{value} out")
            value = key
        elif not value:
            raise ValueError(f"{text!r}: {key} has no value: give it one, as {_EXAMPLES[key]}")
        try:
            work = replace(work, **{field: read(value)})
        except ValueError as error:
            raise ValueError(f"{text!r}: {key}: {error}") from None
    found = _named(name, text, work)
    _check(found)
    return found


def _named(name: str, text: str, work: Work) -> Contender:
    if name == PRESENT:
        return Contender(text, None, work)
    check_renamed(name)
    if name in TRAPS:
        return Contender(text, name, work)
    if name.removeprefix(OFF) in TRAPS:
        return Contender(text, None, work, off=name.removeprefix(OFF))
    if name == SHARDED:
        return Contender(text, "userfaultfd", work, sharded=True)
    if name == MISSING:
        return Contender(text, "userfaultfd", replace(work, uffd_mode="missing"))
    readers = _READERS.fullmatch(name)
    if readers:
        return Contender(text, "userfaultfd", work, readers=int(readers[1]))
    known = ", ".join((PRESENT, *TRAPS, "userfaultfd-rN", SHARDED, MISSING, f"{OFF}TRAP"))
    raise ValueError(f"there is no contender {name!r}: choose from {known}")


def _check(found: Contender) -> None:
    """Raise ValueError if the contender's memory is not for its trap, or its work is not for its machine."""
    work = found.work
    if work.backing not in BACKINGS:
        raise ValueError(
            f"{found.name!r}: there is no backing {work.backing!r}; there are {', '.join(BACKINGS)}"
        )
    trap = found.trap or found.off
    if trap is None and work.device_view:
        raise ValueError(
            f"{found.name!r} has no trap that a device view could stand beside: leave {DEVICE_VIEW} out"
        )
    kind = None if trap is None else trap_class(trap)
    check(Together(BACKINGS[work.backing], kind, work.uffd_mode, work.device_view))
    if work.pin and len(work.pin) != work.vcpus:
        raise ValueError(
            f"{found.name!r} has {work.vcpus} vCPUs, and -c names {len(work.pin)} of the host's CPUs: leave out -c or "
            "vcpus="
        )
    pages = work.memory_bytes // PAGE_SIZE
    if not 0 <= work.device_pages <= max(pages, 0):
        raise ValueError(f"{found.name!r}: a device cannot read {work.device_pages} of {pages} pages")
