"""Each way past the pager is gone for real, and the detector sees it; what is in order it leaves alone."""

import mmap
import os

import numpy as np
import pytest
from harness import (
    MEMORY,
    SEED,
    TIMEOUT,
    host_pv,
    make_machine,
    plan,
    program_machine,
    require_trap,
    without_msr_interception,
)

from kvmdp.lab.detector import LeakDetector
from kvmdp.lab.experiment import run_workload
from kvmdp.lab.leaks import LeakKind, absent_msr_pages, runs_with_data, spurious_page_fault
from kvmdp.machine.guest_abi import PROGRAM_BASE, ParameterBlock, PvFlag
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.machine.workloads import WORKLOADS
from kvmdp.memory.layout import GuestLayout
from kvmdp.paging.claim import State
from kvmdp.source.synthetic import SyntheticSource

TRAPS = ("memory-fault", "marker", "mmio", "userfaultfd")
SLOT_TRAPS = ("memory-fault", "mmio")
PAGE = 7
GPA = PAGE * 4096


def watch(machine):
    detector = LeakDetector()
    detector.attach(machine)
    return detector


def only(detector):
    assert len(detector.leaks) == 1, detector.leaks
    return detector.leaks[0]


@pytest.mark.kvm
@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_nothing_is_found_where_nothing_is_wrong(name, trap):
    require_trap(trap)
    detector, workload = LeakDetector(), plan(name, vcpus=2, pages=16)
    options = MachineOptions(MEMORY, trap, vcpus=2)
    result = run_workload(
        options, workload, SyntheticSource(MEMORY, SEED), timeout=TIMEOUT, detector=detector
    )
    assert result.ok
    assert detector.leaks == []


@pytest.mark.kvm
@pytest.mark.parametrize("trap", TRAPS)
def test_a_page_fault_on_mapped_ram_is_a_leak(trap):
    # mov rax, [0x1000]; then the same in 0x3000, at whose exit or later the host injects a #PF
    code = bytes.fromhex("488b042500100000 66ba1405 ec 488b042500300000 31c0 31d2 c3")
    with program_machine(trap, code) as machine:
        detector = watch(machine)
        thread = machine.threads[0]
        entries = []

        def inject(vcpu, look=thread.inspect):
            look(vcpu)
            # The loopback port's exit: complete only after re-entry, so at the exit that follows.
            entries.append(vcpu.regs.rip)

        thread.inspect = inject
        serve = machine.ports.handle

        def handle(index, io):
            served = serve(index, io)
            if io.port == 0x514:
                vcpu = thread.vcpu
                vcpu.immediate_exit = True
                vcpu.run()
                vcpu.immediate_exit = False
                sregs = vcpu.sregs
                sregs.cr2 = GPA
                vcpu.set_sregs(sregs)
                events = vcpu.events
                events.exception.injected = 1
                events.exception.nr = 14
                events.exception.has_error_code = 1
                events.exception.error_code = 4
                vcpu.set_events(events)
            return served

        machine.ports.handle = handle
        with pytest.raises(GuestError, match="#PF"):
            machine.run(TIMEOUT)
        detector.finish(machine)
        leak = only(detector)
        assert leak.kind is LeakKind.PAGE_FAULT
        assert leak.gpa == GPA
        assert leak.origin == "vCPU 0"
        assert f"RIP {PROGRAM_BASE + 13:#x}" in leak.detail


@pytest.mark.kvm
def test_a_page_fault_outside_ram_is_the_guests_own():
    code = bytes.fromhex("488b0425 00000050 31c0 31d2 c3")  # mov rax, [0x50000000], which is not mapped
    with program_machine("memory-fault", code) as machine:
        detector = watch(machine)
        with pytest.raises(GuestError, match="#PF"):
            machine.run(TIMEOUT)
        detector.finish(machine)
        assert detector.leaks == []


@pytest.mark.kvm
@pytest.mark.skipif(
    not host_pv() & PvFlag.CLOCK, reason="this KVM offers no kvmclock that can be intercepted"
)
@pytest.mark.parametrize("ring", [3, 0])
@pytest.mark.parametrize("trap", ["memory-fault", "marker", "mmio"])
def test_a_clock_enabled_while_its_page_is_absent_is_a_leak(trap, ring, monkeypatch):
    without_msr_interception(monkeypatch)
    workload = plan("clock", pv=PvFlag.CLOCK, ring=ring)
    with make_machine(trap, workload=workload) as machine:
        detector = watch(machine)
        machine.run(TIMEOUT)
        detector.finish(machine)
        leak = only(detector)
        assert leak.kind is LeakKind.MSR
        assert leak.gpa == 0x140
        assert leak.origin == "KVM's kvmclock of vCPU 0"


