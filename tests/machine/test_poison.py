"""Poisoned pages: a vCPU that touches one takes a machine check and goes on, a device's request ends with a status."""

import random
import struct
import threading
import time

import numpy as np
import pytest
from harness import (
    MEMORY,
    SEED,
    TIMEOUT,
    TRAPS,
    every_trap,
    every_trap_and_backing,
    host_vectors,
    make_machine,
    meanwhile,
    plan,
    program_machine,
)

from kvmdp.errors import PagingError
from kvmdp.lab.experiment import run_workload
from kvmdp.lab.poison import PoisonResult, check_poison, poison_pages
from kvmdp.machine import guest_abi as guest
from kvmdp.machine.disk import DiskDevice, DiskFile
from kvmdp.machine.disk_ports import DiskThread
from kvmdp.machine.guest_abi import DiskStatus
from kvmdp.machine.hostinfo import emulates_ring_0
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.machine.workloads import Program, WorkloadOptions
from kvmdp.page import PAGE_SIZE
from kvmdp.source.base import read_pages
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.uffd import descriptor as uffd
from kvmdp.trap.uffd import userfaultfd
from kvmdp.vcpu.emulated import Emulation

pytestmark = pytest.mark.kvm

every_ring = pytest.mark.parametrize("ring", [3, 0])

PAGE, OFFSET = 3, 16  # what the programs of one access touch
GPA = PAGE * PAGE_SIZE
RAX = 0x1111222233334444


def image_of(pages):
    return read_pages(SyntheticSource(MEMORY, SEED), np.array(pages))


def taken(block):
    """The addresses of the machine checks that a vCPU had, in order."""
    return list(block.mc_addresses[: block.mc_count])


# Fifty pages in turn

COMMAND_PORT, PAGES_IN_TURN, HEAL = 0x5A0, 50, 1 << 31
# resume at 2; for ecx in range(50): out COMMAND_PORT, ecx; load [page + 8]; ud2;
# 2: out COMMAND_PORT, ecx | HEAL; add r9, [page + 8]; at the end rax = r9
IN_TURN = bytes.fromhex(
    "488d0521000000 48898790010000 31c9 4531c9 baa0050000 89c8ef 4889cb48c1e30c 4c8b5308 0f0b"
    "89c80fbae81fef 4c034b08 ffc1 83f932 75de 4c89c8 89ca c3"
)


