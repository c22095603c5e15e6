"""The guest program that holds all forms: the driver, and a slot for each form.

Where there is no binutils, KVMDP_PROGRAMS names a folder with what was assembled elsewhere (tools/forms --assemble).
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from kvmdp.machine.guest_abi import PROGRAM_BASE, PROGRAM_SIZE

from .form import LANDED, Form

DRIVER = Path(__file__).with_name("driver.S")
_GUEST = DRIVER.parents[3] / "guest"
_SLOTS = 0x1000  # SLOTS_OFFSET of driver.S
_SLOT = 128
_LANDING = 96  # in a slot


def _source(forms: Sequence[Form]) -> str:
    lines = ['.include "driver.S"']
    for number, form in enumerate(forms):
        here = f"form_{number} - {form.at}" if form.at is not None else ""
        lines += [
            f".org {_SLOTS + _SLOT * number}, 0xCC",
            f"form_{number}:",
            *form.code.replace("{here}", here).split(";"),
            "end_form",
            f".org {_SLOTS + _SLOT * number + _LANDING}, 0xCC",
            f"mov r15d, {LANDED}",
            "end_form",
        ]
    return "\n".join([*lines, ""])


def prepared(name: str, assembled: Callable[[], bytes]) -> bytes:
    """Return a program from the folder KVMDP_PROGRAMS if there is one, else `assembled()`."""
    folder = os.environ.get("KVMDP_PROGRAMS")
    return Path(folder, f"{name}.bin").read_bytes() if folder else assembled()


def assemble(forms: Sequence[Form]) -> bytes:
    """Return the program with these forms. Needs binutils; raises CalledProcessError if a form is wrong."""
    return assemble_source(_source(forms), [DRIVER.parent, _GUEST])


def assemble_source(source: str, includes: Sequence[Path] = ()) -> bytes:
    """Return a flat binary for the program area."""
    prefix = "x86_64-linux-gnu-" if shutil.which("x86_64-linux-gnu-as") else ""
    with tempfile.TemporaryDirectory() as directory:
        assembly, linked, binary = (Path(directory, name) for name in ("forms.S", "forms.o", "forms.bin"))
        assembly.write_text(source)
        options = [f"-I{each}" for each in includes]
        subprocess.run([prefix + "as", "--64", *options, "-o", linked, assembly], check=True)
        command = [prefix + "ld", "-N", "-e", "0", "-Ttext", hex(PROGRAM_BASE), "--oformat", "binary"]
        subprocess.run([*command, "-o", binary, linked], check=True)
        code = binary.read_bytes()
    assert len(code) <= PROGRAM_SIZE, "more forms than the program area takes"
    return code


def code_of(program: bytes, number: int) -> bytes:
    """Return the bytes of form `number`, to be put elsewhere: as many as there may be."""
    start = _SLOTS + _SLOT * number
    return program[start : start + _LANDING]


def entry_of(form: Form, number: int) -> int:
    """Return the address at which form `number` begins."""
    return form.at if form.at is not None else PROGRAM_BASE + _SLOTS + _SLOT * number


def landing_of(number: int) -> int:
    """Return the address that Symbol.LANDING stands for in form `number`."""
    return PROGRAM_BASE + _SLOTS + _SLOT * number + _LANDING
