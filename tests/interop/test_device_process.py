"""vCPUs, a device thread and a device process at the same absent pages: exact, fetched once, everybody answered."""

import os

import numpy as np
import pytest
from device_process import child_of
from harness import SEED, TIMEOUT, all_of_ram, make_machine, meanwhile, plan

from kvmdp.memory.layout import PAGE_SIZE
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

PAGES = 4096
ROUNDS = int(os.environ.get("KVMDP_DEVICE_ROUNDS", "1"))
DEVICE = """
from random import Random
pages = list(range(4096))
Random(1).shuffle(pages)
total = sum(len(memory.read(page * 4096 + 4088, 8)) for page in pages)
memory.close()
say(total)
"""


@pytest.mark.parametrize("trap", ["marker", "memory-fault", "mmio", "userfaultfd"])
def test_vcpus_a_device_thread_and_a_device_process_share_absent_pages(trap):
    for _ in range(ROUNDS):
        workload = plan("atomic", vcpus=2, memory=PAGES * PAGE_SIZE, pages=PAGES)
        source = SyntheticSource(PAGES * PAGE_SIZE, SEED)
        sentences = []
        with make_machine(trap, workload=workload, source=source) as machine:
            server = machine.serve_devices(sentences.append)

            def read(number):
                machine.memory.read((number * 1021 % PAGES) * PAGE_SIZE, 8)
                return number < PAGES - 1

            with child_of(server, DEVICE) as child:
                hammering = meanwhile(read, lambda number: child.hear() != PAGES * 8)
                with hammering:
                    machine.run(TIMEOUT)
                assert child.session.wait_ended(TIMEOUT)
            wrong = (all_of_ram(machine) != workload.expected_pages(source.pages, np.arange(PAGES))).any(
                axis=1
            )
            assert np.flatnonzero(wrong).tolist() == []
            assert machine.pager.counters.pages_fetched == PAGES
            assert machine.pager.ledger.claims == []
            assert server.counters.requests == server.counters.replies
            assert sentences == []
