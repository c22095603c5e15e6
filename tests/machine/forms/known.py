"""What is known to differ under a trap from what memory that is present gives, and why."""

from kvmdp.machine.hostinfo import cpu_model, emulates_ring_0, uses_nested_paging

from .form import Form

_HIDDEN = (
    "KVM's emulator stores the guest's selector or flags; where KVM has no hardware behind it, ring 3 runs with others "
    "and stores those, with memory present. The store is over by the time KVM exits."
)
_READ_FIRST = (
    "QEMU's CPU says of a page fault of a read-modify-write that it was a read; KVM's emulator says, as hardware does, "
    "that it was a write."
)


def hopeless(trap: str, form: Form) -> str | None:
    """Return why a form is not run under a trap on this host, None if it is."""
    if not form.delivers or trap == "userfaultfd":
        return None
    if not uses_nested_paging():
        return "without nested paging KVM writes an event's frame itself, and shuts down where that is absent"
    if trap == "mmio":
        return (
            "KVM emulates the instruction at RIP if the frame of an event is in no memslot, or tries for ever"
        )
    return None


def known() -> dict[tuple[str, int, str], str]:
    """Return (trap, ring, name of a form) -> the reason, on this host.

    Such a form is run all the same, and may differ; nothing else may.
    """
    if cpu_model().startswith("QEMU TCG"):
        return {("mmio", ring, "add across the end of RAM"): _READ_FIRST for ring in (3, 0)}
    if not emulates_ring_0():
        return {}
    names = [f"mov m,{register}" for register in ("ds", "ss", "cs")]
    names += [f"{push}{place}" for push in ("pushfq", "pushfw", "push fs") for place in ("", " across")]
    return {("mmio", 3, name): _HIDDEN for name in names}
