"""Single instructions on absent memory do what they do on present memory, however KVM gives the access to us.

Each program runs twice on the same bytes: in a guest whose memory is always there, and under a trap.  What it
returns and what it leaves in memory must be the same, and exactly the pages it names are fetched, once.
"""

import functools
import struct

import numpy as np
import pytest
from harness import BACKINGS, MEMORY, SEED, TIMEOUT, TRAPS, all_of_ram, program_machine
from plain_guest import PlainGuest

from kvmdp.kvm import InternalError
from kvmdp.machine.guest_abi import Report
from kvmdp.machine.hostinfo import uses_nested_paging
from kvmdp.machine.workloads import Program, WorkloadOptions
from kvmdp.source.base import read_pages
from kvmdp.source.patched import PatchedSource
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

# name: (code without the final ret, RAM pages it touches); Intel syntax, addresses are those of RAM pages 5 to 9
PROGRAMS = {
    # movdqu xmm0,[0x5008]; movdqu [0x7010],xmm0; mov rax,[0x7018]
    "movdqu": ("f30f6f042508500000 f30f7f042510700000 488b042518700000", {5, 7}),
    # movdqu xmm0,[0x5ff9]; movdqu [0x8ff3],xmm0; mov rax,[0x8ffb]
    "movdqu across pages": ("f30f6f0425f95f0000 f30f7f0425f38f0000 488b0425fb8f0000", {5, 6, 8, 9}),
    # fxsave [0x5000]; mov eax,[0x5018]
    "fxsave": ("0fae042500500000 8b042518500000", {5}),
    # ldmxcsr [0x5000]; stmxcsr [0x6000]; mov eax,[0x6000]
    "ldmxcsr, stmxcsr": ("0fae142500500000 0fae1c2500600000 8b042500600000", {5, 6}),
    # popcnt rax,[0x5000]
    "popcnt": ("f3480fb8042500500000", {5}),
    # xor eax,eax; crc32 rax,qword ptr [0x5000]
    "crc32": ("31c0 f2480f38f1042500500000", {5}),
    # fld qword ptr [0x5000]; fstp qword ptr [0x6000]; mov rax,[0x6000]
    "fld, fstp": ("dd042500500000 dd1c2500600000 488b042500600000", {5, 6}),
    # xor eax,eax; adcx rax,[0x5000]
    "adcx": ("31c0 66480f38f6042500500000", {5}),
    # lock inc qword ptr [0x5000]; mov rax,[0x5000]
    "lock inc": ("f048ff042500500000 488b042500500000", {5}),
    # push rbx; mov rax,[0x6000]; mov rdx,[0x6008]; mov ebx,1; mov ecx,2; lock cmpxchg16b [0x5000]; setz al;
    # movzx eax,al; add rax,[0x5000]; add rax,[0x5008]; pop rbx
    "lock cmpxchg16b": (
        """53 488b042500600000 488b142508600000 bb01000000 b902000000 f0480fc70c2500500000 0f94c0 0fb6c0
        4803042500500000 4803042508500000 5b""",
        {5, 6},
    ),
    # mov eax,7; xchg rax,[0x5000]; add rax,[0x5000]
    "xchg": ("b807000000 4887042500500000 4803042500500000", {5}),
    # mov eax,3; bts qword ptr [0x5000],5; adc eax,0
    "bts": ("b803000000 480fba2c250050000005 83d000", {5}),
    # mov rax,[0x5ffc]
    "read across pages": ("488b0425fc5f0000", {5, 6}),
    # mov rax,0x1122334455667788; mov [0x5ffd],rax; mov rax,[0x5ffd]
    "write across pages": ("48b88877665544332211 48890425fd5f0000 488b0425fd5f0000", {5, 6}),
    # mov eax,1; lock add [0x5ffc],rax; mov rax,[0x5ffc]
    "lock add across pages": ("b801000000 f048010425fc5f0000 488b0425fc5f0000", {5, 6}),
    # mov eax,0x5040; call rax
    "fetch": ("b840500000 ffd0", {5}),
    # mov eax,0x5ffa; call rax
    "fetch across pages": ("b8fa5f0000 ffd0", {5, 6}),
    # mov esi,0x5ff0; mov edi,0x8ff8; mov ecx,4; rep movsq; mov rax,[0x9000]
    "rep movsq": ("bef05f0000 bff88f0000 b904000000 f348a5 488b042500900000", {5, 6, 8, 9}),
    # mov edi,0x5ff8; mov ecx,3; mov eax,9; rep stosq; mov rax,[0x6008]
    "rep stosq": ("bff85f0000 b903000000 b809000000 f348ab 488b042508600000", {5, 6}),
    # mov rcx,rsp; mov esp,0x6000; push 77; pop rax; add rax,[0x5ff8]; mov rsp,rcx
    "push, pop": ("4889e1 bc00600000 6a4d 58 48030425f85f0000 4889cc", {5}),
    # mov rcx,rsp; mov r8,rbp; mov esp,0x6000; mov ebp,0x1234; enter 16,0; leave; mov rax,[0x5ff8]; mov rsp,rcx;
    # mov rbp,r8
    "enter, leave": ("4889e1 4989e8 bc00600000 bd34120000 c8100000 c9 488b0425f85f0000 4889cc 4c89c5", {5}),
}
# Where KVM makes these accesses itself, it spins on absent memory without an exit.
SPINNING = {
    # sgdt [0x5000]; mov rax,[0x5002]
    "sgdt": ("0f01042500500000 488b042502500000", {5}),
    # sidt [0x5ffc]; mov rax,[0x5ffe]
    "sidt across pages": ("0f010c25fc5f0000 488b0425fe5f0000", {5, 6}),
}
ALL = PROGRAMS | SPINNING
RET = b"\xc3"
FUNCTION = struct.pack("<2sQ1s", b"\x48\xb8", 0x1234567812345678, b"\xc3")  # mov rax,imm64; ret

