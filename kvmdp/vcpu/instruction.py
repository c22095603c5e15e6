"""The instruction a vCPU is at: its bytes, and which RAM pages it may touch.

KVM does not say which memory an instruction needs that it could not emulate, or on which it spins. This reads the
instruction through the guest's page tables and finds out (`kvmdp.vcpu.operand`).

Belongs to the vCPU's thread, like the vCPU. Units: bytes, RAM pages.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmdp.abi.kvm_x86 import kvm_regs
from kvmdp.kvm import Vcpu
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.vcpu.encoding import LEGACY_PREFIXES, MAX_INSTRUCTION, TruncatedError
from kvmdp.vcpu.operand import Operand, memory_operands
from kvmdp.vcpu.vector_operand import VectorRegisters


class InstructionReader:
    """Reads the instruction at a vCPU's RIP.

    `read_physical(gpa, length)` returns bytes of present guest memory, or None where there is none.
    """

    def __init__(
        self, vcpu: Vcpu, layout: GuestLayout, read_physical: Callable[[int, int], bytes | None]
    ) -> None:
        self._vcpu = vcpu
        self._layout = layout
        self._read_physical = read_physical

    def page_at(self, address: int) -> int | None:
        """Return the RAM page behind a linear address, None if it is not mapped or not RAM."""
        gpa = self._vcpu.translate(address)
        return None if gpa is None else self._layout.page_of_gpa(gpa)

    def code_at(self, rip: int, length: int = MAX_INSTRUCTION) -> bytes:
        """Return up to `length` bytes at `rip`, fewer if a page is not there."""
        code = b""
        while len(code) < length:
            address = rip + len(code)
            count = min(length - len(code), PAGE_SIZE - address % PAGE_SIZE)
            piece = self.read(address, count)
            if piece is None:
                break
            code += piece
        return code

    def code_before(self, end: int) -> bytes:
        """Return the 15 bytes that end at `end`, fewer if the page before is not there."""
        start, border = end - MAX_INSTRUCTION, (end - 1) // PAGE_SIZE * PAGE_SIZE
        if start >= border:
            return self.code_at(start)
        return (self.read(start, border - start) or b"") + self.code_at(border, end - border)

    def read(self, address: int, length: int) -> bytes | None:
        """Return bytes at a linear address, all of one page; None if they are not there."""
        gpa = self._vcpu.translate(address)
        return None if gpa is None else self._read_physical(gpa, length)

    def opcode(self) -> int | None:
        """Return the one-byte opcode of the instruction at RIP, None for one with another map or without its bytes."""
        for byte in self.code_at(self._vcpu.regs.rip):
            if byte not in LEGACY_PREFIXES and byte & 0xF0 != 0x40:
                return None if byte == 0x0F else byte
        return None

    def pages(self, registers: kvm_regs | None = None) -> list[int]:
        """Return the RAM pages that an instruction may touch: its own bytes', then its operands'.

        `registers` are those before it, where it is not the one at RIP.
        """
        rip = (registers or self._vcpu.regs).rip
        code = self.code_at(rip)
        pages = [] if code else [self.page_at(rip)]
        pages += self.operand_pages(code, registers)
        if 0 < len(code) < MAX_INSTRUCTION:
            # It may go on in the next page. Last, because a short one does not.
            pages.append(self.page_at(rip + len(code)))
        return list(dict.fromkeys(page for page in pages if page is not None))

    def operand_pages(self, code: bytes, registers: kvm_regs | None = None) -> list[int | None]:
        """Return the RAM pages in which the operands of an instruction begin and end; as `operands`."""
        return [
            self.page_at(address)
            for operand in self.operands(code, registers)
            for address in (operand.address, operand.address + operand.length - 1)
        ]

    def operands(self, code: bytes, registers: kvm_regs | None = None) -> tuple[Operand, ...]:
        """Return the operands of an instruction, by default the one at RIP; none if `code` is not all of it.

        `registers` are those before it, where they are not the vCPU's.
        """
        sregs = self._vcpu.sregs
        try:
            return memory_operands(
                code,
                registers or self._vcpu.regs,
                sregs.fs.base,
                sregs.gs.base,
                lambda: VectorRegisters(self._vcpu.registers.xsave),
            )
        except TruncatedError:
            return ()

    def is_fetched(self, page: int) -> bool:
        """Return whether the instruction at RIP needs an absent page for its own bytes, and not for an operand."""
        rip = self._vcpu.regs.rip
        if self.page_at(rip) == page:
            return True
        code = self.code_at(rip)
        goes_on_there = len(code) < MAX_INSTRUCTION and self.page_at(rip + len(code)) == page
        return goes_on_there and page not in self.operand_pages(code)
