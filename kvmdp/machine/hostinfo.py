"""Facts about this process and its host, from procfs and sysfs. Units: bytes."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

_FLAVOURS = ("kvm_intel", "kvm_amd", "kvm_pvm")
_TDP_PARAMETERS = {"kvm_intel": "ept", "kvm_amd": "npt"}


def _kib_field(path: str, name: str) -> int:
    """Return the field `name` ("VmRSS", given there in kB) of a procfs file in bytes.

    0 if it is not there, or there is no /proc, or it is hidden, as containers may have it.
    """
    try:
        text = Path(path).read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, PermissionError):
        return 0
    for line in text.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def vmalloc_used() -> int:
    """Return the kernel's vmalloc memory, system-wide: memslots live there."""
    return _kib_field("/proc/meminfo", "VmallocUsed")


def available_memory() -> int:
    """Return how much memory processes could still have without swapping, as the kernel estimates it; 0: unknown."""
    return _kib_field("/proc/meminfo", "MemAvailable")


def resident_memory() -> int:
    """Return this process's resident memory."""
    return _kib_field("/proc/self/status", "VmRSS")


def proportional_memory() -> int:
    """Return this process's resident memory without counting a page twice that it has mapped twice.

    HugeTLB pages are not in it: the kernel counts them apart. 0 where there is no smaps_rollup.
    """
    try:
        return _kib_field("/proc/self/smaps_rollup", "Pss")
    except OSError:
        return 0


def page_table_memory() -> int:
    """Return what this process's page tables take."""
    return _kib_field("/proc/self/status", "VmPTE")


def _read(path: str | Path) -> str:
    """Return a sysfs or procfs file's text, empty if it is not there."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _chosen(text: str) -> str:
    """Return the bracketed one of a sysfs file that lists choices: "always [madvise] never"."""
    return text.partition("[")[2].partition("]")[0]


def cpu_model() -> str:
    """Return the CPU's name."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def kvm_flavour() -> str:
    """Return which KVM module there is: kvm_intel, kvm_amd, kvm_pvm, or "unknown" (built in, or not visible)."""
    return next((name for name in _FLAVOURS if Path("/sys/module", name).exists()), "unknown")


def emulates_ring_0() -> bool:
    """Return whether KVM runs a guest's ring 0 in its emulator: PVM, which has no hardware behind it."""
    return kvm_flavour() == "kvm_pvm"


def uses_nested_paging() -> bool:
    """Return whether KVM gives guests page tables of their own in hardware (TDP), or shadows them."""
    flavour = kvm_flavour()
    parameter = _TDP_PARAMETERS.get(flavour)
    return parameter is not None and _read(f"/sys/module/{flavour}/parameters/{parameter}") in ("Y", "1")


def huge_page_pools() -> dict[int, dict[str, int]]:
    """Return the HugeTLB pools: size of a page in bytes -> {"total": pages, "free": pages}."""
    pools = {}
    for folder in sorted(Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        size = int(folder.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        total, free = (int(_read(folder / name) or 0) for name in ("nr_hugepages", "free_hugepages"))
        pools[size] = {"total": total, "free": free}
    return pools


@functools.cache
def tmpfs_has_huge_pages() -> bool:
    """Return whether a memfd may get memory for more pages than one that is touched."""
    root = Path("/sys/kernel/mm/transparent_hugepage")
    files = [root / "shmem_enabled", *root.glob("hugepages-*/shmem_enabled")]
    return any(_chosen(_read(file)) in ("always", "within_size", "force") for file in files)


def host_facts() -> dict[str, str | int | bool]:
    """Return what a reader of a measurement wants to know about the host."""
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count() or 0,
        "memory_bytes": _kib_field("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "kvm": kvm_flavour(),
        "nested_paging": uses_nested_paging(),
        "thp": _chosen(_read("/sys/kernel/mm/transparent_hugepage/enabled")) or "none",
        "thp_shmem": _chosen(_read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")) or "none",
        "python": platform.python_version(),
    }
