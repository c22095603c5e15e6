"""The programs that guest/README.md and guest/examples show assemble and do what they say."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from plain_guest import PlainGuest

from kvmdp.machine.guest_abi import PROGRAM_BASE, Report
from kvmdp.machine.workloads import Program, WorkloadOptions

pytestmark = [pytest.mark.kvm, pytest.mark.binutils]

GUEST = Path(__file__).parents[2] / "guest"
MEMORY = 2 << 20
PAGES = MEMORY // 4096


def assemble(source, directory):
    prefix = "x86_64-linux-gnu-" if shutil.which("x86_64-linux-gnu-as") else ""
    assembly, linked, binary = directory / "prog.S", directory / "prog.o", directory / "prog.bin"
    assembly.write_text(source)
    subprocess.run([prefix + "as", "--64", "-I", GUEST, "-o", linked, assembly], check=True)
    command = [prefix + "ld", "-Ttext", hex(PROGRAM_BASE), "--oformat", "binary", "-o", binary, linked]
    subprocess.run(command, check=True)
    return binary.read_bytes()


@pytest.mark.parametrize("ring", [3, 0])
def test_program_of_the_readme(tmp_path, ring):
    source = re.search(r"```asm\n(.*?)```", (GUEST / "README.md").read_text(), re.DOTALL)[1]
    blocks = Program(WorkloadOptions(memory_bytes=MEMORY, vcpus=3, ring=ring)).blocks
    with PlainGuest(MEMORY, blocks, assemble(source, tmp_path)) as machine:
        assert machine.run() == [Report.DONE] * 3
        assert [(block.checksum, block.accesses) for block in machine.blocks] == [
            (n, PAGES) for n in range(3)
        ]
        assert [block.progress for block in machine.blocks] == [PAGES] * 3
        assert set(machine.ram[:, 0].tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("ring", [3, 0])
def test_example_counts_zero_words(tmp_path, ring):
    program = assemble((GUEST / "examples" / "hello.S").read_text(), tmp_path)
    blocks = Program(WorkloadOptions(memory_bytes=MEMORY, ring=ring)).blocks
    with PlainGuest(MEMORY, blocks, program) as machine:
        machine.ram[:, 0] = np.arange(PAGES) % 5
        assert machine.run() == [Report.DONE]
        assert machine.blocks[0].checksum == len(range(0, PAGES, 5))
        assert machine.blocks[0].accesses == PAGES
