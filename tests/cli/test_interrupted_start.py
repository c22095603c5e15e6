"""Ctrl-C while the command is still loading: no traceback, status 130."""

import signal
import time

import pytest
from command import Running

# Raised from inside our own loading: as early as the entry, and as each heavy module comes in.
SIGNAL_AT_IMPORT = """
import os, signal, sys
class AtImport:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.{number})
sys.meta_path.insert(0, AtImport())
"""
MODULES = ("kvmdp.cli.main", "argparse", "kvmdp.kvm", "numpy", "kvmdp.cli.bench", "kvmdp.bench.report.table")


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("module", MODULES)
def test_an_interruption_while_a_module_is_loaded(module, number):
    prelude = SIGNAL_AT_IMPORT.format(module=module, number=number)
    with Running("bench", "--help", prelude=prelude, fresh=True) as command:
        done = command.finish()
    assert (done.status, done.error, done.out) == (130, "interrupted", "")


READY = """import sys
import kvmdp.cli.entry as entry
entry.on_interruption(entry.leave)
print("ready\\n", end="", file=sys.stderr)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("tenths", range(1, 8))
def test_an_interruption_while_a_supervised_run_starts(tenths, number):
    with Running("run", "--memory", "1G", "--detect-leaks", prelude=READY, fresh=True) as command:
        command.wait_for_progress("ready")
        time.sleep(tenths / 10)
        command.process.send_signal(number)
        done = command.finish()
    assert done.status in (130, 4)  # 4: no KVM here, and it was said before the signal came
    assert done.error == "interrupted" or done.status == 4


@pytest.mark.kvm
@pytest.mark.parametrize("leaks", [(), ("--detect-leaks",)], ids=["plain", "supervised"])
def test_a_background_jobs_run_goes_on_ignoring_sigint(leaks):
    prelude = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    with Running("run", "--memory", "8M", *leaks, prelude=prelude) as command:
        command.wait_for_progress("RAM from")
        command.process.send_signal(signal.SIGINT)
        done = command.finish()
    assert done.status == 0


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.2])
def test_an_interruption_soon_after_the_entry(delay):
    with Running("run", "--memory", "256M", prelude=READY, fresh=True) as command:
        command.wait_for_progress("ready")
        time.sleep(delay)
        command.process.send_signal(signal.SIGINT)
        done = command.finish()
    assert done.status in (130, 4)  # 4: no KVM here, and it was said before the signal came
