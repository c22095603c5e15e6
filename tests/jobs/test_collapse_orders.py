"""What is lost if a collapse is not made as `kvmdp.trap.collapse` has it: why its order is the only one."""

import ctypes
import os

import pytest

from kvmdp.abi import userfaultfd as abi
from kvmdp.abi.mman import MADV_COLLAPSE, MADV_HUGEPAGE
from kvmdp.memory.mapping import Mapping
from kvmdp.page import HUGE_PAGE
from kvmdp.trap.collapse import can_collapse
from kvmdp.trap.uffd.descriptor import Uffd, supported_features

PAGE = 4096
PLAIN = abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_MINOR
PROTECTED = PLAIN | abi.UFFDIO_REGISTER_MODE_WP
NEEDED = abi.UFFD_FEATURE_POISON | abi.UFFD_FEATURE_MINOR_SHMEM | abi.UFFD_FEATURE_MISSING_SHMEM
ABSENT = 7  # the page that is shut off


class Ram:
    """2 MiB of a memory file, all filled; in the guest view, registered, page ABSENT is under a marker."""

    def __init__(self, mode):
        self.file = os.memfd_create("orders", os.MFD_CLOEXEC)
        os.ftruncate(self.file, HUGE_PAGE)
        self.guest, self.vmm = (Mapping.shared(self.file, HUGE_PAGE) for _ in range(2))
        protection = abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM if mode == PROTECTED else 0
        self.uffd = Uffd(NEEDED | protection, kernel_faults=False)
        self.vmm.view[:] = b"\x5a" * HUGE_PAGE
        self.uffd.register(self.guest.hva, HUGE_PAGE, mode)
        self.uffd.continue_(self.guest.hva, ABSENT * PAGE)
        behind = (ABSENT + 1) * PAGE
        self.uffd.continue_(self.guest.hva + behind, HUGE_PAGE - behind)
        assert self.uffd.poison(self.marked, PAGE)

    @property
    def marked(self):
        return self.guest.hva + ABSENT * PAGE

    def has_marker(self):
        """Whether the page traps; a marker that has gone is set again by the question."""
        return not self.uffd.poison(self.marked, PAGE)

    def readable(self):
        """Whether the page can be read like any other."""
        try:
            return os.write(self.file, (ctypes.c_char * 1).from_address(self.marked)) == 1
        except OSError:
            return False

    def close(self):
        self.uffd.close()
        self.guest.close()
        self.vmm.close()
        os.close(self.file)


@pytest.fixture
def ram():
    made = []

    def make(mode):
        if missing := (NEEDED | abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM) & ~supported_features():
            pytest.skip(f"this kernel's userfaultfd lacks the features {missing:#x}: use Linux 6.6 or later")
        made.append(Ram(mode))
        if not can_collapse(made[-1].guest):
            pytest.skip("this kernel has no MADV_COLLAPSE: use Linux 6.1 or later")
        return made[-1]

    yield make
    for each in made:
        each.close()


def collapse(view):
    view.advise(MADV_HUGEPAGE)
    view.advise(MADV_COLLAPSE)


def test_a_collapse_through_the_vmm_view_takes_markers_away(ram):
    memory = ram(PLAIN)
    assert memory.has_marker()
    collapse(memory.vmm)
    assert not memory.has_marker()


def test_registered_for_write_protection_too_markers_outlive_that(ram):
    memory = ram(PROTECTED)
    collapse(memory.vmm)
    assert memory.has_marker()


def test_a_region_with_an_absent_page_that_is_unregistered_and_collapsed_lets_the_guest_read_it(ram):
    memory = ram(PROTECTED)
    assert not memory.readable()
    memory.uffd.unregister(memory.guest.hva, HUGE_PAGE)
    assert not memory.readable()  # the marker is still there
    memory.guest.drop(0, HUGE_PAGE)
    collapse(memory.guest)
    assert memory.readable()


def test_registering_again_leaves_the_huge_page_and_one_page_can_go(ram):
    memory = ram(PROTECTED)
    memory.uffd.unregister(memory.guest.hva, HUGE_PAGE)
    memory.guest.drop(0, HUGE_PAGE)
    collapse(memory.guest)
    memory.uffd.register(memory.guest.hva, HUGE_PAGE, PROTECTED)
    assert memory.readable()
    memory.guest.drop(ABSENT * PAGE, PAGE)
    assert memory.uffd.poison(memory.marked, PAGE)
    assert not memory.readable()
    memory.uffd.continue_(memory.marked, PAGE)
    assert memory.readable()
