"""What is no raw memory is told by its first bytes; and the commands that are named make raw memory of it."""

import shutil
import subprocess

import numpy as np
import pytest
from foreign import FOREIGN, RAW, VARIANTS
from qemu import pc

from kvmdp.source.formats import FORMATS, HEAD_BYTES, TAIL_BYTES, recognise, recognise_file

MEMORY = 8 << 20


def recognised(path):
    with open(path, "rb") as file:
        found = recognise_file(file.fileno())
    return None if found is None else found.name


def test_each_format_of_the_table_is_tried():
    assert [each.name for each in FORMATS] == list(dict.fromkeys(each.name for each in FORMATS))
    assert {each.name for each in FORMATS} == set(FOREIGN)


@pytest.mark.parametrize(("name", "content"), [*FOREIGN.items(), *VARIANTS])
def test_a_format_is_recognised_in_a_long_file_and_in_a_short_one(tmp_path, name, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert recognised(path) == name
    if content[-512:-504] != b"conectix":
        path.write_bytes(content + bytes(1 << 20))
        assert recognised(path) == name


@pytest.mark.parametrize("content", RAW.values(), ids=RAW)
def test_raw_memory_is_of_no_format(content):
    assert recognise(content[:HEAD_BYTES], content[-TAIL_BYTES:]) is None


def test_a_mark_elsewhere_is_none():
    for name, content in FOREIGN.items():
        assert recognise((b"\0" + content)[:HEAD_BYTES], bytes(TAIL_BYTES)) is None, name


def test_a_name_with_blanks_and_quotes_is_one_word_of_the_command():
    gzip = next(each for each in FORMATS if each.name == "gzip")
    assert gzip.remedy("my 'dump'") == (
        """convert it with gzip -dc 'my '"'"'dump'"'"'' > 'my '"'"'dump'"'"''.raw"""
    )


COMPRESSORS = {
    "gzip": ("gzip", "-c"),
    "xz": ("xz", "-c", "-0"),
    "zstd": ("zstd", "-qc"),
    "bzip2": ("bzip2", "-c"),
    "lz4": ("lz4", "-qc"),
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_a_compressor_writes_is_recognised_and_unpacked_by_the_command(tmp_path, name):
    if shutil.which(name) is None:
        pytest.skip(f"no {name} on PATH: install the package {name}")
    content = np.random.default_rng(1).bytes(8192) + bytes(8192)
    path = tmp_path / "a memory"
    with open(path, "wb") as file:
        subprocess.run(COMPRESSORS[name], input=content, stdout=file, check=True)
    assert recognised(path) == name
    assert convert(name, path).read_bytes() == content


def convert(name, path):
    """Run the command that the table has for a file; return the path of what it made."""
    remedy = next(each for each in FORMATS if each.name == name).remedy(str(path))
    subprocess.run(remedy.removeprefix("convert it with "), shell=True, check=True, capture_output=True)
    return path.with_name(f"{path.name}.raw")


# What QEMU writes

DISKS = {
    "qcow2": "qcow2",
    "qed": "qed",
    "vmdk": "vmdk",
    "vdi": "vdi",
    "vhdx": "vhdx",
    "vpc": "vhd",
    "parallels": "parallels",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the memory of a PC, raw and in each form that QEMU writes it in, and empty disks."""
    folder = tmp_path_factory.mktemp("qemu")
    pattern = folder / "pattern"
    pattern.write_bytes(np.random.default_rng(2).bytes(1 << 16))
    loader = f"loader,file={pattern},addr=0x100000,force-raw=on"
    with pc("-m", f"{MEMORY >> 20}M", "-S", "-device", loader) as monitor:
        monitor("pmemsave", val=0, size=MEMORY, filename=str(folder / "raw"))
        for kind in ("elf", "kdump-zlib"):
            monitor("dump-guest-memory", paging=False, protocol=f"file:{folder / kind}", format=kind)
        for driver in DISKS:
            make_disk(monitor, driver, folder / driver)
        monitor("migrate", uri=f"exec:cat > {folder / 'stream'}")
        while monitor("query-migrate").get("status") != "completed":
            pass
    yield folder
    shutil.rmtree(folder)  # pytest keeps the folders of its last runs


def make_disk(monitor, driver, path):
    file = {"driver": "file", "filename": str(path)}
    monitor.job("blockdev-create", options={**file, "size": 0})
    monitor("blockdev-add", **file, **{"node-name": "file"})
    size = {"size": 16 << 20, **({"force-size": True} if driver == "vpc" else {})}
    monitor.job("blockdev-create", options={"driver": driver, "file": "file", **size})
    monitor("blockdev-del", **{"node-name": "file"})


@pytest.mark.qemu
def test_what_qemu_writes_is_recognised(written):
    found = {path.name: recognised(path) for path in written.iterdir()}
    assert found.pop("pattern") is found.pop("raw") is None
    memory = {"elf": "elf-core", "kdump-zlib": "kdump-flat", "stream": "qemu"}
    assert found == {**memory, **DISKS}


@pytest.mark.qemu
@pytest.mark.binutils
def test_the_command_for_an_elf_core_puts_memory_at_its_addresses(written, tmp_path):
    path = tmp_path / "a core"
    shutil.copy(written / "elf", path)
    made = convert("elf-core", path)
    with open(made, "rb") as file:
        assert file.read(MEMORY) == (written / "raw").read_bytes()
    made.unlink()  # sparse, but 4 GiB long: the firmware is at its end


@pytest.mark.qemu
@pytest.mark.parametrize("driver", DISKS)
def test_the_command_for_a_disk_makes_its_sectors(written, tmp_path, driver):
    if shutil.which("qemu-img") is None:
        pytest.skip("no qemu-img on PATH: sudo apt-get install qemu-utils")
    shutil.copy(written / driver, tmp_path / "disk")
    made = convert(DISKS[driver], tmp_path / "disk")
    assert made.stat().st_size >= 16 << 20
    assert not any(made.read_bytes())
