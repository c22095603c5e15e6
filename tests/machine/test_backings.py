"""Every backing under every trap that works on it: exact, and fetched is what was touched, by the unit that must be."""

import functools
import random
import threading

import numpy as np
import pytest
from harness import SEED, TIMEOUT, plan, require_trap

from kvmdp.errors import UnsupportedError
from kvmdp.lab.experiment import run_workload
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.workloads import combined_checksum
from kvmdp.memory.backings import BACKINGS
from kvmdp.source.base import read_pages
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.registry import TRAPS
from kvmdp.trap.uffd.options import UffdOptions

pytestmark = pytest.mark.kvm

PAGE, HUGE, GIGANTIC = 4096, 2 << 20, 1 << 30
MEMORY = 8 << 20
SLOTS = ("memory-fault", "mmio")
BY_HOST_PAGE = ("marker", "userfaultfd")
ORDINARY = ("memfd", "anonymous", "guest-memfd", "file")
HUGETLB = ("hugetlb-2m", "private-hugetlb-2m")
hugetlb = [pytest.mark.root, pytest.mark.hugepages]

CELLS = [
    *((trap, backing) for trap in SLOTS for backing in ORDINARY),
    *((trap, backing) for trap in BY_HOST_PAGE for backing in ("memfd", "anonymous")),
    *(pytest.param(trap, backing, marks=hugetlb) for trap in (*SLOTS, *BY_HOST_PAGE) for backing in HUGETLB),
]


def options(trap, backing, memory=MEMORY, **more):
    more = {"vcpus": 2, "reserve_hugepages": BACKINGS[backing].page_size > PAGE, **more}
    return MachineOptions(memory, trap, backing, **more)


def run(machine, workload):
    require_trap(machine.trap)
    try:
        result = run_workload(machine, workload, SyntheticSource(machine.memory_bytes, SEED), timeout=TIMEOUT)
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert result.ok
    assert result.pages_checked == result.pages_present
    return result


@pytest.mark.parametrize("workload", ["touch", "atomic"])
@pytest.mark.parametrize(("trap", "backing"), CELLS)
def test_fetched_is_what_is_touched(trap, backing, workload):
    work = plan(workload, vcpus=2, memory=MEMORY, pages=600, order="random", write=True)
    result = run(options(trap, backing), work)
    unit = PAGE if TRAPS[trap].by_memslot else BACKINGS[backing].page_size
    assert result.granule == unit
    pages = unit // PAGE
    touched = len({page // pages for page in np.asarray(work.touched).tolist()})
    assert touched == (len(work.touched) if unit == PAGE else 2)
    assert result.counters.pages_fetched == touched * pages


@pytest.mark.root
@pytest.mark.hugepages
@pytest.mark.parametrize(
    ("trap", "fetched"), [("memory-fault", 2 * (1 << 20) // PAGE), ("marker", GIGANTIC // PAGE)]
)
def test_a_page_of_1_gib_is_fetched_by_the_memslot_or_as_a_whole(trap, fetched):
    work = plan("touch", vcpus=2, memory=GIGANTIC, pages=512, write=True)
    more = {"granule": 1 << 20} if trap in SLOTS else {}
    result = run(options(trap, "hugetlb-1g", GIGANTIC, **more), work)
    assert result.counters.pages_fetched == fetched


@pytest.mark.root
@pytest.mark.hugepages
def test_a_descriptor_has_whole_huge_pages_even_if_there_are_more_descriptors():
    work = plan("touch", vcpus=3, memory=MEMORY, write=True)
    uffd = UffdOptions(readers=2, shards=3)
    result = run(options("userfaultfd", "hugetlb-2m", vcpus=3, uffd=uffd), work)
    assert result.counters.pages_fetched == MEMORY // PAGE


FIRES = [
    *((trap, backing, None) for trap in SLOTS for backing in ("guest-memfd", "file")),
    *(
        pytest.param(trap, backing, mode, marks=hugetlb)
        for backing in HUGETLB
        for trap, mode in (("memory-fault", None), ("marker", None), ("userfaultfd", None))
    ),
    pytest.param("userfaultfd", "hugetlb-2m", "missing", marks=hugetlb),
]


@pytest.mark.parametrize(("trap", "backing", "mode"), FIRES)
def test_pages_that_come_and_go_lose_no_addition(trap, backing, mode):
    require_trap(trap)
    # The vCPUs are stopped for each revocation by memslot; without that they would be done before any was made.
    iterations = 3 if trap in SLOTS else 1000
    work = plan("atomic", vcpus=2, memory=MEMORY, pages=1200, iterations=iterations)
    source = SyntheticSource(MEMORY, SEED)
    granule = 65536 if trap in SLOTS else None
    try:
        machine = Machine(options(trap, backing, uffd=UffdOptions(mode=mode), granule=granule), source)
    except UnsupportedError as error:
        pytest.skip(str(error))
    with machine:
        machine.set_parameters(work.blocks)
        over = threading.Event()
        revoked = []
        chance = random.Random(SEED)

        def take_away():
            while not over.is_set():
                first, count = chance.randrange(1200), chance.randrange(1, 600)
                revoked.append(machine.pager.mark_nonpresent(first, count))
                over.wait(0.002)

        thread = threading.Thread(target=take_away)
        thread.start()
        try:
            machine.run(TIMEOUT)
        finally:
            over.set()
            thread.join()
        assert sum(revoked) > 0
        image = functools.partial(read_pages, source)
        checksum = combined_checksum(each.parameters.checksum for each in machine.threads)
        assert checksum == combined_checksum(work.expected_checksums(image))
        for first, count in machine.pager.bitmap.present_runs().tolist():
            pages = np.arange(first, first + count)
            assert np.array_equal(machine.memory.read_pages(pages), work.expected_pages(image, pages))
        # Each page was fetched once, however often it went: its bytes stayed.
        unit = machine.pager.trap.granule // PAGE
        assert machine.pager.counters.pages_fetched == -(-1200 // unit) * unit
