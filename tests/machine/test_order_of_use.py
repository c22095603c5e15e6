"""What a machine says when it is used in the wrong order: told nothing, run twice, read after its run or its end."""

import numpy as np
import pytest
from harness import MEMORY, SEED, TIMEOUT, TRAPS, make_machine, plan

from kvmdp.errors import CancelledError
from kvmdp.machine.guest_abi import ParameterBlock
from kvmdp.page import PAGE_SIZE
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

FIRST, LAST = 0, MEMORY - PAGE_SIZE  # gpas of a page that the guest touches and of one that it does not


def at_source(gpa):
    return SyntheticSource(MEMORY, SEED).pages(np.array([gpa // PAGE_SIZE])).tobytes()


@pytest.mark.parametrize("program", [b"", b"\xc3"])
def test_a_machine_that_was_told_nothing_does_not_run(program):
    with make_machine("mmio", program=program) as machine:
        with pytest.raises(
            ValueError, match=r"^the vCPUs have not been told what to do: call set_parameters"
        ):
            machine.run(TIMEOUT)
        machine.set_parameters(plan("checksum", pages=2).blocks)
        machine.run(TIMEOUT)


def test_there_is_a_parameter_block_for_each_vcpu():
    with (
        make_machine("mmio", vcpus=2) as machine,
        pytest.raises(ValueError, match=r"^1 parameter blocks for 2 vCPUs: give one for each$"),
    ):
        machine.set_parameters(plan("checksum").blocks)


def test_a_second_run_wants_a_restart():
    workload = plan("checksum", pages=2)
    with make_machine("mmio", workload=workload) as machine:
        machine.run(TIMEOUT)
        with pytest.raises(ValueError, match=r"^the machine has run: call restart"):
            machine.run(TIMEOUT)
        machine.restart(workload.blocks)
        machine.run(TIMEOUT)
        assert [each.parameters.checksum for each in machine.threads] == workload.expected_checksums(
            SyntheticSource(MEMORY, SEED).pages
        )


@pytest.mark.parametrize("trap", [*TRAPS, pytest.param("userfaultfd", marks=pytest.mark.userfaultfd)])
def test_memory_after_a_run(trap):
    workload = plan("checksum", pages=2)
    with make_machine(trap, workload=workload) as machine:
        assert machine.memory.read(LAST - PAGE_SIZE, PAGE_SIZE) == at_source(LAST - PAGE_SIZE)
        machine.run(TIMEOUT)
        for gpa in (FIRST, LAST - PAGE_SIZE):
            assert machine.memory.read(gpa, PAGE_SIZE) == at_source(gpa)
        for access in (
            lambda: machine.memory.read(LAST, 8),
            lambda: machine.memory.write(LAST, b"new"),
            lambda: machine.memory.view(LAST, 8).__enter__(),
        ):
            with pytest.raises(
                CancelledError, match=f"gpa {LAST:#x} is absent and the run is over: call Mach"
            ):
                access()
        machine.pager.reopen()  # the first remedy of the two
        assert machine.memory.read(LAST, PAGE_SIZE) == at_source(LAST)


def test_memory_after_a_restart():
    workload = plan("checksum", pages=2)
    with make_machine("marker", workload=workload) as machine:
        machine.run(TIMEOUT)
        machine.restart(workload.blocks)
        assert machine.memory.read(LAST, PAGE_SIZE) == at_source(LAST)


def test_memory_of_a_closed_machine():
    with make_machine("mmio") as machine:
        machine.memory.read(FIRST, 8)
    with pytest.raises(
        ValueError, match=r"^the machine is closed and its RAM is gone: read it before `close`$"
    ):
        machine.memory.read(FIRST, 8)


def test_a_parameter_block_shows_its_numbers():
    assert repr(ParameterBlock(vcpus=2, checksum=7)) == "ParameterBlock(vcpus=2, checksum=7)"
