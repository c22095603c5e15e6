"""How the commands speak: exit statuses, remarks on stderr, and what is said of a target before any work."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kvmdp.errors import KvmdpError
from kvmdp.temporary import check_takes_files

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_LACKING = 4
EXIT_INTERRUPTED = 130


class UsageError(KvmdpError):
    """The command line asks for something that makes no sense; the message is one sentence."""


def say(text: str) -> None:
    """Print progress or a remark on stderr."""
    sys.stderr.write(f"{text}\n")  # at once, for other threads speak too
    sys.stderr.flush()


def check_json_target(target: str | None) -> None:
    """Raise UsageError if JSON could not be written to `target` later ("-" is stdout)."""
    if target not in (None, "-"):
        _check_target("--json", str(target), "a file name or -")


def check_trace_target(target: str | None) -> None:
    """Raise UsageError if a trace could not be written to the file `target` later."""
    if target == "-":
        raise UsageError("--trace -: stdout has the result; give a file name")
    if target is not None:
        _check_target("--trace", target, "a file name")


def _check_target(option: str, target: str, wanted: str) -> None:
    path = Path(target)
    try:
        if path.is_dir():
            raise UsageError(f"{option} {target}: that is a directory; give {wanted}")
        if is_stream(path):
            return
        folder = path.resolve().parent
    except OSError as error:
        raise UsageError(f"{option} {target}: {error.strerror}; give {wanted}") from None
    if not folder.is_dir():
        raise UsageError(f"{option} {target}: there is no directory {folder}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {target}: no permission to write in {folder}")
    try:
        check_takes_files(folder)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UsageError(
            f"{option} {target}: no file can be made in {folder} ({reason}); name another place"
        ) from None


def is_stream(path: Path) -> bool:
    """Whether there is something at `path` that is written to, never replaced: /dev/null, a shell's >(...)."""
    return path.exists() and not path.is_file()
