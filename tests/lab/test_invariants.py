"""The checker itself: it finds nothing where all is well, and what is broken on purpose it names."""

import pytest
from harness import TRAPS, every_trap_and_backing, make_machine, require_trap

from kvmdp.lab.invariants import violations
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.claim import State

pytestmark = pytest.mark.kvm


@every_trap_and_backing
def test_nothing_is_found_where_pages_come_and_go(trap, backing):
    with make_machine(trap, backing) as machine:
        pager = machine.pager
        steps = [
            lambda: machine.memory.read(0, 100 * PAGE_SIZE),
            lambda: pager.mark_nonpresent(10, 20),
            lambda: machine.memory.read(15 * PAGE_SIZE, 8),
            lambda: pager.evict(50, 10),
            lambda: pager.discard(0, 12),
            lambda: pager.poison(30),
            lambda: pager.unpoison(30, bytes(PAGE_SIZE)),
            lambda: pager.mark_present(0, 512),
            pager.disable,
            pager.enable,
        ]
        assert violations(pager) == []
        for step in steps:
            step()
            assert violations(pager) == []


def damaged(trap):
    machine = make_machine(trap)
    machine.memory.read(0, 8 * PAGE_SIZE)
    assert violations(machine.pager) == []
    return machine


@pytest.mark.parametrize("trap", TRAPS)
def test_a_state_that_the_bitmap_and_the_trap_do_not_know_is_found(trap):
    with damaged(trap) as machine:
        machine.pager.ledger.states[100] = State.PRESENT
        found = violations(machine.pager)
        assert "the bit does not say whether the page is present: 1 pages (100)" in found
        assert len(found) == 2


def test_a_page_left_claimed_is_found():
    with damaged("marker") as machine:
        machine.pager.ledger.states[100] = State.INFLIGHT
        assert violations(machine.pager) == ["claimed, though no thread is active: 1 pages (100)"]


@pytest.mark.parametrize(
    ("trap", "message"),
    [
        ("memory-fault", "present, and in no open memslot: 1 pages (3)"),
        ("mmio", "present, and in no open memslot: 1 pages (3)"),
    ],
)
def test_a_memslot_that_is_missing_is_found(trap, message):
    with damaged(trap) as machine:
        ram_slots = machine.pager.trap._slots
        ram_slots.delete(ram_slots.overlapping(3, 1)[0])
        assert violations(machine.pager) == [message]


@pytest.mark.parametrize("trap", ["memory-fault", "mmio"])
def test_a_memslot_that_lets_the_guest_into_an_absent_page_is_found(trap):
    with damaged(trap) as machine:
        ram_slots = machine.pager.trap._slots
        for block in ram_slots.overlapping(200, 1):
            ram_slots.delete(block)
        ram_slots.open(200, 1)
        assert violations(machine.pager) == ["absent, and in a memslot that does not trap: 1 pages (200)"]


@pytest.mark.parametrize("trap", ["marker", "layered"])
def test_a_marker_that_is_missing_or_too_many_is_found(trap):
    require_trap(trap)
    with damaged(trap) as machine:
        hva = machine.backing.guest.hva
        machine.pager.trap._uffd_of(300).continue_(hva + 300 * PAGE_SIZE, PAGE_SIZE)
        machine.backing.guest.drop(4 * PAGE_SIZE, PAGE_SIZE)
        machine.pager.trap._uffd_of(4).poison(hva + 4 * PAGE_SIZE, PAGE_SIZE)
        assert violations(machine.pager) == [
            "absent, and mapped in the guest view: 1 pages (300)",
            "absent, and without a marker: 1 pages (300)",
            "present, and under a marker: 1 pages (4)",
        ]
