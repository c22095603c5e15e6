"""Every operation of the pager, interrupted at every point: nothing is left behind, and all goes on as without."""

import os

import numpy as np
import pytest
from fakes import PAGES, content, page_of, pager_of, source_error
from interruptions import interrupt_everywhere

from kvmdp.page import PAGE_SIZE, Origin, Outcome, PageFault
from kvmdp.paging.access import GuestMemory
from kvmdp.paging.claim import State, Waiter
from kvmdp.paging.pager import Pager

# Of steps, which are many, every so manieth is interrupted; all of them where that is asked for.
STRIDE = 1 if os.environ.get("KVMDP_EFFORT") == "full" else 7
ZEROS = bytes(PAGE_SIZE)
HEALED = b"healed  " * (PAGE_SIZE // 8)
SOON = 5.0  # seconds that nothing here needs, unless something was left behind


class Backing:
    """What GuestMemory uses of one."""

    shared = True
    on_disk = False

    def __init__(self, view):
        self.vmm = type("View", (), {"view": view})


def memory_of(pager):
    return GuestMemory(pager.layout, Backing(pager.trap.fill_view), pager, Origin.HOST, timeout=SOON)


def present(pager):
    pager.mark_present(0, 8)


def poisoned(pager):
    pager.mark_present(0, 8)
    pager.poison(3)


def shut_off(pager):
    pager.mark_present(0, 8)
    pager.mark_nonpresent(0, 8)


def evicted(pager):
    pager.mark_present(0, 8)
    pager.evict(0, 8)


def full(pager):
    pager.mark_present(0, PAGES)


def off(pager):
    full(pager)
    pager.disable()


def cancelled(pager):
    pager.mark_present(2, 4)
    pager.cancel()


def nothing(pager):
    pass


def pieces(pager):
    pager.source.pieces = 5


def pause_and_resume(pager):
    def fail(first, count):
        raise source_error(first, count)

    pager.source.before = fail
    try:
        assert pager.resolve(PageFault(5)) is Outcome.FAILED
    finally:
        pager.source.before = lambda first, count: None
        pager.resume()


THREE_PAGES = np.array([0b1011, *[0] * (PAGES // 64 - 1)], np.uint64)


def view(pager):
    with memory_of(pager).view(2 * PAGE_SIZE, 3 * PAGE_SIZE) as found:
        found[0] = found[0]


def held(pager):
    with pager.held(PageFault(5)) as outcome:
        assert outcome in (Outcome.PRESENT, Outcome.POISONED)


def frozen(pager):
    with pager.frozen(SOON):
        pass


def switch_on_and_off(pager):
    pager.disable()
    pager.enable()


# What is done, and what comes before
OPERATIONS = {
    "resolve": (nothing, lambda pager: pager.resolve(PageFault(5))),
    "resolve or park": (nothing, lambda pager: pager.resolve_or_park(PageFault(5), Waiter(lambda: None))),
    "resolve what is shut off": (shut_off, lambda pager: pager.resolve(PageFault(5))),
    "resolve what is evicted": (evicted, lambda pager: pager.resolve(PageFault(5))),
    "mark present": (nothing, lambda pager: pager.mark_present(0, 16)),
    "mark a bitmap present": (nothing, lambda pager: pager.mark_bitmap_present(THREE_PAGES)),
    "complete": (shut_off, lambda pager: pager.complete(0, 16)),
    "mark non-present": (present, lambda pager: pager.mark_nonpresent(0, 8)),
    "mark a bitmap non-present": (present, lambda pager: pager.mark_bitmap_nonpresent(THREE_PAGES)),
    "shut off": (present, lambda pager: pager.shut_off(0, 8)),
    "evict": (present, lambda pager: pager.evict(0, 8)),
    "evict what is shut off": (shut_off, lambda pager: pager.evict_shut_off(0, 8)),
    "discard": (present, lambda pager: pager.discard(0, 8)),
    "discard what is absent": (evicted, lambda pager: pager.discard(4, 8)),
    "poison": (present, lambda pager: pager.poison(3)),
    "unpoison": (poisoned, lambda pager: pager.unpoison(3, HEALED)),
    "collapse": (full, lambda pager: pager.collapse(0, PAGES)),
    "reassert": (present, lambda pager: pager.reassert(3)),
    "read": (shut_off, lambda pager: memory_of(pager).read(7 * PAGE_SIZE + 4000, 300)),
    "write": (nothing, lambda pager: memory_of(pager).write(7 * PAGE_SIZE, content(7))),
    "load": (nothing, lambda pager: memory_of(pager).load64(7 * PAGE_SIZE)),
    "view": (present, view),
    "hold": (nothing, held),
    "hold what is poisoned": (poisoned, held),
    "freeze and thaw": (present, frozen),
    "disable": (full, Pager.disable),
    "enable": (off, Pager.enable),
    "disable and enable": (full, switch_on_and_off),
    "cancel": (shut_off, Pager.cancel),
    "reopen": (cancelled, Pager.reopen),
    "mark present piece by piece": (pieces, lambda pager: pager.mark_present(0, 16)),
    "read pages where they are": (
        evicted,
        lambda pager: pager.content(0, 16, memoryview(bytearray(16 * PAGE_SIZE))),
    ),
    "pause and resume": (nothing, pause_and_resume),
}


def check_nothing_is_left(pager):
    assert not pager.mutex._is_owned()
    ledger = pager.ledger
    assert ledger.claims == []
    assert not set(ledger.states) & {State.INFLIGHT, State.EVICTING, State.ADMITTING}
    is_present = bytes(state == State.PRESENT for state in ledger.states)
    assert bytes(pager.bitmap.test(page) for page in range(PAGES)) == is_present
    assert ledger.resident == sum(map(ledger.states.count, (State.PRESENT, State.BACKED)))
    if pager.enabled:
        assert pager.trap.armed
        assert bytes(pager.trap.entered) == is_present, (
            "the guest may enter what is absent, or not what is present"
        )
    else:
        assert not pager.trap.armed
    assert pager.error is None
    assert not pager.gate.is_closed
    assert not pager.accesses.frozen


def check_all_goes_on(pager):
    """Each of these would wait in vain for a claim, a pin or a freeze that was left behind; and all bytes are right."""
    pager.reopen()
    pager.enable()
    for page in range(PAGES):
        if pager.ledger.states[page] == State.POISON:
            pager.unpoison(page, HEALED)
    was_zero = [page for page in range(PAGES) if pager.ledger.states[page] == State.ZERO]
    with pager.frozen(SOON):
        pass
    assert pager.mark_present(0, PAGES) is Outcome.PRESENT
    for page in range(PAGES):
        allowed = {ZEROS} if page in was_zero else {content(page)}
        if page == 3:
            allowed |= {HEALED, ZEROS}
        assert page_of(pager, page) in allowed, page
    pager.disable()
    pager.enable()
    assert pager.mark_nonpresent(0, PAGES, timeout=SOON) == PAGES
    assert memory_of(pager).read(4 * PAGE_SIZE, 8) in (content(4)[:8], ZEROS[:8])
    check_nothing_is_left(pager)


def check(name, steps, stride=1):
    before, operate = OPERATIONS[name]

    def once(interrupted):
        with pager_of(needs_quiesce=True) as pager:
            before(pager)
            interrupted(lambda: operate(pager))
            pager.resume()
            check_nothing_is_left(pager)
            check_all_goes_on(pager)

    return interrupt_everywhere(once, steps, stride)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_exception_at_any_entry_of_a_function(name):
    assert check(name, steps=False) > 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_signal_at_any_step(name):
    assert check(name, steps=True, stride=STRIDE) > 1
