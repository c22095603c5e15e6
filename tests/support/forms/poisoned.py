"""What a form leaves whose page is poisoned: nothing at all, or all of it, but for a store that is lost."""

from collections.abc import Sequence
from dataclasses import replace

from .exchange import FX_STATE, YMM_STATE, Given, Outcome, comparable_fx
from .form import ALL_FLAGS, DIRECTION, PAGE, TRAP, WINDOW, Case, Form, Symbol
from .judge import differs
from .reference import Right
from .trapped import Failure, Result, pages_in

_MACHINE_CHECK = 18
_GIVEN_FLAGS = ALL_FLAGS | DIRECTION | TRAP


def is_single(form: Form) -> bool:
    """Return whether a form is one instruction that happens once, and goes on behind itself."""
    goes_elsewhere = Symbol.LANDING in (*form.memory.values(), *form.registers.values())
    is_many = ";" in form.code or "rep" in form.code or form.at is not None
    return not (goes_elsewhere or is_many or form.delivers)


def difference(case: Case, given: Given, right: Right, result: Result) -> str:
    """Say how a result differs from what is right; empty if it does not. `given` is what the form began with."""
    if isinstance(result, Failure):
        return f"fails: {result.message}"
    got, first = result[0], right.first
    if got.fault is not None and got.fault == first.fault:
        return ""
    if got.fault is not None and got.registers is None:
        return f"ends with {got.fault}"
    if got.fault is None or got.fault.vector != _MACHINE_CHECK:
        return differs(case.form, _hidden(first, case.absent), _hidden(got, case.absent))
    if got.fault.rip:
        expected, form = first, case.form
    else:
        expected, form = _untouched(given, got), case.form.but(undefined=0, leaves_open=())
    expected = replace(expected, fault=got.fault)
    return differs(form, _hidden(expected, case.absent), _hidden(got, case.absent))


def _untouched(given: Given, got: Outcome) -> Outcome:
    """Return what there is if the instruction has not happened."""
    return Outcome(
        registers=given.registers,
        flags=got.flags & ~_GIVEN_FLAGS | given.flags,
        selectors=got.selectors,
        fx=comparable_fx(FX_STATE),
        ymm=YMM_STATE if any(got.ymm) else got.ymm,
        ram=given.ram,
        cr2=0,
        written=b"",
        taken=0,
    )


def _hidden(outcome: Outcome, letters: str) -> Outcome:
    """Return an outcome without the pages that are poisoned."""
    ram = bytearray(outcome.ram)
    for page in pages_in(letters):
        start = page * PAGE - WINDOW
        ram[start : start + PAGE] = bytes(PAGE)
    return replace(outcome, ram=bytes(ram))


def single(forms: Sequence[Form]) -> list[Form]:
    """Return the forms that can be judged."""
    return [form for form in forms if is_single(form)]
