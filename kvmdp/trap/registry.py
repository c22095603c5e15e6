"""The traps there are, by the names users call them. A new trap is one module and one line here, or one `register`."""

from __future__ import annotations

from kvmdp.trap.kind import TrapKind
from kvmdp.trap.layered import LayeredTrap
from kvmdp.trap.slots.memory_fault import MemoryFaultTrap
from kvmdp.trap.slots.mmio import MmioTrap
from kvmdp.trap.uffd.marker import MarkerTrap
from kvmdp.trap.uffd.userfaultfd import UserfaultfdTrap

# Those whose faults are exits of KVM_RUN come fastest first, as measured on every host seen so far: `auto` tries them
# in this order.
TRAPS: dict[str, type[TrapKind]] = {}

DEVICE_VIEW = "device-view"
_RENAMED = {f"hybrid-{name}": f"{name}:{DEVICE_VIEW}" for name in ("memory-fault", "mmio")}


def register(trap: type[TrapKind]) -> None:
    """Add a trap, which is known by its `name` from then on. Raises ValueError if there is one of that name."""
    if trap.name in TRAPS:
        raise ValueError(f"there is a trap {trap.name} already: give yours another name")
    TRAPS[trap.name] = trap


register(MarkerTrap)
register(MemoryFaultTrap)
register(MmioTrap)
register(LayeredTrap)
register(UserfaultfdTrap)


def trap_class(name: str) -> type[TrapKind]:
    """Return the trap that `name` means. Raises ValueError, one sentence with the names there are."""
    check_renamed(name)
    if name not in TRAPS:
        raise ValueError(f"there is no trap {name!r}: choose from {', '.join(TRAPS)}")
    return TRAPS[name]


def check_renamed(name: str) -> None:
    """Raise ValueError with the new name if `name` is one that a trap had before."""
    if name in _RENAMED:
        raise ValueError(f"the trap {name} is a device view beside another trap: give {_RENAMED[name]}")


def parse_trap(text: str) -> tuple[str, bool]:
    """Return the name of NAME[:device-view], and whether it has that behind it. Raises ValueError.

    Nothing is said of the name itself.
    """
    name, colon, option = text.partition(":")
    check_renamed(name)
    if colon and option != DEVICE_VIEW:
        raise ValueError(
            f"{text!r}: a trap has no {option!r}; there is {DEVICE_VIEW}, as in mmio:{DEVICE_VIEW}"
        )
    return name, bool(colon)
