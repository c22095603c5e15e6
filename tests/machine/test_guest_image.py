"""The committed image is what the source gives, and source, host and README agree on the ABI."""

import ctypes
import re
import subprocess
import sys
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest

from kvmdp.machine import guest_abi
from kvmdp.machine.guest_abi import ParameterBlock
from kvmdp.machine.workloads import WORKLOADS
from kvmdp.memory import layout

GUEST = Path(__file__).parents[2] / "guest"

ENUMS = {
    "REPORT": guest_abi.Report,
    "FAILURE": guest_abi.Failure,
    "GATE": guest_abi.Gate,
    "FLAG": guest_abi.VectorFlag,
    "PV": guest_abi.PvFlag,
    "ORDER": guest_abi.Order,
    "OPERATION": guest_abi.Operation,
}


def assembler_constants():
    text = (GUEST / "abi.inc").read_text()
    return {name: int(value, 0) for name, value in re.findall(r"^\.set (\w+), (\w+)", text, re.MULTILINE)}


def fields():
    """Offsets of the fields that mean something."""
    names = [name for name, *_ in ParameterBlock._fields_ if not name.startswith("reserved")]
    return {name: getattr(ParameterBlock, name).offset for name in names}


@pytest.mark.binutils
def test_image_is_what_the_source_gives():
    check = subprocess.run([sys.executable, GUEST / "build", "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_build_without_binutils_names_the_package():
    command = [sys.executable, GUEST / "build", "--check"]
    check = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/nonexistent"})
    assert check.returncode == 4
    assert "binutils" in check.stderr


def test_image_fits_its_place():
    assert 0 < (GUEST / "guest.bin").stat().st_size <= guest_abi.IMAGE_SIZE
    assert guest_abi.BOOT_BASE + guest_abi.IMAGE_SIZE <= guest_abi.PARAMETERS_BASE


def test_parameter_block_size():
    assert ctypes.sizeof(ParameterBlock) == guest_abi.PARAMETERS_SIZE == 4096


def test_parameter_block_is_the_same_in_assembly():
    in_assembly = {
        name.removeprefix("BLOCK_").lower(): value
        for name, value in assembler_constants().items()
        if name.startswith("BLOCK_")
    }
    assert in_assembly == fields()


def test_constants_are_the_same_in_assembly():
    layout_names = {"LOW_RAM_END": layout.LOW_RAM_END, "HIGH_RAM_BASE": layout.HIGH_RAM_BASE}
    entry_names = {
        "SELECTOR_CODE0": guest_abi.ENTRY_CODE_SELECTOR,
        "SELECTOR_DATA0": guest_abi.ENTRY_DATA_SELECTOR,
    }
    own = {"SELECTOR_DATA3", "SELECTOR_CODE3", "SELECTOR_TSS"}  # the image's alone
    for name, value in assembler_constants().items():
        prefix, _, rest = name.partition("_")
        if prefix == "BLOCK" or name in own:
            continue
        if name in layout_names | entry_names:
            assert value == (layout_names | entry_names)[name], name
        elif hasattr(guest_abi, name):
            assert value == getattr(guest_abi, name), name
        else:
            assert value == ENUMS[prefix][rest], name


def test_every_code_of_the_host_is_known_in_assembly():
    constants = assembler_constants()
    for prefix, enum in ENUMS.items():
        assert issubclass(enum, IntEnum | IntFlag)
        for member in enum:
            assert constants[f"{prefix}_{member.name}"] == member


def test_workload_numbers_are_places_in_the_table():
    text = (GUEST / "workloads.S").read_text()
    table = re.findall(r"^    \.quad (?:workload_)?(\w+)", text, re.MULTILINE)
    for name, kind in WORKLOADS.items():
        assert table[kind.number] == name


def test_readme_describes_the_parameter_block():
    rows = re.findall(
        r"^\| (0x[0-9A-F]{3}) \| (\d+) \| `(\w+)` \|", (GUEST / "README.md").read_text(), re.MULTILINE
    )
    described = {name: (int(offset, 16), int(size)) for offset, size, name in rows}
    sizes = {name: getattr(ParameterBlock, name).size for name in fields()}
    assert described == {name: (offset, sizes[name]) for name, offset in fields().items()}
