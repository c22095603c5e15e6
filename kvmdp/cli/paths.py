"""The files of a command line, told apart before any is opened: none that is written is another's.

By what a file is, not by its name: symbolic and hard links, other spellings of a path and names of files that are not
there yet are seen through. What is written to as a stream (a terminal, a pipe, /dev/null) may be named as often as one
likes.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from kvmdp.cli.output import UsageError


@dataclass(frozen=True, slots=True)
class Named:
    """A path that an option names, or none; `written` if the command changes or makes what is there.

    A `folder` is replaced with all that is in it; `again` is what the command puts there again of what it has read.
    """

    option: str
    path: str | None
    written: bool
    folder: bool = False
    again: str = ""

    def __str__(self) -> str:
        return f"{self.option} {self.path}".strip()


def reads(option: str, path: str | None) -> Named:
    """Return what an option names to be read, or connected to."""
    return Named(option, path, written=False)


def writes(option: str, path: str | None) -> Named:
    """Return what an option names to be written, or listened at; "-" is standard output, which is looked at anyway."""
    return Named(option, None if path == "-" else path, written=True)


def fills(option: str, path: str | None, again: str = "") -> Named:
    """Return what an option names as a folder to be filled; a file named `again` in it may be read for that."""
    return Named(option, path, written=True, folder=True, again=again)


def check_distinct(*named: Named) -> None:
    """Raise UsageError if two of these, or one of them and a standard stream, are one file, and one is written."""
    paths = [each for each in named if each.path is not None]
    found = [(each, _identity(each.path)) for each in paths if each.path is not None]
    for (one, identity), (other, its) in combinations([*_streams(), *found], 2):
        if identity is not None and identity == its and (one.written or other.written):
            writer = other if other.written else one
            raise UsageError(
                f"{one} and {other} are one file, and {writer.option} is written: give another file"
            )
    for folder in paths:
        for each in paths if folder.folder else ():
            if _would_be_lost(each, folder):
                raise UsageError(
                    f"{each} lies in the folder {folder}, which is replaced as a whole: give a place elsewhere"
                )


def _streams() -> list[tuple[Named, Hashable]]:
    """Return standard output and standard error as far as they go to files; both may go to one."""
    found: dict[Hashable, Named] = {}
    for name, stream in (("standard output", sys.stdout), ("standard error", sys.stderr)):
        try:
            identity = _of_status(os.fstat(stream.fileno()))
        except (OSError, ValueError):  # closed, or no file
            continue
        if identity is not None:
            found.setdefault(identity, Named(name, "", written=True))
    return [(named, identity) for identity, named in found.items()]


def _identity(path: str) -> Hashable:
    """Return what tells the file at `path` from all others, there or not; None if it may be named twice."""
    try:
        return _of_status(os.stat(path))  # noqa: PTH116 - a Path would lose what a path like "x/" says
    except FileNotFoundError:
        try:
            place = Path(os.path.realpath(path))  # a link may lead to what is not there yet
            folder = place.parent.stat()
        except OSError:  # also if the working directory has been deleted
            return None
        return folder.st_dev, folder.st_ino, place.name
    except (OSError, ValueError):
        return None  # cannot be opened either, which is said where it is


def _of_status(status: os.stat_result) -> Hashable:
    if stat.S_ISCHR(status.st_mode) or stat.S_ISFIFO(status.st_mode):
        return None
    if stat.S_ISBLK(status.st_mode):
        return "device", status.st_rdev
    return status.st_dev, status.st_ino


def _would_be_lost(named: Named, folder: Named) -> bool:
    """Whether the file that is named lies in a folder that is replaced, and is not what is put there again."""
    assert named.path is not None
    assert folder.path is not None
    try:
        place = Path(os.path.realpath(named.path))
    except OSError:  # the working directory has been deleted, and nothing can lie in it
        return False
    if named is folder or not _is_same(place.parent, Path(folder.path)):
        return False
    return named.written or place.name != folder.again


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
