"""What a machine is to be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kvmdp.machine.hostinfo import uses_nested_paging
from kvmdp.memory.layout import LOW_RAM_END
from kvmdp.trap.registry import exit_trap_of
from kvmdp.trap.slots.mmio import MmioTrap
from kvmdp.trap.slots.slot_trap import SlotOptions
from kvmdp.trap.uffd.userfaultfd import UffdOptions, UserfaultfdTrap

PageTablePlace = Literal["boot", "paged", "absent"]


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """What the machine is to be.

    `memory_bytes` of RAM, with a hole from gpa `low_ram_end` on; `trap` and `backing` by name; `granule` in bytes or
    None for the trap's choice; `fault_around` in pages; `program`, a flat binary for the guest's program area. `uffd`
    is for the trap userfaultfd and the device view of the hybrid ones. `pin` has a host CPU for each vCPU, or none.
    `page_tables` is where the guest's lie: in the "boot" slot, or "paged", in RAM's last pages, which are made present
    before the guest is entered if the trap does not catch page walks on this host; "absent" leaves that out, to see
    what comes of it. So does `intercept_msrs` False with what makes KVM write to memory by itself
    (`kvmdp.machine.pv_msrs`).
    `resident_limit` is how many bytes of RAM may be in memory at once. `slots` is for the traps that work by memslot.
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
    intercept_msrs: bool = True
    demand_paging: bool = True
    resident_limit: int | None = None
    slots: SlotOptions = field(default_factory=SlotOptions)
    thp: bool = False
    backing_file: str | None = None
    reserve_hugepages: bool = False
    low_ram_end: int = LOW_RAM_END


def catches_page_walks(trap: str) -> bool:
    """Return whether an absent page table traps by itself under `trap` on this host.

    With page tables in hardware a walk is an access like any other, but memory without a slot ends it. Where KVM
    shadows page tables it walks them itself: that puts it to sleep in userfaultfd, and what it cannot read in any
    other way it takes for not mapped.
    """
    if trap == UserfaultfdTrap.name:
        return True
    return exit_trap_of(trap) != MmioTrap.name and uses_nested_paging()
