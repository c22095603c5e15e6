"""KVM's own writes: kvmclock, wall clock and steal time in absent pages, and what a guest may not ask for."""

import struct

import pytest
from harness import (
    MEMORY,
    SEED,
    TIMEOUT,
    host_pv,
    make_machine,
    plan,
    program_machine,
    prove,
    without_msr_interception,
)

from kvmdp.abi.kvm_para import (
    KVM_CPUID_FEATURES,
    KVM_FEATURE_CLOCKSOURCE,
    KVM_FEATURE_CLOCKSOURCE2,
    KVM_FEATURE_STEAL_TIME,
    MSR_KVM_ASYNC_PF_EN,
    MSR_KVM_PV_EOI_EN,
    MSR_KVM_STEAL_TIME,
    MSR_KVM_SYSTEM_TIME,
    MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_WALL_CLOCK,
    MSR_KVM_WALL_CLOCK_NEW,
)
from kvmdp.errors import PagingError
from kvmdp.kvm import Kvm
from kvmdp.machine.boot import guest_cpuid
from kvmdp.machine.guest_abi import BOOT_BASE, PvFlag
from kvmdp.machine.pv_msrs import offered_features
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.source.base import SourceError
from kvmdp.source.synthetic import SyntheticSource

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not host_pv(), reason="this KVM has no MSR filter: use Linux 5.10 or later"),
]

TRAPS = ("memory-fault", "marker", "mmio", "userfaultfd")
EXIT_TRAPS = TRAPS[:3]
CLOCK = 0x5140
PAGE = 5
RETURN = bytes.fromhex("31c0 31d2 c3")


def write_msr(index, value):
    """mov ecx, index; mov eax, low; mov edx, high; wrmsr: for ring 0"""
    low, high = struct.pack("<I", value & 0xFFFFFFFF), struct.pack("<I", value >> 32)
    return b"\xb9" + struct.pack("<I", index) + b"\xb8" + low + b"\xba" + high + b"\x0f\x30"


def run(trap, *writes, **options):
    """Run a program that writes MSRs, (index, value) each; returns the machine, closed by the caller."""
    code = b"".join(write_msr(*each) for each in writes) + RETURN
    machine = program_machine(trap, code, ring=0, **options)
    try:
        machine.run(TIMEOUT)
    except BaseException:
        machine.close()
        raise
    machine.pager.ledger.cancelled = False  # it has stopped; what comes is about the pager alone
    return machine


@pytest.mark.parametrize("ring", [3, 0])
@pytest.mark.parametrize("trap", TRAPS)
def test_the_clock_moves_in_pages_that_were_absent(trap, ring):
    workload = plan("clock", vcpus=2, ring=ring)
    result = prove(trap, "memfd", workload)
    assert result.counters.pages_fetched == len(workload.touched)
    assert result.exits["msr"] == result.accesses == 2 * (2 + bool(host_pv() & PvFlag.STEAL_TIME))


@pytest.mark.parametrize("trap", EXIT_TRAPS)
def test_without_interception_the_page_stays_zero(trap, monkeypatch):
    without_msr_interception(monkeypatch)
    workload = plan("clock", pv=PvFlag.CLOCK)
    with make_machine(trap, workload=workload) as machine:
        machine.run(TIMEOUT)
        block = machine.threads[0].parameters
        assert block.checksum == block.clock_first == block.clock_last == block.clock_version == 0


@pytest.mark.parametrize("msr", [MSR_KVM_SYSTEM_TIME, MSR_KVM_SYSTEM_TIME_NEW])
@pytest.mark.parametrize("trap", TRAPS)
def test_both_msrs_of_kvmclock_are_intercepted(trap, msr):
    with run(trap, (msr, CLOCK | 1)) as machine:
        assert machine.pager.bitmap.test(PAGE)
        version, _, _, nanoseconds, multiplier, *_ = struct.unpack(
            "<IIQQIbBH", machine.memory.read(CLOCK, 32)
        )
        assert version > 0
        assert version % 2 == 0
        assert min(nanoseconds, multiplier) > 0


@pytest.mark.parametrize("msr", [MSR_KVM_WALL_CLOCK, MSR_KVM_WALL_CLOCK_NEW])
@pytest.mark.parametrize("trap", TRAPS)
def test_the_wall_clock_is_written_once_and_its_page_may_go(trap, msr):
    with run(trap, (msr, CLOCK)) as machine:
        version, seconds, nanoseconds = struct.unpack("<III", machine.memory.read(CLOCK, 12))
        assert version % 2 == 0
        assert seconds > 1_600_000_000
        assert nanoseconds < 1_000_000_000
        if trap != "userfaultfd":
            assert machine.pager.mark_nonpresent(PAGE, 1, timeout=5) == 1


