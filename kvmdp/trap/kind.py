"""What a class of traps says of itself, and what its objects are made from.

Other rooms ask the class and never its name: what a trap needs, what it offers, how a fault under it looks. The class
of `mmio` says more than any list of names could, and a trap from outside says it in the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from kvmdp.kvm import Vm
from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import GuestLayout
from kvmdp.trap.inspect import InspectedTrap
from kvmdp.trap.slots.ram_slots import RamSlots
from kvmdp.trap.uffd.device_view import DeviceFaults, DeviceView
from kvmdp.trap.uffd.options import UffdOptions


@dataclass(frozen=True, slots=True)
class Materials:
    """What a trap is made from; it owns `slots` and `devices` from then on, and the rest stays its maker's.

    `devices` serves the faults of a device view, None where there is none. `uffd` is for a trap that
    `takes_uffd_options`. `slot_memory` is bytes of kernel memory that the memslots of regions in pieces may take.
    """

    vm: Vm
    backing: Backing
    slots: RamSlots
    devices: DeviceFaults | None
    uffd: UffdOptions
    slot_memory: int


class TrapKind(ABC):
    """The abilities of a trap, as attributes of its class. A trap derives from it, and is an `InspectedTrap` besides.

    What it needs of the backing:
    `registers`: it has the guest view registered with userfaultfd. `needs_shared`: memory that is mapped twice.
    `needs_small_pages`: memory that the host has in pages of 4 KiB.

    How a fault looks:
    `exits`: a vCPU's access to an absent page is an exit of KVM_RUN; else the vCPU sleeps until the page is there.
    `repeats`: it is the same exit each time until the page is admitted, and has changed nothing, so that a bare exit
    can be timed. `is_pure`: it has one way of its own to catch an access; else it joins those of others, and catches
    what they catch. `catches_nested_walks`, `catches_shadow_walks`: whether a page table of the guest that is absent
    traps when it is walked, by the CPU (nested paging) or by KVM itself (shadow paging).

    What there is to choose:
    `by_memslot`: absent pages lie in memslots that trap, or in none. So RAM has a granule, may be left unarmed from the
    beginning, and can have a device view beside. Other traps work by the pages that the host has RAM in.
    `takes_uffd_options`: readers, descriptors and mode (`UffdOptions`).
    `suits_large`: untouched RAM takes neither page tables nor more than some hundred memslots.
    """

    name: str
    registers: bool = False
    needs_shared: bool = False
    needs_small_pages: bool = False
    exits: bool = True
    repeats: bool = False
    is_pure: bool = True
    catches_nested_walks: bool = True
    catches_shadow_walks: bool = False
    by_memslot: bool = False
    takes_uffd_options: bool = False
    suits_large: bool = False

    # Of the object: guest RAM for threads of this process, if it was made with that.
    device_view: DeviceView | None = None

    @classmethod
    def unit(cls, layout: GuestLayout, backing: Backing | type[Backing], granule: int | None) -> int:
        """Return how many bytes become present or absent as one, on such RAM.

        `granule` is bytes, None for a trap that is not `by_memslot`. Asked before there is a trap, for what depends on
        it (limits, pages to poison).
        """
        return granule or backing.page_size

    @classmethod
    @abstractmethod
    def make(cls, made_of: Materials) -> InspectedTrap:
        """Make one, not yet armed. Raises UnsupportedError or KvmError where the host lacks what it needs."""
