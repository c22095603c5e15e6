"""What the failure tests share."""

import sys
from pathlib import Path

import pytest

for _folder in ("paging", "machine"):
    sys.path.insert(0, str(Path(__file__).parent.parent / _folder))


@pytest.fixture
def socket_path(tmp_path):
    """A path for a socket, short enough wherever pytest keeps its files."""
    return tmp_path / "handler.sock"
