"""`kvmdp`: the command line. Parses, hands over to one module a subcommand, turns errors into one sentence."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from kvmdp import __version__
from kvmdp.cli import probe, run
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
  kvmdp probe                       what this host can do, and how to mend what it cannot
  kvmdp run                         boot a 64 MiB guest whose memory is fetched page by page
  kvmdp run --image FILE --trap T   the same on a memory image of your own
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without the usage lines above it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="kvmdp",
        allow_abbrev=False,
        description="KVM demand paging from user space, on unpatched kernels.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvmdp {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (probe, run):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status (0, 1, 2, 4 or 130)."""
    try:
        options = build_parser().parse_args(arguments)
        status: int = options.run(options)
        return status
    except UsageError as error:
        return _fail(str(error), EXIT_USAGE)
    except (UnsupportedError, KvmError) as error:
        return _fail(str(error), EXIT_LACKING)
    except (PagingError, GuestError, SourceError) as error:
        return _fail(str(error), EXIT_FAILED)
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not trip over it again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)


def _fail(sentence: str, status: int) -> int:
    say(f"kvmdp: {sentence}")
    return status


def entry() -> NoReturn:
    """Entry point of the installed command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
