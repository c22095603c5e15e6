"""Which memory an instruction touches: real encodings as GNU as makes them, addresses worked out by hand."""

import pytest

from kvmdp.abi.kvm_x86 import kvm_regs
from kvmdp.vcpu.encoding import MAX_INSTRUCTION, TruncatedError
from kvmdp.vcpu.operand import Operand, memory_operands

RIP = 0x5000
FS, GS = 0x10000000, 0x20000000
REGISTERS = kvm_regs(
    rip=RIP,
    rax=0x100000,
    rcx=3,
    rdx=0x200000,
    rbx=0x300000,
    rsp=0x400000,
    rbp=0x500000,
    rsi=0x600000,
    rdi=0x700000,
    r8=0x800000,
    r9=0x900000,
    r10=0xA00000,
    r11=0xB00000,
    r12=0xC00000,
    r13=0xD00000,
    r14=0xE00000,
    r15=0xF00000,
)

# bytes, instruction, (address, bytes it touches there) of each operand
WITH_OPERANDS = [
    ("488b03", "mov rax,[rbx]", [(0x300000, 8)]),
    ("884310", "mov [rbx+0x10],al", [(0x300010, 1)]),
    ("8b4380", "mov eax,[rbx-0x80]", [(0x2FFF80, 4)]),
    ("488b8345230100", "mov rax,[rbx+0x12345]", [(0x312345, 8)]),
    ("49830005", "add qword ptr [r8],5", [(0x800000, 8)]),
    ("010424", "add [rsp],eax", [(0x400000, 4)]),
    ("488b442408", "mov rax,[rsp+8]", [(0x400008, 8)]),
    ("498b0424", "mov rax,[r12]", [(0xC00000, 8)]),
    ("498b4500", "mov rax,[r13+0]", [(0xD00000, 8)]),
    ("488b44cb04", "mov rax,[rbx+rcx*8+4]", [(0x30001C, 8)]),
    ("498b448ffc", "mov rax,[r15+rcx*4-4]", [(0xF00008, 8)]),
    ("488b04cd00400000", "mov rax,[rcx*8+0x4000]", [(0x4018, 8)]),
    ("488b042500500000", "mov rax,[0x5000]", [(0x5000, 8)]),
    ("4a8b0423", "mov rax,[rbx+r12*1]", [(0xF00000, 8)]),
    ("488b4500", "mov rax,[rbp]", [(0x500000, 8)]),
    ("488b0500010000", "mov rax,[rip+0x100]", [(0x5107, 8)]),
    ("813d0001000078563412", "cmp dword ptr [rip+0x100],0x12345678", [(0x510A, 4)]),
    ("66813d000100003412", "cmp word ptr [rip+0x100],0x1234", [(0x5109, 2)]),
    ("803d0001000005", "cmp byte ptr [rip+0x100],5", [(0x5107, 1)]),
    ("4883050001000005", "add qword ptr [rip+0x100],5", [(0x5108, 8)]),
    ("f70500ffffff00100000", "test dword ptr [rip-0x100],0x1000", [(0x4F0A, 4)]),
    ("f71500010000", "not dword ptr [rip+0x100]", [(0x5106, 4)]),
    ("69050001000044332211", "imul eax,[rip+0x100],0x11223344", [(0x510A, 4)]),
    ("6b050001000005", "imul eax,[rip+0x100],5", [(0x5107, 4)]),
    ("c1250001000003", "shl dword ptr [rip+0x100],3", [(0x5107, 4)]),
    ("0fa4050001000003", "shld [rip+0x100],eax,3", [(0x5108, 4)]),
    ("0fba250001000003", "bt dword ptr [rip+0x100],3", [(0x5108, 4)]),
    ("660f70050001000001", "pshufd xmm0,[rip+0x100],1", [(0x5109, 16)]),
    ("660f3a0f050001000001", "palignr xmm0,[rip+0x100],1", [(0x510A, 16)]),
    ("c4e3750f050001000001", "vpalignr ymm0,ymm1,[rip+0x100],1", [(0x510A, 32)]),
    ("c4e3fd00050001000001", "vpermq ymm0,[rip+0x100],1", [(0x510A, 32)]),
    ("64488b03", "mov rax,fs:[rbx]", [(0x10300000, 8)]),
    ("65488b042510000000", "mov rax,gs:[0x10]", [(0x20000010, 8)]),
    ("678b03", "mov eax,[ebx]", [(0x300000, 4)]),
    ("678b83ffffcfff", "mov eax,[ebx-0x300001]", [(0xFFFFFFFF, 4)]),
    ("a0bc9a785634120000", "movabs al,[0x123456789abc]", [(0x123456789ABC, 1)]),
    ("50", "push rax", [(0x3FFFF8, 8)]),
    ("ff33", "push qword ptr [rbx]", [(0x300000, 8), (0x3FFFF8, 8)]),
    ("58", "pop rax", [(0x400000, 8)]),
    ("8f03", "pop qword ptr [rbx]", [(0x300000, 8), (0x400000, 8)]),
    ("ff13", "call qword ptr [rbx]", [(0x300000, 8), (0x3FFFF8, 8)]),
    ("ff23", "jmp qword ptr [rbx]", [(0x300000, 8)]),
    ("e8fb0f0000", "call .+0x1000", [(0x3FFFF8, 8)]),
    ("c3", "ret", [(0x400000, 8)]),
    ("c20800", "ret 8", [(0x400000, 8)]),
    ("48cf", "iretq", [(0x400000, 40)]),
    ("c9", "leave", [(0x500000, 8)]),
    ("c8100000", "enter 16,0", [(0x3FFFF8, 8), (0x3FFFE8, 1)]),
    ("c8200002", "enter 32,2", [(0x4FFFF8, 8), (0x3FFFE8, 24), (0x3FFFC8, 1)]),
    ("c8200003", "enter 32,3", [(0x4FFFF0, 16), (0x3FFFE0, 32), (0x3FFFC0, 1)]),
    ("48cb", "retfq", [(0x400000, 16)]),
    ("48ca0800", "retfq 8", [(0x400000, 16)]),
    ("48ff1b", "call far [rbx]", [(0x300000, 10), (0x3FFFF0, 16)]),
    ("ff2b", "jmp far [rbx]", [(0x300000, 6)]),
    ("660f38f803", "movdir64b rax,[rbx]", [(0x300000, 64), (0x100000, 64)]),
    ("67660f38f803", "movdir64b eax,[ebx]", [(0x300000, 64), (0x100000, 64)]),
    ("f20f38f84b08", "enqcmd rcx,[rbx+8]", [(0x300008, 64), (3, 64)]),
    ("480f38f903", "movdiri [rbx],rax", [(0x300000, 8)]),
    ("480fa303", "bt qword ptr [rbx],rax", [(0x320000, 8)]),
    ("f00fab0b", "lock bts dword ptr [rbx],ecx", [(0x300000, 4)]),
    ("480fa33b", "bt qword ptr [rbx],rdi", [(0x3E0000, 8)]),
    ("9c", "pushfq", [(0x3FFFF8, 8)]),
    ("9d", "popfq", [(0x400000, 8)]),
    ("d7", "xlatb", [(0x300000, 1)]),
    ("48a5", "movsq", [(0x600000, 8), (0x700000, 8)]),
    ("f3a4", "rep movsb", [(0x600000, 1), (0x700000, 1)]),
    ("64ac", "lodsb fs:[rsi]", [(0x10600000, 1)]),
    ("48ab", "stosq", [(0x700000, 8)]),
    ("f3a6", "repe cmpsb", [(0x600000, 1), (0x700000, 1)]),
    ("ae", "scasb", [(0x700000, 1)]),
    ("f36e", "rep outsb", [(0x600000, 1)]),
    ("6d", "insd", [(0x700000, 4)]),
    ("f30f6f4301", "movdqu xmm0,[rbx+1]", [(0x300001, 16)]),
    ("f3450f7f4901", "movdqu [r9+1],xmm9", [(0x900001, 16)]),
    ("660f382a03", "movntdqa xmm0,[rbx]", [(0x300000, 16)]),
    ("f2480f38f103", "crc32 rax,qword ptr [rbx]", [(0x300000, 8)]),
    ("f3480fb803", "popcnt rax,[rbx]", [(0x300000, 8)]),
    ("66480f38f603", "adcx rax,[rbx]", [(0x300000, 8)]),
    ("480f38f003", "movbe rax,[rbx]", [(0x300000, 8)]),
    ("f0480fc70b", "lock cmpxchg16b [rbx]", [(0x300000, 16)]),
    ("0fc70b", "cmpxchg8b [rbx]", [(0x300000, 8)]),
    ("f0480fc103", "lock xadd [rbx],rax", [(0x300000, 8)]),
    ("660ff7c1", "maskmovdqu xmm0,xmm1", [(0x700000, 16)]),
    ("0f0103", "sgdt [rbx]", [(0x300000, 10)]),
    ("0fae03", "fxsave [rbx]", [(0x300000, 512)]),
    ("480fae0b", "fxrstor64 [rbx]", [(0x300000, 512)]),
    ("0fae13", "ldmxcsr [rbx]", [(0x300000, 4)]),
    ("0fae23", "xsave [rbx]", [(0x300000, 2696)]),
    ("0fc723", "xsavec [rbx]", [(0x300000, 2696)]),
    ("0fae3b", "clflush [rbx]", [(0x300000, 1)]),
    ("db2b", "fld tbyte ptr [rbx]", [(0x300000, 10)]),
    ("dd1b", "fstp qword ptr [rbx]", [(0x300000, 8)]),
    ("dd33", "fnsave [rbx]", [(0x300000, 108)]),
    ("d933", "fnstenv [rbx]", [(0x300000, 28)]),
    ("df03", "fild word ptr [rbx]", [(0x300000, 2)]),
    ("c5fe6f4301", "vmovdqu ymm0,[rbx+1]", [(0x300001, 32)]),
    ("c4417a6f14cb", "vmovdqu xmm10,[r11+rcx*8]", [(0xB00018, 16)]),
    ("c4c27d5803", "vpbroadcastd ymm0,[r11]", [(0xB00000, 4)]),
    ("c4c2e8f207", "andn rax,rdx,[r15]", [(0xF00000, 8)]),
    ("62f1fe486f4301", "vmovdqu64 zmm0,[rbx+64]", [(0x300040, 64)]),
    ("62c1fe486f642402", "vmovdqu64 zmm20,[r12+128]", [(0xC00080, 64)]),
    ("62f17e296f4301", "vmovdqu32 ymm0{k1},[rbx+32]", [(0x300020, 32)]),
    ("62f17548fe0500010000", "vpaddd zmm0,zmm1,[rip+0x100]", [(0x510A, 64)]),
    ("62f3754825050001000005", "vpternlogd zmm0,zmm1,[rip+0x100],5", [(0x510B, 64)]),
    ("0f970500010000", "seta byte ptr [rip+0x100]", [(0x5107, 1)]),
    ("0fb603", "movzx eax,byte ptr [rbx]", [(0x300000, 1)]),
    ("488703", "xchg [rbx],rax", [(0x300000, 8)]),
    ("66c705000100003412", "mov word ptr [rip+0x100],0x1234", [(0x5109, 2)]),
    ("48c7050001000034120000", "mov qword ptr [rip+0x100],0x1234", [(0x510B, 8)]),
    ("660f3a21050001000001", "insertps xmm0,[rip+0x100],1", [(0x510A, 4)]),
    ("0fc2050001000001", "cmpps xmm0,[rip+0x100],1", [(0x5108, 16)]),
    ("c5f0c2050001000001", "vcmpps xmm0,xmm1,[rip+0x100],1", [(0x5109, 16)]),
    ("660fc4050001000001", "pinsrw xmm0,[rip+0x100],1", [(0x5109, 2)]),
    ("c4e3f122050001000001", "vpinsrq xmm0,xmm1,[rip+0x100],1", [(0x510A, 8)]),
    ("0f0023", "verr [rbx]", [(0x300000, 2)]),
    ("0f001b", "ltr [rbx]", [(0x300000, 2)]),
    ("d203", "rol byte ptr [rbx],cl", [(0x300000, 1)]),
    ("6467f30f10044b", "movss xmm0,fs:[ebx+ecx*2]", [(0x10300006, 4)]),
    (
        "664881050001000078563412",
        "add qword ptr [rip+0x100],0x12345678, with a 66 prefix that REX.W overrides",
        [(0x510C, 8)],
    ),
]

