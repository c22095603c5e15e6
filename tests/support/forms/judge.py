"""Whether a form has left what it must, and how it differs."""

import itertools

from .exchange import Fault, Outcome, Step
from .form import LETTERS, PAGE, REGISTERS, WINDOW, Case, Form
from .reference import Right
from .trapped import Failure, Result

_SELECTORS = ("CS", "SS", "DS", "ES", "FS")
_SHOWN = 4  # places in memory, at most


def difference(case: Case, right: Right, result: Result) -> str:
    """Say how a result differs from what is right; empty if it does not."""
    if isinstance(result, Failure):
        return f"fails: {result.message}"
    if len(result) == 1:
        return differs(case.form, right.first, result[0])
    return _contended(case.form, right, result)


def is_judged_contended(form: Form, right: Right, *, emulated: bool) -> bool:
    """Return whether it is known what two vCPUs must leave that run the form at the same time.

    It is if the form does nothing else when it is run again on the same memory, or if it is one step. KVM's emulator,
    where the ring is `emulated`, does a locked instruction that crosses pages in several, memory present or not.
    """
    if form.alone or (form.locked and emulated and {"A", "B"} <= set("".join(form.absent))):
        return False
    return form.locked or (right.first.fault is None and not differs(form, right.first, right.second))


def _contended(form: Form, right: Right, result: tuple[Outcome, ...]) -> str:
    """Say how vCPUs that ran a form at once differ from those that run it one after the other, in any order."""
    in_order = [right.first, right.second]
    best = None
    for order in itertools.permutations(in_order):
        found = [
            differs(form, expected, got, ram=right.second.ram)
            for expected, got in zip(order, result, strict=True)
        ]
        words = "; ".join(f"vCPU {number}: {each}" for number, each in enumerate(found) if each)
        if best is None or len(words) < len(best):
            best = words
    return best or ""


def differs(form: Form, right: Outcome, got: Outcome, *, ram: bytes | None = None) -> str:
    """Say how an outcome differs from the right one; `ram` is the right one's, if another."""
    if right.fault != got.fault:
        return f"{_fault(got.fault)} instead of {_fault(right.fault)}"
    found = []
    if right.registers is not None and got.registers is not None:
        found += [
            f"{name} {there:#x} instead of {wanted:#x}"
            for name, wanted, there in zip(REGISTERS, right.registers, got.registers, strict=True)
            if wanted != there
        ]
    changed = (right.flags ^ got.flags) & ~form.undefined
    if changed:
        found.append(f"flags {got.flags:#x} instead of {right.flags:#x}")
    found += [
        f"{name} {there:#x} instead of {wanted:#x}"
        for name, wanted, there in zip(_SELECTORS, right.selectors, got.selectors, strict=False)
        if wanted != there
    ]
    if right.fx != got.fx:
        found.append(f"x87 and SSE state {_first(right.fx, got.fx)}")
    if right.ymm != got.ymm:
        found.append(f"upper halves of YMM {_first(right.ymm, got.ymm)}")
    found += _memory(_compared(form, right.ram if ram is None else ram), _compared(form, got.ram))
    if right.step != got.step:
        found.append(f"{_step(got.step)} instead of {_step(right.step)}")
    if right.cr2 != got.cr2:
        found.append(f"CR2 {got.cr2:#x} instead of {right.cr2:#x}")
    if right.written != got.written:
        found.append(f"wrote {got.written[:64].hex()} to the port instead of {right.written[:64].hex()}")
    if right.taken != got.taken:
        found.append(f"read {got.taken} bytes from the port instead of {right.taken}")
    return ", ".join(found)


def _fault(fault: Fault | None) -> str:
    if fault is None:
        return "no exception"
    return (
        f"exception {fault.vector} (error code {fault.error_code:#x}) at +{fault.rip:#x} in CS {fault.cs:#x}"
    )


def _step(step: Step | None) -> str:
    if step is None:
        return "no single step"
    return f"{step.count} single steps, the first with DR6 {step.dr6:#x} at +{step.rip:#x}"


def _first(right: bytes, got: bytes) -> str:
    at = next(at for at in range(len(right)) if right[at] != got[at])
    return f"at {at:#x}: {got[at : at + 8].hex()} instead of {right[at : at + 8].hex()}"


def _compared(form: Form, ram: bytes) -> bytes:
    """Return the eight pages without what the form leaves open."""
    compared = bytearray(ram)
    for address, length in form.leaves_open:
        compared[address - WINDOW : address - WINDOW + length] = bytes(length)
    return bytes(compared)


def _memory(right: bytes, got: bytes) -> list[str]:
    if right == got:
        return []
    found = []
    at = 0
    while at < len(right):
        if right[at] == got[at]:
            at += 1
            continue
        end = at
        while end < len(right) and right[end] != got[end]:
            end += 1
        found.append(
            f"{LETTERS[at // PAGE]}+{at % PAGE:#x} {got[at:end][:16].hex()} instead of {right[at:end][:16].hex()}"
        )
        at = end
    more = [f"and {len(found) - _SHOWN} places more in memory"] if len(found) > _SHOWN else []
    return found[:_SHOWN] + more
