"""How the commands speak: results on stdout, progress and errors on stderr, JSON for machines."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
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


def check_json_target(target: str | None) -> None:
    """Raise UsageError if JSON could not be written to `target` later ("-" is stdout)."""
    if target in (None, "-"):
        return
    path = Path(str(target))
    if path.is_dir():
        raise UsageError(f"--json {target}: that is a directory; give a file name or -")
    if not path.parent.is_dir():
        raise UsageError(f"--json {target}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--json {target}: no permission to write in {path.parent}")


def write_json(target: str, document: dict[str, Any]) -> None:
    """Write a document to a file, whole or not at all, or to stdout ("-")."""
    text = json.dumps(document, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    write_file(Path(target), text)


def write_file(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises OSError."""
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