WITHOUT_OPERANDS = [
    ("488d4308", "lea rax,[rbx+8]"),
    ("4889d8", "mov rax,rbx"),
    ("90", "nop"),
    ("0fa2", "cpuid"),
    ("eb0e", "jmp .+0x10"),
    ("0f85fa0f0000", "jne .+0x1000"),
    ("b805000000", "mov eax,5"),
    ("48b88877665544332211", "movabs rax,0x1122334455667788"),
    ("480fc8", "bswap rax"),
    ("c5f877", "vzeroupper"),
    ("660fd4c1", "paddq xmm0,xmm1"),
    ("0f05", "syscall"),
    ("ec", "in al,dx"),
    ("e610", "out 0x10,al"),
    ("c7f8fa000000", "xbegin .+0x100"),
]


def operands(code, registers=REGISTERS):
    return memory_operands(code, registers, FS, GS)


@pytest.mark.parametrize(("code", "text", "expected"), WITH_OPERANDS, ids=[row[1] for row in WITH_OPERANDS])
def test_operands_are_found(code, text, expected):
    found = {operand.address: operand.length for operand in operands(bytes.fromhex(code))}
    assert found.keys() == {address for address, _ in expected}
    for address, length in expected:
        assert found[address] >= length


@pytest.mark.parametrize(("code", "text"), WITHOUT_OPERANDS, ids=[row[1] for row in WITHOUT_OPERANDS])
def test_instructions_without_memory_have_none(code, text):
    assert operands(bytes.fromhex(code)) == ()


