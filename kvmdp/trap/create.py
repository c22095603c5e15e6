"""Makes a trap by its name, with all that it works with."""

from __future__ import annotations

import contextlib

from kvmdp.kvm import Vm
from kvmdp.memory.backing import Backing
from kvmdp.memory.layout import GuestLayout
from kvmdp.trap.fits import Together, check, granule_of
from kvmdp.trap.inspect import InspectedTrap
from kvmdp.trap.kind import Materials
from kvmdp.trap.registry import trap_class
from kvmdp.trap.slots.partial_slots import DEFAULT_SLOT_MEMORY
from kvmdp.trap.slots.ram_slots import RamSlots, region_size
from kvmdp.trap.uffd.device_view import DeviceFaults
from kvmdp.trap.uffd.options import UffdOptions


def create_trap(
    name: str,
    vm: Vm,
    layout: GuestLayout,
    backing: Backing,
    granule: int | None = None,
    uffd: UffdOptions | None = None,
    slot_memory: int = DEFAULT_SLOT_MEMORY,
    *,
    device_view: bool = False,
) -> InspectedTrap:
    """Make the trap `name`, not yet armed.

    `granule` is bytes (a power of two) for a trap that works by memslot; None takes the smallest that keeps RAM within
    16,384 slots. `slot_memory` is bytes for such a trap too. `uffd` is for the trap userfaultfd, and but for its mode
    for a device view. Raises ValueError for an unknown name, or a granule, a backing, readers or a device view that the
    trap cannot have, UnsupportedError or KvmError where the kernel lacks what the trap needs.
    """
    kind = trap_class(name)
    uffd = uffd or UffdOptions()
    check(Together(backing, kind, uffd.mode, device_view, readers=uffd.has_readers))
    size = granule_of(kind, layout, backing, granule)
    with contextlib.ExitStack() as stack:
        slots = RamSlots(vm, layout, backing, size or region_size(layout))
        stack.callback(slots.close)
        devices = None
        if device_view:
            devices = DeviceFaults(layout, backing, readers=uffd.readers, shards=uffd.shards)
            stack.callback(devices.close)
        trap = kind.make(Materials(vm, backing, slots, devices, uffd, slot_memory))
        stack.pop_all()
    return trap
