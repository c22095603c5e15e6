"""What the failure tests share."""

import subprocess

import pytest


@pytest.fixture
def socket_path(tmp_path):
    """A path for a socket, short enough wherever pytest keeps its files."""
    return tmp_path / "handler.sock"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "kvmdp-test", folder], check=False)
    if done.returncode:
        pytest.skip("needs to mount a tmpfs: run as root, with CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", folder], check=True)
