"""One way to run a guest and have its result judged, be it a workload or a program of the user's own."""

import importlib
import re

import numpy as np
import pytest
from harness import MEMORY, SEED, TIMEOUT, plan

import kvmdp
from kvmdp.lab.experiment import run_workload
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.workloads import Program, WorkloadOptions
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

SOURCE = SyntheticSource(MEMORY, SEED)
# mov rax,[0x3000]; mov edx,1; ret
LOAD = bytes.fromhex("488b042500300000 ba01000000 c3")


def test_a_program_runs_as_a_workload_does_and_nothing_is_expected_of_it():
    options = MachineOptions(MEMORY, "mmio", program=LOAD)
    result = run_workload(options, Program(WorkloadOptions(memory_bytes=MEMORY)), SOURCE, timeout=TIMEOUT)
    assert result.guest_checksum == SOURCE.pages(np.array([3]))[0, 0]
    assert (result.accesses, result.counters.pages_fetched) == (1, 1)
    assert (result.ok, result.expected_checksum, result.pages_checked) == (True, None, 0)


def test_a_program_needs_a_machine_that_has_one():
    task = Program(WorkloadOptions(memory_bytes=MEMORY))
    with pytest.raises(
        ValueError, match=r"a program and has none: give it one with MachineOptions\.program$"
    ):
        run_workload(MachineOptions(MEMORY, "mmio"), task, SOURCE)


def test_a_workload_that_brings_its_program_runs_it_and_no_other():
    class Loading(Program):
        program = LOAD

    task = Loading(WorkloadOptions(memory_bytes=MEMORY))
    for options in (MachineOptions(MEMORY, "mmio"), MachineOptions(MEMORY, "mmio", program=LOAD)):
        result = run_workload(options, task, SOURCE, timeout=TIMEOUT)
        assert result.guest_checksum == SOURCE.pages(np.array([3]))[0, 0]
    with pytest.raises(ValueError, match=r"brings its own program: leave MachineOptions\.program out$"):
        run_workload(MachineOptions(MEMORY, "mmio", program=b"\xc3"), task, SOURCE)


def test_what_a_run_found_can_be_printed():
    result = run_workload(MachineOptions(MEMORY, "mmio"), plan("checksum", pages=3), SOURCE, timeout=TIMEOUT)
    assert " object at 0x" not in str(result)
    assert re.search(r"\bpages_fetched=3\b", str(result.counters))
    assert str(result.counters) in str(result)


def test_the_docstring_of_the_package_names_what_there_is():
    named = re.findall(r"`(kvmdp(?:\.\w+)+)`", kvmdp.__doc__)
    assert named
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name)
