"""Memory of a machine that kvmdp knows nothing of: taken from QEMU, restored by `kvmdp run --image`."""

import os
import time

import numpy as np
import pytest
from command import kvmdp, require_trap
from qemu import SECONDS, pc

pytestmark = pytest.mark.kvm

PAGE = 4096
MEMORY = 128 << 20
TRAPS = ("marker", "memory-fault", "mmio")


@pytest.fixture(scope="session")
def memory_image(tmp_path_factory):
    """The physical memory of a PC whose firmware has found nothing to boot and has gone to sleep."""
    path = tmp_path_factory.mktemp("machine") / "memory.img"
    with pc("-m", "128M", "-vga", "std") as monitor:
        deadline = time.monotonic() + SECONDS
        while "HLT=1" not in monitor("human-monitor-command", **{"command-line": "info registers"}):
            assert time.monotonic() < deadline, "the firmware does not come to rest"
            time.sleep(0.1)
        monitor("stop")
        monitor("pmemsave", val=0, size=MEMORY, filename=str(path))
    yield path
    path.unlink()  # pytest keeps the folders of its last runs


@pytest.fixture(scope="session")
def sparse_image(memory_image, tmp_path_factory):
    """The same, with holes where memory is zero."""
    path = tmp_path_factory.mktemp("machine") / "sparse.img"
    pages = np.fromfile(memory_image, dtype=np.uint64).reshape(-1, PAGE // 8)
    with open(path, "wb") as file:
        file.truncate(MEMORY)
        for page in np.flatnonzero(pages.any(axis=1)).tolist():
            file.seek(page * PAGE)
            file.write(pages[page])
    if path.stat().st_blocks * 512 > MEMORY // 2:
        pytest.skip("this file system makes no holes: put the temporary folder on another (--basetemp)")
    yield path
    path.unlink()


def checksum(path):
    """The checksum of guest/README.md, by its formula."""
    words = np.fromfile(path, dtype=np.uint64)
    weights = np.arange(len(words), 0, -1, dtype=np.uint64) * np.uint64(2) - np.uint64(1)
    return f"{int((weights * words).sum(dtype=np.uint64)):#018x}"


@pytest.mark.qemu
def test_the_image_is_a_machines_memory(memory_image):
    content = memory_image.read_bytes()
    assert len(content) == MEMORY
    assert content.count(b"SeaBIOS") > 0
    # The BIOS data area says how much memory there is below 640 KiB.
    assert int.from_bytes(content[0x413:0x415], "little") in range(600, 641)
    assert any(content[: 4 * 256])  # real-mode interrupt vectors


@pytest.mark.qemu
@pytest.mark.parametrize("trap", TRAPS)
def test_a_machines_memory_arrives_exactly_and_its_holes_are_not_read(memory_image, sparse_image, trap):
    require_trap(trap)
    arguments = ("--image", sparse_image, "--trap", trap, "--fault-around", 16, "--vcpus", 2)
    done = kvmdp("run", *arguments, "--json", "-")
    document = done.document
    assert done.status == 0
    assert document["ok"] is True
    assert document["image"] == str(sparse_image)
    assert document["memory_bytes"] == MEMORY
    assert document["guest_checksum"] == checksum(memory_image)
    assert document["pages_zeroed"] > MEMORY // PAGE // 2
    assert document["pages_fetched"] + document["pages_zeroed"] == MEMORY // PAGE
    assert document["pages_present"] == document["pages_checked"] == MEMORY // PAGE


@pytest.mark.qemu
def test_a_file_without_holes_is_fetched_page_by_page(memory_image):
    done = kvmdp("run", "--image", memory_image, "--json", "-")
    document = done.document
    assert done.status == 0
    assert document["fault_around"] == 1
    assert document["guest_checksum"] == checksum(memory_image)
    assert (document["pages_fetched"], document["pages_zeroed"]) == (MEMORY // PAGE, 0)


# Memory above 3 GiB: a PC has it from 4 GiB on, a file has it without the hole

HOLE = 3 << 30
LARGE = HOLE + (8 << 20)
SEED = 5  # of 500 random touches, three are in the data below the hole and two in that above
TOUCHED_DATA = 5


@pytest.fixture(scope="session")
def large_image(tmp_path_factory):
    """A sparse image with data in the 8 MiB on each side of 3 GiB."""
    path = tmp_path_factory.mktemp("machine") / "large.img"
    with open(path, "wb") as file:
        file.seek(HOLE - (8 << 20))
        file.write(np.random.default_rng(3).bytes(16 << 20))
    with open(path, "rb") as file:
        if os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0:
            pytest.skip("this file system makes no holes: put the temporary folder on another (--basetemp)")
    yield path
    path.unlink()


@pytest.mark.parametrize(
    ("trap", "options"),
    [("marker", ()), ("marker", ("--write",)), ("mmio", ("--granule", "256K", "--write"))],
)
def test_memory_on_both_sides_of_the_hole_is_at_its_true_address(large_image, trap, options):
    require_trap(trap)
    done = kvmdp(
        *("run", "--image", large_image, "--workload", "touch", "--order", "random", "--touches", 500),
        *("--seed", SEED, "--trap", trap, *options, "--json", "-"),
    )
    document = done.document
    assert done.status == 0
    assert document["ok"] is True
    assert document["memory_bytes"] == LARGE
    assert document["guest_checksum"] == document["expected_checksum"]
    unit = document["granule"] // PAGE
    assert document["pages_present"] == document["pages_checked"] == document["faults"] * unit
    assert document["pages_fetched"] + document["pages_zeroed"] == document["pages_present"]
    assert document["pages_fetched"] == TOUCHED_DATA * unit
