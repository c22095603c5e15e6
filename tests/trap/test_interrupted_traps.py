"""Interruptions of the main thread where it is at memslots, or at the device view."""

import signal
import threading
from types import SimpleNamespace

import pytest
from interruptions import interrupt_everywhere

from kvmdp.memory.backing import MemfdBacking
from kvmdp.memory.layout import GuestLayout
from kvmdp.memory.mapping import Mapping
from kvmdp.page import PAGE_SIZE, Outcome
from kvmdp.trap.slots.partial_slots import SLOT_BYTES, PartialRegions
from kvmdp.trap.uffd.device_view import DeviceView

MEMORY = 2 << 20
REGION = 512
SOON = 10


class InterruptedSlots:
    """Memslots of full regions; SIGINT comes in the middle of each merge."""

    spare = 1 << 20

    def __init__(self):
        self.pieces = 2
        self.merges = 0

    def blocks_in(self, _first, _count):
        return self.pieces

    def merge_upward(self, _first, _count, _quiesced):
        self.pieces = 0
        signal.raise_signal(signal.SIGINT)
        self.pieces = 1
        self.merges += 1


def regions_of(slots, *, present, memory=1 << 20, complete=None):
    bitmap = SimpleNamespace(count_range=lambda _first, _count: present)
    pager = SimpleNamespace(
        bitmap=bitmap,
        gate=SimpleNamespace(quiesced=None),
        jobs=SimpleNamespace(most_at_once=None),
        complete=complete,
    )
    return PartialRegions(slots, pager, REGION, memory)


def test_an_interruption_waits_until_memslots_are_merged_and_the_next_thread_merges_too():
    slots = InterruptedSlots()
    regions = regions_of(slots, present=REGION)
    for merges in (1, 2):
        slots.pieces = 2
        regions.changed(0, 1)
        with pytest.raises(KeyboardInterrupt):
            regions.after_fault()
        assert (slots.pieces, slots.merges) == (1, merges)


def test_an_interruption_ends_the_fetch_of_what_a_region_lacks_and_the_next_thread_fetches_again():
    fetches = []

    def complete(first, _count):
        fetches.append(first)
        signal.raise_signal(signal.SIGINT)
        fetches.append("not interrupted")
        return Outcome.PRESENT

    regions = regions_of(InterruptedSlots(), present=1, memory=SLOT_BYTES, complete=complete)
    regions.changed(0, 1)
    for count in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            regions.after_fault()
        assert fetches == [0] * count


@pytest.mark.parametrize("steps", [False, True], ids=["at any entry", "at any step"])
@pytest.mark.parametrize(
    "access",
    [lambda view: view.read(PAGE_SIZE, 8), lambda view: view.write(PAGE_SIZE, b"8 bytes.")],
    ids=["read", "write"],
)
def test_an_interrupted_access_does_not_hold_up_the_end_of_the_device_view(access, steps):
    def once(interrupted):
        with MemfdBacking(MEMORY) as backing:
            view = DeviceView(GuestLayout(MEMORY), Mapping.shared(backing.fd, MEMORY))
            interrupted(lambda: access(view))
            view.end()
            closing = threading.Thread(target=view.close, daemon=True)
            closing.start()
            closing.join(SOON)
            assert not closing.is_alive()

    assert interrupt_everywhere(once, steps) > 1
