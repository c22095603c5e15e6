"""The coverage table: what each cell says is what happened, and a trap that fails is found out."""

import errno
import os

import pytest
from harness import TRAPS, require_trap

from kvmdp.errors import UnsupportedError
from kvmdp.lab import coverage as module
from kvmdp.lab.coverage import ACCESSES, coverage, covered_traps, run_cell
from kvmdp.lab.coverage_cell import Seen
from kvmdp.machine.hostinfo import emulates_ring_0, uses_nested_paging
from kvmdp.machine.options import catches_page_walks
from kvmdp.paging.access import GuestMemory
from kvmdp.source.request import FetchRequest
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap import registry
from kvmdp.trap.slots.mmio import MmioTrap

pytestmark = pytest.mark.kvm

ALL_TRAPS = covered_traps()
OWN_EXIT = {"marker": "sigbus", "memory-fault": "memory_fault", "mmio": "mmio", "userfaultfd": "uffd_event"}
RING_3_DATA = ("read", "write", "atomic")


class NeverTraps(MmioTrap):
    """All of RAM is plain memory, as if nothing had been armed."""

    def arm(self, presence):
        self._slots.map_plain()

    def admit(self, first, count):
        raise OSError(errno.EEXIST, "the pages have a memslot")


def put_in_place_of_mmio(monkeypatch, trap):
    monkeypatch.setitem(registry.TRAPS, "mmio", trap)


class FilledBefore(NeverTraps):
    """The same on memory that happens to hold what the source has: right bytes, and nothing was caught."""

    def arm(self, presence):
        super().arm(presence)
        SyntheticSource(module._MEMORY, module._SEED).fetch(FetchRequest(0), self.fill_view)


def cell(access, trap):
    require_trap(trap)
    return run_cell(access, trap)


@pytest.mark.parametrize("access", ["read", "write", "fetch", "atomic", "vector", "string", "emulator"])
@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_what_a_vcpu_does_is_caught_and_exact(trap, access):
    found = cell(access, trap)
    assert found.exact
    assert found.ok
    assert found.seen is not Seen.MISSED
    # For string input the pages are there before the port is asked.
    assert sum(found.exits.values()) >= (6 if access == "string" else 8)
    if trap == "userfaultfd":
        assert (found.seen, found.exits.keys()) == (Seen.SLEEP, {"uffd_event"})
    else:
        emulated = (Seen.EMULATION, Seen.RUN_AGAIN)
        assert found.seen in (emulated if "mmio" in found.exits else (Seen.EXIT,))
    if found.seen in (Seen.EMULATION, Seen.RUN_AGAIN):
        assert found.note


@pytest.mark.parametrize("access", RING_3_DATA)
@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_plain_accesses_are_caught_in_the_traps_own_way_one_by_one(trap, access):
    assert cell(access, trap).exits == {OWN_EXIT[trap]: 8}


@pytest.mark.parametrize("trap", TRAPS)
def test_string_instructions_are_data_to_the_trap_and_port_io_is_emulated(trap):
    found = cell("string", trap)
    if trap == "mmio":
        assert found.seen is Seen.EMULATION
    else:
        assert found.seen is Seen.RUN_AGAIN
        assert found.exits == {OWN_EXIT[trap]: 4, "mmio": 2}


@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_a_far_call_that_changes_cs_is_exact_or_the_table_says_that_it_is_not(trap):
    found = cell("far call", trap)
    assert found.ok
    assert found.exact == (found.seen is not Seen.EMULATION)
    if not found.exact:
        assert "loses one of its two stores" in found.note
    if trap == "userfaultfd":
        assert found.exact


@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_a_page_walk_is_caught_or_what_helps_is_said(trap):
    found = cell("page walk", trap)
    assert found.ok
    if catches_page_walks(trap):
        assert (found.exact, found.note) == (True, "")
        assert sum(found.exits.values()) == 8 + 3  # the pages, and PML4, PDPT and a directory
    else:
        assert (found.seen, found.exact) == (Seen.MISSED, False)
        assert (
            "--page-tables paged makes them present before the guest is entered, and was exact" in found.note
        )


@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_the_frame_of_an_event_is_caught_or_it_is_said_where_stacks_belong(trap):
    found = cell("event frame", trap)
    assert found.ok
    if catches_page_walks(trap):
        assert (found.exact, found.note) == (True, "")
    else:
        assert (found.seen, found.exact) == (Seen.MISSED, False)
        assert "the stacks of handlers belong into present memory" in found.note


@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_an_access_on_which_kvm_spins_is_not_called_caught(trap):
    found = cell("sgdt", trap)
    assert found.exact
    assert found.ok
    if trap == "userfaultfd":
        assert found.seen is Seen.SLEEP
    elif not uses_nested_paging():
        assert found.seen is Seen.MISSED
        assert "the watchdog" in found.note


