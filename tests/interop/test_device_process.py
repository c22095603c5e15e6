"""vCPUs, a device thread and a device process at the same absent pages: exact, fetched once, everybody answered."""

import threading

import numpy as np
import pytest
from device_process import child_of
from effort import by_effort
from harness import SEED, TIMEOUT, all_of_ram, make_machine, meanwhile, plan

from kvmdp.errors import BusyError
from kvmdp.machine.workloads.arithmetic import place_in_page
from kvmdp.page import PAGE_SIZE
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.uffd.options import UffdOptions

pytestmark = pytest.mark.kvm

PAGES = 4096
ROUNDS = by_effort(1, 1, 100)
DEVICE = """
from random import Random
from kvmdp.machine.workloads.arithmetic import place_in_page
import numpy as np
pages = list(range(4096))
Random(1).shuffle(pages)
words = ((place_in_page(np.arange(4096), 9) + 1) % 512).tolist()
for page in pages:
    memory.store64(page * 4096 + words[page] * 8, page + 1)
memory.close()
say("done")
"""


def _words(number):
    """Where in each page the words of a writer are: those of the vCPUs have number 0."""
    return (place_in_page(np.arange(PAGES), 9) + number) % (PAGE_SIZE // 8)


def _writer(memory, written):
    """What the device thread does at its call number `number`; `written` is set at the end."""
    words = _words(2).tolist()

    def write(number):
        if number == PAGES:
            written.set()
            return False
        page = number * 1021 % PAGES
        memory.store64(page * PAGE_SIZE + words[page] * 8, PAGES + page)
        return True

    return write


@pytest.mark.parametrize("trap", ["marker", "memory-fault", "mmio", "userfaultfd"])
def test_vcpus_a_device_thread_and_a_device_process_share_absent_pages(trap):
    for _ in range(ROUNDS):
        workload = plan("atomic", vcpus=2, memory=PAGES * PAGE_SIZE, pages=PAGES)
        source = SyntheticSource(PAGES * PAGE_SIZE, SEED)
        sentences = []
        with make_machine(trap, workload=workload, source=source) as machine:
            server = machine.serve_devices(sentences.append)

            written = threading.Event()
            write = _writer(machine.memory_for_device(1), written)

            with child_of(server, DEVICE) as child:
                hammering = meanwhile(write, lambda number: child.hear() != "done")
                with hammering:
                    machine.run(TIMEOUT)
                    assert written.wait(TIMEOUT)  # with all pages present by now
                assert child.session.wait_ended(TIMEOUT)
            pages = np.arange(PAGES)
            expected = workload.expected_pages(source.pages, pages)
            expected[pages, _words(1)] = pages + 1
            expected[pages, _words(2)] = PAGES + pages
            wrong = (all_of_ram(machine) != expected).any(axis=1)
            assert np.flatnonzero(wrong).tolist() == []
            assert machine.pager.counters.pages_fetched == PAGES
            assert machine.pager.ledger.claims == []
            assert server.counters.requests == server.counters.replies
            assert sentences == []


EARLY_ACK = """
from kvmdp.peers.owed_acks import OwedAcks

def acknowledge_at_once(self):
    tokens, self._owed = [token for token, _, _ in self._owed], []
    return tokens
OwedAcks.payable = acknowledge_at_once
"""
WRITER = """
with memory.view(4096, 4096) as view:
    say("open")
    heard()
    view[:8] = b"written!"
say("closed")
heard()
"""


@pytest.mark.parametrize("early", [False, True])
def test_a_device_that_acknowledges_too_early_loses_what_it_writes(early, monkeypatch):
    # In this mode the bytes of a page that is taken away are moved elsewhere, and come back: a late write shows. It is
    # refused to devices, because it fills pages elsewhere too; here nothing is filled while there is one.
    monkeypatch.setattr("kvmdp.peers.peers.check_shareable", lambda *_: None)
    with make_machine("userfaultfd", uffd=UffdOptions(mode="missing")) as machine:
        server = machine.serve_devices(print)
        with child_of(server, (EARLY_ACK if early else "") + WRITER) as child:
            assert child.hear() == "open"
            before = machine.memory.read(PAGE_SIZE, PAGE_SIZE)
            if early:
                assert machine.pager.mark_nonpresent(1, 1) == 1
            else:
                with pytest.raises(BusyError, match="a view open"):
                    machine.pager.mark_nonpresent(1, 1, timeout=0.05)
            child.tell("write")
            assert child.hear() == "closed"
            if not early:
                assert machine.pager.mark_nonpresent(1, 1, timeout=TIMEOUT) == 1
            exact = machine.memory.read(PAGE_SIZE, PAGE_SIZE) == b"written!" + before[8:]
            assert exact is not early
            child.tell("end")
