"""How an x86-64 instruction is written: prefixes, opcode, ModRM, SIB, displacement, immediate.

`kvmdp.vcpu.operand` finds the memory an instruction touches by it. None of the two need know what an instruction
does, only where its bytes end (for RIP-relative operands) and which address they name.

Source: Intel SDM volume 2, chapter 2 (instruction format) and appendix A (opcode maps). Addresses are linear.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmdp.abi.kvm_x86 import kvm_regs
from kvmdp.errors import KvmdpError

MAX_INSTRUCTION = 15  # bytes
ADDRESS_MASK = (1 << 64) - 1
REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
LEGACY_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))

_IMMEDIATE_1_ONE_BYTE = frozenset((0x6B, 0x80, 0x83, 0xC0, 0xC1, 0xC6))
_IMMEDIATE_Z_ONE_BYTE = frozenset((0x69, 0x81, 0xC7))
_IMMEDIATE_1_TWO_BYTE = frozenset((0x70, 0x71, 0x72, 0x73, 0xA4, 0xAC, 0xBA, 0xC2, 0xC4, 0xC5, 0xC6))
_X87 = range(0xD8, 0xE0)
# Two-byte opcodes (0F xx) of MMX and SSE, and FXRSTOR with its neighbours.
_VECTORS_TWO_BYTE = frozenset(
    (*range(0x10, 0x18), *range(0x28, 0x30), *range(0x50, 0x80), 0xAE, *range(0xC2, 0xC7))
)
_VECTORS_TWO_BYTE |= frozenset(range(0xD0, 0x100))


class TruncatedError(KvmdpError):
    """The instruction goes on beyond the bytes at hand."""


@dataclass(slots=True)
class Reader:
    """Takes an instruction's bytes one after the other. Raises TruncatedError where there are no more."""

    code: bytes
    position: int = 0

    def byte(self) -> int:
        """Take a byte."""
        if self.position >= len(self.code):
            raise TruncatedError
        self.position += 1
        return self.code[self.position - 1]

    def signed(self, length: int) -> int:
        """Take a signed number of `length` bytes."""
        end = self.position + length
        if end > len(self.code):
            raise TruncatedError
        value = int.from_bytes(self.code[self.position : end], "little", signed=True)
        self.position = end
        return value


@dataclass(slots=True)
class Instruction:
    """The parts of an instruction that decide about its memory operand."""

    opcode_map: int = 0  # 0: one byte, 1: 0F, 2: 0F 38, 3: 0F 3A
    opcode: int = 0
    rex: int = 0
    vector_length: int = 0  # bytes; 0 if there is no VEX or EVEX prefix
    vector_source: int = 0  # the register in VEX.vvvv
    evex: bool = False
    operand_16: bool = False
    address_32: bool = False
    segment_base: int = 0

    @property
    def operand_size(self) -> int:
        """Bytes of an operand, for the general instructions whose default is 4."""
        return 8 if self.rex & 8 else 2 if self.operand_16 else 4


def read_prefixes(reader: Reader, fs_base: int, gs_base: int) -> Instruction:
    """Read prefixes and opcode."""
    instruction = Instruction()
    byte = reader.byte()
    while byte in LEGACY_PREFIXES:
        if byte == 0x66:
            instruction.operand_16 = True
        elif byte == 0x67:
            instruction.address_32 = True
        elif byte == 0x64:
            instruction.segment_base = fs_base
        elif byte == 0x65:
            instruction.segment_base = gs_base
        byte = reader.byte()
    if byte & 0xF0 == 0x40:
        instruction.rex = byte
        byte = reader.byte()
    if byte in (0xC4, 0xC5, 0x62):
        _vector_prefix(byte, instruction, reader)
        instruction.opcode = reader.byte()
        return instruction
    if byte == 0x0F:
        instruction.opcode_map = 1
        byte = reader.byte()
        if byte in (0x38, 0x3A):
            instruction.opcode_map = 2 if byte == 0x38 else 3
            byte = reader.byte()
    instruction.opcode = byte
    return instruction


def _vector_prefix(first: int, instruction: Instruction, reader: Reader) -> None:
    """Read the rest of a VEX (C5, C4) or EVEX (62) prefix; their register bits are REX's, inverted."""
    payload = reader.byte()
    inverted = ~payload
    if first == 0xC5:
        instruction.rex = 0x40 | (inverted >> 5 & 4)
        instruction.opcode_map = 1
        instruction.vector_length = 32 if payload & 4 else 16
        instruction.vector_source = inverted >> 3 & 15
        return
    instruction.rex = 0x40 | (inverted >> 5 & 7)
    instruction.opcode_map = payload & (0x1F if first == 0xC4 else 0x07)
    payload = reader.byte()
    instruction.vector_source = ~payload >> 3 & 15
    instruction.rex |= payload >> 4 & 8
    if first == 0xC4:
        instruction.vector_length = 32 if payload & 4 else 16
    else:
        instruction.evex = True
        instruction.vector_length = 16 << min(reader.byte() >> 5 & 3, 2)