# ldmxcsr faults on bits it does not know; the functions are what the fetching programs call.
PATCHES = {
    "ldmxcsr, stmxcsr": [(0x5000, struct.pack("<I", 0x1F80))],
    "fld, fstp": [(0x5000, struct.pack("<d", 2.5))],
    "fetch": [(0x5040, FUNCTION)],
    "fetch across pages": [(0x5FFA, FUNCTION)],
}


def source_for(name):
    source = SyntheticSource(MEMORY, SEED)
    return PatchedSource(source, PATCHES[name]) if name in PATCHES else source


@functools.cache
def on_present_memory(name, ring):
    """Return how the program ends, its result, and RAM, where no page is ever absent."""
    blocks = Program(WorkloadOptions(memory_bytes=MEMORY, ring=ring, seed=SEED)).blocks
    with PlainGuest(MEMORY, blocks, bytes.fromhex(ALL[name][0]) + RET) as guest:
        guest.ram[:] = read_pages(source_for(name), np.arange(MEMORY // 4096))
        end = guest.run()[0]
        return end, guest.blocks[0].checksum, guest.ram.copy()


def check(name, trap, backing, ring):
    """Run the program under the trap and compare; returns how often the watchdog had to help."""
    end, checksum, ram = on_present_memory(name, ring)
    if isinstance(end, InternalError) and end.is_emulation_failure:
        pytest.skip(f"this host emulates ring {ring}, without {name}, on present memory too")
    if end == Report.EXCEPTION:
        pytest.skip(f"this host's CPU gives a guest no {name}: use one that has it")
    assert end == Report.DONE
    code, pages = bytes.fromhex(ALL[name][0]) + RET, sorted(ALL[name][1])
    with program_machine(trap, code, backing, ring=ring, source=source_for(name)) as machine:
        machine.run(TIMEOUT)
        assert machine.threads[0].parameters.checksum == checksum
        present = [page for page in range(machine.layout.pages) if machine.pager.bitmap.test(page)]
        assert present == pages
        assert machine.pager.counters.pages_fetched == len(pages)
        assert np.array_equal(all_of_ram(machine)[pages], ram[pages])
        return machine.threads[0].stalls


@pytest.mark.parametrize("ring", [3, 0])
@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_instruction_is_exact_on_absent_memory(name, trap, backing, ring):
    assert check(name, trap, backing, ring) == 0


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("name", SPINNING)
def test_the_watchdog_finds_an_instruction_on_which_kvm_spins(monkeypatch, name, trap):
    monkeypatch.setattr("kvmdp.machine.stall_watch._STALL_SECONDS", 0.5)
    # With page tables in hardware the CPU makes the access itself; but for memory without a slot KVM emulates it.
    spins = trap == "mmio" or not uses_nested_paging()
    assert check(name, trap, "memfd", 3) == (len(ALL[name][1]) if spins else 0)
