"""The guest's entry, handlers and service gate, seen by small programs on memory that is always present."""

import struct

import pytest
from plain_guest import PlainGuest

from kvmdp.abi.kvm_x86 import kvm_x86_mce
from kvmdp.kvm import Hlt, Shutdown
from kvmdp.machine import guest_abi as guest
from kvmdp.machine.guest_abi import Failure, Gate, Report
from kvmdp.machine.workloads import Program, Touch, WorkloadOptions

pytestmark = pytest.mark.kvm

MEMORY = 2 << 20
UNMAPPED = 0x12345678000  # far above RAM
BLOCK = guest.parameter_block_gpa(0)

RET = b"\xc3"
LOAD = b"\x48\x8b\x00"  # mov rax, [rax]
NOTHING = 0xFFFFFFFFFFFFFFFF


def mov_rax(value):
    return b"\x48\xb8" + struct.pack("<Q", value)


def mov_rdi(value):
    return b"\x48\xbf" + struct.pack("<Q", value)


def service(function, ecx=0):
    """mov ecx, ...; mov eax, function; int 0x80."""
    return b"\xb9" + struct.pack("<I", ecx) + b"\xb8" + struct.pack("<I", function) + b"\xcd\x80"


def report(code):
    """mov eax, code; mov edx, REPORT_PORT; out dx, eax."""
    return b"\xb8" + struct.pack("<I", code) + b"\xba" + struct.pack("<I", guest.REPORT_PORT) + b"\xef"


def boot(program, **options):
    return PlainGuest(MEMORY, Program(WorkloadOptions(memory_bytes=MEMORY, **options)).blocks, program)


def result_of(program, **options):
    with boot(program, **options) as machine:
        assert machine.run() == [Report.DONE]
        return machine.blocks[0].checksum


@pytest.mark.parametrize("ring", [3, 0])
def test_program_is_told_its_block_and_its_number(ring):
    program = b"\x48\x89\xf8\x48\x89\xf2" + RET  # mov rax, rdi; mov rdx, rsi
    with boot(program, vcpus=3, ring=ring) as machine:
        assert machine.run() == [Report.DONE] * 3
        assert [block.checksum for block in machine.blocks] == [
            guest.parameter_block_gpa(n) for n in range(3)
        ]
        assert [block.accesses for block in machine.blocks] == [0, 1, 2]


@pytest.mark.parametrize("ring", [3, 0])
def test_guest_halts_after_its_report(ring):
    with boot(RET, ring=ring) as machine:
        assert machine.run() == [Report.DONE]
        assert machine.run() == [Hlt()]


@pytest.mark.parametrize(
    ("field", "value", "failure"), [("magic", 0, Failure.ABI), ("version", 2, Failure.ABI)]
)
def test_block_of_another_abi_is_refused(field, value, failure):
    blocks = Program(WorkloadOptions(memory_bytes=MEMORY)).blocks
    setattr(blocks[0], field, value)
    with PlainGuest(MEMORY, blocks, RET) as machine:
        assert machine.run() == [Report.CHECK_FAILED]
        assert machine.blocks[0].failure == failure


def test_unknown_workload_is_refused():
    blocks = Touch(WorkloadOptions(memory_bytes=MEMORY)).blocks
    blocks[0].workload = 1000
    with PlainGuest(MEMORY, blocks) as machine:
        assert machine.run() == [Report.CHECK_FAILED]
        assert machine.blocks[0].failure == Failure.WORKLOAD


@pytest.mark.parametrize(("ring", "error_code"), [(3, 4), (0, 0)])
def test_exception_is_reported_with_its_circumstances(ring, error_code):
    with boot(mov_rax(UNMAPPED) + LOAD + RET, ring=ring) as machine:
        assert machine.run() == [Report.EXCEPTION]
        block = machine.blocks[0]
        assert block.exception_count == block.pf_count == 1
        assert block.exception_vector == 14
        assert block.exception_error_code == error_code
        assert block.exception_cr2 == UNMAPPED
        assert block.exception_rip == guest.PROGRAM_BASE + 10
        assert block.exception_cs & 3 == ring
        bottom = guest.STACKS_BASE + (guest.RING0_STACK_SIZE if ring else 0)
        assert bottom < block.exception_rsp < bottom + guest.RING0_STACK_SIZE
        assert machine.run() == [Hlt()]


