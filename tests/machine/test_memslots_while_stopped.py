"""Memslots of RAM change only while every vCPU is out of KVM_RUN, and of KVM's emulator, whatever makes them change.

That a change beside a running vCPU can make its instruction come out wrong shows once in thousands of faults
(guests/lzcnt_race.S); this shows it each time.
"""

import random
import threading
import time

import pytest
from harness import TIMEOUT, make_machine, meanwhile, plan

from kvmdp.kvm import Mmio, Vcpu, Vm
from kvmdp.page import REGION
from kvmdp.vcpu.faults import VcpuPaging

pytestmark = pytest.mark.kvm

MEMORY = 4 << 20
PAGES = 128

# What is done beside two vCPUs that fault, by the pager's name and the number of pages.
MEANWHILE = {
    "faults": [],
    "evictions": [("evict", 8), ("mark_nonpresent", 8), ("mark_present", 16)],
    "collapses": [("evict", 1), ("mark_present", REGION), ("collapse", REGION)],
}


@pytest.mark.parametrize("what", MEANWHILE)
@pytest.mark.parametrize("ring", [3, 0])
@pytest.mark.parametrize("trap", ["memory-fault", "layered", "mmio"])
def test_no_vcpu_is_inside_when_a_memslot_changes(monkeypatch, trap, ring, what):
    workload = plan("atomic", vcpus=2, memory=MEMORY, pages=PAGES, ring=ring)
    draw = random.Random(1)
    emulated = emulated_accesses(monkeypatch)
    changes = []
    with make_machine(trap, workload=workload) as machine:
        vcpus = [thread.vcpu for thread in machine.threads]

        def busy():
            return [vcpu.index for vcpu in vcpus if machine.gate.is_inside(vcpu)] + [*emulated]

        def watched(change):
            def changed(_vm, *arguments):
                changes.append(busy())
                change(*arguments)
                changes.append(busy())

            return changed

        for name in ("set_user_memory_region", "set_user_memory_region2"):
            monkeypatch.setattr(Vm, name, watched(getattr(machine.vm, name)))
        actions = [
            lambda _number, name=name, count=count: act(machine, draw, name, count)
            for name, count in MEANWHILE[what]
        ]
        with meanwhile(*actions):
            machine.run(TIMEOUT)
    assert changes
    assert not any(changes)


def emulated_accesses(monkeypatch):
    """Return a set of the names of vCPU threads whose accesses KVM's emulator is at, each for a moment longer."""
    accesses, run, settle = set(), Vcpu.run, VcpuPaging.settle

    def run_and_note(vcpu):
        exit = run(vcpu)
        if isinstance(exit, Mmio):
            accesses.add(threading.current_thread().name)
        return exit

    def settle_late(paging, access):
        time.sleep(0.0005)
        settle(paging, access)
        accesses.discard(threading.current_thread().name)

    monkeypatch.setattr(Vcpu, "run", run_and_note)
    monkeypatch.setattr(VcpuPaging, "settle", settle_late)
    return accesses


def act(machine, draw, name, count):
    first = draw.randrange(PAGES) // count * count
    getattr(machine.pager, name)(first, min(count, PAGES - first) if count < REGION else count)
    time.sleep(0.005)  # or the guest gets nowhere
