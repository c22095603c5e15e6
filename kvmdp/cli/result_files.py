"""The files that a command was asked for: each is written by itself, and none is lost because another cannot be.

What the command has found is not lost either: it goes to stdout whatever becomes of the files. A result that was asked
for and is missing makes a command that went well fail; one that had failed before keeps its status and its cause. A
trace is a diagnostic: it costs nothing but itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kvmdp.cli.output import EXIT_OK, is_stream, say
from kvmdp.cli.streams import missing_streams
from kvmdp.errors import KvmdpError
from kvmdp.interruption import Uninterrupted
from kvmdp.last_acts import last_act

_STDOUT = 1
_TEMPORARY = ".kvmdp-"  # and eight characters: fits beside any name


class OutputError(KvmdpError):
    """A result that was asked for was not written; the message is one sentence with a remedy."""


class ResultFiles:
    """The files of one command; `settle` says at its end what became of them."""

    def __init__(self) -> None:
        self._lost: list[str] = []

    def json(self, target: str | None, document: dict[str, Any]) -> None:
        """Write a document to a file, whole or not at all, or to stdout ("-"); to no place if `target` is None."""
        if target is None:
            return
        import json  # here, for it costs milliseconds that most commands need not wait for

        text = json.dumps(document, indent=2) + "\n"
        if target == "-" and _STDOUT not in missing_streams():
            sys.stdout.write(text)
        elif target == "-":
            self._lost.append("--json - could not be written: standard output is closed; name a file for it")
        else:
            self.write("--json", target, lambda: _write_file(Path(target), text))

    def write(self, option: str, target: str, write: Callable[[], None]) -> None:
        """Have `write` write the result that `option` asked for; it raises OSError or OutputError if it cannot."""
        try:
            write()
        except OSError as error:
            self._lost.append(f"{_refusal(option, target, error)}; name another place for it")
        except OutputError as error:
            self._lost.append(f"{option} {error}")

    def trace(self, target: str, lines: Iterable[str]) -> None:
        """Write lines to the file of `--trace`, or say that this cannot be."""
        try:
            _write_file(Path(target), "".join(f"{line}\n" for line in lines))
        except OSError as error:
            say(f"{_refusal('--trace', target, error)}; nothing else is lost")

    def settle(self, status: int) -> int:
        """Return the exit status of a command that has come to `status` and is done with its files.

        Raises OutputError if all is well but for a result that is missing.
        """
        lost, self._lost = self._lost, []
        if status == EXIT_OK and lost:
            raise OutputError(". ".join(lost))
        for sentence in lost:
            say(sentence)
        return status


def _refusal(option: str, target: str, error: OSError) -> str:
    return f"{option} {target} could not be written: {os.strerror(error.errno) if error.errno else error}"


def _write_file(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises OSError.

    The file that a link leads to is replaced, not the link; a device or a FIFO is written to.
    """
    if is_stream(path):
        path.write_text(text, encoding="utf-8")
        return
    import tempfile  # here, as json above

    path = path.resolve()
    with contextlib.ExitStack() as stack:
        with Uninterrupted():  # or a file could be left that nothing knows of
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY)
            temporary = Path(name)
            # It has become the result by then, as a rule.
            stack.enter_context(last_act(functools.partial(temporary.unlink, missing_ok=True)))
            file = stack.enter_context(open(descriptor, "w", encoding="utf-8"))
        file.write(text)
        file.close()
        # mkstemp makes files for their owner alone; a result is a file like any other.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
