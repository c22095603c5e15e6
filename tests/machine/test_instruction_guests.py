"""Guests whose instructions were once emulated wrongly, or not at all: the right value under every trap."""

from pathlib import Path

import numpy as np
import pytest
from forms.program import assemble_source
from forms.reference import cpu_flags
from harness import SEED, TIMEOUT, every_trap, program_machine

from kvmdp.source.base import read_pages
from kvmdp.source.synthetic import SyntheticSource

pytestmark = [pytest.mark.kvm, pytest.mark.binutils]

MEMORY = 16 << 20
PAGES = 3500  # that the races go through, from the second page of RAM on
_GUESTS = Path(__file__).with_name("guests")


def word(gpa, length=8):
    """Return the bytes at the beginning of a page of the synthetic image."""
    row = read_pages(SyntheticSource(MEMORY, SEED), np.array([gpa // 4096]))
    return row.tobytes()[gpa % 4096 :][:length]


def swapped(gpa):
    return int.from_bytes(word(gpa), "big")


# name: (the checksum, vCPUs, what the CPU must have)
GUESTS = {
    "lzcnt": (0, 1, "abm"),
    "lzcnt_race": (0, 2, "abm"),
    "movbe": (swapped(0x401000), 1, "movbe"),
    "movbe_race": (swapped(PAGES * 4096), 2, "movbe"),
    "gather": (int.from_bytes(word(0x401000, 4), "little"), 1, "avx2"),
    "enter": (0x404000 + 0x401FF8 + int.from_bytes(word(0x403FF8), "little"), 1, "fpu"),
    "ins_backwards": (0x44434241 << 32 | int.from_bytes(word(0x400FF6, 4), "little"), 1, "fpu"),
}


@every_trap
@pytest.mark.parametrize("name", GUESTS)
def test_guest_gives_the_right_value(name, trap):
    checksum, vcpus, needs = GUESTS[name]
    if needs not in cpu_flags():
        pytest.skip(f"this CPU has no {needs}")
    code = assemble_source((_GUESTS / f"{name}.S").read_text(), symbols=["N=3"])
    with program_machine(trap, code, vcpus=vcpus, memory_bytes=MEMORY) as machine:
        machine.run(TIMEOUT)
        assert [hex(thread.parameters.checksum) for thread in machine.threads] == [
            hex(checksum % (1 << 64))
        ] * vcpus
