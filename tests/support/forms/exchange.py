"""The host's side of the driver: what a form is given, and what it leaves."""

import ctypes
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from dataclasses import dataclass

import numpy as np

from kvmdp.kvm import IoOut, Vcpu
from kvmdp.machine.guest_abi import ParameterBlock

from .form import LETTERS, PAGE, REGISTERS, STACK, WINDOW, WINDOW_BYTES, Form, Symbol
from .program import code_of, entry_of, landing_of

NEXT_PORT = 0x540  # of driver.S
DATA_PORT = 0x544  # what forms read from and write to
IDT_PORT = 0x548  # gives the address of the interrupt table

# Last x87 instruction, its address and that of its operand; which bits of MXCSR there are; what is not in use.
_LEFT_OUT_OF_FX = (slice(6, 24), slice(28, 32), slice(416, 512))
_SEED = 5


class Scratch(ctypes.Structure):
    """The scratch part of a parameter block, as driver.S has it."""

    _fields_ = [
        ("left_fx", c_uint8 * 0x200),
        ("left_ymm", c_uint8 * 0x100),
        ("left_registers", c_uint64 * 16),
        ("left_flags", c_uint64),
        ("left_selectors", c_uint16 * 8),
        ("stack", c_uint64),
        ("meeting", c_uint64),
        ("home_selectors", c_uint16 * 4),
        ("done", c_uint64),
        ("entry", c_uint64),
        ("meet_at", c_uint64),
        ("has_avx", c_uint32),
        ("_reserved", c_uint32),
        ("given_flags", c_uint64),
        ("fs_base", c_uint64),
        ("self", c_uint64),
        ("_reserved_too", c_uint64 * 3),
        ("given_registers", c_uint64 * 16),
        ("steps", c_uint64),
        ("step_dr6", c_uint64),
        ("step_rip", c_uint64),
        ("_reserved_still", c_uint8 * 0x68),
        ("given_fx", c_uint8 * 0x200),
        ("given_ymm", c_uint8 * 0x100),
    ]


@dataclass(frozen=True)
class Fault:
    """An exception that a form raised; `rip` counts from the form's beginning."""

    vector: int
    error_code: int
    rip: int
    cs: int


@dataclass(frozen=True)
class Step:
    """The first of `count` single steps: DR6, and the RIP it came to, counted from the form's beginning."""

    count: int
    dr6: int
    rip: int


@dataclass(frozen=True)
class Outcome:
    """What a form left. With a `fault` that ended the run, `registers` and vector registers are None."""

    registers: tuple[int, ...] | None
    flags: int
    selectors: tuple[int, ...]
    fx: bytes
    ymm: bytes
    ram: bytes
    cr2: int
    written: bytes
    taken: int
    fault: Fault | None = None
    step: Step | None = None


@dataclass(frozen=True)
class Given:
    """What a form begins with, besides the vector registers."""

    registers: tuple[int, ...]
    flags: int
    ram: bytes


@dataclass(frozen=True)
class Selectors:
    """What CS and SS are where forms run."""

    code: int
    data: int


def pattern() -> bytes:
    """Return what the eight pages hold where a form does not say otherwise."""
    return np.random.default_rng(_SEED).bytes(WINDOW_BYTES)


def _fx_state() -> bytes:
    """Return x87 and SSE state to begin with: four x87 registers in use, all XMM registers full."""
    state = bytearray(np.random.default_rng(_SEED + 1).bytes(0x200))
    state[0:2] = (0x037F).to_bytes(2, "little")  # control word: as after FNINIT
    state[2:4] = (4 << 11).to_bytes(2, "little")  # status word: TOP is 4
    state[4:24] = bytes([0xF0]) + bytes(19)  # tag word: registers 4 to 7 are in use
    state[24:28] = (0x1F80).to_bytes(4, "little")  # MXCSR: all exceptions masked
    state[28:32] = bytes(4)
    for number in range(8):
        value = 0x8000_0000_0000_0000 + number * 0x0123_4567_89AB_CDEF >> 1 | 1 << 63
        state[32 + 16 * number : 48 + 16 * number] = value.to_bytes(8, "little") + bytes(
            [number, 0x40, *[0] * 6]
        )
    return bytes(state)


FX_STATE = _fx_state()
YMM_STATE = np.random.default_rng(_SEED + 2).bytes(0x100)
_PATTERN = pattern()


def first_registers() -> dict[str, int]:
    """Return the general registers where a form does not say otherwise."""
    values = {name: 0x9E3779B97F4A7C15 * (n + 1) % (1 << 64) for n, name in enumerate(REGISTERS)}
    return values | {"rsp": STACK}


