"""What goes with what, and why not: traps, backings, device views, other processes, limits. Asked before all is made.

`RULES` is the table. A rule is about abilities (`kvmdp.trap.kind`, `kvmdp.memory.backing`), never about names, so a new
trap or backing finds its place in it. The granule rule is here too (`granule_of`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.trap.kind import TrapKind
from kvmdp.trap.registry import TRAPS
from kvmdp.trap.slots.ram_slots import check_granule, least_granule
from kvmdp.trap.uffd.options import UffdMode


class _AnyTrap(TrapKind):
    """Stands for a trap that is not chosen yet: it goes with everything."""

    name = "any"
    by_memslot = True
    takes_uffd_options = True


@dataclass(frozen=True, slots=True)
class Together:
    """What is to go together; what is left out is not asked for.

    `trap`: None is one that is not chosen yet. `mode` is that of userfaultfd. `device_view`: threads of this process
    touch RAM by a view of their own. `devices`: processes that touch it. `handler`: a process that fills it.
    `limited`: not all of RAM may be in memory at once. `unarmed`: the guest never has demand paging. `readers`: the
    number of userfaultfd's readers or descriptors is asked for.
    """

    backing: type[Backing] | Backing
    trap: type[TrapKind] | None = None
    mode: UffdMode | None = None
    device_view: bool = False
    devices: bool = False
    handler: bool = False
    limited: bool = False
    unarmed: bool = False
    readers: bool = False


class Rule(NamedTuple):
    """`clashes` tells of a trap and all else whether they do not go together, `why` says so, with the remedy.

    In `why` stand {trap} and {backing} for the names, {by_memslot} and {with_modes} for those of the traps that are.
    """

    clashes: Callable[[type[TrapKind], Together], bool]
    why: str


RULES = (
    Rule(
        lambda trap, it: (
            (trap.needs_shared and not it.backing.shared)
            or (trap.needs_small_pages and it.backing.page_size > PAGE_SIZE)
        ),
        "the trap {trap} keeps what is shut out in a memory file of small pages, which {backing} memory has not: use "
        "the backing memfd",
    ),
    Rule(
        lambda trap, it: trap.registers and not it.backing.registrable,
        "the trap {trap} registers RAM with userfaultfd, which cannot be done with {backing} memory: use the trap "
        "{by_memslot}",
    ),
    Rule(
        lambda trap, it: it.device_view and not trap.by_memslot,
        "the trap {trap} has no device view, for it works by page tables and not by memslots: use the trap "
        "{by_memslot}, or leave the device view out",
    ),
    Rule(
        lambda _, it: (
            it.device_view
            and not (it.backing.sealed and it.backing.registrable and it.backing.page_size == PAGE_SIZE)
        ),
        "a device view maps RAM once more, page by page, which cannot be done with {backing} memory: use the backing "
        "memfd",
    ),
    Rule(
        lambda trap, it: it.mode is not None and not trap.takes_uffd_options,
        "the trap {trap} has no userfaultfd mode: use the trap {with_modes}, or leave the mode out",
    ),
    Rule(
        lambda trap, it: it.readers and not (trap.takes_uffd_options or it.device_view),
        "the trap {trap} has no userfaultfd readers: use the trap {with_modes}, or a device view, or leave --readers "
        "and --uffd-per-vcpu out",
    ),
    Rule(
        lambda _, it: it.mode == "minor" and not it.backing.shared,
        "{backing} memory has no minor faults: use the mode missing, or the backing memfd",
    ),
    # A peer touches a page in the memory file once its bit is set, which is before the trap has admitted it. So its
    # bytes must lie there by then. Where they are filled elsewhere a peer would find the hole, make it a page of zeros,
    # and the bytes could not be moved there any more.
    Rule(
        lambda _, it: (it.devices or it.handler) and not it.backing.sealed,
        "RAM is {backing} memory, which cannot be handed to another process: use the backing memfd",
    ),
    Rule(
        lambda _, it: (it.devices or it.handler) and it.mode == "missing",
        "the trap {with_modes}, in the mode missing, fills pages where no other process finds them: use the mode "
        "minor, or another trap",
    ),
    Rule(
        lambda _, it: it.limited and not it.backing.frees,
        "{backing} memory is held to the end, and evicting pages frees none of it: leave --resident-limit out, or use "
        "the backing memfd",
    ),
    Rule(
        lambda trap, it: it.unarmed and not trap.by_memslot,
        "a machine without demand paging has plain memslots from the beginning, which the trap {trap} does not give "
        "it: use the trap {by_memslot}",
    ),
    Rule(
        lambda _, it: it.unarmed and it.handler,
        "a machine without demand paging is filled before its guest runs, and a handler fills what is asked for: use "
        "a source in this process",
    ),
)


def check(it: Together) -> None:
    """Raise ValueError with the first rule's sentence if these do not go together."""
    trap = it.trap or _AnyTrap
    for rule in RULES:
        if rule.clashes(trap, it):
            raise ValueError(
                rule.why.format(
                    trap=trap.name,
                    backing=it.backing.name,
                    by_memslot=named(lambda each: each.by_memslot),
                    with_modes=named(lambda each: each.takes_uffd_options),
                )
            )


def named(has: Callable[[type[TrapKind]], bool]) -> str:
    """Return the names of the traps that have some ability, in words: "memory-fault or mmio"."""
    *names, last = [name for name, trap in TRAPS.items() if has(trap)]
    return f"{', '.join(names)} or {last}" if names else last


def granule_of(
    trap: type[TrapKind],
    layout: GuestLayout,
    backing: type[Backing] | Backing,
    asked: int | None = None,
    fault_around: int = 1,
) -> int | None:
    """Return how many bytes a memslot covers under `trap`; None if it does not work by memslot.

    `asked` is bytes; None takes the least that keeps RAM within 16,384 memslots, where the host has RAM in small pages,
    and no less than `fault_around` pages: what is fetched together is one memslot, for the fewer are exchanged the
    better. Raises ValueError for a granule that the trap or RAM cannot have.
    """
    if not trap.by_memslot:
        if asked not in (None, PAGE_SIZE):
            raise ValueError(
                f"a granule is for {named(lambda each: each.by_memslot).replace(' or ', ' and ')}: the trap "
                f"{trap.name} works by the host's pages; leave it out"
            )
        return None
    granule = (
        max(least_granule(layout, backing.page_size), fault_around * PAGE_SIZE) if asked is None else asked
    )
    check_granule(granule, layout)
    return granule
