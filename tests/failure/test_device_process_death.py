"""A device process killed while vCPUs run: the machine says so, another one takes its place, the guest is exact."""

import random
import threading
import time

import numpy as np
import pytest
from device_process import SOON, child_of
from effort import by_effort
from harness import MEMORY, SEED, TIMEOUT, all_of_ram, make_machine, meanwhile, plan, require_trap

from kvmdp.machine.workloads.arithmetic import place_in_page
from kvmdp.page import PAGE_SIZE, Origin
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.uffd.options import UffdOptions

pytestmark = pytest.mark.kvm

TRAPS = ("marker", "memory-fault", "mmio", "userfaultfd")
# Every moment takes the start of two processes.
MOMENTS = by_effort(1, 3, 50)
PAGES = MEMORY // PAGE_SIZE
GUEST_PAGES = PAGES // 2  # the guest's are the first half, so that the device has absent pages of its own
# No vCPU gets this page before the devices are through: so the guest is under way all the time.
LAST_OF_VCPUS = 100
# One that the source lets wait for that page, and one for the rest.
DEVICE = f"""
from kvmdp.machine.workloads.arithmetic import place_in_page
import numpy as np
pages = [page for page in range({PAGES}) if page != {LAST_OF_VCPUS}]
random.Random(1).shuffle(pages)
def write_words(pages):
    for page in pages:
        word = (int(place_in_page(np.array([page]), 9)[0]) + 1) % 512
        memory.write(page * 4096 + word * 8, (page + 1).to_bytes(8, "little"))
"""
FOR_EVER = DEVICE + 'say("begins")\nwhile True: write_words(pages)'
ONCE = DEVICE + 'write_words(pages)\nmemory.close()\nsay("done")'


class Watched:
    """The synthetic image; tells whose fault each fill is for, before it."""

    def __init__(self, before):
        self.inner = SyntheticSource(MEMORY, SEED)
        self.name, self.size, self.extents, self.close = (
            self.inner.name,
            self.inner.size,
            self.inner.extents,
            self.inner.close,
        )
        self._before = before
        self.concurrency = self.inner.concurrency

    def fetch(self, request, destination):
        offset = request.offset
        if request.fault is not None:
            self._before(request.fault.origin, offset // PAGE_SIZE)
        self.inner.fetch(request, destination)


class Executioner:
    """Kills `child` at its fault number `faults`, or at the revocation number `revocations`."""

    def __init__(self, faults=0, revocations=0):
        self.dead = threading.Event()
        self.through = threading.Event()  # set by the test
        self.child = None
        self._faults = faults
        self._revocations = revocations
        self._mutex = threading.Lock()

    def before_fill(self, origin, page):
        if origin is Origin.DEVICE and not self.dead.is_set():
            with self._mutex:
                self._faults -= 1
                last = self._faults == 0
            if last:
                self._kill()
                self.child.process.wait(SOON)
        elif page == LAST_OF_VCPUS and origin is Origin.VCPU:
            assert self.through.wait(TIMEOUT)

    def before_revocation(self):
        with self._mutex:
            self._revocations -= 1
            last = self._revocations == 0
        if last:
            self._kill()

    def _kill(self):
        self.child.process.kill()
        self.dead.set()


def take_away(machine, executioner, number):
    executioner.before_revocation()
    machine.pager.mark_nonpresent(number * 16 % PAGES, 16)
    time.sleep(0.002)  # others are to get on too


def check_all(machine, workload):
    """Every page has what the image had, what the vCPUs added, and the device's word."""
    pages = np.arange(PAGES)
    expected = workload.expected_pages(SyntheticSource(MEMORY, SEED).pages, pages)
    written = pages[pages != LAST_OF_VCPUS]
    expected[written, (place_in_page(written, 9) + 1) % 512] = written + 1
    assert np.flatnonzero((all_of_ram(machine) != expected).any(axis=1)).tolist() == []
    assert machine.pager.counters.pages_fetched == PAGES
    assert machine.pager.ledger.claims == []


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_killed_device_is_replaced_and_the_guest_is_exact(moment):
    trap = TRAPS[moment // 2 % len(TRAPS)]
    require_trap(trap)
    chance = random.Random(moment)
    in_fetch = moment % 2 == 0
    executioner = Executioner(
        faults=chance.randint(1, GUEST_PAGES) if in_fetch else 0,
        revocations=0 if in_fetch else chance.randint(1, 60),
    )
    workload = plan("atomic", vcpus=2, pages=GUEST_PAGES, iterations=2)
    sentences = []
    with make_machine(
        trap,
        workload=workload,
        source=Watched(executioner.before_fill),
        uffd=UffdOptions(readers=2 if trap == "userfaultfd" else 1),
    ) as machine:
        server = machine.serve_devices(sentences.append)
        errors = []

        def guest():
            try:
                machine.run(TIMEOUT)
            except Exception as error:
                errors.append(error)

        running = threading.Thread(target=guest)
        with child_of(server, FOR_EVER) as first:
            executioner.child = first
            assert first.hear() == "begins"
            with meanwhile(lambda number: take_away(machine, executioner, number)):
                running.start()
                assert executioner.dead.wait(SOON)
                assert first.session.wait_ended(SOON)
                with child_of(server, ONCE) as second:
                    assert second.hear() == "done"
                    assert second.session.wait_ended(SOON)
                executioner.through.set()
                running.join()
        assert errors == []
        check_all(machine, workload)
        assert sentences == [f"device process {first.pid} has died"]
        assert server.counters.requests == server.counters.replies
