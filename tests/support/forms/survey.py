"""All forms, or some, under one trap in one ring."""

import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from kvmdp.machine.hostinfo import emulates_ring_0

from . import judge, poisoned
from .exchange import Setter
from .form import Form, cases_of
from .known import hopeless, known_when_poisoned
from .known import known as known_here
from .program import assemble, prepared
from .reference import Reference, Right, find_right
from .table import FORMS
from .trapped import Numbered, Result, Setting, run_cases


@dataclass(frozen=True)
class Survey:
    """What was found: the names of cases that differ, and how; how many were run; forms that were not, and why.

    `touched` is in how many cases the guest came to a page that was absent.
    """

    different: dict[str, str]
    known: dict[str, str]
    cases: int
    skipped: dict[str, str]
    touched: int


@functools.cache
def program() -> bytes:
    """Return the guest program with the whole table."""
    return prepared("forms", lambda: assemble(FORMS))


@functools.cache
def reference(ring: int, numbers: Sequence[int] = range(len(FORMS))) -> Reference:
    """Return what is right in a ring of this host's guests, of the forms with these numbers."""
    return find_right(FORMS, numbers, program(), ring)


def chosen(pattern: str = "*", *, quick: bool = False) -> list[Form]:
    """Return the forms whose names match, all or the quick ones."""
    return [form for form in FORMS if fnmatch.fnmatchcase(form.name, pattern) and (form.quick or not quick)]


def survey(setting: Setting, ring: int, forms: Sequence[Form] = FORMS, rounds: int = 1) -> Survey:
    """Run forms, `rounds` times, and compare. Two vCPUs run each at the same time."""
    numbers = {form.name: number for number, form in enumerate(FORMS)}
    right = reference(ring, tuple(numbers[form.name] for form in forms))
    skipped = {
        form.name: why
        for form in forms
        if (why := right.skipped.get(numbers[form.name]) or hopeless(setting, form))
    }
    runnable = [form for form in forms if form.name not in skipped]
    if setting.poisoned:
        runnable = poisoned.single(runnable)
    if setting.vcpus > 1:
        emulated = ring == 0 and emulates_ring_0()
        runnable = [
            form
            for form in runnable
            if judge.is_judged_contended(form, right.right[numbers[form.name]], emulated=emulated)
        ]
    cases = [Numbered(case, numbers[case.form.name]) for case in cases_of(runnable) for _ in range(rounds)]
    setter = Setter(program(), right.selectors, right.avx)
    different: dict[str, str] = {}
    known: dict[str, str] = {}
    results, touched = run_cases(setting, right, program(), cases)
    for each, result in zip(cases, results, strict=True):
        words = _difference(setting, setter, each, right.right[each.number], result)
        if words:
            found = known if _is_known(setting, ring, each.case.form.name) else different
            found.setdefault(each.case.name, words)
    return Survey(different, known, len(cases), skipped, touched)


def _is_known(setting: Setting, ring: int, name: str) -> bool:
    if setting.poisoned and any(
        fnmatch.fnmatchcase(name, pattern) for pattern in known_when_poisoned(setting.trap, ring)
    ):
        return True
    return (setting.trap, ring, name) in known_here()


def _difference(setting: Setting, setter: Setter, each: Numbered, right: Right, result: Result) -> str:
    if setting.poisoned:
        given = setter.given(each.case.form, each.number)
        return poisoned.difference(each.case, given, right, result)
    return judge.difference(each.case, right, result)
