"""What is right: forms run in a ring of this host's guests with all memory present."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from plain_guest import PlainGuest

from kvmdp.kvm import InternalError, Io, IoIn
from kvmdp.machine.guest_abi import REPORT_PORT, ParameterBlock, Report
from kvmdp.machine.workloads import Program, WorkloadOptions
from kvmdp.source.base import read_pages
from kvmdp.source.synthetic import SyntheticSource

from .exchange import (
    DATA_PORT,
    IDT_PORT,
    NEXT_PORT,
    DataPort,
    Outcome,
    Selectors,
    Setter,
    fatal_outcome,
    outcome_of,
    scratch_of,
    take_cr2,
)
from .form import MEMORY, PAGE, WINDOW, WINDOW_BYTES, Form

_INVALID_OPCODE = 6
_USES_AVX = bytes.fromhex("c5fc57c0 c3")  # vxorps ymm0, ymm0, ymm0; ret
_ROWS = slice(WINDOW // PAGE, (WINDOW + WINDOW_BYTES) // PAGE)  # of a PlainGuest's RAM


@dataclass(frozen=True)
class Right:
    """What a form must leave: `first`, and when it is run once more on the same memory, `second`."""

    first: Outcome
    second: Outcome


@dataclass(frozen=True)
class Reference:
    """What is right in a ring: by number of the form, `right`, or why it cannot be run there, `skipped`."""

    ring: int
    selectors: Selectors
    avx: bool
    right: dict[int, Right]
    skipped: dict[int, str]


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the flags of this host's CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def find_right(forms: Sequence[Form], numbers: Sequence[int], program: bytes, ring: int) -> Reference:
    """Run the forms with these `numbers` with all memory present; `forms` are all of the program."""
    return _Finder(forms, numbers, program, ring).find()


def blocks_for(ring: int, vcpus: int) -> list[ParameterBlock]:
    """Return the parameter blocks of a machine for the driver."""
    return Program(WorkloadOptions(memory_bytes=MEMORY, vcpus=vcpus, ring=ring)).blocks


def has_avx(ring: int) -> bool:
    """Return whether guests can use AVX in `ring`: with PVM they can in ring 3 alone, although their CPUID has none."""
    with PlainGuest(MEMORY, blocks_for(ring, 1), _USES_AVX) as guest:
        return guest.run() == [Report.DONE]


@functools.cache
def whole_ram() -> np.ndarray:
    """Return RAM as `trapped` has it: a form may go astray."""
    return read_pages(SyntheticSource(MEMORY), np.arange(MEMORY // PAGE))


class _EmulatorError(Exception):
    """KVM runs this ring in its emulator, which does not know the form."""


class _Finder:
    def __init__(self, forms: Sequence[Form], numbers: Sequence[int], program: bytes, ring: int) -> None:
        self._forms, self._numbers, self._program, self._ring = forms, numbers, program, ring
        self._avx = has_avx(ring)
        self._right: dict[int, Right] = {}
        self._skipped = {number: why for number in numbers if (why := self._why_not(forms[number]))}
        self._selectors = Selectors(0, 0)

    def _why_not(self, form: Form) -> str | None:
        if self._ring not in form.rings:
            return f"not for ring {self._ring}"
        missing = [flag for flag in form.needs if flag not in cpu_flags()]
        if missing:
            return f"this CPU has no {', '.join(missing)}"
        return None

    def find(self) -> Reference:
        todo = [number for number in self._numbers if number not in self._skipped]
        while todo:
            with PlainGuest(MEMORY, blocks_for(self._ring, 1), self._program) as guest:
                self._run(_Guest(guest), todo)
        skipped = dict(sorted(self._skipped.items()))
        return Reference(self._ring, self._selectors, self._avx, self._right, skipped)

    def _run(self, guest: "_Guest", todo: list[int]) -> None:
        """Run forms from the list's head on and take them off, until an exception has ended the guest."""
        with guest:
            self._selectors = guest.begin()
            setter = Setter(self._program, self._selectors, self._avx)
            while todo:
                number = todo.pop(0)
                form = self._forms[number]
                guest.put(setter.ram(form, number))
                try:
                    first = guest.run(setter, form, number)
                except _EmulatorError as error:
                    self._skipped[number] = str(error)
                    continue
                if first.fault is not None and first.fault.vector == _INVALID_OPCODE:
                    self._skipped[number] = f"#UD in ring {self._ring} with all memory present"
                    return
                if first.registers is None:
                    self._right[number] = Right(first, first)
                    return
                self._right[number] = Right(first, guest.run(setter, form, number))


class _Guest:
    """A guest with all memory present in which the driver runs, on the calling thread."""

    def __init__(self, guest: PlainGuest) -> None:
        self._guest = guest
        guest.ram[:] = whole_ram()
        self._vcpu, self._block = guest.vcpus[0], guest.blocks[0]
        self._port = DataPort()

    def __enter__(self):
        self._vcpu.attach_thread()
        return self

    def __exit__(self, *error):
        self._vcpu.detach_thread()

    def begin(self) -> Selectors:
        """Run to where the driver asks for the first form."""
        self._go_on()
        return Selectors(*scratch_of(self._block).left_selectors[:2])

    def put(self, ram: bytes) -> None:
        """Set the pages that forms use."""
        self._guest.ram[_ROWS] = np.frombuffer(ram, dtype=np.uint64).reshape(-1, PAGE // 8)

    def run(self, setter: Setter, form: Form, number: int) -> Outcome:
        """Run a form on the memory there is. Raises _EmulatorError, after which the next can be run."""
        self._port.begin()
        setter.give(self._block, form, number)
        asks = self._go_on()
        ports = {"written": bytes(self._port.written), "taken": self._port.taken}
        ram = self._guest.ram[_ROWS].tobytes()
        if not asks:
            return fatal_outcome(self._block, form, number, ram=ram, **ports)
        return outcome_of(self._block, form, number, ram=ram, cr2=take_cr2(self._vcpu), **ports)

    def _go_on(self) -> bool:
        """Run until the driver asks for a form; False if an exception has ended the guest."""
        while True:
            exit = self._vcpu.run()
            match exit:
                case Io(port=port) if port == DATA_PORT:
                    self._port.serve(exit)
                case Io(port=port) if port == IDT_PORT:
                    exit.data[:] = self._vcpu.sregs.idt.base.to_bytes(4, "little")
                case Io(port=port) if port == NEXT_PORT:
                    return True
                case IoIn(port=port) if port == REPORT_PORT:
                    exit.data[:] = bytes(4)  # to the #UD handler: no, it is not to be run again
                case Io(port=port) if port == REPORT_PORT:
                    return False
                case InternalError(is_emulation_failure=True):
                    self._pass_over()
                    code = exit.instruction.hex(" ")
                    raise _EmulatorError(f"KVM's emulator does not know it, with all memory present: {code}")
                case _:
                    raise AssertionError(f"{exit} at RIP {self._vcpu.regs.rip:#x}")

    def _pass_over(self) -> None:
        """Go on behind a form that cannot be run."""
        regs = self._vcpu.regs
        regs.rip = scratch_of(self._block).done
        self._vcpu.set_regs(regs)
        self._go_on()
