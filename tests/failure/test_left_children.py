"""Commands that are interrupted while a process of theirs is at work: it is over when they are."""

import random
import signal
import time

import pytest
from command import Running

ONLY_TOUCHES = """
from kvmdp.lab import coverage
for access in {*coverage.ACCESSES} - {"user touch"}:
    del coverage.ACCESSES[access]
"""


@pytest.mark.kvm
@pytest.mark.parametrize("turn", range(4))
def test_a_coverage_that_is_interrupted_leaves_no_process_that_touches(turn):
    chance = random.Random(turn)
    with Running("compare", "--coverage", prelude=ONLY_TOUCHES) as command:
        command.wait_for_progress("user touch")
        time.sleep(chance.uniform(0, 0.4))
        command.process.send_signal(signal.SIGINT)
        assert command.finish().status == 130
