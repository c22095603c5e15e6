"""What KVM does besides a clean fault exit, several vCPUs at a time: handled, and exact."""

import time
from collections import Counter

import numpy as np
import pytest
from harness import (
    BACKINGS,
    MEMORY,
    SEED,
    TIMEOUT,
    TRAPS,
    all_of_ram,
    make_machine,
    meanwhile,
    plan,
    program_machine,
    prove,
    require_trap,
)

from kvmdp.kvm import BusError, Kvm, MemoryFault, MmioRead, MmioWrite
from kvmdp.machine.boot import guest_cpuid
from kvmdp.machine.guest_abi import BOOT_BASE
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.page import PageFault
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.slots.memory_fault import MemoryFaultTrap
from kvmdp.trap.slots.ram_slots import RamSlots
from kvmdp.trap.uffd.marker import MarkerTrap
from kvmdp.vcpu.faults import LivelockError, VcpuPaging

pytestmark = pytest.mark.kvm

SOURCE = SyntheticSource(MEMORY, SEED)


# The window in which a memslot is being replaced


def test_no_vcpu_looks_while_a_memslot_is_replaced(monkeypatch):
    make = RamSlots._set

    def make_late(slots, block):
        time.sleep(0.002)  # the granule has no slot: another vCPU's access would exit as MMIO
        make(slots, block)

    workload = plan("touch", vcpus=2, pages=64, write=True, overlap=True)
    with make_machine("memory-fault", workload=workload) as machine:
        monkeypatch.setattr(RamSlots, "_set", make_late)
        machine.run(TIMEOUT)
        exits = sum((thread.exits for thread in machine.threads), start=Counter())
        assert (exits[MmioRead], exits[MmioWrite]) == (0, 0)
        assert np.array_equal(all_of_ram(machine)[:64], workload.expected_pages(SOURCE.pages, np.arange(64)))
        assert machine.pager.counters.pages_fetched == 64


# Accesses that KVM emulates, or cannot emulate


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("trap", TRAPS)
def test_bytes_that_go_out_of_a_port_come_from_the_absent_page(trap, backing):
    # mov esi,0x5000; mov edx,0x510; outsd -- the dword at 0x5000 becomes the guest's report
    code = bytes.fromhex("be00500000 ba10050000 6f c3")
    with program_machine(trap, code, backing, patches=[(0x5000, bytes(4))]) as machine:
        machine.run(TIMEOUT)
        assert machine.pager.counters.pages_fetched == 1
    with (
        program_machine(trap, code, backing, patches=[(0x5000, b"\2\0\0\0")]) as machine,
        pytest.raises(GuestError, match="reports failure 0 of its own check"),
    ):
        machine.run(TIMEOUT)


# Adds up a word of every page: mov rcx,[rdi+0x30]; xor edx,edx; 1: paddq xmm1,[rdx+16]; add rdx,4096; dec rcx;
# jnz 1b; movq rax,xmm1
SUM_BY_PADDQ = bytes.fromhex("488b4f30 31d2 660fd44a10 4881c200100000 48ffc9 75ef 66480f7ec8 c3")


def check_sums(machine):
    """Every vCPU must have found every page's word."""
    pages = machine.layout.pages
    words = SyntheticSource(machine.layout.memory_bytes, SEED).pages(np.arange(pages))[:, 2]
    expected = int(words.sum(dtype=np.uint64))
    assert [thread.parameters.checksum for thread in machine.threads] == [expected] * len(machine.threads)
    assert machine.pager.counters.pages_fetched == pages


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("trap", TRAPS)
def test_vcpus_that_race_with_an_instruction_kvm_cannot_emulate_all_get_there(trap, backing):
    with program_machine(trap, SUM_BY_PADDQ, backing, vcpus=4) as machine:
        machine.run(TIMEOUT)
        check_sums(machine)


