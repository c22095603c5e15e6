"""Page tables in paged RAM: the guest works as ever, the tables stay, and what the CPU wrote in them is no error."""

import time

import numpy as np
import pytest
from harness import (
    MEMORY,
    SEED,
    TIMEOUT,
    TRAPS,
    all_of_ram,
    make_machine,
    meanwhile,
    require_trap,
)

from kvmdp.errors import PagingError
from kvmdp.lab.experiment import run_workload, usable_memory
from kvmdp.machine.guest_abi import BOOT_BASE, PAGE_TABLES_BASE
from kvmdp.machine.options import MachineOptions, catches_page_walks
from kvmdp.machine.page_tables import LARGE_PAGE, PageTables, page_table_bytes
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.machine.workloads import WorkloadOptions, make_workload
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.source.base import SourceError, read_pages
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.registry import TRAPS as ALL_TRAPS

GIB = 1 << 30
ACCESSED_AND_DIRTY = 0x60
TABLE_PAGES = range(509, 512)  # PML4, PDPT and one directory, at the end of 2 MiB


def plan(name, *, memory=MEMORY, **options):
    usable = usable_memory(memory, "paged")
    return make_workload(name, WorkloadOptions(memory_bytes=usable, seed=SEED, **options))


def paged_machine(trap, workload, memory=MEMORY, **options):
    return make_machine(trap, workload=workload, memory_bytes=memory, page_tables="paged", **options)


def translate(layout, tables, address):
    """Walk the tables as the CPU does; return the gpa, or None if nothing is mapped."""
    ram = dict(tables.patches)

    def entry(table, index):
        if BOOT_BASE <= table < BOOT_BASE + tables.boot_size:
            offset = table - PAGE_TABLES_BASE + 8 * index
            return int.from_bytes(tables.boot_tables[offset : offset + 8], "little")
        page = ram[layout.page_of_gpa(table) * PAGE_SIZE]
        return int.from_bytes(page[8 * index : 8 * index + 8], "little")

    table = tables.root
    for shift in (39, 30, 21):
        found = entry(table, address >> shift & 511)
        if not found & 1:
            return None
        table = found & ~0xFFF
        if found & 0x80:
            return table + address % LARGE_PAGE
    raise AssertionError("no large page at the end of the walk")


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("memory", [MEMORY, GIB, 3 * GIB, 3 * GIB + 8192, 6 * GIB, 256 * GIB])
def test_all_of_ram_and_the_boot_slot_are_mapped_where_they_lie(memory, paged):
    layout = GuestLayout(memory)
    tables = PageTables(layout, paged=paged)
    inside = [region.gpa for region in layout.regions]
    inside += [region.gpa + region.size - 1 for region in layout.regions]
    inside += [BOOT_BASE, BOOT_BASE + tables.boot_size - 1]
    for address in inside:
        assert translate(layout, tables, address) == address
    outside = [BOOT_BASE - 1, BOOT_BASE + tables.boot_size, layout.gpa_of_page(layout.pages - 1) + LARGE_PAGE]
    for address in outside:
        assert translate(layout, tables, address) is None
    assert tables.pages * PAGE_SIZE == (page_table_bytes(layout) if paged else 0)


def test_paged_tables_are_the_last_pages_and_begin_without_accessed_and_dirty_bits():
    tables = PageTables(GuestLayout(MEMORY), paged=True)
    assert range(tables.first_page, tables.first_page + tables.pages) == TABLE_PAGES
    assert [offset for offset, _ in tables.patches] == [page * PAGE_SIZE for page in TABLE_PAGES]
    entries = np.frombuffer(b"".join(data for _, data in tables.patches), dtype=np.uint64)
    assert not (entries & np.uint64(ACCESSED_AND_DIRTY)).any()
    assert usable_memory(MEMORY, "paged") == TABLE_PAGES.start * PAGE_SIZE
    assert usable_memory(MEMORY, "boot") == MEMORY


def test_what_walks_change_is_forgiven_in_tables_alone_and_nothing_else_is():
    tables = PageTables(GuestLayout(MEMORY), paged=True)
    pages = np.array([7, 509, 510, 511])
    difference = np.zeros((4, 512), dtype=np.uint64)
    difference[:, 3] = ACCESSED_AND_DIRTY
    difference[2, 4] = ACCESSED_AND_DIRTY | 1 << 12
    tables.ignore_walks(pages, difference)
    assert np.flatnonzero(difference.any(axis=1)).tolist() == [0, 2]
    assert difference[2, 4] == 1 << 12


@pytest.mark.kvm
@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_the_cpu_has_marked_what_it_walked(trap):
    workload = plan("touch", pages=4, write=True)
    with paged_machine(trap, workload) as machine:
        machine.run(TIMEOUT)
        before = read_pages(machine.source, np.array(TABLE_PAGES))
        changed = machine.memory.read_pages(np.array(TABLE_PAGES)) ^ before
        assert changed[0, 0] & np.uint64(ACCESSED_AND_DIRTY)
        assert changed[2, 0] == ACCESSED_AND_DIRTY
        assert not (changed & ~np.uint64(ACCESSED_AND_DIRTY)).any()


