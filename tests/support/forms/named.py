"""Guests with a name, in ../guests: each shows something that was once emulated wrongly, or not at all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.workloads import Program, WorkloadOptions
from kvmdp.source.base import read_pages
from kvmdp.source.synthetic import SyntheticSource

from .program import assemble_source, prepared

MEMORY = 2 << 20
PAGES = 500  # that the races go through, from the second page of RAM on
_GUESTS = Path(__file__).parents[1] / "guests"
_SEED = 11
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Named:
    """A guest: what gives its checksum, its vCPUs, the flag of /proc/cpuinfo that it needs."""

    name: str
    checksum: Callable[[], int]
    needs: str
    vcpus: int = 1

    def program(self) -> bytes:
        """Return the assembled program."""
        return prepared(self.name, lambda: assemble_source((_GUESTS / f"{self.name}.S").read_text()))

    def run(self, trap: str) -> list[int]:
        """Return each vCPU's checksum after a run with all of RAM absent at first."""
        options = MachineOptions(MEMORY, trap, vcpus=self.vcpus, program=self.program())
        with Machine(options, SyntheticSource(MEMORY, _SEED)) as machine:
            machine.set_parameters(Program(WorkloadOptions(memory_bytes=MEMORY, vcpus=self.vcpus)).blocks)
            machine.run(_TIMEOUT)
            return [thread.parameters.checksum for thread in machine.threads]

    def right(self) -> list[int]:
        """Return what `run` must."""
        return [self.checksum() % (1 << 64)] * self.vcpus


def _word(gpa: int, length: int = 8) -> bytes:
    """Return bytes of the image."""
    row = read_pages(SyntheticSource(MEMORY, _SEED), np.array([gpa // 4096]))
    return row.tobytes()[gpa % 4096 :][:length]


def _little(gpa: int, length: int = 8) -> int:
    return int.from_bytes(_word(gpa, length), "little")


NAMED = (
    Named("lzcnt", lambda: 0, "abm"),
    Named("lzcnt_race", lambda: 0, "abm", vcpus=2),
    Named("movbe", lambda: int.from_bytes(_word(0x101000), "big"), "movbe"),
    Named("movbe_race", lambda: int.from_bytes(_word(PAGES * 4096), "big"), "movbe", vcpus=2),
    Named("gather", lambda: _little(0x101000, 4), "avx2"),
    Named("enter", lambda: 0x104000 + 0x101FF8 + _little(0x103FF8), "fpu"),
    Named("ins_backwards", lambda: 0x44434241 << 32 | _little(0x100FF6, 4), "fpu"),
)
