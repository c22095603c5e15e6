"""A cell of the table of coverage: what became of one kind of access under one trap."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass

from kvmdp.machine.machine import Machine
from kvmdp.machine.vcpu_thread import EXIT_NAMES

EMULATED = "KVM's emulator has done with a store when it exits; user space puts the bytes in place"


class Seen(enum.Enum):
    """What became of an access to an absent page."""

    EXIT = "caught by exit"  # KVM_RUN came back, the access was retried
    SLEEP = "caught by sleep"  # the thread that made it slept until the page was there
    RUN_AGAIN = (
        "taken back, run again"  # KVM_RUN came back in the middle of it, the CPU did all of it afterwards
    )
    EMULATION = "completed by emulation"  # KVM_RUN came back in the middle of it, user space did the rest
    MISSED = "missed"  # nothing trapped, or it failed, or the bytes were wrong


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of access under one trap.

    `exits` counts what was seen by kind: exits of KVM_RUN, `uffd_event` (a reader served it), `request` (the pager
    was asked first). `exact`: every byte was right. `ok`: it was, or this is known, and `note` says what helps.
    """

    access: str
    trap: str
    seen: Seen
    exits: dict[str, int]
    exact: bool
    note: str = ""
    ok: bool = True


def seen_by(exits: dict[str, int], completed: int = 0) -> Seen:
    """Return what became of an access, of which KVM's emulator has `completed` some."""
    if "mmio" in exits:
        return Seen.EMULATION if completed else Seen.RUN_AGAIN
    if "uffd_event" in exits or "request" in exits:
        return Seen.SLEEP
    return Seen.EXIT if exits else Seen.MISSED


def vcpu_exits(machine: Machine) -> dict[str, int]:
    """Return the exits of all vCPUs by kind, and the events of userfaultfd, but for those that are no access."""
    exits: Counter[str] = Counter()
    for thread in machine.threads:
        for kind, count in thread.exits.items():
            exits[EXIT_NAMES.get(kind, kind.__name__)] += count
    events = sum(len(each) for each in machine.pager.trap.latencies)
    if events:
        exits["uffd_event"] = events
    return {kind: count for kind, count in exits.items() if kind not in ("io", "interrupted")}
