"""`kvmdp bench`: contenders take turns on the same work; options and output after the kernel's demand_paging_test."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kvmdp.bench.check import judge, read_bounds
from kvmdp.bench.comparison import Comparison
from kvmdp.bench.contender import DEFAULT, SHARDED, Contender, contender
from kvmdp.bench.measure import Measurement, plan
from kvmdp.bench.work import Work
from kvmdp.cli.output import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_LACKING,
    EXIT_OK,
    UsageError,
    check_json_target,
    say,
    write_file,
    write_json,
)
from kvmdp.memory.backing import BACKINGS
from kvmdp.memory.layout import GuestLayout
from kvmdp.memory.size import format_size, parse_size
from kvmdp.paging.policy import FaultAround
from kvmdp.source.network import parse_bandwidth, parse_latency

# What demand_paging_test calls a kind of memory -> ours
_MEMORY_KINDS = {"shmem": "memfd", "anonymous": "anonymous"} | {name: name for name in BACKINGS}
_UFFD_MODES = ("MISSING", "MINOR")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="measure ways of demand paging next to each other",
        description="Let contenders take turns on the same work, and report medians, ratios, latencies and CPU time. "
        "Letters are those of the kernel's demand_paging_test.",
        epilog="contenders: present, the traps (marker, memory-fault, mmio, userfaultfd), userfaultfd-rN (N readers), "
        "userfaultfd-sharded (a descriptor a vCPU). One may do other work than the rest: marker:vcpus=2, "
        "mmio:fault-around=16.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("contenders", nargs="*", metavar="CONTENDER", help=f"what to compare (default: {' '.join(DEFAULT)})")
    add("-b", "--bytes", default="64M", metavar="SIZE", help="RAM a vCPU (default: 64M)")
    add("-v", "--vcpus", type=int, default=1, metavar="N", help="vCPUs, 1 to 16 (default: 1)")
    add("-o", "--overlap", action="store_true", help="every vCPU touches all RAM (default: a share each)")
    add("-u", "--uffd", choices=_UFFD_MODES, help="compare with userfaultfd only, in this mode; MISSING means anonymous "
        "RAM, MINOR shared RAM (default: the contenders given)")
    add("-a", "--one-uffd", action="store_true", help="with -u: one userfaultfd for all RAM (default: one a vCPU)")
    add("-r", "--readers", type=int, default=1, metavar="N", help="with -u: readers a userfaultfd (default: 1)")
    add("-d", "--delay", type=int, default=0, metavar="USEC", help="delay of each fetch, in us (default: 0)")
    add("-s", "--memory-kind", default="shmem", metavar="KIND", help="RAM: shmem (memfd) or anonymous (default: shmem)")
    add("-c", "--pin", metavar="CPUS", help="host CPUs for the vCPUs, as 0,1 (default: not pinned)")
    add("--ring", type=int, default=3, help="privilege ring of the workload, 3 or 0 (default: 3)")
    add("--workload", default="touch", metavar="W", help="what the guest does (default: touch)")
    add("--order", default="sequential", choices=("sequential", "strided", "random"), help="(default: sequential)")
    add("--read", action="store_true", help="touch by reading (default: by writing)")
    add("--touches", type=int, metavar="N", help="of each vCPU (default: one for each of its pages)")
    add("--fault-around", type=int, default=1, metavar="N", help="pages fetched a fault (default: 1)")
    add("--granule", metavar="SIZE", help="memory a memslot covers (default: least with at most 16384 memslots)")
    add("--latency", default="0", metavar="TIME", help="of a simulated network, as 30us (default: 0)")
    add("--bandwidth", default="0", metavar="RATE", help="of a simulated network, as 10Gbit (default: 0, no limit)")
    add("--rounds", type=int, default=5, metavar="N", help="measured rounds (default: 5)")
    add("--warm-up", type=int, default=1, metavar="N", help="rounds not measured before them (default: 1)")
    add("--seed", type=int, default=0, help="of synthetic pages and random orders (default: 0)")
    add("--trace", metavar="FILE", help="write one record a fault of each contender's last round (default: none)")
    add("--check", metavar="FILE", help="hold the result against the bounds in FILE (default: no bounds)")
    add("--json", metavar="FILE", help="write the result as JSON to FILE, - is stdout (default: no JSON)")


def run(options: argparse.Namespace) -> int:
    """Measure, print, hold against bounds, return the exit status."""
    check_json_target(options.json)
    check_json_target(options.trace)
    try:
        bounds = read_bounds(options.check) if options.check else []
        work = _work(options)
        contenders = _contenders(options, work)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"--check {options.check}: {error.strerror}") from None
    comparison = Comparison(work, contenders, options.rounds, traced=options.trace is not None)
    status = EXIT_OK
    try:
        comparison.run(options.warm_up, _tell)
    except KeyboardInterrupt:
        say("kvmdp: interrupted; what follows is partial")
        status = EXIT_INTERRUPTED
    document = comparison.document()
    if options.json != "-":
        print_document(document)
    if options.json:
        write_json(options.json, document)
    if options.trace:
        write_file(Path(options.trace), "".join(f"{line}\n" for line in comparison.trace_lines()))
    for name, reason in comparison.skipped.items():
        say(f"skipped {name}: {reason}")
    if status == EXIT_OK and len(document["contenders"]) < min(2, len(contenders) + len(comparison.skipped)):
        status = EXIT_LACKING
    if status == EXIT_OK:
        status = _hold(bounds, document)
    return status
