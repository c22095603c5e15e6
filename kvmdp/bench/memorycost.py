"""What demand paging costs in memory: page tables of each view of RAM, the bitmap, the kernel's memslots.

Twice for each contender: armed, with nothing present, and full, after the guest has touched all its RAM. A view's page
tables are what this process has less (`VmPTE`) once something empty is mapped in the view's place: so guest view and
VMM view are told apart, to the page table at either end that they share with a neighbour. Memslots and their reverse
maps are what the kernel's vmalloc area grew by (`VmallocUsed`): system-wide, so other work on the host shows in it.

Units: KiB, and bytes of the bitmap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvmdp import __version__
from kvmdp.bench.contender import PRESENT, Contender, contender
from kvmdp.bench.losses import Losses
from kvmdp.bench.measure import machine_options, make_plain, plan, source_of
from kvmdp.bench.work import Work
from kvmdp.interruption import entered
from kvmdp.machine.hostinfo import host_facts, page_table_memory, vmalloc_used
from kvmdp.machine.machine import Machine
from kvmdp.memory.backings import backing_class
from kvmdp.memory.layout import GuestLayout
from kvmdp.paging.policy import MAX_FAULT_AROUND
from kvmdp.size import format_size
from kvmdp.trap.fits import granule_of
from kvmdp.trap.registry import TRAPS, trap_class

SCHEMA = "kvmdp.bench-memory/1"
CONTENDERS = (PRESENT, *TRAPS)
_TIMEOUT = 600.0


def memory_contender(name: str, work: Work) -> Contender:
    """Return a contender that touches all RAM of `work`, with memslots as small as it has them.

    Pages are fetched many at a time: what they cost in memory is the same, and takes seconds. Raises ValueError for a
    name that there is not.
    """
    made = contender(name, replace(work, fault_around=MAX_FAULT_AROUND))
    # present has no memslots to be counted, and needs none that are small.
    if made.trap is None or made.work.granule is not None:
        return made
    backing = backing_class(made.work.backing)
    granule = granule_of(trap_class(made.trap), GuestLayout(made.work.memory_bytes), backing)
    return replace(made, work=replace(made.work, granule=granule))


def memory_cost(each: Contender) -> dict[str, Any]:
    """Return the row of a contender: what its memory costs, armed and full. Raises what a machine raises."""
    armed, full = _cost(each, fill=False), _cost(each, fill=True)
    return {
        "contender": each.name,
        "gib": each.work.memory_bytes / (1 << 30),
        "vmpte_kib": full["vmpte_kib"],
        "bitmap_bytes": full["bitmap_bytes"],
        "memslots": full["memslots"],
        "slot_kib": full["slot_kib"],
        "granule": machine_options(each).granule if each.trap else None,
        "fault_around": each.work.fault_around,
        "armed": armed,
        "full": full,
    }


def _cost(each: Contender, *, fill: bool) -> dict[str, int]:
    source, _ = source_of(each.work)
    tables = page_table_memory()
    with entered(Machine, machine_options(each), source) as machine:
        vmalloc = vmalloc_used()
        if each.trap is None and fill:
            make_plain(machine)
        if fill:
            machine.set_parameters(plan(each.work).blocks)
            machine.run(_TIMEOUT)
        everything = page_table_memory()
        # What arming took, and what was made since: mmio has no memslots to begin with.
        slots = machine.slot_bytes + max(vmalloc_used() - vmalloc, 0)
        memslots = machine.pager.trap.memslots
        bitmap = machine.pager.bitmap.mapped_bytes
        guest, vmm = _page_tables_of_views(machine)
    return {
        "bitmap_bytes": bitmap,
        "vmpte_kib": max(everything - tables, 0) // 1024,
        "guest_view_kib": guest // 1024,
        "vmm_view_kib": vmm // 1024,
        "memslots": memslots,
        "slot_kib": slots // 1024,
    }


def _page_tables_of_views(machine: Machine) -> tuple[int, int]:
    """Return what the page tables of guest view and VMM view take, and unmap both: no vCPU runs, nor will."""
    before = page_table_memory()
    machine.backing.guest.detach()
    between = page_table_memory()
    if machine.backing.vmm is machine.backing.guest:
        return max(before - between, 0), 0
    machine.backing.vmm.detach()
    return max(before - between, 0), max(between - page_table_memory(), 0)


def document(work: Work, rows: Sequence[dict[str, Any]], losses: Losses, *, complete: bool) -> dict[str, Any]:
    """Return the rows as the JSON document has them (kvmdp.bench-memory/1)."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "complete": complete,
        "host": host_facts(),
        "backing": work.backing,
        "memory_bytes": work.memory_bytes,
        "contenders": [{"name": row["contender"], **row} for row in rows],
        "ratios": [],
        "skipped": losses.skipped,
        "failed": losses.failed,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the document as lines for people, none over 100 columns."""
    partial = "" if found["complete"] else ", PARTIAL"
    table = [
        f"memory of {format_size(found['memory_bytes'])} of {found['backing']} RAM in KiB{partial}",
        f"{'':<22}{'bitmap':>8}  {'armed: guest':>13}{'VMM':>8}{'slots':>9}  {'full: guest':>13}{'VMM':>8}{'slots':>9}",
    ]
    for row in found["contenders"]:
        armed, full = row["armed"], row["full"]
        table.append(
            f"{row['name']:<22}{row['bitmap_bytes'] / 1024:>8.0f}  "
            f"{armed['guest_view_kib']:>13}{armed['vmm_view_kib']:>8}{armed['slot_kib']:>9}  "
            f"{full['guest_view_kib']:>13}{full['vmm_view_kib']:>8}{full['slot_kib']:>9}"
        )
    table += [
        "",
        "guest, VMM: page tables of the guest view and of the VMM view. slots: what memslots and their",
        "reverse maps take of the kernel's vmalloc area. armed: nothing present; full: all RAM touched",
    ]
    return table
