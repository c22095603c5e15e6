"""An ordinary user's userfaultfd is not told of KVM's own faults: on a hole of registered memory KVM_RUN just fails.

So no vCPU may meet one that we made, and one that the host makes (reclaim) is filled after the failure.
"""

import ctypes
import itertools
import random
import time
from collections import Counter

import numpy as np
import pytest
from harness import SEED, TIMEOUT, all_of_ram, make_machine, meanwhile, plan, without_kernel_faults

from kvmdp.abi.mman import PROT_NONE
from kvmdp.kvm import BadAddress, BusError
from kvmdp.lab.invariants import violations
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.page import PAGE_SIZE, REGION, Outcome
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

MEMORY = 8 << 20
PAGES = MEMORY // 4096
SOURCE = SyntheticSource(MEMORY, SEED)
EVERY = pytest.mark.parametrize(
    ("trap", "backing"), [("marker", "memfd"), ("marker", "anonymous"), ("layered", "memfd")]
)
SHARED = pytest.mark.parametrize("trap", ["marker", "layered"])


@pytest.fixture(autouse=True)
def _ordinary_user(monkeypatch):
    without_kernel_faults(monkeypatch)


def machine_for(trap, backing, workload, **options):
    return make_machine(trap, backing, workload=workload, source=SOURCE, **options)


def check(machine, workload):
    """All exact; returns the exits there were."""
    expected = workload.expected_pages(SOURCE.pages, np.arange(PAGES))
    assert np.array_equal(all_of_ram(machine), expected)
    checksums = workload.expected_checksums(SOURCE.pages)
    assert [thread.parameters.checksum for thread in machine.threads] == checksums
    assert violations(machine.pager) == []
    return sum((thread.exits for thread in machine.threads), Counter())


@EVERY
def test_the_neighbours_of_a_page_that_leaves_a_collapsed_region_stay_mapped(trap, backing):
    workload = plan("checksum", memory=MEMORY)
    with machine_for(trap, backing, workload) as machine:
        assert machine.pager.mark_present(0, PAGES) is Outcome.PRESENT
        machine.pager.collapse(0, PAGES)
        for page in (7, REGION, PAGES - 1):
            assert machine.pager.mark_nonpresent(page, 1) == 1
        machine.run(TIMEOUT)
        exits = check(machine, workload)
        assert (exits[BusError], exits[BadAddress]) == (3, 0)


@EVERY
def test_no_vcpu_meets_a_hole_while_pages_go_and_regions_are_collapsed(trap, backing):
    workload = plan("atomic", vcpus=2, memory=MEMORY, pages=PAGES, iterations=1000)
    with machine_for(trap, backing, workload) as machine:
        pager, chance = machine.pager, random.Random(SEED)

        def collapse(_number):
            if pager.mark_present(0, PAGES) is not Outcome.PRESENT:
                return False
            pager.collapse(0, PAGES)
            time.sleep(0.01)
            return None

        def shut_off(_number):
            pager.mark_nonpresent(chance.randrange(PAGES - 8), chance.randrange(1, 8))
            time.sleep(0.001)

        with meanwhile(collapse, shut_off, shut_off):
            machine.run(TIMEOUT)
        assert pager.counters.pages_revoked > 0
        assert check(machine, workload)[BadAddress] == 0


@EVERY
def test_nor_in_a_machine_that_has_less_memory_than_its_guest(trap, backing):
    workload = plan("atomic", vcpus=4, memory=MEMORY, pages=600, iterations=2)
    with machine_for(trap, backing, workload, resident_limit=1 << 20) as machine:
        machine.run(TIMEOUT)
        exits = sum((thread.exits for thread in machine.threads), Counter())
        assert exits[BadAddress] == 0
        checksums = workload.expected_checksums(SOURCE.pages)
        assert [thread.parameters.checksum for thread in machine.threads] == checksums


@SHARED
def test_nor_after_demand_paging_was_off_and_on(trap):
    workload = plan("checksum", memory=MEMORY)
    with machine_for(trap, "memfd", workload) as machine:
        assert machine.pager.mark_present(0, PAGES) is Outcome.PRESENT
        machine.pager.disable()
        machine.backing.guest.drop(0, MEMORY // 2)
        machine.pager.enable()
        machine.run(TIMEOUT)
        assert check(machine, workload)[BadAddress] == 0


@SHARED
@pytest.mark.parametrize("ring", [3, 0])
def test_what_reclaim_has_unmapped_is_mapped_again(trap, ring):
    workload = plan("atomic", memory=MEMORY, pages=512, ring=ring)
    with machine_for(trap, "memfd", workload) as machine:
        assert machine.pager.mark_present(0, PAGES) is Outcome.PRESENT
        machine.pager.mark_nonpresent(9, 1)
        machine.backing.guest.drop(0, 9 * 4096)
        machine.backing.guest.drop(10 * 4096, MEMORY - 10 * 4096)
        machine.run(TIMEOUT)
        exits = check(machine, workload)
        assert ring == 0 or exits[BadAddress] > 0


@SHARED
def test_a_page_that_is_unmapped_again_before_each_access_is_mapped_until_there_is_one(trap, monkeypatch):
    workload = plan("checksum", memory=MEMORY)
    with machine_for(trap, "memfd", workload) as machine:
        pager, times = machine.pager, itertools.count(1)
        reassert = pager.reassert

        def reassert_and_unmap(page):
            mended = reassert(page)
            if next(times) < 200:
                machine.backing.guest.drop(page * PAGE_SIZE, PAGE_SIZE)
            return mended

        monkeypatch.setattr(pager, "reassert", reassert_and_unmap)
        assert pager.mark_present(0, PAGES) is Outcome.PRESENT
        machine.backing.guest.drop(100 * PAGE_SIZE, PAGE_SIZE)
        machine.run(TIMEOUT)
        assert check(machine, workload)[BadAddress] == 200


@SHARED
def test_what_no_mapping_mends_ends_the_run(trap):
    workload = plan("checksum", memory=MEMORY)
    with machine_for(trap, "memfd", workload) as machine:
        assert machine.pager.mark_present(0, PAGES) is Outcome.PRESENT
        hva = machine.backing.guest.hva + 100 * PAGE_SIZE
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(hva), ctypes.c_size_t(PAGE_SIZE), PROT_NONE) == 0
        with pytest.raises(GuestError, match="KVM_RUN failed with EFAULT"):
            machine.run(TIMEOUT)


@SHARED
def test_reclaim_beside_running_vcpus_loses_nothing(trap):
    workload = plan("atomic", vcpus=2, memory=MEMORY, pages=64, iterations=2000)
    with machine_for(trap, "memfd", workload) as machine:
        pager, chance = machine.pager, random.Random(SEED)
        assert pager.mark_present(0, PAGES) is Outcome.PRESENT

        def reclaim(_number):
            page = chance.randrange(64)
            if pager.hold(page):  # or its marker would be taken away, which reclaim does not do
                try:
                    machine.backing.guest.drop(page * 4096, 4096)
                finally:
                    pager.release(page)
            time.sleep(0.001)

        def shut_off(_number):
            pager.mark_nonpresent(chance.randrange(64), 1)
            time.sleep(0.001)

        with meanwhile(reclaim, shut_off):
            machine.run(TIMEOUT)
        check(machine, workload)
