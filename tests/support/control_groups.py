"""Control groups of a test's own, of whichever version this host has. Needs root.

A command gets into one by its prelude: `join(path)`.
"""

import contextlib
import os
from pathlib import Path

import pytest


@contextlib.contextmanager
def control_group(controller):
    """Give the folder of a new group with this controller; skip the test where there can be none."""
    root, is_first = _hierarchy(controller)
    subtree = root / "cgroup.subtree_control"
    enabled = is_first or controller in subtree.read_text().split()
    group = root / f"kvmdp-test-{os.getpid()}"
    try:
        if not enabled:
            subtree.write_text(f"+{controller}")
        group.mkdir()
    except OSError as error:
        pytest.skip(
            f"no control group with {controller} can be made here ({error}): run on the host, as root"
        )
    try:
        yield group
    finally:
        group.rmdir()
        if not enabled and not [*root.glob("kvmdp-test-*")]:
            subtree.write_text(f"-{controller}")


def _hierarchy(controller):
    """Where a hierarchy with this controller is mounted, and whether it is of the first version."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, _, kind = line.partition(" - ")
        root = Path(place.split()[4])
        name, _, options = kind.split()
        if name == "cgroup" and controller in options.split(","):
            return root, True
        if name == "cgroup2" and controller in (root / "cgroup.controllers").read_text().split():
            return root, False
    pytest.skip(f"no control groups with {controller} are mounted here: mount -t cgroup2 none /sys/fs/cgroup")
    return None


def write_limit(group, value, *names):
    """Set the first of these limits that the group has, whose name is another in each version; return its file."""
    file = next(group / name for name in names if (group / name).exists())
    file.write_text(str(value))
    return file


def join(group):
    """Move the calling process into a group."""
    Path(group, "cgroup.procs").write_text("0")