class Setter:
    """Prepares forms of one program for the vCPUs of one machine, in one ring."""

    def __init__(self, program: bytes, selectors: Selectors, avx: bool) -> None:
        self._program = program
        self._avx = avx
        self._symbols = {Symbol.CODE: selectors.code, Symbol.DATA: selectors.data}

    def _value(self, value: int | Symbol, number: int) -> int:
        if value is Symbol.LANDING:
            return landing_of(number)
        return (self._symbols[value] if isinstance(value, Symbol) else value) % (1 << 64)

    def ram(self, form: Form, number: int) -> bytes:
        """Return the eight pages as form `number` is to find them."""
        ram = bytearray(_PATTERN)
        if form.at is not None:
            code = code_of(self._program, number)
            ram[form.at - WINDOW : form.at - WINDOW + len(code)] = code
        for address, value in form.memory.items():
            data = value if isinstance(value, bytes) else self._value(value, number).to_bytes(8, "little")
            ram[address - WINDOW : address - WINDOW + len(data)] = data
        assert len(ram) == WINDOW_BYTES, f"{form.name} puts something outside its pages"
        return bytes(ram)

    def given(self, form: Form, number: int) -> Given:
        """Return what form `number` begins with."""
        registers = first_registers() | {
            name: self._value(value, number) for name, value in form.registers.items()
        }
        return Given(tuple(registers[name] for name in REGISTERS), form.flags | 2, self.ram(form, number))

    def give(self, block: ParameterBlock, form: Form, number: int, meet_at: int = 0) -> None:
        """Have a vCPU run form `number` next."""
        scratch = scratch_of(block)
        given = self.given(form, number)
        scratch.given_registers[:] = given.registers
        scratch.given_flags = given.flags
        scratch.fs_base = form.fs_base
        scratch.given_fx[:] = FX_STATE
        scratch.given_ymm[:] = YMM_STATE
        scratch.has_avx = self._avx
        scratch.meet_at = meet_at
        scratch.entry = entry_of(form, number)
        scratch.steps = 0
        block.exception_count = 0


def end(block: ParameterBlock) -> None:
    """Have a vCPU end."""
    scratch_of(block).entry = 0


def scratch_of(block: ParameterBlock) -> Scratch:
    """Return the scratch part of a parameter block, in place."""
    return Scratch.from_buffer(block, ParameterBlock.scratch.offset)


def comparable_fx(state: bytes) -> bytes:
    """Return the x87 and SSE state without what a form does not decide."""
    compared = bytearray(state)
    for part in _LEFT_OUT_OF_FX:
        compared[part] = bytes(part.stop - part.start)
    return bytes(compared)


def outcome_of(
    block: ParameterBlock, form: Form, number: int, *, ram: bytes, cr2: int, written: bytes, taken: int
) -> Outcome:
    """Return what a form has left, after which the driver has come to ask for the next."""
    scratch = scratch_of(block)
    return Outcome(
        registers=tuple(scratch.left_registers),
        flags=scratch.left_flags,
        selectors=tuple(scratch.left_selectors[:5]),
        fx=comparable_fx(bytes(scratch.left_fx)),
        ymm=bytes(scratch.left_ymm),
        ram=ram,
        cr2=cr2,
        written=written,
        taken=taken,
        fault=_fault(block, form, number) if block.exception_count else None,
        step=Step(scratch.steps, scratch.step_dr6, scratch.step_rip - entry_of(form, number))
        if scratch.steps
        else None,
    )


def fatal_outcome(
    block: ParameterBlock, form: Form, number: int, *, ram: bytes, written: bytes, taken: int
) -> Outcome:
    """Return what there is of a form whose exception has ended the guest."""
    fault = _fault(block, form, number)
    return Outcome(None, block.exception_rflags, (), b"", b"", ram, 0, written, taken, fault)


def take_cr2(vcpu: Vcpu) -> int:
    """Return what is in CR2, and set that to 0, so that it tells of the next form alone."""
    system = vcpu.sregs
    cr2 = system.cr2
    if cr2:
        system.cr2 = 0
        vcpu.set_sregs(system)
    return cr2


def _fault(block: ParameterBlock, form: Form, number: int) -> Fault:
    return Fault(
        block.exception_vector,
        block.exception_error_code,
        block.exception_rip - entry_of(form, number),
        block.exception_cs,
    )


class DataPort:
    """What a vCPU reads from `DATA_PORT` is a sequence of bytes; what it writes is kept."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.taken = 0

    def serve(self, io) -> None:
        """Serve an exit."""
        if isinstance(io, IoOut):
            self.written += io.data
            return
        for index in range(io.data.nbytes):
            io.data[index] = (self.taken * 37 + 11) % 256
            self.taken += 1

    def begin(self) -> None:
        """Forget everything, for the next form."""
        self.written.clear()
        self.taken = 0


def pages_in(letters: str) -> list[int]:
    """Return the RAM pages that letters name."""
    return [(WINDOW + LETTERS.index(letter) * PAGE) // PAGE for letter in letters]
