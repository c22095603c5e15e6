"""Pages are put together in every other region while the kernel has few mappings left: the rest stays as it is."""

import contextlib
import errno

import numpy as np
import pytest
from harness import SEED, TIMEOUT, all_of_ram, make_machine, plan

from kvmdp.abi import libc
from kvmdp.abi.mman import MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, PROT_NONE
from kvmdp.errors import PagingError
from kvmdp.memory.mapping import mappings_left
from kvmdp.page import PAGE_SIZE, REGION
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap import collapse as trap_collapse
from kvmdp.trap.collapse import can_collapse

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]

REGIONS = 16
MEMORY = REGIONS * REGION * PAGE_SIZE
SOURCE = SyntheticSource(MEMORY, SEED)
MADV_DONTDUMP, MADV_DODUMP = 16, 17
every_trap = pytest.mark.parametrize(
    ("trap", "backing"),
    [("marker", "memfd"), ("userfaultfd", "memfd"), ("userfaultfd", "anonymous"), ("memory-fault", "memfd")],
)


@contextlib.contextmanager
def mappings_taken_but(left):
    """Have this process `left` mappings, or one more, away from the kernel's limit; `left` is even."""
    pages = 2 * (mappings_left() + 1)
    hva = libc.mmap(pages * PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
    try:
        last = 1
        with contextlib.suppress(OSError):
            for last in range(1, pages, 2):
                libc.madvise(hva + last * PAGE_SIZE, PAGE_SIZE, MADV_DONTDUMP)  # splits one into three
        for page in range(last - left, last, 2):
            libc.madvise(hva + page * PAGE_SIZE, PAGE_SIZE, MADV_DODUMP)
        yield
    finally:
        libc.munmap(hva, pages * PAGE_SIZE)


def machine_with_all_present(trap, backing, workload):
    machine = make_machine(trap, backing, workload=workload, source=SOURCE, memory_bytes=MEMORY)
    if not can_collapse(machine.backing.guest):
        machine.close()
        pytest.skip("this kernel has no MADV_COLLAPSE: use Linux 6.1 or later, with transparent huge pages")
    machine.pager.mark_present(0, machine.layout.pages)
    return machine


def collapse_every_other(pager):
    """Returns how many regions could be put together; a page may be in use for a moment, so a few times each."""
    return sum(
        any(pager.collapse(number * REGION, REGION) for _ in range(5)) for number in range(1, REGIONS, 2)
    )


@every_trap
def test_without_mappings_pages_stay_as_they_are_and_come_and_go(trap, backing):
    workload = plan("atomic", vcpus=2, memory=MEMORY, pages=REGIONS * REGION, iterations=1)
    with machine_with_all_present(trap, backing, workload) as machine:
        pager = machine.pager
        with mappings_taken_but(6):
            few = collapse_every_other(pager)
        if trap != "memory-fault":  # whose guest view stays one mapping
            assert few < REGIONS // 2
        assert pager.error is None
        machine.run(TIMEOUT)
        pager.reopen()
        for number in range(REGIONS):
            assert pager.mark_nonpresent(number * REGION + 3, 1) == 1
            pager.mark_present(number * REGION + 3, 1)
        assert collapse_every_other(pager) >= few
        wanted = workload.expected_pages(SOURCE.pages, np.arange(machine.layout.pages))
        assert np.array_equal(all_of_ram(machine), wanted)


@pytest.mark.parametrize(("trap", "backing"), [("marker", "memfd"), ("userfaultfd", "anonymous")])
def test_no_more_regions_are_plain_than_can_be_taken_apart_again(trap, backing, monkeypatch):
    monkeypatch.setattr(trap_collapse, "mappings_left", lambda: trap_collapse._SPARE_MAPPINGS + 7)
    with machine_with_all_present(trap, backing, plan("touch", memory=MEMORY, pages=1)) as machine:
        before = mappings_left()
        assert collapse_every_other(machine.pager) == 3
        assert before - mappings_left() <= 6
        assert machine.pager.mark_nonpresent(3 * REGION, 1) == 1
        assert any(machine.pager.collapse(15 * REGION, REGION) for _ in range(5))


def test_a_page_that_cannot_be_taken_out_for_want_of_mappings_is_said():
    with machine_with_all_present("marker", "memfd", plan("touch", memory=MEMORY, pages=1)) as machine:
        for _ in range(5):
            machine.pager.collapse(0, machine.layout.pages)
        with mappings_taken_but(0), pytest.raises(PagingError, match=r"sysctl vm\.max_map_count=262144"):
            machine.pager.mark_nonpresent(7 * REGION, 1)


def test_a_region_that_cannot_be_unregistered_for_another_reason_is_an_error(monkeypatch):
    with machine_with_all_present("marker", "memfd", plan("touch", memory=MEMORY, pages=1)) as machine:
        uffd = machine.pager.trap._uffds[0]
        monkeypatch.setattr(
            uffd, "unregister", lambda hva, length: (_ for _ in ()).throw(OSError(errno.EIO, "?"))
        )
        with pytest.raises(OSError, match=r"\?"):
            machine.pager.collapse(0, REGION)
        monkeypatch.undo()
        assert any(machine.pager.collapse(0, REGION) for _ in range(5))
