"""Cells of the table of coverage that are a program of one instruction, run with its page present and absent."""

from __future__ import annotations

from kvmdp.errors import PagingError
from kvmdp.interruption import entered
from kvmdp.lab.coverage_cell import EMULATED, Cell, Seen, seen_by, vcpu_exits
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions, catches_page_walks
from kvmdp.machine.vcpu_thread import GuestError, GuestTimeoutError
from kvmdp.machine.workloads import Program, WorkloadOptions
from kvmdp.page import PAGE_SIZE
from kvmdp.source.synthetic import SyntheticSource

_MEMORY = 2 << 20
_SEED = 2023
_TIMEOUT = 10.0
_PAGE = 3  # that the programs are about

# sgdt [0x3000]; mov rax,[0x3002]; xor edx,edx; ret
_SGDT = bytes.fromhex("0f01042500300000 488b042502300000 31d2 c3")
# lgdt [gdtr]; mov rbx,rsp; mov esp,0x3010; call far [target]; mov rsp,rbx; mov eax,[0x300c]; xor edx,edx; ret
# target: 0x18:0xd0100015, as AMD's CPUs have no other; gdtr: 31, gdt; gdt: null, code, data, another code segment.
# It returns the CS it came from.
_FAR_CALL = bytes.fromhex(
    "0f011521000000 4889e3 bc10300000 ff1d0d000000 4889dc 8b04250c300000 31d2 c3"
    "150010d0 1800 1f00 320010d000000000"
    "0000000000000000 ffff0000009baf00 ffff00000093cf00 ffff0000009baf00"
)
# mov [0x3008],cs; mov rbx,rsp; mov esp,0x3008; pushf; mov rsp,rbx; xor eax,eax; xor edx,edx; ret
_SELECTOR_AND_FLAGS = bytes.fromhex("8c0c2508300000 4889e3 bc08300000 9c 4889dc 31c0 31d2 c3")
# lea rax,[1f]; mov [rdi+0x180],rax (BLOCK_PF_RESUME); mov rbx,rsp; mov esp,0x3040; mov rcx,[0x200000]; 1: mov rsp,rbx;
# xor eax,eax; xor edx,edx; ret
_EVENT = bytes.fromhex("488d0517000000 48898780010000 4889e3 bc40300000 488b0c2500002000 4889dc 31c0 31d2 c3")
_FAR_CALL_LOST = (
    "KVM's emulator loses one of its two stores, and what was in CS is not to be found out; one that keeps CS is taken "
    "back"
)
_SELECTOR_HIDDEN = (
    "KVM's emulator stores the guest's own; this KVM, with no hardware behind it, runs ring 3 with others, and the CPU "
    "would store those"
)


def far_call(access: str, trap: str) -> Cell:
    """A far call that changes CS, with its stack in absent memory."""
    expected, _ = _run_program(trap, _FAR_CALL, ring=0, present=True)
    found, exits = _run_program(trap, _FAR_CALL, ring=0, present=False)
    completed = exits.pop("emulated", 0)
    if completed:
        seen = seen_by(exits, completed)
        return Cell(access, trap, seen, exits, exact=found == expected, note=_FAR_CALL_LOST)
    return Cell(access, trap, seen_by(exits), exits, exact=found == expected)


def selector_and_flags(access: str, trap: str) -> Cell:
    """CS and the flags stored in absent memory, in ring 3."""
    expected, _ = _run_program(trap, _SELECTOR_AND_FLAGS, ring=3, present=True)
    found, exits = _run_program(trap, _SELECTOR_AND_FLAGS, ring=3, present=False)
    completed = exits.pop("emulated", 0)
    note = _SELECTOR_HIDDEN if completed and found != expected else EMULATED if completed else ""
    return Cell(access, trap, seen_by(exits, completed), exits, exact=found == expected, note=note)


def event_frame(access: str, trap: str) -> Cell:
    """The frame of a page fault, in ring 0, where no other stack is taken for it."""
    expected, _ = _run_program(trap, _EVENT, ring=0, present=True)
    try:
        found, exits = _run_program(trap, _EVENT, ring=0, present=False)
    except GuestTimeoutError:
        what = "the guest never got on"
    except (PagingError, GuestError) as error:
        what = str(error).removeprefix("vCPU 0: ")
    else:
        return Cell(access, trap, seen_by(exits), exits, exact=found == expected)
    note = f"no event is delivered on an absent stack ({what}); the stacks of handlers belong into present memory"
    # An event is delivered as page tables are walked: by hardware, or by KVM itself.
    return Cell(access, trap, Seen.MISSED, {}, exact=False, note=note, ok=not catches_page_walks(trap))


def descriptor_store(access: str, trap: str) -> Cell:
    """A store on which KVM spins."""
    expected, _ = _run_program(trap, _SGDT, ring=3, present=True)
    found, exits = _run_program(trap, _SGDT, ring=3, present=False)
    stalls = exits.pop("stall", 0)
    if stalls and not exits:
        note = "KVM spins without an exit; the watchdog looked at the instruction and made its page present"
        return Cell(
            access, trap, Seen.MISSED, exits, exact=found == expected, note=note, ok=found == expected
        )
    return Cell(access, trap, seen_by(exits), exits, exact=found == expected)


def _run_program(
    trap: str, code: bytes, *, ring: int, present: bool
) -> tuple[tuple[int, bytes], dict[str, int]]:
    """Return what a program returned and left in its page, and what was seen."""
    options = MachineOptions(_MEMORY, trap, program=code)
    with entered(Machine, options, SyntheticSource(_MEMORY, _SEED)) as machine:
        machine.set_parameters(Program(WorkloadOptions(memory_bytes=_MEMORY, seed=_SEED, ring=ring)).blocks)
        if present:
            machine.pager.mark_present(_PAGE, 1)
        machine.run(_TIMEOUT)
        exits = vcpu_exits(machine)
        for what, count in (
            ("stall", sum(thread.stalls for thread in machine.threads)),
            ("emulated", sum(thread.emulated.total() for thread in machine.threads)),
        ):
            if count:
                exits[what] = count
        page = machine.memory.read(_PAGE * PAGE_SIZE, PAGE_SIZE)
        return (machine.threads[0].parameters.checksum, page), exits
