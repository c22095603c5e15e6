"""The workloads of the guest: what each vCPU is told to do, and what must come of it.

One module a workload, the counterpart of the assembly file of that name in guest/workloads. A new one is a module
here and its place in the registry below, an assembly file there and its line in guest/workloads.S. One from outside is
a class that brings its code as `program`, and one `register`.
"""

from __future__ import annotations

from kvmdp.errors import UnsupportedError
from kvmdp.machine.hostinfo import emulates_ring_0, kvm_flavour
from kvmdp.machine.workloads.arithmetic import combined_checksum
from kvmdp.machine.workloads.atomic import Atomic
from kvmdp.machine.workloads.base import PageReader, Task, Workload, WorkloadOptions
from kvmdp.machine.workloads.checksum import Checksum
from kvmdp.machine.workloads.clock import Clock
from kvmdp.machine.workloads.copy import Copy
from kvmdp.machine.workloads.disk import Disk
from kvmdp.machine.workloads.execute import Execute
from kvmdp.machine.workloads.fill import Fill
from kvmdp.machine.workloads.poison import Poison
from kvmdp.machine.workloads.program import Program
from kvmdp.machine.workloads.string import String
from kvmdp.machine.workloads.touch import Touch
from kvmdp.machine.workloads.vector import Vector

__all__ = [
    "WORKLOADS",
    "PageReader",
    "Program",
    "Task",
    "Workload",
    "WorkloadOptions",
    "check_ring",
    "combined_checksum",
    "make_workload",
    "register",
]

WORKLOADS: dict[str, type[Workload]] = {}


def register(workload: type[Workload]) -> None:
    """Add a workload, which is known by its `name` from then on.

    Raises ValueError if there is one of that name, or if it has neither a number of the guest's nor a program.
    """
    if workload.name in (*WORKLOADS, Program.name):
        raise ValueError(f"there is a workload {workload.name} already: give yours another name")
    if workload.number == Program.number and not workload.program:
        raise ValueError(f"the workload {workload.name} has no code: give its class a `program`")
    WORKLOADS[workload.name] = workload


for _kind in (Checksum, Touch, Fill, Atomic, Copy, Execute, Vector, String, Clock, Disk, Poison):
    register(_kind)


def make_workload(name: str, options: WorkloadOptions) -> Workload:
    """Plan the workload called `name`.

    Raises ValueError, one sentence, if there is none of that name or it cannot be done with `options`.
    """
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}: give one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name](options)


def check_ring(name: str, ring: int) -> None:
    """Raise UnsupportedError if this host cannot run the workload called `name` in `ring`. Unknown names can be run."""
    kind = WORKLOADS.get(name)
    if ring == 0 and kind is not None and kind.needs_cpu and emulates_ring_0():
        raise UnsupportedError(
            f"the workload {name} cannot run in ring 0 on this host: {kvm_flavour()} emulates ring 0, and its emulator "
            "lacks vector instructions; give --ring 3, or use a host with kvm_intel or kvm_amd"
        )