@pytest.mark.kvm
@pytest.mark.skipif(
    not host_pv() & PvFlag.CLOCK, reason="this KVM offers no kvmclock that can be intercepted"
)
@pytest.mark.parametrize("trap", ["memory-fault", "marker", "mmio"])
def test_a_clock_whose_page_is_never_touched_is_found_at_the_end(trap, monkeypatch):
    without_msr_interception(monkeypatch)
    # mov ecx, 0x4b564d01; mov eax, 0x7001; xor edx, edx; wrmsr
    code = bytes.fromhex("b9014d564b b801700000 31d2 0f30 31c0 31d2 c3")
    with program_machine(trap, code, ring=0) as machine:
        detector = watch(machine)
        machine.run(TIMEOUT)
        detector.finish(machine)
        assert only(detector).gpa == GPA


@pytest.mark.kvm
@pytest.mark.parametrize("way", ["read", "write"])
@pytest.mark.parametrize("backing", ["memfd", "anonymous"])
@pytest.mark.parametrize("trap", SLOT_TRAPS)
def test_a_touch_of_the_guest_view_that_does_not_trap_is_found(trap, backing, way):
    workload = plan("checksum", pages=4)
    with make_machine(trap, backing, workload=workload) as machine:
        detector = watch(machine)
        if way == "write":
            machine.backing.guest.view[GPA] = 1
        elif backing == "anonymous":
            pytest.skip("a read of private memory maps the kernel's zero page")
        else:
            assert machine.backing.guest.view[GPA] == 0
        detector.tick(machine)
        machine.run(TIMEOUT)
        detector.finish(machine)
        leak = only(detector)
        assert leak.kind is LeakKind.DATA
        assert leak.gpa == GPA
        assert "guest view" in leak.origin
        assert f"{GPA + 4096:#x}" in leak.detail


@pytest.mark.kvm
@pytest.mark.parametrize("trap", TRAPS)
def test_a_peer_that_writes_to_absent_pages_is_found(trap):
    workload = plan("checksum", pages=4)
    with make_machine(trap, workload=workload) as machine:
        detector = watch(machine)
        child = os.fork()
        if not child:
            with mmap.mmap(machine.backing.fd, MEMORY) as ram:
                ram[GPA : GPA + 8192] = bytes([1]) * 8192
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        machine.run(TIMEOUT)
        detector.finish(machine)
        leak = only(detector)
        assert (leak.kind, leak.gpa) == (LeakKind.DATA, GPA)
        assert "peer" in leak.origin
        assert "8192 bytes" in leak.detail


@pytest.mark.kvm
@pytest.mark.parametrize("granule", [4096, 65536])
@pytest.mark.parametrize("backing", ["memfd", "anonymous"])
@pytest.mark.parametrize("trap", TRAPS)
def test_pages_marked_non_present_and_those_fetched_around_are_in_order(trap, backing, granule):
    slots = trap in SLOT_TRAPS
    if trap == "userfaultfd" and backing == "anonymous":
        pytest.skip("not a combination that can be marked non-present")
    workload = plan("touch", vcpus=2, write=True)
    options = {"granule": granule if slots else None, "fault_around": 16}
    with make_machine(trap, backing, workload=workload, **options) as machine:
        detector = watch(machine)
        machine.pager.mark_present(40, 30)
        machine.pager.mark_nonpresent(48, 8)
        machine.run(TIMEOUT, lambda: detector.tick(machine))
        machine.pager.ledger.cancelled = False
        machine.pager.mark_nonpresent(100, 50)
        detector.finish(machine)
        assert detector.leaks == []


def test_only_pages_absent_before_and_after_count():
    source, present, backed, zero = State.SOURCE, State.PRESENT, State.BACKED, State.ZERO
    before = bytes([source, source, source, present, backed, zero, source, source])
    after = bytes([source, source, present, source, backed, zero, source, source])
    resident = np.array([1, 1, 1, 1, 1, 1, 0, 1], dtype=bool)
    assert runs_with_data(before, resident, after) == [(0, 2), (5, 1), (7, 1)]
    assert runs_with_data(before, np.zeros(8, dtype=bool), after) == []


def test_what_a_page_fault_record_says():
    layout = GuestLayout(MEMORY)
    block = ParameterBlock(exception_count=1, exception_vector=14, exception_cr2=GPA)
    assert spurious_page_fault(2, block, layout, lambda address: address).origin == "vCPU 2"
    assert spurious_page_fault(2, block, layout, lambda address: None) is None
    assert spurious_page_fault(2, block, layout, lambda address: MEMORY) is None
    block.exception_vector = 13
    assert spurious_page_fault(2, block, layout, lambda address: address) is None
    assert spurious_page_fault(2, ParameterBlock(exception_cr2=GPA), layout, lambda address: address) is None


def test_an_msr_counts_if_it_is_enabled_and_its_page_absent():
    layout = GuestLayout(MEMORY)
    values = {0x12: GPA | 1, 0x4B564D01: GPA | 1, 0x4B564D03: 0x9000}
    assert [leak.gpa for leak in absent_msr_pages(0, values, layout, lambda page: False)] == [GPA]
    assert absent_msr_pages(0, values, layout, lambda page: page == PAGE) == []
    assert absent_msr_pages(0, {0x12: MEMORY | 1}, layout, lambda page: False) == []
