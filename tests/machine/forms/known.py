"""What is known to differ under a trap from what memory that is present gives, and why."""

from kvmdp.machine.hostinfo import emulates_ring_0

_HIDDEN = (
    "KVM's emulator stores the guest's selector or flags; where KVM has no hardware behind it, ring 3 runs with others "
    "and stores those, with memory present. The store is over by the time KVM exits."
)


def known() -> dict[tuple[str, int, str], str]:
    """Return (trap, ring, name of a form) -> the reason, on this host.

    Such a form is run all the same, and may differ; nothing else may.
    """
    if not emulates_ring_0():
        return {}
    names = [f"mov m,{register}" for register in ("ds", "ss", "cs")]
    names += [f"{push}{place}" for push in ("pushfq", "pushfw", "push fs") for place in ("", " across")]
    return {("mmio", 3, name): _HIDDEN for name in names}
