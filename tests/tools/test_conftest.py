"""tests/conftest.py by what a run of pytest on small tests shows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path):
    """Run pytest on a module with this text, under the project's settings; return its status and output."""
    for name in ("tests/conftest.py", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, tmp_path)
    shutil.copytree(CHECKOUT / "tests/support", tmp_path / "tests/support")

    def run_pytest(text, **environment):
        (tmp_path / "test_small.py").write_text("import os, threading, pytest\n" + text)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)],
            capture_output=True,
            text=True,
            env={**os.environ, "KVMDP_REQUIRE": "", **environment},
        )
        return done.returncode, done.stdout + done.stderr

    return run_pytest


NEEDS_QEMU = "@pytest.mark.qemu\ndef test_it(): pass\n"
NO_QEMU = "no qemu-system-x86_64 on PATH: sudo apt-get install qemu-system-x86"


def test_an_unmet_need_skips_with_the_remedy(run, tmp_path):
    status, output = run(NEEDS_QEMU, PATH=str(tmp_path))
    assert status == 0
    assert "1 skipped" in output
    assert f"needs qemu: {NO_QEMU}" in output


@pytest.mark.parametrize("words", ["qemu", "kvm, qemu", "all"])
def test_an_unmet_need_that_is_required_fails(run, tmp_path, words):
    status, output = run(NEEDS_QEMU, PATH=str(tmp_path), KVMDP_REQUIRE=words)
    assert status == 1
    assert f"KVMDP_REQUIRE names qemu, but: {NO_QEMU}" in output


def test_a_required_need_that_the_test_does_not_have_changes_nothing(run, tmp_path):
    status, output = run("def test_it(): pass\n", PATH=str(tmp_path), KVMDP_REQUIRE="qemu")
    assert status == 0
    assert "1 passed" in output


def test_an_unknown_word_is_a_usage_error(run):
    status, output = run(NEEDS_QEMU, KVMDP_REQUIRE="kvm,quemu")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "KVMDP_REQUIRE names quemu; it knows kvm, userfaultfd, root, hugepages, qemu," in output


def test_a_thread_that_dies_fails_its_test(run):
    status, output = run(
        "def test_it():\n"
        "    thread = threading.Thread(target=lambda: 1 / 0)\n"
        "    thread.start()\n"
        "    thread.join()\n"
    )
    assert status == 1
    assert "1 failed" in output
    assert "ZeroDivisionError" in output


def test_a_thread_left_running_fails_its_test(run):
    status, output = run(
        "def test_it():\n    threading.Thread(target=threading.Event().wait, name='left', daemon=True).start()\n"
    )
    assert status == 1
    assert "the test left threads running: left" in output


def test_a_descriptor_left_open_fails_its_test(run):
    status, output = run("def test_it(): os.open('/dev/null', os.O_RDONLY)\n")
    assert status == 1
    assert "the test left descriptors open: " in output
    assert "(/dev/null)" in output


def test_a_failed_test_is_not_blamed_for_what_it_left(run):
    status, output = run("def test_it():\n    os.open('/dev/null', os.O_RDONLY)\n    assert False\n")
    assert status == 1
    assert "1 failed" in output
    assert "left descriptors" not in output


def test_what_fixtures_open_and_close_is_no_leak(run):
    status, output = run(
        "@pytest.fixture\n"
        "def null():\n"
        "    with open(os.devnull) as file:\n"
        "        yield file\n"
        "def test_it(null, capfd, tmp_path): pass\n"
    )
    assert (status, "1 passed" in output) == (0, True), output