@pytest.mark.kvm
@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_tables_are_there_before_the_guest_is_or_trap_by_themselves(trap):
    workload = plan("touch", pages=4)
    with paged_machine(trap, workload) as machine:
        present = [machine.pager.bitmap.test(page) for page in TABLE_PAGES]
        assert present == [not catches_page_walks(trap)] * len(TABLE_PAGES)
        machine.run(TIMEOUT)
        own = len(TABLE_PAGES) if catches_page_walks(trap) else 0
        assert machine.pager.counters.claims == len(workload.touched) + own


@pytest.mark.kvm
@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_tables_left_absent_are_caught_where_it_is_said_and_nowhere_else(trap):
    workload = plan("touch", pages=4)
    with make_machine(trap, workload=workload, memory_bytes=MEMORY, page_tables="absent") as machine:
        if catches_page_walks(trap):
            machine.run(TIMEOUT)
            assert machine.pager.bitmap.count() == 4 + len(TABLE_PAGES)
        else:
            with pytest.raises(GuestError):
                machine.run(10)


@pytest.mark.kvm
@pytest.mark.parametrize("granule", [PAGE_SIZE, 64 << 10])
@pytest.mark.parametrize("trap", TRAPS)
def test_marking_all_of_ram_non_present_passes_the_tables_over(trap, granule):
    if trap == "marker" and granule != PAGE_SIZE:
        pytest.skip("markers work by single pages")
    workload = plan("atomic", vcpus=2, pages=64)
    with paged_machine(trap, workload, granule=granule) as machine:
        pager = machine.pager
        pager.mark_present(0, 512)
        kept = max(len(TABLE_PAGES), granule // PAGE_SIZE)
        assert pager.mark_nonpresent(0, 512) == 512 - kept
        assert pager.mark_nonpresent(509, 1) == 0
        words = np.full(8, (1 << 64) - 1, dtype=np.uint64)
        assert pager.mark_bitmap_nonpresent(words) == 0
        assert [run.tolist() for run in pager.bitmap.present_runs()] == [[512 - kept, kept]]
        machine.run(TIMEOUT)


@pytest.mark.kvm
@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_pages_that_come_and_go_while_the_guest_runs_never_take_the_tables(trap):
    workload = plan("atomic", vcpus=2, pages=64, iterations=3000)
    with paged_machine(trap, workload) as machine:
        pager = machine.pager

        def revoke(number):
            pager.mark_nonpresent(number * 7 % 64, 8)
            pager.mark_nonpresent(504, 8)
            time.sleep(0.002)

        pager.mark_present(0, 64)
        with meanwhile(revoke):
            while not pager.counters.pages_revoked:  # else a busy host may be through with the guest before
                time.sleep(0.001)
            machine.run(TIMEOUT)
        pages = workload.touched
        expected = workload.expected_pages(lambda numbers: read_pages(machine.source, numbers), pages)
        assert np.array_equal(all_of_ram(machine)[pages], expected)
        assert all(pager.bitmap.test(page) for page in TABLE_PAGES)


@pytest.mark.kvm
@pytest.mark.parametrize("trap", TRAPS)
def test_demand_paging_can_be_switched_off_and_on_again(trap):
    workload = plan("atomic", vcpus=2, pages=64)
    with paged_machine(trap, workload) as machine:
        machine.pager.mark_present(0, 512)
        machine.pager.disable()
        machine.pager.enable()
        machine.pager.mark_nonpresent(0, 512)
        machine.run(TIMEOUT)
        assert all(machine.pager.bitmap.test(page) for page in TABLE_PAGES)


@pytest.mark.kvm
@pytest.mark.parametrize("trap", ["marker", "userfaultfd"])
def test_tables_on_both_sides_of_the_hole(trap):
    memory = 3 * GIB + 2 * PAGE_SIZE  # six tables: four of them below the hole
    workload = plan("touch", memory=memory, order="strided", stride=8009, touches=50, write=True)
    require_trap(trap)
    options = MachineOptions(memory, trap, page_tables="paged")
    result = run_workload(options, workload, SyntheticSource(memory, SEED), timeout=TIMEOUT)
    assert result.ok


@pytest.mark.kvm
def test_a_workload_that_would_write_over_the_tables_is_refused():
    workload = make_workload("fill", WorkloadOptions(memory_bytes=MEMORY))
    options = MachineOptions(MEMORY, "mmio", page_tables="paged")
    with pytest.raises(
        ValueError, match="fill would use page 511 of RAM, and from 509 on there are page tables"
    ):
        run_workload(options, workload, SyntheticSource(MEMORY))


class TablesLost(SyntheticSource):
    """Fails for good where the tables are."""

    def fill(self, offset, destination):
        if offset + destination.nbytes > TABLE_PAGES.start * PAGE_SIZE:
            raise SourceError(self.name, offset, destination.nbytes, "it is gone")
        super().fill(offset, destination)


@pytest.mark.kvm
@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_tables_that_cannot_be_fetched_are_named(trap):
    require_trap(trap)
    with (
        pytest.raises(PagingError, match=r"the page at gpa 0x1fd000 cannot be fetched: .*it is gone"),
        paged_machine(trap, plan("touch", pages=4), source=TablesLost(MEMORY, SEED)) as machine,
    ):
        machine.run(TIMEOUT)