@every_trap_and_backing
@every_ring
def test_fifty_pages_in_turn_give_one_machine_check_each_and_then_what_healed_them(trap, ring, backing):
    new = random.Random(SEED).randbytes(PAGES_IN_TURN * PAGE_SIZE)

    def command(_vcpu, io):
        value = int.from_bytes(io.data, "little")
        page = value & ~HEAL
        if value & HEAL:
            machine.pager.unpoison(page, new[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
        else:
            machine.pager.poison(page)

    with program_machine(trap, IN_TURN, backing, ring=ring) as machine:
        machine.ports.add(COMMAND_PORT, command)
        machine.memory.read(0, 25 * PAGE_SIZE)  # half of them have been present, half never
        machine.run(TIMEOUT)
        block = machine.threads[0].parameters
        assert taken(block) == [page * PAGE_SIZE for page in range(PAGES_IN_TURN)]
        words = np.frombuffer(new, dtype=np.uint64).reshape(PAGES_IN_TURN, -1)
        assert block.checksum == int(words[:, 1].sum(dtype=np.uint64))
        assert machine.memory.read(0, len(new)) == new


@every_trap
@every_ring
@pytest.mark.parametrize("vcpus", [1, 3])
def test_the_workload_leaves_out_fifty_pages_and_nothing_else(trap, ring, vcpus):
    workload = plan("poison", ring=ring, vcpus=vcpus, pages=150, poison=50)
    options = MachineOptions(MEMORY, trap, vcpus=vcpus)
    result = run_workload(options, workload, SyntheticSource(MEMORY, SEED), timeout=TIMEOUT)
    assert result.ok
    assert result.poison.machine_checks == 50
    assert result.poison.addresses == [page * PAGE_SIZE for page in workload.poisoned.tolist()]
    assert result.pages_present == result.pages_checked == result.counters.pages_fetched == 100
    assert result.accesses == 100 * 512
    assert result.guest_checksum != sum(plan("checksum", pages=150).expected_checksums(image_of))


@every_trap
def test_a_page_that_is_never_touched_is_never_heard_of(trap):
    workload = plan("poison", pages=100)
    with make_machine(trap, workload=workload) as machine:
        poison_pages(machine, np.arange(100, 120), workload.touched)
        machine.run(TIMEOUT)
        block = machine.threads[0].parameters
        assert (block.mc_count, block.exception_count, block.accesses) == (0, 0, 100 * 512)


def test_a_machine_check_that_nobody_expects_fails_the_run():
    workload = plan("poison", pages=20, poison=5)
    workload.touched = np.setdiff1d(workload.touched, workload.poisoned)
    result = run_workload(
        MachineOptions(MEMORY, "mmio"), workload, SyntheticSource(MEMORY, SEED), timeout=TIMEOUT
    )
    assert result.guest_checksum == result.expected_checksum
    assert not result.poison.ok
    assert not result.ok


# What the guest is told, and what its access has done by then


def access_program(code, after=b""):
    """Resume behind `code`, go on with `after`, with rax as the result.

    Before: rax = RAX, rsi = rbx = GPA + OFFSET, dx a port, rcx 4.
    """
    setup = b"\x48\xb8" + struct.pack("<Q", RAX) + b"\xbb" + struct.pack("<I", GPA + OFFSET)
    setup += b"\x89\xde\xba" + struct.pack("<I", guest.LOOPBACK_PORT) + b"\xb9\x04\x00\x00\x00"
    resume = b"\x48\x8d\x05" + struct.pack("<i", 7 + len(setup) + len(code)) + b"\x48\x89\x87"
    resume += struct.pack("<I", guest.ParameterBlock.mc_resume.offset)
    at = len(resume) + len(setup)
    # 31 d2: xor edx, edx; and wherever it is that `code` went, the machine check brought it back here
    return resume + setup + code + after + b"\x31\xd2\xc3", guest.PROGRAM_BASE + at


# Bank and status (SDM volume 3): VAL UC EN MISCV ADDRV S AR, but no AR for a lost store, and what kind of access it was
FETCHED, LOADED, LOST = (0, 0xBD80000000000150), (1, 0xBD80000000000134), (9, 0xBD0000000000017A)
LOADS = {
    "mov": "488b03",
    "over two pages": "488b83ecffffff",  # mov rax, [rbx - 20]
    "lock add": "f0480103",
    "cmpxchg": "480fb113",
    "popcnt": "f3480fb803",
    "lods": "48ad",
    "rep outs": "f36e",
    "push": "ff33",
    "movdqu": "f30f6f03",
    "fld": "dd03",
    "vmovdqu": "c5fe6f03",
    "call": "ffd3",  # there it is the fetch that meets the page
}
STORES = {"mov": "488903", "over two pages": "488983ecffffff", "rep ins": "89df f36c", "movdqu": "f30f7f03"}


def run_access(trap, ring, code):
    """Run one access to the page that is poisoned; returns the parameter block, and RIP of the access."""
    if code == bytes.fromhex(LOADS["vmovdqu"]) and not host_vectors():
        pytest.skip("this host's guests have no AVX")
    program, rip = access_program(code)
    with program_machine(trap, program, ring=ring) as machine:
        machine.memory.read(GPA - PAGE_SIZE, PAGE_SIZE)
        machine.pager.poison(PAGE)
        machine.run(TIMEOUT)
        block = guest.ParameterBlock.from_buffer_copy(machine.threads[0].parameters)
        return block, rip, machine.memory.read(GPA - PAGE_SIZE, PAGE_SIZE)


@every_trap
@every_ring
@pytest.mark.parametrize("name", LOADS)
def test_a_load_has_not_happened_when_its_machine_check_comes(trap, ring, name):
    if ring == 0 and emulates_ring_0() and name in ("fld", "vmovdqu", "popcnt"):
        pytest.skip("this host's KVM emulates ring 0, and its emulator does not know the instruction")
    block, rip, before = run_access(trap, ring, bytes.fromhex(LOADS[name]))
    assert taken(block) == [GPA]
    where = GPA + OFFSET if name == "call" else rip
    assert (block.exception_count, block.exception_vector, block.exception_rip) == (1, 18, where)
    assert block.exception_cs & 3 == ring
    assert block.checksum == RAX
    assert (block.mc_bank, block.mc_status) == (FETCHED if name == "call" else LOADED)
    # The physical address of a page; MCIP EIPV RIPV
    assert (block.mc_misc, block.mc_mcg_status) == (0x8C, 0b111)
    assert before == image_of([PAGE - 1]).tobytes()


@every_trap
@every_ring
@pytest.mark.parametrize(
    ("code", "kind"),
    [("48b81122", FETCHED), ("480fb603", LOADED), ("f20f", FETCHED), ("8b04254030", FETCHED)],
    ids=["immediate", "a load at the end", "opcode", "displacement"],
)
def test_an_instruction_that_goes_on_in_a_poisoned_page_is_fetched_there(trap, ring, code, kind):
    at = GPA - len(code) // 2
    # mov ecx, at; jmp rcx
    program, _ = access_program(b"\xb9" + struct.pack("<I", at) + b"\xff\xe1")
    with program_machine(trap, program, ring=ring, patches=[(at, bytes.fromhex(code))]) as machine:
        machine.memory.read(GPA - PAGE_SIZE, PAGE_SIZE)
        machine.pager.poison(PAGE)
        machine.run(TIMEOUT)
        block = machine.threads[0].parameters
        assert taken(block) == [GPA]
        assert (block.exception_rip, block.mc_bank, block.mc_status) == (at, *kind)


@every_trap
@every_ring
@pytest.mark.parametrize("name", STORES)
def test_a_store_is_dropped_and_told_of(trap, ring, name):
    code = bytes.fromhex(STORES[name])
    block, rip, _ = run_access(trap, ring, code)
    assert taken(block) == [GPA]
    assert block.mc_misc == 0x8C
    # Where KVM emulated the store it has retired: then RIP is behind it, and EIPV clear.
    if block.mc_mcg_status == 0b111:
        assert rip <= block.exception_rip < rip + len(code)
        assert (block.mc_bank, block.mc_status) == LOADED
    else:
        assert block.mc_mcg_status == 0b101
        assert rip < block.exception_rip <= rip + len(code)
        assert (block.mc_bank, block.mc_status) == LOST
    if trap == "mmio" and name == "mov":
        assert block.mc_mcg_status == 0b101


# The exit for it is the one before that of the access: mov r8, [page 5], which is absent
OTHER_LOAD = bytes.fromhex("4c8b042510500000")
MOVED_TO = 0x9010


ALL_ONES = (1 << 64) - 1


@pytest.mark.parametrize(
    ("code", "after"),
    [
        ("bf10900000 48a5", "488b042510900000"),  # movsq to MOVED_TO; mov rax, [MOVED_TO]
        ("48c74424f8ffffffff ff33", "488b4424f8"),  # mov qword [rsp - 8], -1; push [rbx]; mov rax, [rsp - 8]
        ("660f76c0 f30f6f03", "66480f7ec0"),  # pcmpeqd xmm0, xmm0; movdqu xmm0, [rbx]; movq rax, xmm0
    ],
    ids=["movs", "push", "movdqu"],
)
def test_an_emulated_load_leaves_nothing_elsewhere(code, after):
    program, _ = access_program(OTHER_LOAD + bytes.fromhex(code), bytes.fromhex(after))
    with program_machine("mmio", program, patches=[(MOVED_TO, b"\xff" * 8)]) as machine:
        machine.memory.read(MOVED_TO, 8)
        machine.pager.poison(PAGE)
        machine.run(TIMEOUT)
        block = machine.threads[0].parameters
        assert taken(block) == [GPA]
        assert image_of([5])[0, 2] != 0  # what the other load has left in the exit
        assert block.checksum == ALL_ONES


def test_a_code_page_that_is_poisoned_while_it_is_decoded_is_a_machine_check_too():
    code = 0x5000
    program, _ = access_program(b"\xb9" + struct.pack("<I", code) + b"\xff\xe1")  # mov ecx, code; jmp rcx
    # fld [rbx], which KVM's emulator does not know
    with program_machine("mmio", program, patches=[(code, b"\xdd\x03")]) as machine:
        machine.memory.read(code, 2)
        read = machine._decoding.read

        def poisoned_first(gpa, length, **options):
            if machine.pager.bitmap.test(code // PAGE_SIZE):
                machine.pager.poison(code // PAGE_SIZE)
            return read(gpa, length, **options)

        machine._decoding.read = poisoned_first
        machine.run(TIMEOUT)
        block = machine.threads[0].parameters
        assert taken(block) == [code]
        assert (block.exception_rip, block.mc_bank, block.mc_status) == (code, *FETCHED)


def test_a_machine_check_of_a_guest_that_is_not_ready_ends_the_run_with_a_sentence():
    # int 0x80, WRMSR: MCG_STATUS = MCIP, as if the last machine check were still being dealt with
    busy = bytes.fromhex("bf04000000 b97a010000 b802000000 cd80")
    with program_machine("mmio", busy + b"\x48\x8b\x04\x25" + struct.pack("<I", GPA) + b"\xc3") as machine:
        machine.pager.poison(PAGE)
        with pytest.raises(
            PagingError, match=r"vCPU 0 at RIP 0x\w+ touched gpa 0x3000, which is poisoned, and its"
        ):
            machine.run(TIMEOUT)


@every_trap
def test_other_workloads_report_it_as_an_exception(trap):
    with make_machine(trap, workload=plan("checksum")) as machine:
        machine.pager.poison(PAGE)
        with pytest.raises(GuestError, match="guest exception #MC at RIP"):
            machine.run(TIMEOUT)


# Poisoned and healed while the guest is at it

# resume at 3; do for ecx in range(8): rax = [page]; 3: progress += 1; while not [0x9000]
AROUND = bytes.fromhex(
    "488d0513000000 48898790010000 31c9 4889cb48c1e30c 488b03 48ff8710010000 ffc1 83f908 75e8"
    "48833c250090000000 74db 31c0 c3"
)


@every_trap_and_backing
def test_pages_poisoned_and_healed_under_running_vcpus(trap, backing):
    chance, rounds, poisoned = random.Random(SEED), 60, set()
    zeros = bytes(PAGE_SIZE)

    def poison(number):
        page = chance.randrange(8)
        poisoned.add(page * PAGE_SIZE)
        machine.pager.poison(page)
        time.sleep(chance.choice((0, 0.001, 0.004)))
        machine.pager.unpoison(page, zeros)
        if number + 1 == rounds:
            machine.memory.write(0x9000, b"\1")
            return False
        return True

    with program_machine(trap, AROUND, backing, vcpus=2, patches=[(0x9000, bytes(8))]) as machine:
        with meanwhile(poison):
            machine.run(TIMEOUT)
        for thread in machine.threads:
            block = thread.parameters
            assert set(block.mc_addresses[: min(block.mc_count, guest.MC_ADDRESSES)]) <= poisoned
            assert block.exception_count == block.mc_count
        assert machine.memory.read(0, 8 * PAGE_SIZE).count(0) >= len(poisoned) * PAGE_SIZE


READ_MODIFY_WRITE = {
    "add": "480103",
    "lock add": "f0480103",
    "xchg": "488703",
    "add over two pages": "480183ecffffff",  # add [rbx - 20], rax
}
HEALED_WITH = b"\x11" * PAGE_SIZE


@every_ring
@pytest.mark.parametrize("name", READ_MODIFY_WRITE)
def test_a_page_is_not_healed_in_the_middle_of_an_access_that_is_called_off(monkeypatch, ring, name):
    code = bytes.fromhex(READ_MODIFY_WRITE[name])
    pages = [PAGE - 1, PAGE] if "two" in name else [PAGE]
    call_off, healer, waited = Emulation.call_off, [], []

    def heal():
        for page in pages:
            machine.pager.unpoison(page, HEALED_WITH)

    def begin_to_heal(emulation, load, **options):
        if not healer:
            healer.append(threading.Thread(target=heal))
            healer[0].start()
            healer[0].join(0.05)
            waited.append(healer[0].is_alive())
        return call_off(emulation, load, **options)

    monkeypatch.setattr(Emulation, "call_off", begin_to_heal)
    program, _ = access_program(code)
    with program_machine("mmio", program, ring=ring) as machine:
        for page in pages:
            machine.pager.poison(page)
        machine.run(TIMEOUT)
        healer[0].join(TIMEOUT)
        assert waited == [True]
        found = machine.memory.read(pages[0] * PAGE_SIZE, len(pages) * PAGE_SIZE)
        # The vCPU took a machine check, or it came back and ran the instruction on what the pages were healed with.
        expected = bytearray(HEALED_WITH * len(pages))
        if not taken(machine.threads[0].parameters):
            at = GPA + OFFSET - (20 if "two" in name else 0) - pages[0] * PAGE_SIZE
            before = int.from_bytes(HEALED_WITH[:8], "little")
            value = RAX if name == "xchg" else (before + RAX) % (1 << 64)
            expected[at : at + 8] = value.to_bytes(8, "little")
        assert found == bytes(expected)


@every_trap
def test_a_page_is_healed_after_the_machine_has_stopped_too(trap):
    with make_machine(trap, workload=plan("checksum", pages=2)) as machine:
        machine.pager.poison(PAGE)
        machine.run(TIMEOUT)
        machine.pager.unpoison(PAGE, HEALED_WITH)
        assert machine.memory.read(GPA, PAGE_SIZE) == HEALED_WITH


# resume at 2; 1: one access to [GPA + OFFSET], rax = 5; 2: while not [0x9000]
ACCESSES = {"add": "480103", "lock add": "f0480103", "store": "488903"}
LARGE = 1 << 40


@every_trap
@every_ring
@pytest.mark.parametrize("name", ACCESSES)
def test_what_heals_a_page_is_not_overwritten_by_an_access_from_before(trap, ring, name):
    access, go_on = bytes.fromhex(ACCESSES[name]), bytes.fromhex("48833c250090000000")
    setup = b"\xb8\x05\x00\x00\x00\xbb" + struct.pack("<I", GPA + OFFSET)
    resume = b"\x48\x8d\x05" + struct.pack("<i", 7 + len(setup) + len(access)) + b"\x48\x89\x87"
    resume += struct.pack("<I", guest.ParameterBlock.mc_resume.offset)
    back = b"\x74" + struct.pack("<b", -(len(access) + len(go_on) + 2))
    program = resume + setup + access + go_on + back + b"\x31\xd2\x31\xc0\xc3"
    chance, rounds, lost = random.Random(SEED), 60, []

    def poison(number):
        machine.pager.poison(PAGE)
        time.sleep(chance.choice((0, 0.0002, 0.001)))
        machine.pager.unpoison(PAGE, struct.pack("<Q", LARGE) * 512)
        value = machine.memory.load64(GPA + OFFSET)
        # The guest only adds 5, or stores it.
        if not (value in (LARGE, 5) if name == "store" else value >= LARGE and (value - LARGE) % 5 == 0):
            lost.append(value)
        if number + 1 == rounds:
            machine.memory.write(0x9000, b"\1")
            return False
        return True

    with program_machine(trap, program, ring=ring, vcpus=2, patches=[(0x9000, bytes(8))]) as machine:
        with meanwhile(poison):
            machine.run(TIMEOUT)
        assert lost == []
        for thread in machine.threads:
            block = thread.parameters
            assert set(block.mc_addresses[: min(block.mc_count, guest.MC_ADDRESSES)]) <= {GPA}
            assert block.exception_count == block.mc_count


# Larger units, programs, hosts that cannot


@pytest.mark.parametrize("trap", ["memory-fault", "mmio"])
def test_a_granule_is_poisoned_as_a_whole_and_each_of_its_pages_is_told_of(trap):
    workload = plan("poison", pages=130, poison=2)
    options = MachineOptions(MEMORY, trap, granule=16 << 10)
    first = workload.poisoned.copy()
    result = run_workload(options, workload, SyntheticSource(MEMORY, SEED), timeout=TIMEOUT)
    assert result.ok
    assert set(first) < set(workload.poisoned.tolist())
    assert len(workload.poisoned) == 4 * len(np.unique(first // 4))
    assert result.poison.machine_checks == len(result.poison.expected) > 2


def test_more_pages_than_a_guest_can_tell_of_are_refused():
    pages = np.arange(1000)
    check_poison(pages[: guest.MC_ADDRESSES], pages, 1)
    check_poison(pages[:1], pages[: guest.MC_ADDRESSES], 512)
    check_poison(pages[:1], pages[512:], 512)
    check_poison(pages, None, 512)  # of a program nothing is expected
    with pytest.raises(
        ValueError,
        match=r"^with 4 x 256K poisoned the guest touches 256 poisoned pages, and it can tell of 192: ",
    ):
        check_poison(pages[:256:64], pages, 64)


@pytest.mark.parametrize("checks", [0, 2])
def test_the_number_of_machine_checks_must_be_right_too(checks):
    assert PoisonResult([GPA], [GPA], 1, [GPA]).ok
    assert not PoisonResult([GPA], [GPA], checks, [GPA]).ok


def test_a_program_of_ones_own_is_told_too():
    program, _ = access_program(bytes.fromhex(LOADS["mov"]))
    task = Program(WorkloadOptions(memory_bytes=MEMORY))
    task.poisoned = np.array([PAGE, PAGE + 1])
    options = MachineOptions(MEMORY, "mmio", program=program)
    result = run_workload(options, task, SyntheticSource(MEMORY, SEED), timeout=TIMEOUT)
    assert (result.poison.addresses, result.poison.expected) == ([GPA], None)
    assert result.ok


@pytest.mark.userfaultfd
def test_userfaultfd_without_markers_says_that_it_cannot(monkeypatch):
    without = uffd.supported_features() & ~uffd.abi.UFFD_FEATURE_POISON
    workload = plan("poison", pages=20)
    with make_machine("userfaultfd", workload=workload) as machine:
        machine.pager.poison(PAGE)
        monkeypatch.setattr(userfaultfd, "supported_features", lambda: without)
        with pytest.raises(PagingError, match="userfaultfd cannot make a poisoned page a machine check here"):
            machine.run(TIMEOUT)


# Devices


@pytest.mark.parametrize(
    ("page", "status"),
    [(2, DiskStatus.POISON), (3, DiskStatus.POISON)],
    ids=["its buffer", "its segments"],
)
def test_a_request_that_needs_a_poisoned_page_ends_with_a_status(page, status):
    ring, requests, segments, buffer = 0x0000, 0x1000, 3 * PAGE_SIZE, 2 * PAGE_SIZE
    with make_machine("mmio") as machine, DiskFile.temporary(MEMORY) as file:
        memory = machine.memory
        memory.write(ring, bytes(0x90))
        memory.write(requests, struct.pack("<QIIQQ", 0, guest.DISK_WRITE, 1, segments, (1 << 64) - 1) * 2)
        memory.write(requests + 32 + 16, struct.pack("<Q", segments + PAGE_SIZE))
        memory.write(segments, struct.pack("<QQ", buffer, 512))
        memory.write(segments + PAGE_SIZE, struct.pack("<QQ", 8 * PAGE_SIZE, 512))
        header = struct.pack("<QIIIIQ", guest.DISK_MAGIC, guest.DISK_VERSION, 0, 4, 0, requests)
        memory.write(ring, header)
        memory.store64(ring + guest.DISK_RING_SUBMITTED, 2)
        machine.pager.poison(page)
        device = DiskDevice(memory, file)
        assert device.serve(ring) == 2
        assert memory.load64(requests + guest.DISK_REQUEST_STATUS) == status
        assert memory.load64(requests + 32 + guest.DISK_REQUEST_STATUS) == DiskStatus.OK


@pytest.mark.parametrize("page", [0, 1], ids=["header", "requests"])
def test_a_ring_that_is_poisoned_is_not_served(page):
    with make_machine("mmio") as machine, DiskFile.temporary(MEMORY) as file:
        memory = machine.memory
        memory.write(0, bytes(0x90))
        memory.write(0, struct.pack("<QIIIIQ", guest.DISK_MAGIC, guest.DISK_VERSION, 0, 4, 0, PAGE_SIZE))
        memory.store64(guest.DISK_RING_SUBMITTED, 1)
        machine.pager.poison(page)
        assert DiskDevice(memory, file).serve(0) == 0
        if page:
            assert memory.load64(guest.DISK_RING_STATUS) == DiskStatus.POISON


def test_the_guests_disk_reports_it_and_the_machine_goes_on():
    with (
        make_machine("mmio", workload=plan("disk", pages=60)) as machine,
        DiskFile.temporary(MEMORY) as file,
        DiskThread(machine, file),
    ):
        machine.pager.poison(10)  # of the half that only the device reads
        with pytest.raises(GuestError, match=r"vCPU 0: the guest's disk failed: request \d+, status POISON"):
            machine.run(TIMEOUT)
        assert machine.pager.error is None


@pytest.mark.root
@pytest.mark.hugepages
@pytest.mark.parametrize("backing", ["hugetlb-2m", "private-hugetlb-2m"])
@pytest.mark.parametrize("trap", [*TRAPS, pytest.param("userfaultfd", marks=pytest.mark.userfaultfd)])
def test_a_poisoned_huge_page_is_a_machine_check_too(trap, backing):
    workload = plan("poison", memory=4 << 20, pages=1)
    with make_machine(trap, backing, workload=workload, reserve_hugepages=True) as machine:
        machine.pager.poison(0)
        machine.run(TIMEOUT)
        parameters = machine.threads[0].parameters
        assert (parameters.mc_count, parameters.mc_addresses[0]) == (1, 0)
