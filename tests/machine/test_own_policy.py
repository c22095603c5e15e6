"""Policies from outside, asked by machines of every trap."""

from dataclasses import replace

import pytest
from command import kvmdp
from harness import MEMORY, SEED, TIMEOUT, every_trap, make_machine, plan, prove

from kvmdp.errors import PagingError
from kvmdp.lab.experiment import run_workload
from kvmdp.machine.options import MachineOptions
from kvmdp.page import Origin
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

BROKEN = """
from kvmdp.machine.options import MachineOptions
class Broken:
    def window(self, fault):
        return (fault.page, 1) if fault.page < 40 else 1 / 0
MachineOptions.fault_policy = lambda options: Broken()
"""


class Noting:
    """Fetches `more` pages beyond the touched one, and notes who touched which."""

    def __init__(self, more):
        self.more = more
        self.faults = []

    def window(self, fault):
        self.faults.append(fault)
        return fault.page, 1 + self.more


@every_trap
@pytest.mark.parametrize("more", [0, 6, 511])
def test_what_the_policy_proposes_is_fetched_and_exact(trap, more):
    policy = Noting(more)
    workload = plan("touch", vcpus=2)
    result = prove(trap, "memfd", workload, policy=policy)
    assert result.counters.pages_fetched == MEMORY // 4096
    assert len(policy.faults) == result.counters.claims
    assert all(fault.origin is Origin.VCPU for fault in policy.faults)
    if trap != "userfaultfd":  # the kernel tells its reader threads of threads, not of vCPUs
        halves = {(fault.number, fault.page // (MEMORY // 4096 // 2)) for fault in policy.faults}
        assert halves <= {(0, 0), (1, 1)}


@every_trap
def test_a_policy_that_breaks_ends_the_run_with_its_sentence_and_leaves_no_claim(trap):
    class Broken(Noting):
        def window(self, fault):
            return super().window(fault) if fault.page < 40 else (0, 1)

    with make_machine(trap, workload=plan("checksum"), policy=Broken(0)) as machine:
        with pytest.raises(PagingError) as caught:
            machine.run(TIMEOUT)
        assert str(caught.value) == (
            "the policy Broken proposes 1 pages from 0 on for a fault on page 40: have it propose 1 to 512 pages that "
            "hold it"
        )
        assert machine.pager.ledger.claims == []
        assert machine.pager.bitmap.present_runs().tolist() == [[0, 40]]


def test_a_resident_limit_leaves_room_for_all_that_a_policy_may_propose():
    workload = plan("touch", memory=32 << 20)
    options = MachineOptions(32 << 20, "mmio", policy=Noting(511), resident_limit=16 << 20)
    source = SyntheticSource(32 << 20, SEED)
    result = run_workload(options, workload, source, timeout=TIMEOUT)
    assert result.ok
    assert result.resident_peak <= (16 << 20) // 4096 + 512  # what comes in is seen before its room is made
    with pytest.raises(ValueError, match="a resident limit of 4M is less than this guest can run in"):
        run_workload(replace(options, resident_limit=4 << 20), workload, source)


def test_a_command_whose_policy_breaks_fails_with_its_sentence():
    done = kvmdp("run", "--memory", "2M", "--trap", "mmio", prelude=BROKEN)
    assert done.status == 1
    assert done.error.startswith("the policy Broken broke at page 40: internal error: ZeroDivisionError")
