"""The traps there are, by the names users call them. A new trap is one module and one line here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from kvmdp.kvm import Vm
from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.trap.inspect import InspectedTrap
from kvmdp.trap.layered import LayeredTrap, region_size
from kvmdp.trap.slots.memory_fault import MemoryFaultTrap
from kvmdp.trap.slots.mmio import MmioTrap
from kvmdp.trap.slots.ram_slots import RamSlots, least_granule
from kvmdp.trap.slots.slot_trap import SlotOptions
from kvmdp.trap.uffd.device_view import DeviceFaults
from kvmdp.trap.uffd.hybrid import HybridTrap
from kvmdp.trap.uffd.marker import MarkerTrap
from kvmdp.trap.uffd.userfaultfd import UffdOptions, UserfaultfdTrap


@dataclass(frozen=True, slots=True)
class Materials:
    """What a trap is made from."""

    vm: Vm
    layout: GuestLayout
    slots: RamSlots
    backing: Backing
    uffd: UffdOptions
    options: SlotOptions


TRAPS: dict[str, Callable[[Materials], InspectedTrap]] = {
    "marker": lambda made_of: MarkerTrap(made_of.slots, made_of.backing),
    "memory-fault": lambda made_of: MemoryFaultTrap(
        made_of.vm, made_of.slots, made_of.backing, made_of.options
    ),
    "mmio": lambda made_of: MmioTrap(made_of.slots, made_of.backing, made_of.options),
    "layered": lambda made_of: LayeredTrap(made_of.vm, made_of.slots, made_of.backing),
    "userfaultfd": lambda made_of: UserfaultfdTrap(made_of.slots, made_of.backing, made_of.uffd),
}


_HYBRID = "hybrid-"


def _hybrid(exit_trap: str, made_of: Materials) -> InspectedTrap:
    vcpus = TRAPS[exit_trap](made_of)
    options = made_of.uffd
    devices = DeviceFaults(made_of.layout, made_of.backing, readers=options.readers, shards=options.shards)
    return HybridTrap(_HYBRID + exit_trap, vcpus, devices)


# An exit trap for vCPUs, userfaultfd for user space. Apart from the rest, because they prove nothing of their own:
# neither `auto` nor `kvmdp probe` tries them.
HYBRID_TRAPS: dict[str, Callable[[Materials], InspectedTrap]] = {
    _HYBRID + name: functools.partial(_hybrid, name) for name in ("memory-fault", "mmio")
}
ALL_TRAPS = (*TRAPS, *HYBRID_TRAPS)
# Each with a way of its own to catch an access: what layered catches is what its two layers catch.
PURE_TRAPS = tuple(name for name in TRAPS if name != LayeredTrap.name)

# Those whose faults are exits of KVM_RUN, the fastest first, as measured on every host seen so far: the order in
# which `auto` tries them.
EXIT_TRAPS = ("marker", "memory-fault", "mmio", "layered")
SLOT_TRAPS = frozenset(("memory-fault", "mmio", *HYBRID_TRAPS))
# Those that make pages of the guest view trap by userfaultfd: they work by the pages that the host has RAM in.
UFFD_TRAPS = frozenset(("marker", "layered", "userfaultfd"))


def exit_trap_of(name: str) -> str:
    """Return the trap that vCPUs meet under the trap `name`: of a hybrid one its exit trap, else itself."""
    return name.removeprefix(_HYBRID)


def check_backing(name: str, backing: Backing | type[Backing]) -> None:
    """Raise ValueError if the trap `name` cannot work on such RAM."""
    if name == LayeredTrap.name and not (backing.shared and backing.page_size == PAGE_SIZE):
        raise ValueError(
            f"the trap {name} keeps what is shut out in a memory file of small pages, which {backing.name} memory has "
            "not: use the backing memfd"
        )
    if name in HYBRID_TRAPS and not (
        backing.shared and backing.registrable and backing.page_size == PAGE_SIZE
    ):
        raise ValueError(
            f"the trap {name} maps RAM once more for devices, which cannot be done with {backing.name} memory: "
            "use the backing memfd"
        )
    if name in UFFD_TRAPS and not backing.registrable:
        raise ValueError(
            f"the trap {name} registers RAM with userfaultfd, which cannot be done with {backing.name} memory: "
            "use the trap memory-fault or mmio"
        )


def create_trap(
    name: str,
    vm: Vm,
    layout: GuestLayout,
    backing: Backing,
    granule: int | None,
    uffd: UffdOptions,
    options: SlotOptions,
) -> InspectedTrap:
    """Make the trap `name`, not yet armed.

    `granule` is bytes (a power of two) for the traps that work by memslot; None takes the smallest that keeps
    them within 16,384 slots. `uffd` is for the trap userfaultfd, and but for its mode for the device view of the
    hybrid ones, `options` for those that work by memslot. Raises ValueError for an unknown name or a granule or a
    backing the trap cannot have, UnsupportedError or KvmError where the kernel lacks what the trap needs.
    """
    if name not in ALL_TRAPS:
        raise ValueError(f"there is no trap {name!r}: choose from {', '.join(ALL_TRAPS)}")
    check_backing(name, backing)
    if name not in SLOT_TRAPS:
        if granule is not None and granule != PAGE_SIZE:
            raise ValueError(f"the trap {name} always works by pages: leave the granule out")
        slots = RamSlots(vm, layout, backing, region_size(layout))
    else:
        least = least_granule(layout, backing.page_size)
        slots = RamSlots(vm, layout, backing, least if granule is None else granule)
    try:
        return (TRAPS | HYBRID_TRAPS)[name](Materials(vm, layout, slots, backing, uffd, options))
    except BaseException:
        slots.close()
        raise
