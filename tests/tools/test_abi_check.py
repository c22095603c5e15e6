import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "abi_check"


def abi_check(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )


@pytest.fixture
def headers(tmp_path):
    """Make a directory of headers with this text as linux/kvm.h."""

    def make(text):
        (tmp_path / "linux").mkdir()
        (tmp_path / "linux/kvm.h").write_text(text)
        return str(tmp_path)

    return make


@pytest.mark.compiler
def test_the_installed_headers_agree():
    done = abi_check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("compared with /usr/include: all equal")
    assert done.stderr == ""


@pytest.mark.compiler
def test_verbose_prints_each_value():
    done = abi_check("--verbose")
    assert "KVM_GET_SREGS: 0x8138ae83\n" in done.stdout
    assert "offset of kvm_run.mmio.phys_addr: 0x20\n" in done.stdout
    assert "sizeof siginfo_t: 0x80\n" in done.stdout
    assert "NR_userfaultfd: 0x143\n" in done.stdout


@pytest.mark.compiler
def test_a_different_constant_fails_and_names_both_values(headers):
    done = abi_check("--headers", headers("#define KVM_API_VERSION 13\n"))
    assert done.returncode == 1
    assert "different: KVM_API_VERSION is 0xc in kvmdp.abi, 0xd in the headers\n" in done.stdout
    assert "1 constants, 0 structures (0 fields), 0 ioctl requests" in done.stdout
    assert "1 differ\n" in done.stdout


@pytest.mark.compiler
def test_a_constant_that_is_no_macro_is_compared(headers):
    done = abi_check("--headers", headers("enum { KVM_API_VERSION = 13 };\n"))
    assert done.returncode == 1
    assert "different: KVM_API_VERSION is 0xc" in done.stdout


@pytest.mark.compiler
def test_a_different_structure_fails_field_by_field(headers):
    text = "struct kvm_dtable { unsigned long long base; unsigned limit; unsigned short padding[3]; };\n"
    done = abi_check("--headers", headers(text))
    assert done.returncode == 1
    assert "different: sizeof kvm_dtable is 0x10 in kvmdp.abi, 0x18 in the headers\n" in done.stdout
    assert "different: sizeof kvm_dtable.limit is 0x2 in kvmdp.abi, 0x4 in the headers\n" in done.stdout
    assert "different: offset of kvm_dtable.padding is 0xa in kvmdp.abi, 0xc in the headers\n" in done.stdout
    assert "kvm_dtable.base is" not in done.stdout


@pytest.mark.compiler
def test_what_older_headers_lack_is_named_and_is_no_failure(headers):
    text = "#define KVM_API_VERSION 12\nstruct kvm_xcr { unsigned xcr, reserved; unsigned long long val; };\n"
    done = abi_check("--headers", headers(text))
    lacking = next(line for line in done.stdout.splitlines() if line.startswith("not in these headers"))
    names = lacking.partition(": ")[2].split(", ")
    assert {"KVM_CAP_GUEST_MEMFD", "KVM_RUN", "uffdio_poison", "kvm_xcr.value"} <= set(names)
    assert "uffdio_poison.mode" not in names, "a missing structure stands for its fields"
    assert "KVM_API_VERSION" not in names
    assert done.returncode == 0


def test_without_a_compiler_it_names_the_package(tmp_path):
    done = abi_check(PATH=str(tmp_path))
    assert done.returncode == 4
    assert "sudo apt-get install gcc" in done.stderr


@pytest.mark.compiler
def test_without_headers_it_names_the_package(tmp_path):
    done = abi_check("--headers", str(tmp_path))
    assert done.returncode == 4
    assert done.stderr == f"abi_check: {tmp_path} has no linux/kvm.h: sudo apt-get install linux-libc-dev\n"


@pytest.mark.compiler
def test_headers_with_nothing_to_compare_are_not_all_equal(headers):
    done = abi_check("--headers", headers(""))
    assert done.returncode == 4
    assert "has no name of kvmdp.abi" in done.stderr


@pytest.mark.compiler
def test_headers_that_no_compiler_can_read(headers):
    done = abi_check("--headers", headers("#error unfinished\n#define KVM_API_VERSION 12\n"))
    assert done.returncode == 4
    assert "the compiler fails on these headers" in done.stderr
    assert "unfinished" in done.stderr


def test_an_unknown_option_is_a_usage_error():
    assert abi_check("--frobnicate").returncode == 2
