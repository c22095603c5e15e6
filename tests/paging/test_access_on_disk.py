"""Accesses to RAM whose bytes may be on a disk: the wait for it holds up no other thread, and ends well or is said."""

import contextlib
import os
import select
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fakes import PAGES, pager_of

from kvmdp.abi import userfaultfd as abi
from kvmdp.errors import BusyError, PagingError
from kvmdp.memory import backing as backing_module
from kvmdp.memory.backing import AnonymousBacking, FileBacking, MemfdBacking
from kvmdp.memory.hugetlb import HugetlbBacking
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.access import GuestMemory
from kvmdp.trap.uffd.descriptor import Uffd

PAGE = 7
GPA = PAGE * PAGE_SIZE
ACCESSES = {
    "read": lambda memory: memory.read(GPA + 8, 3) == b"abc",
    "write": lambda memory: memory.write(GPA + 8, b"ABC") or memory.read(GPA + 8, 3) == b"ABC",
    "load64": lambda memory: memory.load64(GPA + 8) == int.from_bytes(b"abc", "little"),
    "store64": lambda memory: memory.store64(GPA + 8, 5) or memory.load64(GPA + 8) == 5,
    "readv": lambda memory: memory.readv([(GPA - 1, 2), (GPA + 8, 1)]) == b"\0\0a",
    "writev": lambda memory: memory.writev([(GPA - 1, 2)], b"yz") or memory.read(GPA - 1, 2) == b"yz",
}


@contextlib.contextmanager
def slow_disk(view):
    """Have a page of `view` come only when told; userfaultfd stands for the disk."""
    mode = abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_MINOR
    features = abi.UFFD_FEATURE_MISSING_SHMEM | abi.UFFD_FEATURE_MINOR_SHMEM
    with contextlib.closing(Uffd(features, kernel_faults=True)) as uffd:
        uffd.register(view.hva + GPA, PAGE_SIZE, mode)
        view.drop(GPA, PAGE_SIZE)
        poll = select.poll()
        poll.register(uffd.fd, select.POLLIN)

        def asked():
            return bool(poll.poll(20_000)) and uffd.read((abi.uffd_msg * 4)()) > 0

        yield asked, lambda: uffd.continue_(view.hva + GPA, PAGE_SIZE)


def others_go_on_while_an_access_waits_for_the_disk(access):
    results = []
    with pager_of(PAGES) as pager, MemfdBacking(PAGES * PAGE_SIZE) as backing:
        backing.on_disk = True
        pager.mark_present(0, 2 * PAGE)
        backing.vmm.view[GPA + 8 : GPA + 11] = b"abc"
        memory = GuestMemory(pager.layout, backing, pager)
        with slow_disk(backing.vmm) as (asked, bring):
            device = threading.Thread(target=lambda: results.append(ACCESSES[access](memory)))
            device.start()
            assert asked()
            pager.mark_present(2 * PAGE, 1)
            pager.mark_nonpresent(0, 1)
            memory.write(GPA + PAGE_SIZE, b"another page")
            with contextlib.suppress(BusyError):  # the page itself is held
                pager.mark_nonpresent(PAGE, 1, timeout=0)
                raise AssertionError
            bring()
            device.join()
            pager.mark_nonpresent(PAGE, 1, timeout=0)
    assert results == [True]


@pytest.mark.userfaultfd
@pytest.mark.parametrize("access", list(ACCESSES))
def test_others_go_on_while_an_access_waits_for_the_disk(access):
    # In a process of its own: an access that waits with Python's lock held would hold up the test, too.
    here = Path(__file__).parent
    support = here.parent / "support"
    scenario = others_go_on_while_an_access_waits_for_the_disk.__name__
    code = f"import {Path(__file__).stem} as test; test.{scenario}({access!r})"
    environment = {**os.environ, "PYTHONPATH": f"{here}:{support}:{here.parents[1]}"}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=True)


@pytest.mark.parametrize("access", list(ACCESSES))
def test_a_disk_that_cannot_bring_a_page_is_said_and_the_page_let_go(access):
    with pager_of(PAGES) as pager, FileBacking(PAGES * PAGE_SIZE) as backing:
        pager.mark_present(0, 2 * PAGE)
        memory = GuestMemory(pager.layout, backing, pager)
        os.ftruncate(backing._file, 0)  # the access itself would be a SIGBUS, as with a disk that fails
        with pytest.raises(
            PagingError, match=r"at gpa 0x[67][0-9a-f]* cannot be brought into memory from the disk"
        ):
            ACCESSES[access](memory)
        assert pager.mark_nonpresent(PAGE, 1, timeout=0) == 1


def test_a_view_and_nothing_at_all_are_not_brought_in():
    with pager_of(PAGES) as pager, FileBacking(PAGES * PAGE_SIZE) as backing:
        pager.mark_present(0, 2)
        memory = GuestMemory(pager.layout, backing, pager)
        os.ftruncate(backing._file, 0)
        assert memory.read(0, 0) == b""
        with memory.view(0, PAGE_SIZE) as view:
            assert len(view) == PAGE_SIZE


@pytest.mark.parametrize(
    ("swaps", "lines"), [(False, "Filename"), (True, "Filename\n/dev/x partition 1 0 -2")]
)
def test_memory_is_on_disk_where_the_host_swaps_but_for_huge_pages(swaps, lines, monkeypatch):
    monkeypatch.setattr(backing_module.Path, "read_text", lambda self: lines)
    for kind in (MemfdBacking, AnonymousBacking):
        with kind(PAGES * PAGE_SIZE) as backing:
            assert backing.on_disk is swaps
    with FileBacking(PAGES * PAGE_SIZE) as backing:
        assert backing.on_disk
    assert not HugetlbBacking.on_disk
