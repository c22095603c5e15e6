"""The examples run as a user runs them, do what they say, and have the types that mypy --strict wants."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TIMEOUT = 120  # seconds: an example that hangs fails its test, it does not hang the suite
EXAMPLES = sorted(path.name for path in HERE.glob("custom_*.py"))
PROOF = r"^checksum   guest 0x\w+, host 0x\w+: equal\nbytes      {pages} (present )?pages.* compared .*: all exact$"


def start(*command):
    """Run Python with this checkout's kvmdp, to its end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )


def run(*command):
    """Run Python likewise, with success; returns what it printed."""
    done = start(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def example(name, *options):
    return run(HERE / name, *options)


def proved(text, pages):
    return re.search(PROOF.format(pages=pages), text, re.MULTILINE)


@pytest.mark.kvm
def test_a_policy_reads_ahead_and_the_guest_sees_the_same():
    found = re.fullmatch(
        r"page by page: 4096 faults for 4096 pages, exact\nreading ahead: (\d+) faults for 4096 pages, exact\n",
        example("custom_policy.py"),
    )
    assert found
    assert int(found[1]) < 100


@pytest.mark.kvm
def test_a_source_computes_what_the_guest_reads():
    out = example("custom_source.py")
    assert proved(out, 4096)
    # The sum of all n * n, each weighted as guest/README.md says of a sequence's checksum.
    words = (16 << 20) // 8
    checksum = sum((2 * (words - n) - 1) * n * n for n in range(words)) % (1 << 64)
    assert f"guest {checksum:#x}, " in out


@pytest.mark.kvm
@pytest.mark.parametrize("options", [(), ("--vcpus", "3", "--ring", "0"), ("--pages", "1000")])
def test_a_workload_does_its_own_work_and_is_compared(options):
    assert proved(example("custom_workload.py", *options), 1000 if "--pages" in options else 4096)


@pytest.mark.kvm
@pytest.mark.parametrize(
    "options",
    [(), ("--workload", "atomic", "--vcpus", "4"), ("--workload", "touch", "--fault-around", "512")],
)
def test_a_trap_brings_whole_regions(options):
    out = example("custom_trap.py", *options)
    assert proved(out, 16384)
    assert re.search(r"^memslots   32 at the end, granule 2M", out, re.MULTILINE)


@pytest.mark.kvm
def test_a_trap_shuts_out_what_a_limit_takes_away():
    out = example("custom_trap.py", "--workload", "fill", "--vcpus", "1", "--resident-limit", "40M")
    assert proved(out, 16384)
    assert re.search(r"^pages      \d+ of 16384 present", out, re.MULTILINE)
    refused = start(HERE / "custom_trap.py", "--resident-limit", "40M")
    assert refused.returncode == 2
    assert refused.stderr.endswith("is less than this guest can run in: give 45312K or more\n")


@pytest.mark.binutils
def test_the_code_of_the_workload_is_what_stands_beside_it(tmp_path):
    lines = re.findall(
        r'^    "([0-9a-f ]+)"  # +(.+)$', (HERE / "custom_workload.py").read_text(), re.MULTILINE
    )
    assembly, linked, binary = tmp_path / "code.S", tmp_path / "code.o", tmp_path / "code.bin"
    assembly.write_text(
        "\n".join([".intel_syntax noprefix", *(text.split("   ")[0] for _, text in lines), ""])
    )
    prefix = "x86_64-linux-gnu-" if shutil.which("x86_64-linux-gnu-as") else ""
    subprocess.run([prefix + "as", "--64", "-o", linked, assembly], check=True)
    subprocess.run([prefix + "objcopy", "-O", "binary", "-j", ".text", linked, binary], check=True)
    assert binary.read_bytes() == bytes.fromhex(" ".join(code for code, _ in lines))


def test_the_examples_have_all_their_types():
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("needs mypy: pip install '.[lint]'")
    assert EXAMPLES
    run("-m", "mypy", "--strict", *(HERE / name for name in EXAMPLES))
