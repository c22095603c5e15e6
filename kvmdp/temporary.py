"""Files without a name, which go with the process: in the folder that TMPDIR names, else in /tmp, and nowhere else.

Python's own choice of a folder goes on to the next where a file cannot be made, down to the current one, and says
nothing: pages of a guest would land where the user did not look for room. A folder that cannot be used is an
error here.
"""

from __future__ import annotations

import os
from pathlib import Path

from kvmdp.interruption import Uninterrupted
from kvmdp.shortage import of_errno

REMEDY = "name a folder with room for them in TMPDIR"


def temporary_folder() -> str:
    """Return the folder of temporary files."""
    return os.environ.get("TMPDIR") or "/tmp"


def check_takes_files(folder: str | Path) -> None:
    """Raise OSError if no file can be made in `folder`: what it permits says nothing of /proc, or of a full disk."""
    import tempfile  # here, as below

    with Uninterrupted(), tempfile.TemporaryFile(dir=folder):
        pass


def unnamed_file(what: str, folder: str | None = None) -> int:
    """Return the descriptor of a new, empty file without a name in `folder`, by default that of temporary files.

    Raises OSError, which says that `what` ("evicted pages") were to go there, and what to do.
    """
    import tempfile  # here, for most runs have no use for it

    folder = folder or temporary_folder()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.dup(file.fileno())
    except OSError as error:
        if of_errno(error.errno or 0):
            raise  # it is not about the folder
        raise OSError(error.errno, f"{error.strerror}: {folder} is where {what} go; {REMEDY}") from None
