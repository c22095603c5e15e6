"""Instruction forms leave under every trap, pages absent, what they leave in the same ring with all memory present.

The table is in `forms`; tools/forms runs one cell of this matrix by hand.
"""

from collections import Counter

import pytest
from effort import EFFORT
from forms.exchange import FX_STATE, YMM_STATE, Scratch, comparable_fx
from forms.form import cases_of
from forms.poisoned import is_single
from forms.program import DRIVER, code_of
from forms.survey import FORMS, chosen, program, reference, survey
from forms.trapped import Setting
from harness import every_trap, require_trap

from kvmdp.vcpu.encoding import may_load_vectors

pytestmark = [pytest.mark.kvm, pytest.mark.assembled]

_SHOWN = 40
# quick: the forms that stand for the others; normal: those with two vCPUs, all with one; full: all, many times with two


@pytest.mark.whole("trap", "ring", "vcpus")
@every_trap
@pytest.mark.parametrize("ring", [3, 0])
@pytest.mark.parametrize("vcpus", [1, 2])
def test_forms_leave_what_they_leave_with_all_memory_present(trap, ring, vcpus):
    require_trap(trap)
    quick = EFFORT == "quick" or (EFFORT == "normal" and vcpus > 1)
    rounds = 20 if EFFORT == "full" and vcpus > 1 else 1
    found = survey(Setting(trap, vcpus), ring, chosen(quick=quick), rounds)
    lines = [f"{name}: {words}" for name, words in found.different.items()]
    assert not lines, "\n".join([f"{len(lines)} of {found.cases} cases differ:", *lines[:_SHOWN]])
    assert found.touched > 0.98 * found.cases, "pages that were to be absent were not, or not touched"


@every_trap
@pytest.mark.parametrize("ring", [3, 0])
def test_forms_whose_pages_are_poisoned_have_not_happened_or_have_but_for_a_lost_store(trap, ring):
    require_trap(trap)
    found = survey(Setting(trap, poisoned=True), ring, chosen(quick=EFFORT != "full"))
    lines = [f"{name}: {words}" for name, words in found.different.items()]
    assert not lines, "\n".join([f"{len(lines)} of {found.cases} cases differ:", *lines[:_SHOWN]])


@every_trap
@pytest.mark.parametrize("ring", [3, 0])
def test_forms_leave_what_they_must_while_another_thread_evicts_their_pages(trap, ring):
    require_trap(trap)
    found = survey(Setting(trap, evicted=True), ring, chosen(quick=EFFORT != "full"))
    lines = [f"{name}: {words}" for name, words in found.different.items()]
    assert not lines, "\n".join([f"{len(lines)} of {found.cases} cases differ:", *lines[:_SHOWN]])


@pytest.mark.parametrize("ring", [3, 0])
def test_a_region_that_is_touched_first_by_a_form_gives_it_what_it_needs(ring):
    require_trap("layered")
    found = survey(Setting("layered", fresh=True), ring, chosen(quick=True)[:: 1 if EFFORT == "full" else 8])
    assert not found.different
    assert found.touched > 0.98 * found.cases


def test_instructions_that_load_vector_registers_are_taken_for_such():
    def loads(outcome):
        kept = outcome.registers is None or outcome.fx == comparable_fx(FX_STATE)
        return not kept or outcome.ymm not in (b"", bytes(len(YMM_STATE)), YMM_STATE)

    right = reference(3).right
    loading = [number for number, each in right.items() if is_single(FORMS[number]) and loads(each.first)]
    assert len(loading) > 50
    missed = [FORMS[each].name for each in loading if not may_load_vectors(code_of(program(), each))]
    assert missed == []


@pytest.mark.parametrize("ring", [3, 0])
def test_what_is_right_is_the_same_each_time(ring):
    reference.cache_clear()
    first = reference(ring)
    reference.cache_clear()
    assert reference(ring) == first


def test_there_are_forms_for_everything_that_is_asked_for():
    assert len(list(cases_of(FORMS))) > 3000
    assert 100 < len(list(cases_of(chosen(quick=True)))) < 600


def test_driver_and_host_agree_on_where_things_are():
    constants = dict(
        line.split("#")[0].removeprefix(".set ").strip().split(", ")
        for line in DRIVER.read_text().splitlines()
        if line.startswith(".set")
    )
    fields = {name.upper(): getattr(Scratch, name).offset for name, *_ in Scratch._fields_}
    shared = fields.keys() & constants.keys()
    assert {name: int(constants[name], 16) for name in shared} == {name: fields[name] for name in shared}
    assert fields.keys() - shared == {name for name in fields if name.startswith("_")}
    assert not [name for name, count in Counter(fields.values()).items() if count > 1]