@pytest.mark.parametrize("trap", TRAPS)
def test_a_page_that_kvm_writes_to_stays_present_until_it_is_moved_or_switched_off(trap):
    with run(trap, (MSR_KVM_SYSTEM_TIME_NEW, CLOCK | 1)) as machine:
        assert machine.pager.mark_nonpresent(0, 16, timeout=5) == 0
        assert machine.pager.bitmap.test(PAGE)
    moved = CLOCK + 4096
    with run(trap, (MSR_KVM_SYSTEM_TIME_NEW, CLOCK | 1), (MSR_KVM_SYSTEM_TIME_NEW, moved | 1)) as machine:
        assert machine.pager.mark_nonpresent(0, 16, timeout=5) == 1
        assert not machine.pager.bitmap.test(PAGE)
        assert machine.pager.bitmap.test(PAGE + 1)
    # The legacy MSR is another name for the same clock.
    with run(trap, (MSR_KVM_SYSTEM_TIME_NEW, CLOCK | 1), (MSR_KVM_SYSTEM_TIME, 0)) as machine:
        assert machine.pager.mark_nonpresent(0, 16, timeout=5) == 1


@pytest.mark.parametrize("trap", EXIT_TRAPS)
def test_demand_paging_can_be_switched_off_while_the_clock_runs(trap):
    with run(trap, (MSR_KVM_SYSTEM_TIME_NEW, CLOCK | 1)) as machine:
        machine.pager.mark_present(0, machine.layout.pages)
        machine.pager.disable()
        assert not machine.pager.enabled
        assert machine.pager.trap.memslots == 1
        machine.pager.enable()
        assert machine.pager.mark_nonpresent(PAGE, 1, timeout=5) == 0  # the clock's page stays, now as before


def test_both_pages_of_a_structure_that_crosses_are_made_present_and_stay():
    crossing = 6 * 4096 - 16
    with run("memory-fault", (MSR_KVM_SYSTEM_TIME_NEW, crossing | 1)) as machine:
        assert machine.pager.bitmap.test(5)
        assert machine.pager.bitmap.test(6)
        assert machine.pager.mark_nonpresent(0, 16, timeout=5) == 0


def test_the_granule_around_the_clock_stays():
    with run("mmio", (MSR_KVM_SYSTEM_TIME_NEW, CLOCK | 1), granule=16384) as machine:
        assert machine.pager.bitmap.count() == 4
        assert machine.pager.mark_nonpresent(0, 16, timeout=5) == 0


def test_a_structure_in_the_boot_slot_needs_no_page():
    with run("memory-fault", (MSR_KVM_SYSTEM_TIME_NEW, BOOT_BASE + (1 << 20) + 0x8000 | 1)) as machine:
        assert machine.pager.counters.claims == 0


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        (MSR_KVM_SYSTEM_TIME_NEW, MEMORY | 1),  # past the end of RAM
        (MSR_KVM_SYSTEM_TIME_NEW, MEMORY - 16 | 1),  # half of it
        (MSR_KVM_SYSTEM_TIME_NEW, 1 << 52 | 1),
        (MSR_KVM_SYSTEM_TIME_NEW, CLOCK + 2 | 1),
        (MSR_KVM_WALL_CLOCK_NEW, CLOCK + 1),
        (MSR_KVM_STEAL_TIME, CLOCK | 8 | 1),  # reserved bits: KVM's own check
        (MSR_KVM_ASYNC_PF_EN, CLOCK | 1),
        (MSR_KVM_PV_EOI_EN, CLOCK | 1),
    ],
)
@pytest.mark.parametrize("trap", ["memory-fault", "marker"])
def test_what_makes_no_sense_is_a_general_protection_fault(trap, msr, value):
    with pytest.raises(GuestError, match="#GP"):
        run(trap, (msr, value))


def test_a_refused_address_is_not_retained():
    with program_machine(
        "memory-fault", write_msr(MSR_KVM_STEAL_TIME, CLOCK | 8 | 1) + RETURN, ring=0
    ) as machine:
        with pytest.raises(GuestError, match="#GP"):
            machine.run(TIMEOUT)
        machine.pager.ledger.cancelled = False
        present = machine.pager.bitmap.count()
        assert machine.pager.mark_nonpresent(0, 16, timeout=5) == present


def test_a_source_that_fails_pauses_the_machine():
    class Failing(SyntheticSource):
        def fetch(self, request, destination):
            offset = request.offset
            raise SourceError(self.name, offset, len(destination), "it is gone")

    with pytest.raises(PagingError, match=f"{PAGE * 4096:#x}"):
        run("memory-fault", (MSR_KVM_SYSTEM_TIME_NEW, CLOCK | 1), source=Failing(MEMORY, SEED))


def test_only_what_is_intercepted_is_offered():
    wanted = 1 << KVM_FEATURE_CLOCKSOURCE | 1 << KVM_FEATURE_CLOCKSOURCE2 | 1 << KVM_FEATURE_STEAL_TIME
    with Kvm() as kvm:
        features = offered_features(kvm)
        assert features
        assert not features & ~wanted
        for offered in (features, 0):
            leaves = {entry.function: entry.eax for entry in guest_cpuid(kvm, offered)}
            assert leaves[KVM_CPUID_FEATURES] == offered


def test_nothing_is_offered_without_the_filter(monkeypatch):
    monkeypatch.setattr(Kvm, "check_extension", lambda self, capability: 0)
    with Kvm() as kvm:
        assert offered_features(kvm) == 0
