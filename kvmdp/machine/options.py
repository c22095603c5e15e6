"""What a machine is to be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kvmdp.machine.hostinfo import uses_nested_paging
from kvmdp.memory.backings import backing_class
from kvmdp.memory.layout import LOW_RAM_END
from kvmdp.paging.policy import MAX_FAULT_AROUND, FaultAround, FaultPolicy
from kvmdp.trap import fits
from kvmdp.trap.registry import trap_class
from kvmdp.trap.slots.partial_slots import DEFAULT_SLOT_MEMORY
from kvmdp.trap.uffd.options import UffdOptions

PageTablePlace = Literal["boot", "paged"]


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """What the machine is to be.

    `memory_bytes` of RAM, with a hole from gpa `low_ram_end` on; `trap` and `backing` by name; `device_view`, whether
    threads of this process have a view of RAM on which they sleep until a page is there; `granule` in bytes or None for
    the trap's choice; `fault_around` in pages; `program`, a flat binary for the guest's program area. `uffd` is for the
    trap userfaultfd and the device view. `pin` has a host CPU for each vCPU, or none.
    `policy` says which pages a fault fetches, in place of `fault_around`; it is asked by every machine that is made
    with these options.
    `page_tables` is where the guest's lie: in the "boot" slot, or "paged", in RAM's last pages, which are made present
    before the guest is entered if the trap does not catch page walks on this host.
    `holds` is whether accesses to pages that the source cannot deliver wait for `Pager.resume`; else they end the run.
    `resident_limit` is how many bytes of RAM may be in memory at once. `slot_memory` is for the traps that work by
    memslot: bytes of kernel memory for the memslots of regions in pieces.
    With `demand_paging` False the guest never has it: RAM is filled before it runs. That is something to compare with,
    for a trap that works by memslot, and a source in this process.
    `thp`, `backing_file` and `reserve_hugepages` are the options of backings (`kvmdp.memory.backings`).
    """

    memory_bytes: int
    trap: str
    backing: str = "memfd"
    vcpus: int = 1
    granule: int | None = None
    fault_around: int = 1
    program: bytes = b""
    uffd: UffdOptions = field(default_factory=UffdOptions)
    pin: tuple[int, ...] = ()
    page_tables: PageTablePlace = "boot"
    device_view: bool = False
    demand_paging: bool = True
    holds: bool = False
    resident_limit: int | None = None
    slot_memory: int = DEFAULT_SLOT_MEMORY
    thp: bool = False
    backing_file: str | None = None
    reserve_hugepages: bool = False
    low_ram_end: int = LOW_RAM_END
    policy: FaultPolicy | None = None

    def fault_policy(self) -> FaultPolicy:
        """Return what says which pages a fault fetches. Raises ValueError if that is said twice, or wrongly."""
        if self.policy is None:
            return FaultAround(self.fault_around)
        if self.fault_around != 1:
            raise ValueError(
                f"a policy and a fault-around of {self.fault_around} pages, which is a policy too: leave one out"
            )
        return self.policy

    @property
    def most_at_once(self) -> int:
        """How many pages one fault fetches at most."""
        return self.fault_around if self.policy is None else MAX_FAULT_AROUND


def check_together(options: MachineOptions, *, handler: bool) -> None:
    """Raise ValueError if what is asked for does not go together; `handler`: another process fills RAM."""
    fits.check(
        fits.Together(
            backing_class(options.backing),
            trap_class(options.trap),
            options.uffd.mode,
            options.device_view,
            handler=handler,
            limited=options.resident_limit is not None,
            unarmed=not options.demand_paging,
            readers=options.uffd.has_readers,
        )
    )


def catches_page_walks(trap: str) -> bool:
    """Return whether an absent page table traps by itself under `trap` on this host.

    With page tables in hardware a walk is an access like any other, but memory without a slot ends it. Where KVM
    shadows page tables it walks them itself: that puts it to sleep in userfaultfd, and what it cannot read in any
    other way it takes for not mapped.
    """
    kind = trap_class(trap)
    return kind.catches_nested_walks if uses_nested_paging() else kind.catches_shadow_walks
