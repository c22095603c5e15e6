"""`kvmdp`: the command line. Parses, hands over to one module a subcommand, turns errors into one sentence."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from kvmdp import __version__
from kvmdp.cli.ending import NO_STAGES, Stages
from kvmdp.cli.output import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_LACKING,
    EXIT_OK,
    EXIT_USAGE,
    UsageError,
    say,
)
from kvmdp.cli.result_files import OutputError
from kvmdp.errors import PagingError, UnsupportedError
from kvmdp.kvm import KvmError
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.shortage import ShortageError, named
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


def main(arguments: Sequence[str] | None = None, stages: Stages = NO_STAGES) -> int:
    """Run one command, which tells `stages` how far it is, and return its exit status (0, 1, 2, 4 or 130)."""
    try:
        status, cause = _outcome(sys.argv[1:] if arguments is None else list(arguments), stages)
        stages.settled()
    except KeyboardInterrupt:
        status, cause = EXIT_INTERRUPTED, "interrupted"
        stages.settled()
    try:
        sys.stdout.flush()
    except OSError as error:
        # A reader of our output that has gone knows.
        lost = "" if isinstance(error, BrokenPipeError) else f"standard output: {error.strerror}"
        if status == EXIT_OK:
            status, cause = EXIT_FAILED, lost
        elif lost:
            say(lost)
    stages.ended()
    if cause:
        say(f"kvmdp: {cause}")
    return status


def _outcome(arguments: list[str], stages: Stages) -> tuple[int, str]:
    """Return the exit status, and the sentence that says why a command has failed. Raises KeyboardInterrupt."""
    try:
        with named():
            options = build_parser(arguments[0] if arguments else None).parse_args(arguments)
            stages.started()
            return options.run(options), ""
    except SystemExit as end:  # argparse has printed what was asked for
        return EXIT_OK if end.code is None else int(end.code), ""
    except UsageError as error:
        return EXIT_USAGE, str(error)
    except (UnsupportedError, KvmError, ShortageError) as error:
        return EXIT_LACKING, str(error)
    except (PagingError, GuestError, SourceError, OutputError) as error:
        return EXIT_FAILED, str(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return EXIT_FAILED, f"{where}{error.strerror or error}"
