"""`kvmdp compare`: KVM exits or userfaultfd? All contenders, several numbers of vCPUs, several network latencies."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvmdp.bench.contender import SHARDED
from kvmdp.bench.report.folder import ReportError, check_folder
from kvmdp.bench.report.table import claim_lines, table
from kvmdp.bench.survey import Plan, Step, Survey, default_names
from kvmdp.cli.coverage import run_coverage
from kvmdp.cli.lists import parse_backing, parse_list
from kvmdp.cli.output import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_LACKING,
    EXIT_OK,
    UsageError,
    check_json_target,
    check_trace_target,
    is_stream,
    say,
)
from kvmdp.cli.paths import check_distinct, fills, writes
from kvmdp.cli.report import write_folder
from kvmdp.cli.result_files import ResultFiles
from kvmdp.cli.streams import terminal_columns
from kvmdp.memory.backings import BACKINGS
from kvmdp.size import format_size, parse_size
from kvmdp.source.network import parse_bandwidth, parse_latency

# What is measured if the user does not say otherwise: at length, and with --quick.
_USUAL: dict[str, Any] = {
    "bytes": "8M",
    "vcpus": "1,2,4",
    "latencies": "0,30us,500us",
    "rounds": 5,
    "memory_sizes": "1G",
}
_QUICK: dict[str, Any] = {
    "bytes": "4M",
    "vcpus": "1,2",
    "latencies": "0,500us",
    "rounds": 3,
    "memory_sizes": "128M",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="KVM exits or userfaultfd, with figures",
        description="Compare ways of demand paging over numbers of vCPUs and network latencies, and say which claims "
        "of the RFC the figures support, weaken, or cannot decide on this host. Takes minutes; an interruption ends "
        "it with what has been measured.",
        epilog="contenders: as for kvmdp bench. SIZE is in bytes, or has K, M, G or T behind it (powers of 1024).",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "contenders",
        nargs="*",
        metavar="CONTENDER",
        help=f"what to compare (default: {', '.join(default_names((1,)))}; with several vCPUs also userfaultfd with as "
        f"many readers, and {SHARDED})",
    )
    add("-v", "--vcpus", metavar="LIST", help=f"numbers of vCPUs (default: {_USUAL['vcpus']})")
    add(
        "--latencies",
        metavar="LIST",
        help=f"of a simulated network (default: {_USUAL['latencies']})",
    )
    add("--bandwidth", default="0", metavar="RATE", help="of it, as 10Gbit (default: 0, no limit)")
    add(
        "-b",
        "--bytes",
        metavar="SIZE",
        help=f"RAM a vCPU, less where a latency is long (default: {_USUAL['bytes']})",
    )
    add(
        "-s",
        "--backing",
        default="shmem",
        metavar="KIND",
        help=f"RAM: shmem (memfd) or {', '.join(BACKINGS)} (default: shmem)",
    )
    add("--rounds", type=int, metavar="N", help=f"measured rounds (default: {_USUAL['rounds']})")
    add("--warm-up", type=int, default=1, metavar="N", help="rounds not measured before them (default: 1)")
    add(
        "--memory-sizes",
        metavar="LIST",
        help=f"RAM for the figures on memory; none leaves them out (default: {_USUAL['memory_sizes']})",
    )
    add(
        "--quick",
        action="store_true",
        help=f"be done soon: {_QUICK['vcpus']} vCPUs, latencies {_QUICK['latencies']}, {_QUICK['rounds']} rounds, "
        "less RAM (default: at length)",
    )
    add(
        "--report",
        metavar="DIR",
        help="write a page with figures, SVG and CSV files to DIR (default: none)",
    )
    add(
        "--trace",
        metavar="FILE",
        help="write one record a fault of each contender's traced run (default: none)",
    )
    add(
        "--coverage",
        action="store_true",
        help="instead, run each kind of access under each trap and say what was seen (default: no)",
    )
    add("--json", metavar="FILE", help="write the result as JSON to FILE, - is stdout (default: no JSON)")


def run(options: argparse.Namespace) -> int:
    """Measure, write, print, return the exit status."""
    check_distinct(
        fills("--report", options.report), writes("--trace", options.trace), writes("--json", options.json)
    )
    if options.coverage:
        return run_coverage(options)
    try:
        plan = _plan(options)
        plan.check()
        _check_targets(options, plan)
    except ValueError as error:
        raise UsageError(str(error)) from None
    survey, progress, status = Survey(plan), _Progress(), EXIT_OK
    try:
        survey.run(progress)
    except KeyboardInterrupt:
        progress.close()
        say("kvmdp: interrupted; what follows is partial")
        status = EXIT_INTERRUPTED
    finally:
        progress.close()
    document = survey.document()
    if options.json != "-":
        _print(document)
    files = ResultFiles()
    write_folder(files, options.report, document)
    files.json(options.json, document)
    if options.trace:
        files.trace(options.trace, survey.traced.trace_lines() if survey.traced else ())
    for name, reason in survey.skipped.items():
        say(f"skipped {name}: {reason}")
    for each in survey.failed:
        say(f"FAILED {each['contender']}, {each['where']}: {each['why']}")
    if status == EXIT_OK and survey.failed:
        status = EXIT_FAILED
    if status == EXIT_OK and len(survey.ran) < 2:
        status = EXIT_LACKING
    return files.settle(status)


def _plan(options: argparse.Namespace) -> Plan:
    """Return what the options ask for. Raises ValueError, one sentence."""
    chosen = dict(_QUICK if options.quick else _USUAL)
    chosen |= {name: value for name in chosen if (value := getattr(options, name)) is not None}
    vcpus = parse_list("--vcpus", chosen["vcpus"], int)
    if bad := [count for count in vcpus if not 1 <= count <= 16]:
        raise ValueError(f"--vcpus {chosen['vcpus']}: the guest runs with 1 to 16 vCPUs, not {bad[0]}")
    return Plan(
        names=tuple(options.contenders) or default_names(vcpus),
        vcpus=vcpus,
        latencies=parse_list("--latencies", chosen["latencies"], parse_latency),
        bytes_per_vcpu=parse_size(chosen["bytes"]),
        backing=parse_backing(options.backing),
        bandwidth=parse_bandwidth(options.bandwidth),
        rounds=chosen["rounds"],
        warm_up=options.warm_up,
        memory_sizes=_sizes(chosen["memory_sizes"]),
    )


def _sizes(text: str) -> tuple[int, ...]:
    return () if text == "none" else parse_list("--memory-sizes", text, parse_size)


def _check_targets(options: argparse.Namespace, plan: Plan) -> None:
    """Raise ReportError, UsageError or OSError now if the results could not be written minutes later."""
    check_json_target(options.json)
    check_trace_target(options.trace)
    files = [target for target in (options.json, options.trace) if target not in (None, "-")]
    folders = [str(Path(target).resolve().parent) for target in files if not is_stream(Path(target))]
    if options.report is not None:
        try:
            check_folder(options.report)
        except ReportError as error:
            raise UsageError(f"--report {error}") from None
        folders.append(str(Path(options.report).resolve().parent))
    for folder in folders:
        _check_room(folder, plan.report_bytes)


def _check_room(folder: str, size: int) -> None:
    """Raise OSError if `size` bytes do not fit into the file system of a folder."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            needed = format_size(-(-size >> 20) << 20)
            reason = (
                f"{os.strerror(error.errno)} for the results, which may take {needed}: free some, "
                "or name another place for them"
            )
            raise OSError(error.errno, reason, folder) from None


def _print(document: dict[str, Any]) -> None:
    if not document["complete"]:
        print("PARTIAL: not all that was planned has been measured\n")
    for line in [*table(document), "", *claim_lines(document)]:
        print(line)


class _Progress:
    """Says on stderr how far the survey is: one line that changes on a terminal, else a line a round."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = ""

    def __call__(self, step: Step) -> None:
        line = f"[{step.done} of {step.total}] {step.what}"
        if self._terminal:
            sys.stderr.write(
                f"\r\x1b[K{f'{line}, {step.name}' if step.name else line}"[: terminal_columns() + 3]
            )
            sys.stderr.flush()
        elif step.what != self._last:
            say(line)
        self._last = step.what

    def close(self) -> None:
        """Take the line off the terminal."""
        if self._terminal and self._last:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._last = ""
