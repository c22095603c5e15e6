"""Every workload on every kind of machine: results exact, and each touched page read from the source once."""

import numpy as np
import pytest
from harness import BACKINGS, TRAPS, WITH_DEVICE_VIEW, host_vectors, plan, prove

from kvmdp.lab.experiment import usable_memory
from kvmdp.machine.guest_abi import VectorFlag
from kvmdp.machine.hostinfo import emulates_ring_0
from kvmdp.machine.page_tables import PageTables
from kvmdp.machine.workloads import WORKLOADS
from kvmdp.memory.layout import GuestLayout
from kvmdp.trap.uffd.options import UffdOptions

pytestmark = pytest.mark.kvm

MEMORY = 2 << 20
# Ring 0 is emulated where KVM has no hardware behind it, at a few million instructions a second.
PAGES = {3: 128, 0: 48}
LARGE = (3 << 30) + (64 << 20)
BEYOND_HOLE = (3 << 30) // 4096  # number of the first page above the hole

MINOR, MISSING = UffdOptions(), UffdOptions(2, 2, "missing")
MACHINES = [
    *(pytest.param(trap, backing, MINOR, id=f"{trap}-{backing}") for trap in TRAPS for backing in BACKINGS),
    pytest.param("layered", "memfd", MINOR, id="layered"),
    *(
        pytest.param(trap, backing, uffd, id=name, marks=pytest.mark.userfaultfd)
        for name, trap, backing, uffd in (
            ("userfaultfd-memfd", "userfaultfd", "memfd", MINOR),
            ("userfaultfd-anonymous", "userfaultfd", "anonymous", UffdOptions()),
            ("userfaultfd-missing", "userfaultfd", "memfd", MISSING),
            *((trap, trap, "memfd", MINOR) for trap in WITH_DEVICE_VIEW),
        )
    ),
]


@pytest.mark.whole("name", "trap", "backing", "uffd")
@pytest.mark.parametrize("page_tables", ["boot", "paged"])
@pytest.mark.parametrize("ring", [3, 0])
@pytest.mark.parametrize("vcpus", [1, 2, 4])
@pytest.mark.parametrize(("trap", "backing", "uffd"), MACHINES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_each_touched_page_is_fetched_once_and_the_result_is_exact(
    name, trap, backing, uffd, vcpus, ring, page_tables
):
    if name == "vector" and emulates_ring_0():
        ring = 3  # KVM's emulator does not know vector instructions, on present memory neither
    tables = PageTables(GuestLayout(MEMORY), paged=page_tables == "paged").pages
    usable = usable_memory(MEMORY, page_tables)
    workload = plan(name, vcpus=vcpus, ring=ring, pages=PAGES[ring], memory=usable)
    result = prove(trap, backing, workload, memory_bytes=MEMORY, uffd=uffd, page_tables=page_tables)
    assert result.granule == 4096
    assert result.counters.pages_fetched == len(workload.touched) + tables == result.pages_present
    assert result.counters.pages_zeroed == result.counters.pages_backed == result.counters.pages_revoked == 0
    assert result.counters.retries == result.stalls == 0
    asleep = trap == "userfaultfd"
    assert asleep == (result.exits.keys() <= {"io", "msr"}) or name == "clock"


@pytest.mark.parametrize("options", [{"order": "random", "touches": 60}, {"order": "strided", "stride": 9}])
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("fault_around", [2, 16, 512])
@pytest.mark.parametrize("trap", TRAPS)
def test_fault_around_fetches_the_aligned_blocks_that_were_touched(trap, fault_around, write, options):
    workload = plan("touch", vcpus=2, write=write, overlap=True, memory=4 << 20, **options)
    result = prove(trap, "memfd", workload, fault_around=fault_around)
    blocks = np.unique(workload.touched // fault_around)
    assert result.counters.pages_fetched == len(blocks) * fault_around
    assert result.counters.claims <= result.counters.pages_fetched // fault_around + result.counters.waits


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("trap", ["memory-fault", "mmio"])
def test_a_granule_of_64_kib_comes_as_one(trap, backing):
    workload = plan("touch", vcpus=2, order="random", touches=20, overlap=True, write=True)
    result = prove(trap, backing, workload, granule=64 << 10)
    assert result.granule == 64 << 10
    assert result.counters.pages_fetched == 16 * len(np.unique(workload.touched // 16))


@pytest.mark.parametrize(("granule", "fault_around"), [(8192, 512), (64 << 10, 2), (1 << 20, 16)])
@pytest.mark.parametrize("trap", ["memory-fault", "mmio"])
def test_granule_and_fault_around_go_together_whichever_is_larger(trap, granule, fault_around):
    result = prove(trap, "memfd", plan("checksum", vcpus=2), granule=granule, fault_around=fault_around)
    assert result.counters.pages_fetched == result.pages_present == 512


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("trap", TRAPS)
def test_vector_instructions_of_this_host_are_exact_across_pages(trap, backing):
    if host_vectors() is VectorFlag.NONE:
        pytest.skip("this host's CPU has no AVX for a guest: use one that has")
    workload = plan("vector", vcpus=2, pages=96, vector=host_vectors())
    result = prove(trap, backing, workload)
    assert result.counters.pages_fetched == len(workload.touched)


@pytest.mark.parametrize(
    ("trap", "granule"), [("marker", None), ("mmio", 1 << 20), ("memory-fault", 1 << 20)]
)
def test_memory_on_both_sides_of_the_hole_is_exact(trap, granule):
    workload = plan("touch", memory=LARGE, order="strided", stride=8009, touches=100, write=True)
    assert workload.touched[0] < BEYOND_HOLE <= workload.touched[-1]
    result = prove(trap, "memfd", workload, granule=granule)
    unit = (granule or 4096) // 4096
    assert result.counters.pages_fetched == unit * len(np.unique(workload.touched // unit))


@pytest.mark.parametrize("trap", TRAPS)
def test_a_seed_gives_the_same_checksum_under_every_trap_and_backing(trap):
    checksums = {
        prove(trap, backing, plan("checksum", vcpus=vcpus, pages=64)).guest_checksum
        for backing in BACKINGS
        for vcpus in (1, 3)
    }
    assert checksums == {prove("mmio", "memfd", plan("checksum", pages=64)).guest_checksum}
