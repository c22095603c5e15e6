"""`kvmdp compare`: KVM exits or userfaultfd?"""

from __future__ import annotations

import argparse

from kvmdp.cli.coverage import run_coverage
from kvmdp.cli.output import UsageError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="KVM exits or userfaultfd?",
        description="Compare the traps on this host.",
    )
    parser.add_argument(
        "--coverage",
        action="store_true",
        help="run each kind of access under each trap and say what was seen (default: no)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON to FILE, - is stdout (default: no JSON)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compare, print, return the exit status."""
    if not options.coverage:
        raise UsageError("compare has nothing to do: give --coverage")
    return run_coverage(options)
