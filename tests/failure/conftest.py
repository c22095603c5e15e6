"""What the failure tests share."""

import pytest


@pytest.fixture
def socket_path(tmp_path):
    """A path for a socket, short enough wherever pytest keeps its files."""
    return tmp_path / "handler.sock"