def test_waiting_for_another_vcpus_page_is_no_livelock(monkeypatch):
    make, slow = RamSlots._set, set(range(0, 512, 64))

    def make_late(slots, block):
        if block.first in slow:
            time.sleep(0.05)  # long enough for a vCPU that tries in vain to look like one that never gets on
        make(slots, block)

    with program_machine("mmio", SUM_BY_PADDQ, vcpus=2) as machine:
        monkeypatch.setattr(RamSlots, "_set", make_late)
        machine.run(TIMEOUT)
        check_sums(machine)


def test_a_vcpu_that_always_comes_second_is_no_livelock(monkeypatch):
    resolve = VcpuPaging._resolve_instruction

    def somebody_was_faster(paging):
        for page in paging.instruction.pages():
            paging._pager.resolve(PageFault(page))
        return resolve(paging)

    monkeypatch.setattr(VcpuPaging, "_resolve_instruction", somebody_was_faster)
    with program_machine("mmio", SUM_BY_PADDQ) as machine:
        machine.run(TIMEOUT)
        check_sums(machine)


# What must never be absent


def test_tables_stacks_and_page_tables_lie_where_nothing_is_ever_absent():
    with program_machine("mmio", b"\xc3") as machine:
        machine.run(TIMEOUT)
        sregs = machine.threads[0].vcpu.sregs
        for address in (
            sregs.cr3,
            sregs.gdt.base,
            sregs.idt.base,
            sregs.tr.base,
            machine.threads[0].vcpu.regs.rsp,
        ):
            assert BOOT_BASE <= address < BOOT_BASE + (1 << 30)
        assert machine.pager.bitmap.count() == 0


@pytest.mark.parametrize("ring", [3, 0])
@pytest.mark.parametrize("trap", TRAPS)
def test_an_exception_is_reported_while_all_of_ram_is_absent(trap, ring):
    with program_machine(trap, b"\x0f\x0b", ring=ring) as machine:  # ud2
        with pytest.raises(GuestError, match=r"guest exception #UD at RIP 0xd0100000"):
            machine.run(TIMEOUT)
        assert machine.pager.bitmap.count() == 0


def test_the_guest_is_offered_nothing_that_writes_to_its_memory_by_itself():
    with Kvm() as kvm:
        leaves = {entry.function: entry for entry in guest_cpuid(kvm)}
    assert leaves[1].edx & 1 << 9 == 0  # no APIC: no asynchronous page faults
    assert 0x4000_0001 not in leaves or leaves[0x4000_0001].eax == 0  # no kvmclock, no steal time


# No progress


@pytest.mark.parametrize(
    ("trap", "kind"),
    [("marker", MarkerTrap), ("memory-fault", MemoryFaultTrap)],
    ids=["marker", "memory-fault"],
)
@pytest.mark.parametrize("backing", BACKINGS)
def test_a_page_that_faults_for_ever_ends_with_a_diagnosis(monkeypatch, backing, trap, kind):
    workload = plan("touch", pages=4)
    with make_machine(trap, backing, workload=workload) as machine:
        monkeypatch.setattr(kind, "admit", lambda *_: None)
        monkeypatch.setattr(kind, "reassert", lambda *_: False)
        with pytest.raises(
            LivelockError, match=r"vCPU 0 at RIP 0x[0-9a-f]+ faults again and again on gpa 0x0"
        ):
            machine.run(TIMEOUT)
        assert machine.pager.counters.pages_fetched == 1


def test_a_guest_that_is_merely_busy_is_no_stall():
    # mov rcx,1<<30; 1: dec rcx; jnz 1b -- about half a second and more in the guest without an exit
    code = bytes.fromhex("48b9 0000008000000000 48ffc9 75fb c3")
    with program_machine("marker", code) as machine:
        machine.run(TIMEOUT)
        assert machine.threads[0].stalls == 0
        assert machine.pager.counters.claims == 0


# Markers and what the kernel does to page tables


