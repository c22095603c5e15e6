"""Accesses that KVM's emulator has begun: called off and left to the CPU, or, where that cannot be, completed.

An access that finds no memslot, or memory that KVM itself cannot read, is device I/O to KVM. Its emulator carries the
instruction out, and exits in the middle of it for what it takes for a device's part. It does not always do what the
CPU does: it takes `lzcnt` for `bsr`, loses one of two stores, makes two stores of a LOCK-prefixed one that crosses a
page. So an instruction is taken back wherever that can be exact, and runs on the CPU once its page is there.

What comes first decides. The classes, and why each is exact:

*A load.* KVM has changed nothing yet that the guest can see: it writes registers back, and RIP with them, at the end of
an instruction, and at the end of each repetition of a string instruction, of which the next is a new beginning.
`call_off` notes the registers, then has KVM finish with zeros for every load, and sees to it that nothing comes of it:
CR3 names an empty page table meanwhile, so whatever else the instruction touches ends in a page fault instead of in
RAM; what goes to the page itself, which stays absent, and to ports is dropped. Setting the registers then takes
everything back: KVM_SET_SREGS the page table, KVM_SET_REGS registers, RIP and the pending page fault. Vector registers
are put back for an instruction that may load them: the page may turn out to be poisoned, and then it does not run.
LEAVE has set RSP to RBP before it loads, and KVM shows no other: it runs again all the same, for it reads RBP alone.
With RFLAGS.TF the finished instruction also counts as a step in DR6, which is put back.
A far return is the one instruction that changes a register, RSP, between two loads, and KVM shows it changed. It stores
nothing, so it needs no other page table, and can be asked which of its loads it is at (`_call_off_far_return`).

*A store.* The instruction is over by then: registers and RIP are those after it (of a repetition, for a string
instruction). It had no absent load, or that would have come first, and the stores that the emulator makes are the
CPU's. So KVM finishes, and its bytes are stored when the page has been made present; the vCPU does not run before.
With RFLAGS.TF it leaves out the debug exception that follows, which is raised for it (`_raise_step`).
A far call is the exception: of its two stores the second one overwrites the first where both are absent. It can be
taken back all the same (`_before_far_call`), unless it has changed CS.

*String input.* The datum has been taken from the device when it is stored, and KVM drops what it has read ahead if a
store then exits. So the pages are made present, and kept, before the device is asked (`input_target`).

A vCPU finishes in KVM_RUN with `immediate_exit`, which never enters the guest: it comes back with EINTR when nothing
is left to finish. From the exit to that it counts as being in KVM_RUN (`kvmdp.vcpu.gate`), so no memslot changes:
with nested paging KVM knows the gpa of the access, asks no page table, and would store what it has made of the zeros if
the page were there by now.

Source: arch/x86/kvm/x86.c (complete_emulated_mmio, emulator_read_write, __set_regs) and emulate.c of Linux 6.1 to
7.3; proven for several hundred forms by tests/machine/test_forms.py. Belongs to the vCPU's thread.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence

from kvmdp.abi.kvm_x86 import kvm_regs, kvm_sregs
from kvmdp.kvm import Exit, InternalError, Interrupted, Io, IoIn, Mmio, MmioRead, MmioWrite, Vcpu
from kvmdp.page import PAGE_SIZE
from kvmdp.vcpu.encoding import (
    address_mask,
    far_return,
    is_far_call,
    is_selector_store,
    is_string_input,
    may_load_vectors,
)
from kvmdp.vcpu.instruction import InstructionReader

_STRING_STORES = (0xA4, 0xA5, 0xAA, 0xAB)
_MIN_IN_MEMORY = 2  # bytes of an instruction with a ModRM byte
_PUSHES_OF_SELECTOR_OR_FLAGS = (b"\x9c", b"\x0f\xa0", b"\x0f\xa8")
_TRAP_FLAG, _DIRECTION_FLAG = 1 << 8, 1 << 10
_DEBUG, _GENERAL_PROTECTION = 1, 13
_SINGLE_STEP = 1 << 14  # DR6.BS
_RPL = 0b11  # in a selector: no part of an error code
_NO_SELECTOR = (0xFFF8).to_bytes(8, "little")  # the last selector that there can be
# In the second half of a descriptor: type bits 2 and 3, S, P
_CONFORMING, _CODE_SEGMENT, _DESCRIPTOR_PRESENT = 1 << 10, 0b11 << 11, 1 << 15


class Form(enum.StrEnum):
    """What KVM's emulator has completed, as far as it can be told afterwards."""

    STORE = "store"
    STRING_STORE = "string store"
    SELECTOR_OR_FLAGS = "selector or flags"  # the guest's, where KVM has other ones for the CPU
    FAR_CALL = "far call"  # KVM loses one of its stores: the result may be wrong


Store = tuple[int, bytes]  # gpa, and what goes there; within a page


