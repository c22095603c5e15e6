"""The limits of the control groups that this process is in: what a container may have.

Both versions of the hierarchy are looked at, and in each all groups from this process's own up to the root of what is
mounted here. Nothing is raised: what cannot be read sets no limit that could be named.

Sources: cgroups(7), proc_pid_mountinfo(5), `Documentation/admin-guide/cgroup-v2.rst`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 62  # version 1 says so by a number about as large, version 2 by "max"


@dataclass(frozen=True, slots=True)
class GroupLimit:
    """How much a control group may have, in the unit of the file that it stands in, and has now."""

    file: Path
    value: int
    used: int


def tightest(controller: str, *files: tuple[str, str]) -> GroupLimit | None:
    """Return the limit that leaves the least, None if there is none.

    `files` names the file of a limit and that of what is used, for each version: ("pids.max", "pids.current").
    """
    found = [
        GroupLimit(folder / limit, value, _number(folder / used) or 0)
        for folder in _folders(controller)
        for limit, used in files
        if (value := _number(folder / limit)) is not None and value < _UNLIMITED
    ]
    return min(found, key=lambda each: each.value - each.used, default=None)


def _number(file: Path) -> int | None:
    """Return what a file of one number holds; None for "max", and where there is no such file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _folders(controller: str) -> Iterator[Path]:
    """Yield the folder of each group that this process is in, of hierarchies with this controller."""
    for version, controllers, group in _memberships():
        if version == 1 and controller not in controllers:
            continue
        for root, mounted_at in _mounts(version, controller):
            folder = Path(mounted_at)
            if group.is_relative_to(root):
                folder /= group.relative_to(root)
            while True:
                yield folder
                if folder == Path(mounted_at):
                    break
                folder = folder.parent


def _memberships() -> list[tuple[int, list[str], Path]]:
    """Return the groups of this process: version, controllers (none in version 2), path."""
    found = []
    for line in _lines("/proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        found.append((1 if controllers else 2 if number == "0" else 1, controllers.split(","), Path(path)))
    return found


def _mounts(version: int, controller: str) -> list[tuple[Path, str]]:
    """Return where hierarchies of a version with this controller are mounted: the group that is the root, folder."""
    found = []
    for line in _lines("/proc/self/mountinfo"):
        place, _, kind = line.partition(" - ")
        root, mounted_at = place.split()[3:5]
        name, _, options = kind.split()
        if (name == "cgroup2") if version == 2 else name == "cgroup" and controller in options.split(","):
            found.append((Path(root), mounted_at))
    return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