@pytest.mark.parametrize(("code", "text", "expected"), WITH_OPERANDS, ids=[row[1] for row in WITH_OPERANDS])
def test_what_follows_an_instruction_does_not_matter(code, text, expected):
    code = bytes.fromhex(code)
    assert operands((code + bytes(15))[:15]) == operands((code + b"\xff" * 15)[:15]) == operands(code)


@pytest.mark.parametrize(("code", "text", "expected"), WITH_OPERANDS, ids=[row[1] for row in WITH_OPERANDS])
def test_an_instruction_cut_short_is_said_to_be_or_decodes_the_same(code, text, expected):
    # An immediate at the end is not needed, and an opcode alone may name its address.
    code = bytes.fromhex(code)
    for length in range(len(code)):
        try:
            found = operands(code[:length])
        except TruncatedError:
            continue
        assert {operand.address for operand in found} <= {address for address, _ in expected}


def test_nothing_at_all_is_cut_short():
    with pytest.raises(TruncatedError):
        operands(b"")


def test_prefixes_without_end_are_no_instruction():
    with pytest.raises(TruncatedError):
        operands(b"\x66" * (MAX_INSTRUCTION + 5) + b"\x8b\x03")


def test_addresses_wrap_at_64_bits():
    # mov rax,[rbx+0x10]
    assert operands(bytes.fromhex("488b4310"), kvm_regs(rbx=(1 << 64) - 8)) == (Operand(8, 16),)
