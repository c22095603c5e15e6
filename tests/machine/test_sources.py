"""Sources that fail: a page is admitted with the source's bytes or not at all, whatever goes wrong on the way."""

import os
import threading

import numpy as np
import pytest
from harness import BACKINGS, MEMORY, SEED, TIMEOUT, TRAPS, all_of_ram, make_machine, plan, require_trap

from kvmdp.errors import PagingError
from kvmdp.lab.experiment import run_workload
from kvmdp.machine.options import MachineOptions
from kvmdp.source.base import SourceError, read_pages
from kvmdp.source.image import ImageSource
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

PAGE = 4096
PAGES = MEMORY // PAGE
GARBAGE = 0xA5


class FailingSource:
    """The synthetic image, but `fails(page, call)` decides whether the nth call (from 0) for a page fails.

    It returns None or the error's `transient`. A failing call leaves garbage in the destination.
    """

    name = "the failing image"

    def __init__(self, fails, size=MEMORY):
        self.size = size
        self.calls = {}
        self._inner = SyntheticSource(size, SEED)
        self._fails = fails
        self._mutex = threading.Lock()

    def fetch(self, request, destination):
        offset = request.offset
        with self._mutex:
            call = self.calls[offset // PAGE] = self.calls.get(offset // PAGE, -1) + 1
        transient = self._fails(offset // PAGE, call)
        if transient is None:
            self._inner.fetch(request, destination)
            return
        destination[:] = bytes([GARBAGE]) * len(destination)
        raise SourceError(self.name, offset, len(destination), "the disk is on fire", transient=transient)

    def extents(self):
        return self._inner.extents()

    def close(self):
        pass


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("trap", TRAPS)
def test_transient_errors_are_retried_and_the_guest_is_exact(trap, backing):
    require_trap(trap)
    source = FailingSource(lambda page, call: True if page % 32 == 5 and call < 3 else None)
    workload = plan("touch", vcpus=2, write=True, overlap=True)
    result = run_workload(MachineOptions(MEMORY, trap, backing, vcpus=2), workload, source, timeout=TIMEOUT)
    assert result.ok
    assert result.pages_present == result.pages_checked == PAGES
    assert result.counters.pages_fetched == PAGES
    assert result.counters.retries == 3 * (PAGES // 32)


@pytest.mark.parametrize("trap", TRAPS)
def test_an_error_that_stays_transient_is_given_up(trap):
    source = FailingSource(lambda page, call: True if page == 3 else None)
    with make_machine(trap, workload=plan("checksum"), source=source) as machine:
        with pytest.raises(PagingError, match="paused: the page at gpa 0x3000 cannot be fetched"):
            machine.run(TIMEOUT)
        # The first attempt, and as many again as there were pauses.
        assert source.calls[3] == machine.pager.counters.retries > 1


@pytest.mark.parametrize("fault_around", [1, 8])
@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("trap", TRAPS)
def test_a_permanent_error_pauses_and_admits_nothing_of_what_failed(trap, backing, fault_around):
    bad = 200 // fault_around * fault_around
    source = FailingSource(lambda page, call: False if page == bad else None)
    workload = plan("checksum")
    with make_machine(trap, backing, workload=workload, source=source, fault_around=fault_around) as machine:
        with pytest.raises(PagingError) as caught:
            machine.run(TIMEOUT)
        assert str(caught.value) == (
            f"paused: the page at gpa {bad * PAGE:#x} cannot be fetched: cannot read {fault_around * PAGE} bytes "
            f"at offset {bad * PAGE:#x} of the failing image: the disk is on fire"
        )
        assert machine.pager.error is caught.value
        assert source.calls[bad] == 0
        # The guest reads in order: what comes before is there, what failed and what comes after is not.
        assert machine.pager.bitmap.present_runs().tolist() == [[0, bad]]
        before = np.arange(bad)
        np.testing.assert_array_equal(all_of_ram(machine)[:bad], SyntheticSource(MEMORY, SEED).pages(before))
        assert machine.threads[0].parameters.progress <= bad
        with pytest.raises(PagingError, match="cannot be fetched"):
            machine.memory.read(bad * PAGE, 8)


@pytest.mark.parametrize("trap", TRAPS)
def test_every_vcpu_stops_when_one_cannot_have_its_page(trap):
    source = FailingSource(lambda page, call: False if page == 300 else None)
    workload = plan("checksum", vcpus=4)
    with make_machine(trap, workload=workload, source=source) as machine:
        with pytest.raises(PagingError, match="gpa 0x12c000"):
            machine.run(TIMEOUT)
        assert not any(thread.join(0) is False for thread in machine.threads)
        assert not machine.pager.bitmap.test(300)
        present = np.flatnonzero([machine.pager.bitmap.test(page) for page in range(PAGES)])
        np.testing.assert_array_equal(
            machine.memory.read_pages(present), SyntheticSource(MEMORY, SEED).pages(present)
        )


def test_above_the_hole_the_message_tells_gpa_and_offset_apart():
    memory = (3 << 30) + (64 << 20)
    first_high = (3 << 30) // PAGE
    source = FailingSource(lambda page, call: False if page >= first_high else None, memory)
    workload = plan("touch", memory=memory, order="strided", stride=8009, touches=100)
    with (
        make_machine("marker", workload=workload, source=source) as machine,
        pytest.raises(PagingError) as caught,
    ):
        machine.run(TIMEOUT)
    page = int(workload.touched[workload.touched >= first_high][0])
    assert f"the page at gpa {page * PAGE + (1 << 30):#x} cannot be fetched" in str(caught.value)
    assert f"cannot read 4096 bytes at offset {page * PAGE:#x} of the failing image" in str(caught.value)


class TruncatedAt:
    """An image file that becomes empty just before page `page` is read."""

    def __init__(self, path, page):
        self._inner = ImageSource(path)
        self._path, self._page = path, page
        self.name, self.size = self._inner.name, self._inner.size
        self.extents, self.close = self._inner.extents, self._inner.close

    def fetch(self, request, destination):
        offset = request.offset
        if offset == self._page * PAGE:
            os.truncate(self._path, 0)
        self._inner.fetch(request, destination)


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("trap", TRAPS)
def test_an_image_truncated_while_the_guest_runs_never_becomes_zero_pages(trap, backing, tmp_path):
    path = tmp_path / "memory.img"
    content = (
        np.random.default_rng(SEED).integers(1, 1 << 63, MEMORY // 8, dtype=np.uint64).reshape(PAGES, -1)
    )
    path.write_bytes(content.tobytes())
    source = TruncatedAt(path, 77)
    try:
        with make_machine(trap, backing, workload=plan("checksum"), source=source) as machine:
            with pytest.raises(PagingError) as caught:
                machine.run(TIMEOUT)
            assert machine.pager.bitmap.present_runs().tolist() == [[0, 77]]
            np.testing.assert_array_equal(all_of_ram(machine)[:77], content[:77])
    finally:
        source.close()
    assert "gpa 0x4d000 " in str(caught.value)
    assert f"offset 0x4d000 of {path}: the file ends at 0x4d000 and had {MEMORY} bytes" in str(caught.value)


def test_a_source_that_fails_after_the_run_is_an_error_too():
    """The comparison reads the source once more: what it cannot have it must not count as right."""
    source = FailingSource(lambda page, call: False if call == 1 else None)
    with pytest.raises(SourceError, match="the disk is on fire"):
        run_workload(MachineOptions(MEMORY, "mmio"), plan("checksum"), source, timeout=TIMEOUT)


def test_a_transient_error_is_retried_in_the_comparison_as_in_a_fault():
    # The first read from page 0 on is the fault's, those after it are the comparison's and the expectation's: of all of
    # RAM at once. Two of three fail.
    source = FailingSource(lambda page, call: True if page == 0 and call % 3 else None)
    result = run_workload(MachineOptions(MEMORY, "mmio"), plan("checksum"), source, timeout=TIMEOUT)
    assert result.ok
    assert result.pages_checked == PAGES
    assert result.counters.retries == 0
    assert source.calls[0] >= 6


@pytest.mark.parametrize("trap", TRAPS)
def test_a_source_with_holes_is_not_asked_for_them(trap, tmp_path):
    require_trap(trap)
    path = tmp_path / "sparse.img"
    with open(path, "wb") as file:
        for page in (0, 130, 131, PAGES - 1):
            file.seek(page * PAGE)
            file.write(os.urandom(PAGE))
    source = ImageSource(path)
    try:
        data = sum(length for _, length in source.extents()) // PAGE
        result = run_workload(MachineOptions(MEMORY, trap), plan("checksum"), source, timeout=TIMEOUT)
        content = np.fromfile(path, dtype=np.uint64).reshape(PAGES, -1)
        np.testing.assert_array_equal(read_pages(source, np.arange(PAGES)), content)
    finally:
        source.close()
    assert result.ok
    assert (result.counters.pages_fetched, result.counters.pages_zeroed) == (data, PAGES - data)
