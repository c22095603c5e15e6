"""What this host can do: each trap proven by a micro guest that really faults, never by a version number.

A trap counts as working on a backing if every kind of access (read, write, fetch, atomic, vector) that the CPU
offers traps, and brings the guest exactly the bytes of the source.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from kvmdp.abi import kvm as kvm_abi
from kvmdp.abi import userfaultfd as uffd_abi
from kvmdp.kvm import Kvm
from kvmdp.machine.boot import vector_flags
from kvmdp.machine.experiment import run_workload
from kvmdp.machine.machine import MachineOptions
from kvmdp.machine.runloop import GuestError
from kvmdp.machine.workloads import WorkloadOptions, make_workload
from kvmdp.memory.backings import BACKINGS
from kvmdp.paging.fault import PagingError, UnsupportedError
from kvmdp.paging.trap.registry import EXIT_TRAPS, SLOT_TRAPS, TRAPS
from kvmdp.paging.trap.uffd import Uffd, supported_features
from kvmdp.source.synthetic import SyntheticSource

_MEMORY = 2 << 20
_PAGES = 8
_SEED = 2023
_TIMEOUT = 20.0
_GRANULE = 16384  # few memslots, so that a proof takes milliseconds

_CAPABILITIES = {
    "USER_MEMORY2": kvm_abi.KVM_CAP_USER_MEMORY2,
    "MEMORY_FAULT_INFO": kvm_abi.KVM_CAP_MEMORY_FAULT_INFO,
    "GUEST_MEMFD": kvm_abi.KVM_CAP_GUEST_MEMFD,
    "GUEST_MEMFD_FLAGS": kvm_abi.KVM_CAP_GUEST_MEMFD_FLAGS,
    "EXIT_ON_EMULATION_FAILURE": kvm_abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE,
    "SYNC_REGS": kvm_abi.KVM_CAP_SYNC_REGS,
    "DISABLE_QUIRKS2": kvm_abi.KVM_CAP_DISABLE_QUIRKS2,
    "X86_MSR_FILTER": kvm_abi.KVM_CAP_X86_MSR_FILTER,
    "MCE": kvm_abi.KVM_CAP_MCE,
    "NR_MEMSLOTS": kvm_abi.KVM_CAP_NR_MEMSLOTS,
}
_UFFD_FEATURES = {
    "MISSING_SHMEM": uffd_abi.UFFD_FEATURE_MISSING_SHMEM,
    "MINOR_SHMEM": uffd_abi.UFFD_FEATURE_MINOR_SHMEM,
    "MINOR_HUGETLBFS": uffd_abi.UFFD_FEATURE_MINOR_HUGETLBFS,
    "WP_HUGETLBFS_SHMEM": uffd_abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    "POISON": uffd_abi.UFFD_FEATURE_POISON,
    "MOVE": uffd_abi.UFFD_FEATURE_MOVE,
}

# kind of access -> the workload that makes it, and whether it writes
ACCESSES = {
    "read": ("touch", False),
    "write": ("touch", True),
    "fetch": ("execute", False),
    "atomic": ("atomic", True),
    "vector": ("vector", True),
}


@dataclass(frozen=True, slots=True)
class Proof:
    """How one kind of access went under one trap: `error` is empty where the result was exact."""

    access: str
    exits: dict[str, int]
    error: str

    @property
    def ok(self) -> bool:
        """Whether the guest got exactly the source's bytes."""
        return not self.error


def prove(trap: str, backing: str, access: str) -> Proof:
    """Run a micro guest that makes one kind of access to absent pages. Raises nothing but programming errors."""
    name, write = ACCESSES[access]
    try:
        with Kvm() as kvm:
            vector = vector_flags(kvm)
        options = WorkloadOptions(memory_bytes=_MEMORY, pages=_PAGES, seed=_SEED, vector=vector, write=write)
        workload = make_workload(name, options)
        granule = _GRANULE if trap in SLOT_TRAPS else None
        machine = MachineOptions(_MEMORY, trap, backing, granule=granule)
        result = run_workload(machine, workload, SyntheticSource(_MEMORY, _SEED), timeout=_TIMEOUT)
    except (UnsupportedError, OSError, PagingError, GuestError) as error:
        return Proof(access, {}, str(error))
    exits = {kind: count for kind, count in result.exits.items() if kind != "io"}
    if not result.ok:
        return Proof(access, exits, "the guest saw other bytes than the source's")
    if not exits and not len(result.latencies):
        return Proof(access, exits, "no access trapped: the guest ran on memory that nobody had filled")
    return Proof(access, exits, "")


@functools.cache
def proofs(trap: str, backing: str) -> tuple[Proof, ...]:
    """Return a proof for each kind of access; asked for once a process."""
    return tuple(prove(trap, backing, access) for access in ACCESSES)


def works(trap: str, backing: str) -> bool:
    """Return whether `trap` is proven on `backing`."""
    return all(proof.ok for proof in proofs(trap, backing))


def working_traps(backing: str) -> list[str]:
    """Return the traps proven on `backing`, in the order of the registry."""
    return [trap for trap in TRAPS if works(trap, backing)]


def choose_trap(backing: str) -> str:
    """Return the fastest exit-style trap that a micro guest proves on `backing`.

    Raises UnsupportedError if there is none.
    """
    if backing not in BACKINGS:
        raise ValueError(f"there is no backing {backing!r}: choose from {', '.join(BACKINGS)}")
    for trap in EXIT_TRAPS:
        if works(trap, backing):
            return trap
    reasons = "; ".join(f"{trap}: {_first_error(trap, backing)}" for trap in EXIT_TRAPS)
    raise UnsupportedError(f"no trap works on this host ({reasons}): kvmdp probe says what would help")


def _first_error(trap: str, backing: str) -> str:
    return next(proof.error for proof in proofs(trap, backing) if not proof.ok)


def capabilities(kvm: Kvm) -> dict[str, int]:
    """Return what KVM_CHECK_EXTENSION says of the capabilities that matter here."""
    return {name: kvm.check_extension(number) for name, number in _CAPABILITIES.items()}


def userfaultfd_facts() -> dict[str, Any]:
    """Return what userfaultfd offers this user: available, kernel_faults, features by name, error, remedy."""
    facts: dict[str, Any] = {
        "available": False,
        "kernel_faults": False,
        "features": [],
        "error": "",
        "remedy": "",
    }
    try:
        offered = supported_features()
        facts["available"] = True
        facts["features"] = [name for name, bit in _UFFD_FEATURES.items() if offered & bit]
        Uffd(0, kernel_faults=True).close()
        facts["kernel_faults"] = True
    except UnsupportedError as error:
        facts["error"], _, facts["remedy"] = str(error).partition(": ")
    return facts
