"""Two vCPUs add to the words of the same pages while a thread evicts them at random: no addition is lost.

Pages go to the sink, back to the image, or are shut off first. `KVMDP_EFFORT=full` takes 8,192 pages
and goes on for so long with each trap; a guest that has come to its end is followed by another.
"""

import contextlib
import random
import time

import numpy as np
import pytest
from effort import by_effort
from harness import SEED, TIMEOUT, contents, every_trap_and_backing, make_machine, meanwhile, plan

from kvmdp.machine.hostinfo import cpu_model
from kvmdp.machine.workloads import combined_checksum
from kvmdp.memory.layout import MIN_MEMORY
from kvmdp.page import PAGE_SIZE
from kvmdp.source.base import read_pages
from kvmdp.source.image import WritableImageSource
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

SECONDS = by_effort(0, 0, 30)
# A CPU that QEMU emulates takes minutes for what a real one does in seconds.
PAGES = 8192 if SECONDS else 256 if cpu_model().startswith("QEMU TCG") else 1024
MEMORY = max(PAGES * PAGE_SIZE, MIN_MEMORY)


@every_trap_and_backing
def test_no_addition_is_lost_while_pages_are_evicted(trap, backing, tmp_path):
    image = SyntheticSource(MEMORY, SEED)
    content = read_pages(image, np.arange(MEMORY // PAGE_SIZE))
    path = tmp_path / "image"
    end = time.monotonic() + SECONDS
    guests = evicted = 0
    # On a busy host a guest may be done before another thread has had its turn.
    while (not evicted and guests < 20) or time.monotonic() < end:
        path.write_bytes(content.tobytes())
        with contextlib.closing(WritableImageSource(path)) as source:
            evicted += pages_evicted_meanwhile(trap, backing, source, image, guests)
        guests += 1
    assert evicted > 0


def pages_evicted_meanwhile(trap, backing, source, image, seed):
    """Run a guest while pages are evicted; what it saw and left must be exact."""
    workload = plan("atomic", vcpus=2, memory=MEMORY, pages=PAGES, iterations=3)
    draw = random.Random(seed)
    with make_machine(trap, backing, workload=workload, source=source) as machine:
        pager = machine.pager

        def take(_number):
            first = draw.randrange(PAGES)
            count = min(draw.choice((1, 8, 64)), PAGES - first)
            draw.choice((pager.evict, pager.evict, pager.write_back, pager.mark_nonpresent))(first, count)
            # Or the guest gets nowhere: every stop of the vCPUs costs more than the next fault.
            time.sleep(0.01)

        with meanwhile(take):
            machine.run(4 * TIMEOUT)
        expected = combined_checksum(workload.expected_checksums(lambda pages: read_pages(image, pages)))
        assert combined_checksum(thread.parameters.checksum for thread in machine.threads) == expected
        wanted = workload.expected_pages(lambda pages: read_pages(image, pages), np.arange(PAGES))
        assert (found_wherever_it_is(machine, source) == wanted).all()
        return pager.counters.pages_evicted


def found_wherever_it_is(machine, source):
    """After the stop nothing becomes present any more: what is away is looked up where it is."""
    pages = np.arange(PAGES)
    at_source = np.frombuffer(bytes(machine.pager.ledger.states[:PAGES]), np.uint8) == 0
    found = np.empty((PAGES, PAGE_SIZE // 8), dtype=np.uint64)
    found[at_source] = read_pages(source, pages[at_source])
    found[~at_source] = contents(machine, pages[~at_source].tolist())
    return found
