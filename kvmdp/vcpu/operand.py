"""Which memory an x86-64 instruction touches, from its bytes and the registers.

KVM stops with an emulation failure, without an address, where its emulator does not know an instruction that
touched non-present memory. This finds the address. It need not know what an instruction does, only where its
bytes end (for RIP-relative operands) and what its memory operand is. The length of an operand is an upper bound.

Source: Intel SDM volume 2, chapter 2 (instruction format) and appendix A (opcode maps). Addresses are linear.
Operands that depend on a vector register (gathers, masked moves) are in `vector_operand`; those of EVEX's gathers and
scatters, which have their mask in an opmask register, are not found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvmdp.abi.kvm_x86 import kvm_regs
from kvmdp.vcpu.encoding import (
    ADDRESS_MASK,
    MAX_INSTRUCTION,
    REGISTERS,
    Instruction,
    Reader,
    effective_address,
    read_prefixes,
    wrap,
)
from kvmdp.vcpu.vector_operand import VectorRegisters, gathered, masked


def _opcodes(*ranges: tuple[int, int]) -> frozenset[int]:
    return frozenset(code for first, last in ranges for code in range(first, last + 1))


# One-byte opcodes with a ModRM byte: the arithmetic block, and what follows it in the map.
_MODRM_ONE_BYTE = _opcodes(*((base, base + 3) for base in range(0x00, 0x40, 8))) | _opcodes(
    (0x63, 0x63), (0x69, 0x69), (0x6B, 0x6B), (0x80, 0x8F), (0xC0, 0xC1), (0xC6, 0xC7), (0xD0, 0xD3),
    (0xD8, 0xDF), (0xF6, 0xF7), (0xFE, 0xFF),
)  # fmt: skip
# Two-byte opcodes (0F xx) without one.
_NO_MODRM_TWO_BYTE = _opcodes(
    (0x05, 0x09), (0x0B, 0x0B), (0x0E, 0x0E), (0x30, 0x37), (0x77, 0x77), (0x80, 0x8F), (0xA0, 0xA2),
    (0xA8, 0xAA), (0xC8, 0xCF),
)  # fmt: skip
_PUSHES = _opcodes((0x50, 0x57), (0x68, 0x68), (0x6A, 0x6A), (0x9C, 0x9C), (0xE8, 0xE8))
_POPS = dict.fromkeys(_opcodes((0x58, 0x5F), (0x9D, 0x9D), (0xC2, 0xC3)), 8) | {0xCA: 16, 0xCB: 16, 0xCF: 40}
_STRING_SOURCE = _opcodes((0x6E, 0x6F), (0xA4, 0xA7), (0xAC, 0xAD))
_STRING_DESTINATION = _opcodes((0x6C, 0x6D), (0xA4, 0xA7), (0xAA, 0xAB), (0xAE, 0xAF))

_X87_STATE = 108  # FNSAVE
_FX_STATE = 512  # FXSAVE
_LINE = 64  # MOVDIR64B, ENQCMD
_X_STATE = 4096  # XSAVE: more than any CPU's state so far without AMX tiles

_GATHERS = _opcodes((0x90, 0x93))  # opcode map 0F 38, with a vector prefix
_SCATTERS = _opcodes((0xA0, 0xA3))
_MASKED_MOVES = {0x2C: 4, 0x2D: 8, 0x2E: 4, 0x2F: 8}  # VMASKMOVPS and PD: bytes of an element
_MASKED_MOVES_BY_W = frozenset((0x8C, 0x8E))  # VPMASKMOVD, and Q with W
_BIT_TESTS = frozenset((0xA3, 0xAB, 0xB3, 0xBB))  # opcode map 0F: the bit's number is in a register


@dataclass(frozen=True, slots=True)
class Operand:
    """Memory an instruction touches: linear address and length in bytes, the latter an upper bound."""

    address: int
    length: int


def memory_operands(
    code: bytes,
    regs: kvm_regs,
    fs_base: int = 0,
    gs_base: int = 0,
    vectors: Callable[[], VectorRegisters] | None = None,
) -> tuple[Operand, ...]:
    """Return the memory operands of the 64-bit instruction that begins `code`.

    `regs` are the registers before it runs, with RIP at its first byte; `vectors` reads the vector registers, and is
    called only if an operand depends on one. Returns none for an instruction that touches no memory or that is not
    known. Raises TruncatedError if `code` ends before the instruction does.
    """
    reader = Reader(code[:MAX_INSTRUCTION])
    instruction = read_prefixes(reader, fs_base, gs_base)
    if instruction.opcode_map == 0:
        implicit = _implicit(instruction, reader, regs)
        if implicit is not None:
            return implicit
        has_modrm = instruction.opcode in _MODRM_ONE_BYTE
    else:
        has_modrm = instruction.opcode_map != 1 or instruction.opcode not in _NO_MODRM_TWO_BYTE
    if not has_modrm:
        return ()
    return _explicit(instruction, reader, regs, vectors)


def _implicit(instruction: Instruction, reader: Reader, regs: kvm_regs) -> tuple[Operand, ...] | None:
    """Return the operands of instructions that name their address by opcode alone, None for others."""
    opcode, base = instruction.opcode, instruction.segment_base
    found = []
    if opcode in _STRING_SOURCE:
        found.append(Operand(wrap(base + regs.rsi), 8))
    if opcode in _STRING_DESTINATION:
        found.append(Operand(regs.rdi, 8))
    if opcode in _PUSHES:
        found.append(Operand(wrap(regs.rsp - 8), 8))
    elif opcode in _POPS:
        found.append(Operand(regs.rsp, _POPS[opcode]))
    elif opcode == 0xC8:
        found += _enter(instruction, reader, regs)
    elif opcode == 0xC9:  # LEAVE
        found.append(Operand(regs.rbp, 8))
    elif opcode == 0xD7:  # XLAT
        found.append(Operand(wrap(base + regs.rbx + (regs.rax & 0xFF)), 1))
    elif 0xA0 <= opcode <= 0xA3:  # MOV with an absolute address
        length = 4 if instruction.address_32 else 8
        address = reader.signed(length) & ((1 << 8 * length) - 1)
        found.append(Operand(wrap(base + address), 8))
    return tuple(found) or None


def _enter(instruction: Instruction, reader: Reader, regs: kvm_regs) -> list[Operand]:
    """Return the operands of ENTER: the frame pointers it copies, what it pushes, the end of the frame it makes."""
    frame = reader.signed(2) & 0xFFFF
    level = reader.byte() & 31
    size = 2 if instruction.operand_16 else 8
    pushed = size * (1 + level)
    found = [Operand(wrap(regs.rbp - size * (level - 1)), size * (level - 1))] if level > 1 else []
    # Last what it only looks at: whether the frame's end could be written.
    end = regs.rsp - pushed - frame
    return [*found, Operand(wrap(regs.rsp - pushed), pushed), Operand(wrap(end), 1)]


def _explicit(
    instruction: Instruction,
    reader: Reader,
    regs: kvm_regs,
    vectors: Callable[[], VectorRegisters] | None,
) -> tuple[Operand, ...]:
    """Return the operand that ModRM names, and what else the instruction touches."""
    modrm = reader.byte()
    mod, reg = modrm >> 6, modrm >> 3 & 7
    one_byte = instruction.opcode_map == 0
    stack: tuple[Operand, ...] = ()
    if one_byte and instruction.opcode == 0xFF and reg in (2, 6):  # CALL, PUSH
        stack = (Operand(wrap(regs.rsp - 8), 8),)
    elif one_byte and instruction.opcode == 0xFF and reg == 3:  # CALL far
        stack = (Operand(wrap(regs.rsp - 16), 16),)
    elif one_byte and instruction.opcode == 0x8F:  # POP
        stack = (Operand(regs.rsp, 8),)
    if mod == 3:
        if instruction.opcode_map == 1 and instruction.opcode == 0xF7:  # MASKMOVDQU
            return (Operand(wrap(instruction.segment_base + regs.rdi), 16),)
        return stack
    if instruction.vector_length and instruction.opcode_map == 2:
        if instruction.opcode in _GATHERS | _SCATTERS:
            return _gather(modrm, instruction, reader, regs, vectors)
        size = _masked_element(instruction)
        if size and vectors is not None:
            address = effective_address(modrm, instruction, reader, regs)
            mask = vectors().ymm(instruction.vector_source)[: instruction.vector_length]
            return tuple(Operand(wrap(address + start), length) for start, length in masked(mask, size))
    address = effective_address(modrm, instruction, reader, regs)
    if one_byte and instruction.opcode == 0x8D:  # LEA
        return ()
    register = getattr(regs, REGISTERS[reg | (instruction.rex & 4) << 1])
    if instruction.opcode_map == 1 and instruction.opcode in _BIT_TESTS:
        address = wrap(address + _bit_offset(instruction, register))
    if (
        instruction.opcode_map == 2 and instruction.opcode == 0xF8
    ):  # MOVDIR64B, ENQCMD: from here to [register]
        target = register & 0xFFFFFFFF if instruction.address_32 else register
        return (Operand(address, _LINE), Operand(target, _LINE))
    operand = Operand(address, _length(instruction, reg))
    if instruction.opcode_map == 1 and instruction.opcode == 0xAE and reg < 2 and instruction.segment_base:
        # KVM's emulator leaves the segment's base out of FXSAVE and FXRSTOR.
        return (operand, Operand(wrap(address - instruction.segment_base), operand.length))
    return (operand, *stack)


def _gather(
    modrm: int,
    instruction: Instruction,
    reader: Reader,
    regs: kvm_regs,
    vectors: Callable[[], VectorRegisters] | None,
) -> tuple[Operand, ...]:
    """Return the elements that a gather with a VEX prefix has still to load, none for another form."""
    if instruction.evex or vectors is None:
        return ()
    sib = reader.code[reader.position]
    # As if there were no index: what is left is what each element's index is added to.
    base = effective_address(modrm, instruction, reader, regs, with_index=False)
    registers = vectors()
    lanes = gathered(
        registers.ymm((sib >> 3 & 7) | (instruction.rex & 2) << 2),
        registers.ymm(instruction.vector_source),
        instruction.vector_length,
        index_size=8 if instruction.opcode & 1 else 4,
        size=8 if instruction.rex & 8 else 4,
    )
    mask = 0xFFFFFFFF if instruction.address_32 else ADDRESS_MASK
    size = 8 if instruction.rex & 8 else 4
    return tuple(Operand((base + (index << (sib >> 6))) & mask, size) for index in lanes)


def _masked_element(instruction: Instruction) -> int:
    """Return the bytes of an element of a masked move with a VEX prefix, 0 for another instruction."""
    if instruction.evex:
        return 0
    if instruction.opcode in _MASKED_MOVES_BY_W:
        return 8 if instruction.rex & 8 else 4
    return _MASKED_MOVES.get(instruction.opcode, 0)


def _bit_offset(instruction: Instruction, number: int) -> int:
    """Return how far from its operand BT, BTS, BTR or BTC with bit `number` goes, in bytes."""
    size = instruction.operand_size
    bits = 8 * size
    number &= (1 << bits) - 1
    if number >> (bits - 1):
        number -= 1 << bits
    return number // bits * size


def _length(instruction: Instruction, reg: int) -> int:
    """Return an upper bound for the length of the memory operand, in bytes."""
    if instruction.vector_length:
        return instruction.vector_length
    if instruction.opcode_map == 0:
        return _X87_STATE if instruction.opcode in (0xD9, 0xDD) and reg in (4, 6) else 16
    if instruction.opcode_map == 1 and instruction.opcode == 0xAE:
        return _FX_STATE if reg < 2 else 4 if reg < 4 else _X_STATE
    if instruction.opcode_map == 1 and instruction.opcode == 0xC7:
        return 16 if reg == 1 else _X_STATE
    return 16
