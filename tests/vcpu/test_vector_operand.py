"""Which memory a gather or a masked move touches: real encodings, with index and mask in vector registers."""

import ctypes
import struct

import pytest

from kvmdp.abi.kvm_x86 import kvm_regs, kvm_xsave
from kvmdp.vcpu.operand import memory_operands
from kvmdp.vcpu.vector_operand import VectorRegisters

REGISTERS = kvm_regs(rax=0x100000, rbx=0x300000, r8=0x800000)
XMM, XSTATE_BV, YMM_HIGH = 160, 512, 576
SSE, AVX = 2, 4


def vectors(components=SSE | AVX, **registers):
    """Registers as KVM_GET_XSAVE gives them: `ymm3=bytes`."""
    area = bytearray(ctypes.sizeof(kvm_xsave))
    area[XSTATE_BV] = components
    for name, value in registers.items():
        number, value = int(name[3:]), value.ljust(32, b"\0")
        area[XMM + 16 * number : XMM + 16 * (number + 1)] = value[:16]
        area[YMM_HIGH + 16 * number : YMM_HIGH + 16 * (number + 1)] = value[16:]
    return VectorRegisters(bytes(area))


def touched(code, registers):
    found = memory_operands(bytes.fromhex(code), REGISTERS, vectors=lambda: registers)
    return [(operand.address, operand.length) for operand in found]


def test_each_element_of_a_gather_has_an_address_of_its_own():
    # vpgatherdd xmm0,[rax+xmm2*4],xmm1
    registers = vectors(ymm2=struct.pack("<4i", 0, -1, 1024, 7), ymm1=b"\xff" * 16)
    assert touched("c4e271900490", registers) == [(0x100000, 4), (0xFFFFC, 4), (0x101000, 4), (0x10001C, 4)]


def test_a_gather_loads_only_what_its_mask_says():
    # vpgatherdd xmm0,[rax+xmm2*4],xmm1: the CPU has cleared the mask of the elements it has
    registers = vectors(
        ymm2=struct.pack("<4i", 0, 1, 2, 3), ymm1=struct.pack("<4I", 0, 0x80000000, 0x7FFFFFFF, 0)
    )
    assert touched("c4e271900490", registers) == [(0x100004, 4)]


def test_indices_of_a_gather_are_as_wide_as_it_says():
    # vpgatherqq ymm0,[r8+ymm10*8+0x10],ymm9
    registers = vectors(ymm10=struct.pack("<4q", 1, -2, 1 << 20, 0), ymm9=b"\x80" * 32)
    expected = [(0x800018, 8), (0x800000, 8), (0x800010 + (8 << 20), 8), (0x800010, 8)]
    assert touched("c482b59144d010", registers) == expected
    # vgatherqps xmm0,[xmm2*1+0x5000],xmm1: two indices of 8 bytes, two elements of 4
    registers = vectors(ymm2=struct.pack("<2q", 16, 32), ymm1=b"\xff" * 16)
    assert touched("c4e271930415 00500000", registers) == [(0x5010, 4), (0x5020, 4)]
    # vpgatherdq ymm3,[rbx+xmm2*8],ymm1: four indices of 4 bytes, four elements of 8
    registers = vectors(ymm2=struct.pack("<4i", 0, 1, -1, 512), ymm1=b"\xff" * 32)
    assert touched("c4e2f5901cd3", registers) == [(0x300000, 8), (0x300008, 8), (0x2FFFF8, 8), (0x301000, 8)]


@pytest.mark.parametrize("components", [0, SSE, AVX])
def test_a_register_in_its_initial_state_is_zero(components):
    registers = vectors(components, ymm2=b"\x55" * 32)
    low = b"\x55" * 16 if components & SSE else bytes(16)
    high = b"\x55" * 16 if components & AVX else bytes(16)
    assert registers.ymm(2) == low + high


def test_a_masked_move_touches_from_its_first_element_to_its_last():
    # vmaskmovps xmm0,xmm1,[rbx]
    assert touched("c4e2712c03", vectors(ymm1=struct.pack("<4I", 0, 1 << 31, 1 << 31, 0))) == [(0x300004, 8)]
    # vpmaskmovq [rbx],ymm1,ymm0
    assert touched("c4e2f58e03", vectors(ymm1=struct.pack("<4Q", 0, 0, 0, 1 << 63))) == [(0x300018, 8)]
    assert touched("c4e2f58e03", vectors()) == []


def test_without_the_vector_registers_nothing_is_guessed_of_a_gather():
    assert memory_operands(bytes.fromhex("c4e271900490"), REGISTERS) == ()


def test_vector_registers_are_not_read_for_an_instruction_that_does_not_depend_on_them():
    def unwanted():
        pytest.fail("the vector registers were read")

    for code in ("488b03", "c5fc1003", "c4e271dc03"):  # mov, vmovups, vaesenc
        assert memory_operands(bytes.fromhex(code), REGISTERS, vectors=unwanted)
