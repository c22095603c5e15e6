"""What this host can do: each trap proven by a micro guest that really faults, never by a version number.

A trap counts as working on a backing if every kind of access (read, write, fetch, atomic, vector) that the CPU
offers traps, and brings the guest exactly the bytes of the source.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

from kvmdp.abi import userfaultfd as uffd_abi
from kvmdp.abi.kvm_cap import Cap
from kvmdp.errors import UnsupportedError
from kvmdp.kvm import Kvm
from kvmdp.lab.experiment import run_workload
from kvmdp.machine.boot import vector_flags
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.workloads import WorkloadOptions, make_workload
from kvmdp.memory.backings import backing_class
from kvmdp.memory.hugepages import (
    HugePageRefusedError,
    can_overcommit,
    check_pages,
    check_pool,
    how_to_reserve,
)
from kvmdp.page import PAGE_SIZE
from kvmdp.shortage import ShortageError, causes, in_words, named
from kvmdp.size import format_size
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap import fits
from kvmdp.trap.registry import TRAPS, trap_class
from kvmdp.trap.uffd.descriptor import Uffd, supported_features

# From where the memslots of `layered` (12 MiB, for 512 of them) take clearly less than the page tables that `marker`
# makes for absent memory at once (2 MiB a GiB): both as `kvmdp bench --memory-cost` measured them.
_LARGE = 8 << 30
_MEMORY = 2 << 20
_PAGES = 8
_SEED = 2023
_TIMEOUT = 20.0
_GRANULE = 16384  # few memslots, so that a proof takes milliseconds
_MAX_SLOTS = 1024
_MUCH = 32 << 20  # bytes to fetch for one access
_ONE_ACCESS = "write"  # made even if it fetches as much

NO_HUGE_PAGE = "no huge page"  # begins the reason of a proof that was not run for want of one

# What a trap is proven on for a run on gigantic pages, of which there may be one.
_SMALLER = {"hugetlb-1g": "hugetlb-2m", "private-hugetlb-1g": "private-hugetlb-2m"}

_CAPABILITIES = (
    Cap.USER_MEMORY2,
    Cap.MEMORY_FAULT_INFO,
    Cap.GUEST_MEMFD,
    Cap.GUEST_MEMFD_FLAGS,
    Cap.EXIT_ON_EMULATION_FAILURE,
    Cap.SYNC_REGS,
    Cap.DISABLE_QUIRKS2,
    Cap.X86_MSR_FILTER,
    Cap.MCE,
    Cap.NR_MEMSLOTS,
)
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


# What became of a cell of the matrix: the guest got exactly the source's bytes; it did not, or the host lacks what the
# trap needs; there is nothing to run it on; the trap is not made for this backing.
Status = Literal["exact", "failed", "not run", "refused"]


@dataclass(frozen=True, slots=True)
class Proof:
    """How one kind of access went under one trap: `error` says why it is not exact, empty if it is.

    `is_short`: because this process or its host has run out of something, which says nothing of the trap.
    """

    access: str
    exits: dict[str, int]
    error: str
    status: Status = "failed"
    is_short: bool = False

    @property
    def ok(self) -> bool:
        """Whether the guest got exactly the source's bytes."""
        return self.status == "exact"


def prove(trap: str, backing: str, access: str) -> Proof:
    """Run a micro guest that makes one kind of access to absent pages; a run that fails is a proof that fails."""
    try:
        with named():
            return _obstacle(trap, backing, access) or _run(trap, backing, access)
    except ShortageError as error:
        for each in causes(error):
            if isinstance(each, HugePageRefusedError):
                return Proof(access, {}, str(each), "not run")
        return Proof(access, {}, str(error), is_short=True)
    except Exception as error:  # whatever it is, the other cells of the table are not lost to it
        return Proof(access, {}, in_words(error))


