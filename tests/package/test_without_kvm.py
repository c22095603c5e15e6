"""A machine with no /dev/kvm: everything imports, the commands explain, the tests that need KVM skip."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import kvmdp

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_mounts")]

CHECKOUT = Path(__file__).resolve().parents[2]
HIDE_DEVICES = """
import sys
sys.path.insert(0, "tests/support")
import hosts
hosts.have_own_mounts()
hosts.replace_dev()
"""
REMEDY = "load kvm_intel or kvm_amd"

IMPORT_ALL = """
import importlib, pkgutil
import kvmdp
for module in pkgutil.walk_packages(kvmdp.__path__, "kvmdp."):
    importlib.import_module(module.name)
    print(module.name)
"""
RUN_TESTS = """
import pytest
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def python(program, *arguments):
    """Run a Python program in the checkout and return how it ended, with what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "KVMDP_REQUIRE"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_module_imports():
    done = python(HIDE_DEVICES + IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    assert {"kvmdp.kvm", "kvmdp.lab.probe", "kvmdp.cli.main"} <= set(done.stdout.split())


def test_probe_explains():
    done = kvmdp("probe", "--json", "-", prelude=HIDE_DEVICES, fresh=True)
    assert (done.status, done.err) == (4, "")
    (lack,) = done.document["missing"]
    assert lack["what"] == "/dev/kvm"
    assert REMEDY in lack["remedy"]
    assert REMEDY in kvmdp("probe", prelude=HIDE_DEVICES, fresh=True).out


def test_run_explains():
    done = kvmdp("run", prelude=HIDE_DEVICES, fresh=True)
    assert done.status == 4
    assert REMEDY in done.error


def test_pure_tests_pass_and_the_others_skip_with_the_remedy():
    done = python(HIDE_DEVICES + RUN_TESTS, "tests/memory/test_layout.py", "tests/machine/test_contended.py")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert f"needs kvm: no /dev/kvm: {REMEDY}" in done.stdout
    assert "failed" not in done.stdout