class Emulation:
    """KVM's emulator, as far as one vCPU is in its hands. All is done with the vCPU inside the gate.

    `empty_table` is the gpa of a page of zeros that the guest cannot reach. `completed` counts what could not be
    called off, by form.
    """

    def __init__(self, vcpu: Vcpu, instruction: InstructionReader, empty_table: int) -> None:
        self._vcpu = vcpu
        self._instruction = instruction
        self._empty_table = empty_table
        self.completed: Counter[Form] = Counter()

    def finish(self) -> Exit:
        """Have KVM finish what it exited for, and return what it exits for next: Interrupted if nothing is left."""
        self._vcpu.immediate_exit = True
        return self._vcpu.run()

    # Loads

    def call_off(self, load: Exit) -> Exit:
        """Take back the instruction that has exited for a load, or for string input: it has not happened.

        Returns Interrupted, or an exit that nothing is known about.
        """
        vcpu = self._vcpu
        registers = kvm_regs.from_buffer_copy(vcpu.regs)
        debug = vcpu.registers.debug if registers.rflags & _TRAP_FLAG else None
        code = self._instruction.code_at(registers.rip)
        vectors = vcpu.registers.xsave if may_load_vectors(code) else None
        pop = far_return(code)
        system = vcpu.sregs
        if pop and isinstance(load, MmioRead):
            following = self._call_off_far_return(registers, load, pop)
        else:
            nowhere = kvm_sregs.from_buffer_copy(system)
            nowhere.cr3 = self._empty_table
            vcpu.set_sregs(nowhere)
            following, _ = self._finish_with_zeros(load)
        vcpu.set_sregs(system)
        vcpu.set_regs(registers)
        if debug is not None:
            vcpu.registers.set_debug(debug)
        if vectors is not None:
            vcpu.registers.set_xsave(vectors)
        if isinstance(following, InternalError) and following.is_emulation_failure:
            return Interrupted()  # it had more to do, and KVM does not know how: RIP is where it was
        return following

    def _finish_with_zeros(self, exit: Exit, first: bytes = b"") -> tuple[Exit, int]:
        """Have KVM finish, with `first` and then zeros for what it loads; returns the next exit and how many loads."""
        loads = 0
        while isinstance(exit, Mmio | Io):
            if not isinstance(exit, MmioWrite):
                exit.data[:] = first or bytes(len(exit.data))
                first = b""
                loads += 1
            exit = self.finish()
        return exit, loads

    def _call_off_far_return(self, registers: kvm_regs, load: MmioRead, pop: int) -> Exit:
        """Have KVM finish a far return, and correct RSP in `registers`, which are those at its `load`.

        It has two adjacent pops of `pop` bytes: RIP, then CS. RSP is where the one that has exited begins. To tell
        which that was it is given a selector that no table of descriptors has room for. As CS that is a general
        protection fault with just this error code. Where CS is loaded in part from the page before, it may be a good
        one: then RIP is what the first pop took from below RSP. Anything else was RIP's, and so is the first of two
        loads.
        """
        read, rsp = self._instruction.code_at, registers.rsp
        below = int.from_bytes(read(rsp - pop, pop), "little")
        offset = 0 if self._vcpu.translate(rsp) == load.gpa else PAGE_SIZE - rsp % PAGE_SIZE
        operand = read(rsp, offset) + _NO_SELECTOR[offset:]
        following, loads = self._finish_with_zeros(load, operand[offset : offset + load.size])
        exception = self._vcpu.events.exception
        if exception.pending or exception.injected:
            error_code = int.from_bytes(operand[:2], "little") & ~_RPL
            is_second = (exception.nr, exception.error_code) == (_GENERAL_PROTECTION, error_code)
        else:
            is_second = self._vcpu.regs.rip == below
        if loads == 1 and is_second:
            registers.rsp -= pop
        return following

    # Stores

    def finish_store(self, store: MmioWrite) -> tuple[list[Store], Exit]:
        """Have KVM finish an instruction that has exited for a store.

        Returns what it stores, in parts that each lie in a page, and the next exit: Interrupted if all of it is known.
        A part without bytes is of an instruction that has been taken back instead, and will store them itself.
        """
        stores: list[Store] = []
        following: Exit = store
        while isinstance(following, MmioWrite):
            stores.append((following.gpa, bytes(following.data)))
            following = self.finish()
        if isinstance(following, Interrupted):
            form = self._form_of(stores)
            if form is None:
                return [(gpa, b"") for gpa, _ in stores], following
            self.completed[form] += 1
            if self._vcpu.regs.rflags & _TRAP_FLAG:
                self._raise_step()
        return stores, following

    def _raise_step(self) -> None:
        """Have the guest take the debug exception of a single step when it is entered, for the instruction before RIP.

        KVM's emulator raises none if it has to come out for the store (x86_emulate_instruction: `r` is 0).
        """
        debug = self._vcpu.registers.debug
        debug.dr6 |= _SINGLE_STEP
        self._vcpu.registers.set_debug(debug)
        events = self._vcpu.events
        events.exception.injected, events.exception.nr = 1, _DEBUG
        events.exception.has_error_code = 0
        self._vcpu.set_events(events)

    def _form_of(self, stores: Sequence[Store]) -> Form | None:
        """Return what has been completed, None if it was a far call and has been taken back."""
        pushed = self._pushed(stores)
        far_call = self._before_far_call(pushed) if pushed else None
        if far_call is not None:
            before, is_certain = far_call
            if not (is_certain and self._has_one_code_segment()):
                return Form.FAR_CALL
            self._vcpu.set_regs(before)
            return None
        size = sum(len(data) for _, data in stores)
        if self._has_pushed_selector_or_flags() if pushed else size == 2 and self._has_stored_selector():
            return Form.SELECTOR_OR_FLAGS
        is_repeated = self._instruction.opcode() in _STRING_STORES
        return Form.STRING_STORE if is_repeated else Form.STORE

    def _pushed(self, stores: Sequence[Store]) -> bytes:
        """Return what an instruction has pushed last, of which `stores` are at least the end; nothing for another."""
        rsp, gpa = self._vcpu.regs.rsp, stores[0][0]
        data = b"".join(part for _, part in stores)
        if (rsp ^ gpa) % PAGE_SIZE == 0:
            return data if self._vcpu.translate(rsp) == gpa else b""
        # What comes before it is in the page before, which is present.
        before = PAGE_SIZE - rsp % PAGE_SIZE
        if gpa % PAGE_SIZE == 0 and before < 8 and self._vcpu.translate(rsp + before) == gpa:
            return self._instruction.code_at(rsp, before) + data
        return b""

    def _has_pushed_selector_or_flags(self) -> bool:
        """Return whether the instruction that ends at RIP may have been PUSHF, PUSH FS or PUSH GS.

        An instruction cannot be read backwards: another one whose last bytes look the same is taken for one too.
        """
        return self._instruction.code_before(self._vcpu.regs.rip).endswith(_PUSHES_OF_SELECTOR_OR_FLAGS)

    def _has_stored_selector(self) -> bool:
        """Return whether the instruction that ends at RIP may have been a MOV from a segment register."""
        code = self._instruction.code_before(self._vcpu.regs.rip)
        return any(is_selector_store(code[-length:]) for length in range(_MIN_IN_MEMORY, len(code) + 1))

    def _before_far_call(self, pushed: bytes) -> tuple[kvm_regs, bool] | None:
        """Return the registers before a far call that has pushed its return address; None if it was none.

        Its bytes end at the return address, and the far pointer that they name is where the vCPU is now: so it is
        certain, unless that has been taken away since the exit.
        """
        after, size = int.from_bytes(pushed, "little"), len(pushed)
        before = kvm_regs.from_buffer_copy(self._vcpu.regs)
        before.rsp += 2 * size
        code = self._instruction.code_before(after)
        for length in range(_MIN_IN_MEMORY, len(code) + 1):
            if not is_far_call(code[-length:], size):
                continue
            before.rip = after - length
            pointer = self._instruction.operands(code[-length:], before)[0].address
            target = self._instruction.code_at(pointer, size + 2)
            if len(target) < size + 2:
                return before, False
            if int.from_bytes(target[:size], "little") == self._vcpu.regs.rip and (
                int.from_bytes(target[size:], "little") == self._vcpu.sregs.cs.selector
            ):
                return before, True
        return None

    def _has_one_code_segment(self) -> bool:
        """Return whether CS cannot have been another one: the guest has only one code segment for its ring."""
        system = self._vcpu.sregs
        length = system.gdt.limit + 1
        table = self._instruction.code_at(system.gdt.base, length)
        if not system.ldt.unusable or len(table) < length:
            return False
        descriptors = [int.from_bytes(table[at : at + 8], "little") for at in range(0, len(table), 8)]
        return sum(_is_code(each, system.cs.dpl) for each in descriptors) == 1

    # String input

    def input_target(self, io: IoIn) -> list[tuple[int, int]]:
        """Return where KVM will store the items of a string input, (gpa, bytes) within a page each; none for another.

        `io` is an exit that waits for its answer.
        """
        code = self._instruction.code_at(self._vcpu.regs.rip)
        if not is_string_input(code):
            return []
        registers, length = self._vcpu.regs, io.count * io.size
        first = registers.rdi & address_mask(code)
        if registers.rflags & _DIRECTION_FLAG:
            first -= length - io.size
        target = []
        while length:
            part = min(length, PAGE_SIZE - first % PAGE_SIZE)
            gpa = self._vcpu.translate(first)
            if gpa is not None:
                target.append((gpa, part))
            first, length = first + part, length - part
        return target


def _is_code(descriptor: int, ring: int) -> bool:
    """Return whether a descriptor of the GDT is of a code segment that `ring` can run in."""
    high = descriptor >> 32
    if high & _CODE_SEGMENT != _CODE_SEGMENT or not high & _DESCRIPTOR_PRESENT:
        return False
    dpl = high >> 13 & 3
    return dpl == ring or bool(high & _CONFORMING and dpl < ring)
