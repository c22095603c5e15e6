"""How the commands speak: results on stdout, progress and errors on stderr, JSON for machines."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from pathlib import Path
from typing import Any

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_LACKING = 4
EXIT_INTERRUPTED = 130

_PIPE_ROOM = 4096  # bytes that a writable pipe takes without waiting
_REMARK_SECONDS = 0.1  # for a reader of stderr to make room


class UsageError(Exception):
    """The command line asks for something that makes no sense; the message is one sentence."""


def say(text: str) -> None:
    """Print progress or a remark on stderr."""
    print(text, file=sys.stderr, flush=True)


class _Remarks:
    """Prints on stderr for threads that others depend on: neither waits nor fails.

    A stderr that takes nothing, for its reader has stopped or gone or its disk is full, costs the remark and no more.
    The first such remark gives the reader a moment; until one gets through the next are not waited for at all.
    """

    def __init__(self) -> None:
        self._stuck = False  # threads may race for it: at the worst another moment is waited

    def __call__(self, text: str) -> None:
        line = f"{text}\n".encode(errors="replace")[:_PIPE_ROOM]
        with contextlib.suppress(OSError):
            stderr = sys.stderr.fileno()
            poll = select.poll()
            poll.register(stderr, select.POLLOUT)
            ready = poll.poll(0 if self._stuck else _REMARK_SECONDS * 1000)
            self._stuck = not ready
            if ready:  # or broken, which the write finds
                os.write(stderr, line)


remark = _Remarks()


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
    if path.is_dir():
        raise UsageError(f"{option} {target}: that is a directory; give {wanted}")
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