def test_page_fault_resumes_where_the_program_asked():
    fault = mov_rax(UNMAPPED) + LOAD  # one after the other, each resumed behind itself
    resume = mov_rax(BLOCK + guest.ParameterBlock.pf_resume.offset)
    first_end = guest.PROGRAM_BASE + 2 * 10 + 3 + 3 + len(fault)
    store = b"\x48\x89\x18"  # mov [rax], rbx
    program = resume + b"\x48\xbb" + struct.pack("<Q", first_end) + store + b"\x90" * 3 + fault
    program += mov_rax(77) + RET
    with boot(program) as machine:
        assert machine.run() == [Report.DONE]
        block = machine.blocks[0]
        assert (block.pf_count, block.exception_cr2, block.checksum) == (1, UNMAPPED, 77)


def test_machine_check_is_recorded_cleared_and_resumed():
    # mov [rdi + mc_resume], rax; report; then spin: only the machine check gets the program out.
    resume = guest.ParameterBlock.mc_resume.offset
    start = b"\x48\x89\x87" + struct.pack("<I", resume) + report(0x1234) + b"\xeb\xfe"
    end = guest.PROGRAM_BASE + 10 + len(start)
    program = mov_rax(end) + start + mov_rax(88) + RET
    status = 1 << 63 | 1 << 61 | 1 << 60 | 1 << 59 | 1 << 58 | 0x134  # VAL, UC, EN, MISCV, ADDRV
    with boot(program) as machine:
        vcpu, block = machine.vcpus[0], machine.blocks[0]
        vcpu.setup_mce(10 | 1 << 24)  # banks, MCG_SER_P
        assert machine.run() == [0x1234]
        vcpu.set_mce(kvm_x86_mce(status=status, addr=0x5000, misc=0x8C, mcg_status=0b101, bank=9))
        assert machine.run() == [Report.DONE]
        assert block.checksum == 88
        assert (block.mc_count, block.exception_vector, block.mc_bank) == (1, 18, 9)
        assert (block.mc_status, block.mc_address, block.mc_misc) == (status, 0x5000, 0x8C)
        assert block.mc_mcg_status == 0b101
        # MCG_STATUS and MC9_STATUS
        assert vcpu.registers.get_msrs([0x17A, 0x425]) == {0x17A: 0, 0x425: 0}


def test_gate_reads_and_writes_msrs():
    kernel_gs_base = 0xC0000102
    value = 0x123456789A0
    program = mov_rdi(value) + service(Gate.WRMSR, kernel_gs_base) + service(Gate.RDMSR, kernel_gs_base) + RET
    assert result_of(program) == value


def test_gate_reads_control_registers():
    cr3_of_boot = guest.PAGE_TABLES_BASE
    assert result_of(service(Gate.READ_CR, 3) + RET) == cr3_of_boot
    assert result_of(service(Gate.READ_CR, 4) + RET) & 1 << 6  # MCE
    assert result_of(service(Gate.READ_CR, 1) + RET) == NOTHING


def test_gate_writes_cr3_and_invalidates():
    program = mov_rdi(guest.PAGE_TABLES_BASE) + service(Gate.WRITE_CR3) + service(Gate.INVLPG)
    assert result_of(program + service(Gate.READ_CR, 3) + RET) == guest.PAGE_TABLES_BASE


def test_gate_refuses_an_unknown_function():
    assert result_of(service(99) + RET) == NOTHING


def test_gate_halts():
    with boot(service(Gate.HALT)) as machine:
        assert machine.run() == [Hlt()]


def test_fault_inside_the_gate_is_reported_from_ring_0():
    with boot(service(Gate.RDMSR, 0x0BAD0BAD) + RET) as machine:
        assert machine.run() == [Report.EXCEPTION]
        block = machine.blocks[0]
        assert (block.exception_vector, block.exception_cs) == (13, guest.ENTRY_CODE_SELECTOR)


def test_fault_without_descriptor_table_shuts_the_vcpu_down():
    # The program area is zeros beyond the program: a pseudo descriptor of no table.
    program = mov_rdi(guest.PROGRAM_BASE + 0x1000) + service(Gate.LIDT) + mov_rax(UNMAPPED) + LOAD
    with boot(program) as machine:
        assert machine.run() == [Shutdown()]