def _run(trap: str, backing: str, access: str) -> Proof:
    """Return what comes of a run. Raises what a machine raises."""
    name, write = ACCESSES[access]
    page_size = backing_class(backing).page_size
    memory = max(_MEMORY, page_size)
    with Kvm() as kvm:
        vector = vector_flags(kvm)
    options = WorkloadOptions(memory_bytes=memory, pages=_PAGES, seed=_SEED, vector=vector, write=write)
    workload = make_workload(name, options)
    granule = max(_GRANULE, memory // _MAX_SLOTS) if trap_class(trap).by_memslot else None
    reserve = page_size > PAGE_SIZE and can_overcommit(page_size)
    machine = MachineOptions(memory, trap, backing, granule=granule, reserve_hugepages=reserve)
    result = run_workload(machine, workload, SyntheticSource(memory, _SEED), timeout=_TIMEOUT)
    exits = {kind: count for kind, count in result.exits.items() if kind != "io"}
    if not result.ok:
        return Proof(access, exits, "the guest saw other bytes than the source's")
    if not exits and not result.counters.claims:
        return Proof(access, exits, "no access trapped: the guest ran on memory that was never filled")
    return Proof(access, exits, "", "exact")


def _obstacle(trap: str, backing: str, access: str) -> Proof | None:
    """Return why a cell is not to be run, None if it is."""
    page_size = backing_class(backing).page_size
    if refusal := _refusal(trap, backing):
        return Proof(access, {}, refusal, "refused")
    if page_size == PAGE_SIZE or can_overcommit(page_size):
        return None
    check_pool(page_size)
    try:
        check_pages(page_size, 1)
    except UnsupportedError:
        reason = f"{NO_HUGE_PAGE} of {format_size(page_size)} is free: {how_to_reserve(page_size, 1)}"
        return Proof(access, {}, reason, "not run")
    if not trap_class(trap).by_memslot and page_size > _MUCH and access != _ONE_ACCESS:
        return Proof(access, {}, f"each access would fetch {format_size(page_size)}", "not run")
    return None


def _refusal(trap: str, backing: str, *, device_view: bool = False) -> str:
    """Return why a trap cannot work on such memory anywhere; empty if it can."""
    try:
        fits.check(fits.Together(backing_class(backing), trap_class(trap), device_view=device_view))
    except ValueError as error:
        return str(error)
    return ""


@functools.cache
def proofs(trap: str, backing: str) -> tuple[Proof, ...]:
    """Return a proof for each kind of access; asked for once a process."""
    return tuple(prove(trap, backing, access) for access in ACCESSES)


def works(trap: str, backing: str) -> bool:
    """Return whether `trap` is proven on `backing`: all that was run is exact."""
    run = [proof for proof in proofs(trap, backing) if proof.status != "not run"]
    return bool(run) and all(proof.ok for proof in run)


def working_traps(backing: str) -> list[str]:
    """Return the traps proven on `backing`, in the order of the registry."""
    return [trap for trap in TRAPS if works(trap, backing)]


def exit_traps() -> list[str]:
    """Return the traps whose faults are exits of KVM_RUN, in the order in which `auto` tries them."""
    return [name for name, kind in TRAPS.items() if kind.exits]


def choose_trap(backing: str, memory_bytes: int, *, device_view: bool = False) -> str:
    """Return the fastest exit-style trap that a micro guest proves on `backing`; on HugeTLB one with 4 KiB faults.

    For large RAM the first that is tried is one that leaves untouched memory without page tables. With `device_view` it
    can have that beside. Raises UnsupportedError if there is none, ValueError for a backing that there is not, or that
    has no device view.
    """
    page_size = backing_class(backing).page_size
    fits.check(fits.Together(backing_class(backing), device_view=device_view))
    traps = [trap for trap in exit_traps() if not _refusal(trap, backing, device_view=device_view)]
    if page_size > PAGE_SIZE:
        # HugeTLB is chosen for huge pages later and faults of 4 KiB now: memslots have those.
        traps.sort(key=lambda trap: not TRAPS[trap].by_memslot)
    if memory_bytes >= _LARGE:
        traps.sort(key=lambda trap: not TRAPS[trap].suits_large)
    tried = _SMALLER.get(backing, backing)
    if all(proof.status == "not run" for trap in traps for proof in proofs(trap, tried)):
        tried = backing
    for trap in traps:
        if works(trap, tried):
            return trap
        for proof in proofs(trap, tried):
            if proof.is_short:  # another trap that needs less is no answer
                raise ShortageError(proof.error)
    reasons = {trap: _first_error(trap, tried) for trap in traps}
    if len(set(reasons.values())) == 1:  # it is not about traps
        raise UnsupportedError(reasons[traps[0]])
    why = "; ".join(f"{trap}: {reason}" for trap, reason in reasons.items())
    raise UnsupportedError(f"no trap works on this host ({why}): kvmdp probe says what would help")


def _first_error(trap: str, backing: str) -> str:
    return next(proof.error for proof in proofs(trap, backing) if not proof.ok)


def capabilities(kvm: Kvm) -> dict[str, int]:
    """Return what KVM_CHECK_EXTENSION says of the capabilities that matter here."""
    return {capability.name: kvm.check_extension(capability) for capability in _CAPABILITIES}


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
