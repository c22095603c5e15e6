"""`kvmdp`: the command line. Parses, hands over to one module a subcommand, turns errors into one sentence."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from kvmdp import __version__
from kvmdp.cli.output import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_LACKING,
    EXIT_USAGE,
    UsageError,
    say,
)
from kvmdp.kvm import KvmError
from kvmdp.machine.runloop import GuestError
from kvmdp.paging.fault import PagingError, UnsupportedError
from kvmdp.source.base import SourceError

_EPILOG = """\
start with:
  kvmdp probe               what this host can do, and how to mend the rest
  kvmdp run                 boot a 64 MiB guest, fetch its memory page by page
  kvmdp run --image FILE    the same on a memory image of your own
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without the usage lines above it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


_COMMANDS = ("probe", "run", "device", "handler", "bench", "compare", "report")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the whole command line, or of one command: then no other's modules are loaded."""
    parser = _Parser(
        prog="kvmdp",
        allow_abbrev=False,
        description="KVM demand paging from user space, on unpatched kernels.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvmdp {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in (command,) if command in _COMMANDS else _COMMANDS:
        importlib.import_module(f"kvmdp.cli.{name}").add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None, started: Callable[[], None] = lambda: None) -> int:
    """Run one command and return its exit status (0, 1, 2, 4 or 130).

    `started` is called when all is loaded and the command begins its work.
    """
    try:
        try:
            given = sys.argv[1:] if arguments is None else list(arguments)
            options = build_parser(given[0] if given else None).parse_args(given)
            started()
            status: int = options.run(options)
            return status
        finally:
            _flush_stdout()
    except UsageError as error:
        return _fail(str(error), EXIT_USAGE)
    except (UnsupportedError, KvmError) as error:
        return _fail(str(error), EXIT_LACKING)
    except (PagingError, GuestError, SourceError) as error:
        return _fail(str(error), EXIT_FAILED)
    except BrokenPipeError:
        return EXIT_FAILED  # whoever read our output has gone, and knows
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)


def _flush_stdout() -> None:
    """Write out what stdout still holds, while an error of it can be caught: at the interpreter's end none can."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # What could not be written is still there, and the interpreter would try once more.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise OSError(error.errno, error.strerror, "standard output") from None


def _fail(sentence: str, status: int) -> int:
    say(f"kvmdp: {sentence}")
    return status
