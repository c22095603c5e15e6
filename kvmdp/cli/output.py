"""How the commands speak: results on stdout, progress and errors on stderr, JSON for machines."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_LACKING = 4
EXIT_INTERRUPTED = 130


class UsageError(Exception):
    """The command line asks for something that makes no sense; the message is one sentence."""


def say(text: str) -> None:
    """Print progress or a remark on stderr."""
    print(text, file=sys.stderr, flush=True)


def check_json_target(target: str | None, option: str = "--json") -> None:
    """Raise UsageError if what `option` asks for could not be written to `target` later ("-" is stdout)."""
    if target in (None, "-"):
        return
    path = Path(str(target))
    if path.is_dir():
        raise UsageError(f"{option} {target}: that is a directory; give a file name or -")
    if _is_stream(path):
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"{option} {target}: there is no directory {folder}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {target}: no permission to write in {folder}")


def write_json(target: str, document: dict[str, Any]) -> None:
    """Write a document to a file, whole or not at all, or to stdout ("-")."""
    import json  # here, for it costs milliseconds that most commands need not wait for

    text = json.dumps(document, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    write_file(Path(target), text)


def write_file(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises OSError.

    The file that a link leads to is replaced, not the link; a device or a FIFO is written to.
    """
    if _is_stream(path):
        path.write_text(text, encoding="utf-8")
        return
    import tempfile  # here, as json above

    path = path.resolve()
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes files for their owner alone; a result is a file like any other.
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def _is_stream(path: Path) -> bool:
    """Whether there is something at `path` that is written to, never replaced: /dev/null, a shell's >(...)."""
    return path.exists() and not path.is_file()
