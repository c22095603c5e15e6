"""`kvmdp run --detect-leaks` as a user meets it: no false alarm, each leak found, signals and statuses relayed."""

import itertools
import json
import os
import signal
import time

import pytest
from command import Running, kvmdp, require_trap
from effort import EFFORT

from kvmdp.machine.workloads import WORKLOADS

pytestmark = pytest.mark.kvm

TRAPS = ("memory-fault", "marker", "mmio", "userfaultfd")
SMALL = ("run", "--memory", "2M", "--pages", 8, "--detect-leaks")
# Before the machine runs, in the run's process: a touch of page 7 by the main thread, past the pager.
TOUCH = """
from kvmdp.cli import supervise
supervise._STALL_BEATS = 5
from kvmdp.machine.machine import Machine
run = Machine.run
def touch(self, *arguments):
    self.backing.guest.view[0x7000] = 1
    run(self, *arguments)
Machine.run = touch
"""
NOT_INTERCEPTED = """
from kvmdp.kvm import Vm
Vm.set_msr_filter = lambda vm, ranges: None
"""


@pytest.fixture
def in_the_child(tmp_path, monkeypatch):
    """Have Python code run at the start of a fresh command's interpreter, and of every one that it starts."""

    def place(code):
        (tmp_path / "sitecustomize.py").write_text(code)
        paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))

    return place


# All of them without a command: tests/lab/test_leaks_detected.py.
PAIRS = (
    [*itertools.product(WORKLOADS, TRAPS)] if EFFORT == "full" else [*zip(WORKLOADS, itertools.cycle(TRAPS))]
)


@pytest.mark.parametrize(("workload", "trap"), PAIRS)
def test_nothing_is_found_where_nothing_is_wrong(workload, trap):
    require_trap(trap)
    done = kvmdp(*SMALL, "--pages", 16, "--workload", workload, "--trap", trap, "--vcpus", 2)
    assert done.status == 0, done.err
    assert done.out.endswith("leaks      none found\n")


@pytest.mark.parametrize("trap", ["memory-fault", "mmio"])
def test_what_the_page_cache_reads_ahead_is_no_leak(trap):
    require_trap(trap)
    done = kvmdp(
        "run", "--memory", "4M", "--trap", trap, "--backing", "file", "--order", "random", "--detect-leaks"
    )
    assert done.status == 0, done.err
    assert done.out.endswith("leaks      none found\n")


def test_the_document_has_the_leaks_and_null_if_nobody_looked():
    assert kvmdp(*SMALL, "--json", "-").document["leaks"] == []
    assert kvmdp(*SMALL[:-1], "--json", "-").document["leaks"] is None


@pytest.mark.parametrize("trap", ["memory-fault", "marker", "mmio"])
def test_a_clock_that_is_not_intercepted(in_the_child, trap):
    require_trap(trap)
    in_the_child(NOT_INTERCEPTED)
    done = kvmdp(*SMALL, "--workload", "clock", "--trap", trap, "--json", "-", fresh=True)
    assert done.status == 1
    assert {leak["kind"] for leak in done.document["leaks"]} == {"MSR page enabled while absent"}
    assert "0x140" in {leak["gpa"] for leak in done.document["leaks"]}


@pytest.mark.parametrize("trap", ["memory-fault", "mmio"])
def test_a_touch_that_does_not_trap(in_the_child, trap):
    require_trap(trap)
    in_the_child(TOUCH)
    done = kvmdp(*SMALL, "--trap", trap, "--pages", 4, fresh=True)
    assert done.status == 1
    assert "leak       data in absent pages at gpa 0x7000" in done.out


@pytest.mark.parametrize(("trap", "how"), [("marker", "SIGBUS"), ("userfaultfd", "stood still")])
def test_a_touch_that_ends_the_process(in_the_child, tmp_path, trap, how):
    require_trap(trap)
    in_the_child(TOUCH)
    result = tmp_path / "result.json"
    done = kvmdp(*SMALL, "--trap", trap, "--json", result, fresh=True)
    assert done.status == 1
    assert "user-space touch of the guest view" in done.error
    assert how in done.error
    assert ("host address 0x" in done.error) == (trap == "marker")
    assert " in touch" in done.err  # the function that did it
    (leak,) = json.loads(result.read_text())["leaks"]
    assert leak["kind"] == "user-space touch of the guest view"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("everybody", [False, True])
def test_a_signal_ends_the_run(number, everybody):
    with Running("run", "--memory", "2G", "--detect-leaks") as command:
        command.wait_for_progress()
        if everybody:  # as a terminal does
            os.killpg(command.process.pid, number)
        else:
            command.process.send_signal(number)
        done = command.finish()
    assert done.status == 130
    assert done.error == "interrupted"


def lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_run_does_not_outlive_its_supervisor():
    with Running("run", "--memory", "2G", "--detect-leaks") as command:
        command.wait_for_progress()
        command.process.kill()
        command.process.wait()
        deadline = time.monotonic() + 30
        while lives(command.process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not lives(command.process.pid), "the run goes on"


@pytest.mark.parametrize(("arguments", "status"), [(("--vcpus", 99), 2), (("--image", "/nonexistent"), 2)])
def test_errors_are_relayed(arguments, status):
    done = kvmdp(*SMALL, *arguments)
    assert done.status == status
    assert done.error
