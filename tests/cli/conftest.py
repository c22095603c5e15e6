"""What the tests of the commands share."""

import os

import pytest
from command import require_trap


@pytest.fixture(autouse=True)
def trap_of_this_host(request):
    """Skip what is parametrized with a trap that this host lacks."""
    if "trap" in request.fixturenames:
        require_trap(request.getfixturevalue("trap"))


@pytest.fixture
def program(tmp_path):
    """Return a function that writes a guest program and returns the file's path."""

    def write(code):
        path = tmp_path / "program.bin"
        path.write_bytes(code)
        return path

    return write


@pytest.fixture
def image(tmp_path):
    """Return a function that makes an image of so many bytes, all data, and returns its path."""

    def make(size):
        path = tmp_path / "memory.img"
        path.write_bytes(os.urandom(size))
        return path

    return make
