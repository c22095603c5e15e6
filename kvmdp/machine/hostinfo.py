"""Facts about this process and its host, from procfs. Units: bytes."""

from __future__ import annotations

from pathlib import Path


def _kib_field(path: str, name: str) -> int:
    """Return the field `name` ("VmRSS", given there in kB) of a procfs file in bytes; 0 if it is not there."""
    for line in Path(path).read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def vmalloc_used() -> int:
    """Return the kernel's vmalloc memory, system-wide: memslots live there."""
    return _kib_field("/proc/meminfo", "VmallocUsed")


def resident_memory() -> int:
    """Return this process's resident memory."""
    return _kib_field("/proc/self/status", "VmRSS")


def page_table_memory() -> int:
    """Return what this process's page tables take."""
    return _kib_field("/proc/self/status", "VmPTE")
