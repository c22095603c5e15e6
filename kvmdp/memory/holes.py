"""Where machines of other makers have the hole of their map, by the names that users call them.

Facts: QEMU's hw/i386/pc_piix.c and pc_q35.c. Units: bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmdp.memory.layout import HIGH_RAM_BASE, LOW_RAM_END, MAX_LOW_RAM_END, check_low_ram_end
from kvmdp.size import format_size, parse_size


@dataclass(frozen=True, slots=True)
class Hole:
    """The hole of one kind of machine: up to 4 GiB, from `start` on if it has `split_from` bytes of RAM or more.

    With less, all of RAM lies below 4 GiB.
    """

    start: int
    split_from: int

    def begins_at(self, memory_bytes: int) -> int:
        """Return the gpa at which a machine with so much RAM has its hole.

        Raises ValueError for a machine that has RAM where ours has the guest's own code.
        """
        if memory_bytes >= self.split_from or memory_bytes <= self.start:
            return self.start
        if memory_bytes > MAX_LOW_RAM_END:
            raise ValueError(
                f"such a machine has all of its {format_size(memory_bytes)} below 4G, and from "
                f"{format_size(MAX_LOW_RAM_END)} on lies the guest's own code: give the hole a size, as "
                f"hole={format_size(LOW_RAM_END)}, if its RAM is laid out otherwise"
            )
        return min(self.split_from, MAX_LOW_RAM_END)

    def memory_behind(self, end: int) -> int:
        """Return how much RAM a machine has whose RAM ends at the gpa `end`, above 4 GiB.

        Raises ValueError if such a machine would not have RAM there.
        """
        memory_bytes = end - HIGH_RAM_BASE + self.start
        if memory_bytes < self.split_from:
            raise ValueError(
                f"RAM up to {format_size(end)} is {format_size(memory_bytes)} in all, and such a machine has RAM above "
                f"4G only if it has {format_size(self.split_from)} or more"
            )
        return memory_bytes


OUR_HOLE = Hole(LOW_RAM_END, LOW_RAM_END)
HOLES = {"pc": Hole(3 << 30, 0xE000_0000), "q35": Hole(2 << 30, 0xB000_0000)}


def parse_hole(text: str) -> Hole:
    """Return the hole that `text` names: that of a machine, or the gpa at which it begins. Raises ValueError."""
    if text in HOLES:
        return HOLES[text]
    try:
        start = parse_size(text)
    except ValueError:
        raise ValueError(
            f"there is no hole {text!r}: give {', '.join(HOLES)} or where it begins, such as 3328M"
        ) from None
    check_low_ram_end(start)
    return Hole(start, start)
