"""A revocation wants memslots with the vCPUs stopped, a cut and a merge want the vCPUs stopped with their memslots."""

import threading

import numpy as np
import pytest
from harness import SEED, make_machine

from kvmdp.page import PAGE_SIZE, REGION, Outcome
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.slots.ram_slots import MAX_GRANULE_SLOTS

pytestmark = pytest.mark.kvm

MEMORY = (
    2 * MAX_GRANULE_SLOTS * PAGE_SIZE
)  # too many pages for a memslot each: closed ones are cut, open ones merged
SOON = 20


# Page 0 is there: page 2 has to be cut out of a closed memslot, and all that the region lacks is merged with page 0.
@pytest.mark.parametrize(("first", "count"), [(2, 1), (1, REGION - 1)], ids=["cut", "merge"])
def test_threads_that_want_memslots_and_stopped_vcpus_in_either_order_both_get_them(
    first, count, monkeypatch
):
    source = SyntheticSource(MEMORY, SEED)
    with make_machine("memory-fault", source=source, memory_bytes=MEMORY, granule=PAGE_SIZE) as machine:
        pager, results = machine.pager, {}
        pager.mark_present(0, 1)
        has_memslots, has_stopped = threading.Event(), threading.Event()
        close = machine.gate._close

        def close_in_turn(*arguments, **options):
            if threading.current_thread() is bringing:
                has_memslots.set()
                assert has_stopped.wait(SOON)
            closed = close(*arguments, **options)
            if threading.current_thread() is taking:
                has_stopped.set()
            return closed

        def bring():
            results["brought"] = pager.mark_present(first, count)

        def take():
            assert has_memslots.wait(SOON)
            results["taken"] = pager.mark_nonpresent(0, 1)

        monkeypatch.setattr(machine.gate, "_close", close_in_turn)
        bringing = threading.Thread(target=bring, daemon=True)
        taking = threading.Thread(target=take, daemon=True)
        for thread in (bringing, taking):
            thread.start()
        for thread in (bringing, taking):
            thread.join(SOON)
            assert not thread.is_alive()
        assert results == {"brought": Outcome.PRESENT, "taken": 1}
        monkeypatch.undo()
        pages = np.arange(REGION + 1)
        assert np.array_equal(machine.memory.read_pages(pages), source.pages(pages))
