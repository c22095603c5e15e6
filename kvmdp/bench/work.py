"""The work that is measured: sizes, which vCPU touches what, and how far away the pages are."""

from __future__ import annotations

from dataclasses import dataclass

from kvmdp.trap.uffd.options import UffdMode


@dataclass(frozen=True, slots=True)
class Work:
    """What all contenders do.

    `bytes_per_vcpu` of RAM a vCPU; `overlap`: every vCPU touches all of it, else each its share. `latency`
    (seconds) and `bandwidth` (bytes a second, 0 is no limit) of the simulated network. `pin`: host CPUs, one a
    vCPU, or none. `uffd_mode`: how the trap userfaultfd registers RAM.
    `device_pages`: how many pages, from RAM's last one down, a device thread reads while the guest runs; `device_view`:
    by plain loads on a view of its own. `stride` (pages) is for the order "strided"; `reserve_hugepages` has each
    machine reserve the huge pages that its backing lacks.
    """

    bytes_per_vcpu: int = 64 << 20
    vcpus: int = 1
    ring: int = 3
    workload: str = "touch"
    order: str = "sequential"
    stride: int = 16
    write: bool = True
    touches: int | None = None
    overlap: bool = False
    backing: str = "memfd"
    reserve_hugepages: bool = False
    granule: int | None = None
    fault_around: int = 1
    latency: float = 0.0
    bandwidth: float = 0.0
    seed: int = 0
    pin: tuple[int, ...] = ()
    uffd_mode: UffdMode | None = None
    device_pages: int = 0
    device_view: bool = False

    @property
    def memory_bytes(self) -> int:
        """RAM of the machine."""
        return self.bytes_per_vcpu * self.vcpus
