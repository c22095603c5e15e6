"""What the tests of the package share."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def own_mounts():
    """Skip the test where a process cannot have mounts of its own, as root of a container often cannot."""
    command = [sys.executable, "-c", "from hosts import have_own_mounts; have_own_mounts()"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.splitlines()[-1]
        pytest.skip(
            f"cannot make mounts of its own ({reason}): in a container, docker run --cap-add SYS_ADMIN"
        )