@pytest.mark.parametrize("access", ["kvmclock page", "steal time"])
@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_what_kvm_writes_by_itself_is_caught_where_it_is_enabled(trap, access):
    found = cell(access, trap)
    if not found.exits:
        pytest.skip(found.note)
    assert (found.seen, set(found.exits), found.exact) == (Seen.EXIT, {"msr"}, True)


@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_a_user_space_touch_is_caught_by_userfaultfd_alone(trap):
    found = cell("user touch", trap)
    assert found.ok
    if trap == "userfaultfd":
        assert (found.seen, found.exits, found.exact) == (Seen.SLEEP, {"uffd_event": 1}, True)
    else:
        assert (found.seen, found.exits, found.exact) == (Seen.MISSED, {}, False)
        assert ("SIGBUS" in found.note) is (trap == "marker")
        assert "run --detect-leaks" in found.note


@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_a_device_that_asks_waits_and_one_that_does_not_is_caught_by_userfaultfd_alone(trap):
    asking, unasked = cell("device thread", trap), cell("system call", trap)
    assert (asking.seen, asking.exits, asking.exact) == (Seen.SLEEP, {"request": 8}, True)
    if trap == "userfaultfd":
        assert (unasked.seen, unasked.exits, unasked.exact) == (Seen.SLEEP, {"uffd_event": 1}, True)
    else:
        assert (unasked.seen, unasked.exits, unasked.exact) == (Seen.MISSED, {}, False)
        assert unasked.note.endswith("devices have to ask the pager first")
        assert unasked.note.startswith("it fails (Bad address)") is (trap == "marker")


@pytest.mark.parametrize(
    "access", [each for each in ACCESSES if each not in ("page walk", "system call", "sgdt", "user touch")]
)
def test_a_trap_that_never_traps_is_found_out(access, monkeypatch):
    put_in_place_of_mmio(monkeypatch, NeverTraps)
    found = run_cell(access, "mmio")
    assert found.seen is Seen.MISSED or access == "device thread"
    assert not found.ok or access == "device thread"
    assert found.note


@pytest.mark.parametrize("access", ["read", "write", "string", "emulator"])
def test_right_bytes_that_nothing_caught_are_missed(access, monkeypatch):
    put_in_place_of_mmio(monkeypatch, FilledBefore)
    found = run_cell(access, "mmio")
    assert (found.seen, found.ok, found.exits) == (Seen.MISSED, False, {})


def test_a_device_that_does_not_ask_is_found_out(monkeypatch):
    def write_without_asking(memory, gpa, data):
        memory._view[gpa : gpa + len(data)] = data

    monkeypatch.setattr(GuestMemory, "write", write_without_asking)
    found = run_cell("device thread", "mmio")
    assert (found.seen, found.exact, found.ok, found.note) == (
        Seen.MISSED,
        False,
        False,
        "the bytes were wrong",
    )


def test_a_cell_that_breaks_is_missed_and_says_why(monkeypatch):
    def broken(*arguments):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(MmioTrap, "make", broken)
    found = run_cell("read", "mmio")
    assert (found.seen, found.exact, found.ok) == (Seen.MISSED, False, False)
    assert "Cannot allocate memory" in found.note


def test_a_trap_that_the_host_lacks_is_a_column_with_the_reason(monkeypatch):
    def lacking(*arguments):
        raise UnsupportedError("no such thing: get one")

    for trap in ("marker", "userfaultfd", "memory-fault"):
        monkeypatch.setattr(registry.TRAPS[trap], "make", lacking)
    asked = []
    monkeypatch.setattr(module, "ACCESSES", {each: ACCESSES[each] for each in ("read", "device thread")})
    table = coverage(lambda access, trap: asked.append((access, trap)))
    assert [(cell.access, cell.trap) for cell in table.cells] == [("read", "mmio"), ("device thread", "mmio")]
    assert table.skipped == dict.fromkeys(("marker", "memory-fault", "userfaultfd"), "no such thing: get one")
    assert table.ok
    assert len(asked) == 4 + 1


def test_ring_0_stands_for_the_emulator_where_it_is_emulated():
    found = run_cell("emulator", "mmio")
    # Eight pages written by ring 0, or eight of which bytes went out and came in.
    assert found.exits == {"mmio": 8}
    assert emulates_ring_0() or "emulation_failure" not in found.exits


@pytest.mark.parametrize("trap", ALL_TRAPS)
def test_selectors_and_flags_are_exact_or_the_table_says_that_they_are_not(trap):
    found = cell("cs, flags", trap)
    assert found.ok
    assert found.exact or (trap == "mmio" and emulates_ring_0())
    if not found.exact:
        assert found.seen is Seen.EMULATION
        assert "stores the guest's own" in found.note