def test_present_pages_taken_out_of_the_page_table_come_back_with_their_bytes():
    workload = plan("atomic", vcpus=2, pages=256, iterations=200)
    with make_machine("marker", workload=workload) as machine:
        random = np.random.default_rng(5)

        def drop(number):
            # Reclaim does the same. Some of the pages are absent as yet: their markers go.
            first, count = int(random.integers(256)), int(random.integers(1, 33))
            machine.backing.guest.drop(first * 4096, min(count, 256 - first) * 4096)
            time.sleep(0.0005)
            return number < 300  # a slow host's guest must get on in the end

        with meanwhile(drop):
            machine.run(TIMEOUT)
        assert np.array_equal(
            all_of_ram(machine)[:256], workload.expected_pages(SOURCE.pages, np.arange(256))
        )
        assert machine.pager.counters.pages_fetched == 256


def test_pages_dropped_and_marked_at_the_same_time_keep_every_addition():
    workload = plan("atomic", vcpus=2, pages=64, iterations=400)
    with make_machine("marker", workload=workload) as machine:
        random = np.random.default_rng(6)

        def drop(number):
            machine.backing.guest.drop(int(random.integers(64)) * 4096, 4096)
            time.sleep(0.0005)
            return number < 600

        def mark(number):
            machine.pager.mark_nonpresent(number * 7 % 64, 1)
            time.sleep(0.001)
            return number < 300

        with meanwhile(drop, mark):
            machine.run(TIMEOUT)
        assert np.array_equal(all_of_ram(machine)[:64], workload.expected_pages(SOURCE.pages, np.arange(64)))
        assert machine.pager.counters.pages_fetched == 64


def test_a_page_that_comes_back_while_it_is_being_marked_is_taken_away_again(monkeypatch):
    with make_machine("marker", workload=plan("atomic", pages=1)) as machine:
        machine.pager.mark_present(0, 1)
        guest, uffd, came_back = machine.backing.guest, machine.pager.trap._uffds[0], []
        dropped = guest.drop

        def drop_and_come_back(offset, length):
            dropped(offset, length)
            if not came_back:  # a fault that was answered between the drop and the marker
                came_back.append(offset)
                uffd.continue_(guest.hva + offset, length)

        monkeypatch.setattr(guest, "drop", drop_and_come_back)
        assert machine.pager.mark_nonpresent(0, 1) == 1
        assert came_back == [0]
        machine.run(TIMEOUT)
        assert machine.pager.counters.pages_backed == 1
        assert machine.threads[0].exits.total() > 1


def test_a_fault_answered_while_its_page_goes_does_not_let_the_guest_in(monkeypatch):
    with make_machine("marker", workload=plan("atomic", pages=1)) as machine:
        pager, trap = machine.pager, machine.pager.trap
        pager.mark_present(0, 1)
        revoked = trap.revoke

        def answer_then_revoke(first, count):
            trap._serve(trap._hva(first), 0)  # what the reader does with a fault it got before
            revoked(first, count)
            trap._serve(trap._hva(first), 0)

        monkeypatch.setattr(trap, "revoke", answer_then_revoke)
        pager.mark_nonpresent(0, 1)
        machine.run(TIMEOUT)
        assert pager.counters.pages_backed == 1
        assert machine.threads[0].exits.total() > 1


@pytest.mark.parametrize("backing", BACKINGS)
def test_the_marker_trap_is_left_by_sigbus_alone_in_ring_3(backing):
    result = prove("marker", backing, plan("checksum", pages=32))
    assert result.exits == {"sigbus": 32, "io": 1}


def test_the_memory_fault_trap_exits_once_a_page(monkeypatch):
    require_trap("memory-fault")
    with make_machine("memory-fault", workload=plan("checksum", pages=32)) as machine:
        machine.run(TIMEOUT)
        exits = machine.threads[0].exits
        assert BusError not in exits
        assert exits[MemoryFault] + exits[MmioRead] + exits[MmioWrite] >= 32
