"""What is known to differ under a trap from what memory that is present gives, and why."""

from typing import TYPE_CHECKING

from kvmdp.lab.probe import exit_traps
from kvmdp.machine.hostinfo import cpu_model, emulates_ring_0, uses_nested_paging

from .form import Form

if TYPE_CHECKING:
    from .trapped import Setting

_HIDDEN = (
    "KVM's emulator stores the guest's selector or flags; where KVM has no hardware behind it, ring 3 runs with others "
    "and stores those, with memory present. The store is over by the time KVM exits."
)
_READ_FIRST = (
    "QEMU's CPU says of a page fault of a read-modify-write that it was a read; KVM's emulator says, as hardware does, "
    "that it was a write."
)
_RESUMED = (
    "QEMU's CPU leaves RFLAGS.RF out of the frame of a step between two repetitions; KVM's emulator sets it, as the "
    "architecture has it."
)
_STEPPED_NAMES = tuple(f"step over {name}" for name in ("rep movsd", "rep stosq"))
_STEPPED = (
    "With memory present KVM's emulator makes all repetitions in one step; where it comes out for a store there is a "
    "step for each, as hardware does it."
)
_PARTLY = "The CPU stores what it can, and takes the machine check then: it will do it again."
_LEFT = (
    "RSP is RBP already: KVM's emulator sets it before it loads, and shows no other. The instruction does not use it, "
    "and can be run again."
)
_REFUSED = "KVM refuses the instruction with #UD, the guest's handler asks the host, and there takes the machine check."


def hopeless(setting: "Setting", form: Form) -> str | None:
    """Return why a form is not run in a setting on this host, None if it is."""
    trap = setting.trap
    if setting.evicted and form.name.startswith(("sgdt", "sidt", "call far")):
        return "KVM spins on it, longer than a page stays; or it is not recognised once its pointer has been taken away"
    if not form.delivers or trap == "userfaultfd":
        return None
    if not uses_nested_paging():
        return "without nested paging KVM writes an event's frame itself, and shuts down where that is absent"
    if trap == "mmio":
        return (
            "KVM emulates the instruction at RIP if the frame of an event is in no memslot, or tries for ever"
        )
    return None


def may_change_elsewhere(ring: int) -> frozenset[int]:
    """Return the RAM pages, besides those of forms, that a form changes with all memory present too."""
    # KVM's emulator leaves the base of FS out of fxsave.
    return frozenset({0}) if ring == 0 and emulates_ring_0() else frozenset()


def known_when_poisoned(trap: str, ring: int) -> dict[str, str]:
    """Return what differs when a form's page is poisoned: pattern for the names of forms -> the reason."""
    rows = {"enter *": _PARTLY, "fxsave* across": _PARTLY}
    if _is_emulated_cpu():
        rows |= {f"{name} store* across": _PARTLY for name in ("*movups", "movdqu")}
    if trap == "mmio" or (ring == 0 and emulates_ring_0()):
        rows["leave*"] = _LEFT
    if trap == "mmio" and ring == 3 and emulates_ring_0():
        rows["movbe m,r *"] = _REFUSED
    return rows


def _is_emulated_cpu() -> bool:
    return cpu_model().startswith("QEMU TCG")


def known() -> dict[tuple[str, int, str], str]:
    """Return (trap, ring, name of a form) -> the reason, on this host.

    Such a form is run all the same, and may differ; nothing else may.
    """
    if _is_emulated_cpu():
        read_first = {("mmio", ring, "add across the end of RAM"): _READ_FIRST for ring in (3, 0)}
        return read_first | {("mmio", 0, name): _RESUMED for name in _STEPPED_NAMES}
    if not emulates_ring_0():
        return {}
    names = [f"mov m,{register}" for register in ("ds", "ss", "cs")]
    names += [f"{push}{place}" for push in ("pushfq", "pushfw", "push fs") for place in ("", " across")]
    hidden = {("mmio", 3, name): _HIDDEN for name in names}
    stepped = {(trap, 0, name): _STEPPED for trap in exit_traps() for name in _STEPPED_NAMES}
    return hidden | stepped