def effective_address(
    modrm: int, instruction: Instruction, reader: Reader, regs: kvm_regs, *, with_index: bool = True
) -> int:
    """Take the rest of a memory operand, behind its ModRM byte, and return its address.

    `with_index` False leaves out what the SIB byte says of an index.
    """
    mod, rm = modrm >> 6, modrm & 7
    address = 0
    relative = False
    if rm == 4:
        sib = reader.byte()
        index = (sib >> 3 & 7) | (instruction.rex & 2) << 2
        if with_index and index != 4:
            address = getattr(regs, REGISTERS[index]) << (sib >> 6)
        rm = sib & 7
        if rm == 5 and mod == 0:
            address += reader.signed(4)
        else:
            address += getattr(regs, REGISTERS[rm | (instruction.rex & 1) << 3])
    elif rm == 5 and mod == 0:
        relative = True
        address = reader.signed(4)
    else:
        address = getattr(regs, REGISTERS[rm | (instruction.rex & 1) << 3])
    if mod == 1:
        # EVEX scales an 8-bit displacement by the operand's size; the full vector is the common case.
        address += reader.signed(1) * (instruction.vector_length if instruction.evex else 1)
    elif mod == 2:
        address += reader.signed(4)
    if relative:
        address += regs.rip + reader.position + _immediate_length(instruction, modrm >> 3 & 7)
    if instruction.address_32:
        address &= 0xFFFFFFFF
    return wrap(address + instruction.segment_base)


def _immediate_length(instruction: Instruction, reg: int) -> int:
    """Return the bytes of immediate operand behind ModRM and displacement."""
    opcode = instruction.opcode
    full = 2 if instruction.operand_16 and not instruction.rex & 8 else 4
    if instruction.opcode_map == 3:
        return 1
    if instruction.opcode_map == 1:
        return 1 if opcode in _IMMEDIATE_1_TWO_BYTE else 0
    if instruction.opcode_map == 0:
        if opcode in _IMMEDIATE_1_ONE_BYTE or (opcode == 0xF6 and reg < 2):
            return 1
        if opcode in _IMMEDIATE_Z_ONE_BYTE or (opcode == 0xF7 and reg < 2):
            return full
    return 0


def is_far_call(code: bytes, size: int) -> bool:
    """Return whether `code` is all of a CALL through a far pointer in memory, whose offset has `size` bytes."""
    found = _in_memory(code, 0xFF)
    return found is not None and found[1] == 3 and found[0].operand_size == size


def is_selector_store(code: bytes) -> bool:
    """Return whether `code` is all of a MOV from a segment register to memory."""
    return _in_memory(code, 0x8C) is not None


def _in_memory(code: bytes, opcode: int) -> tuple[Instruction, int] | None:
    """Return what `code` is and the register field of its ModRM byte.

    None if it is not all of an instruction with this one-byte opcode, an operand in memory and no immediate.
    """
    reader = Reader(code)
    try:
        instruction = read_prefixes(reader, 0, 0)
        if (instruction.opcode_map, instruction.opcode) != (0, opcode):
            return None
        modrm = reader.byte()
        if modrm >> 6 == 3:
            return None
        effective_address(modrm, instruction, reader, kvm_regs())
    except TruncatedError:
        return None
    return (instruction, modrm >> 3 & 7) if reader.position == len(code) else None


def is_string_input(code: bytes) -> bool:
    """Return whether `code` begins with INS, which stores what it reads from a port."""
    try:
        instruction = read_prefixes(Reader(code[:MAX_INSTRUCTION]), 0, 0)
    except TruncatedError:
        return False
    return instruction.opcode_map == 0 and instruction.opcode in (0x6C, 0x6D)


def address_mask(code: bytes) -> int:
    """Return the bits that an address of the instruction that begins `code` has: 32 after the prefix 67, else 64."""
    return 0xFFFFFFFF if read_prefixes(Reader(code[:MAX_INSTRUCTION]), 0, 0).address_32 else ADDRESS_MASK


def far_return(code: bytes) -> int:
    """Return the size of each of the two pops of a far return, in bytes; 0 if `code` does not begin with one."""
    try:
        instruction = read_prefixes(Reader(code[:MAX_INSTRUCTION]), 0, 0)
    except TruncatedError:
        return 0
    is_far_return = instruction.opcode_map == 0 and instruction.opcode in (0xCA, 0xCB)
    return instruction.operand_size if is_far_return else 0


def may_load_vectors(code: bytes) -> bool:
    """Return whether the instruction that begins `code` may load a register of x87, MMX, SSE or AVX from memory."""
    try:
        instruction = read_prefixes(Reader(code[:MAX_INSTRUCTION]), 0, 0)
    except TruncatedError:
        return True
    if instruction.opcode_map == 0:
        return instruction.opcode in _X87
    return (
        instruction.opcode_map > 1 or instruction.vector_length > 0 or instruction.opcode in _VECTORS_TWO_BYTE
    )


def wrap(address: int) -> int:
    """Return an address as the CPU computes it, in 64 bits."""
    return address & ADDRESS_MASK
