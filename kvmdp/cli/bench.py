"""`kvmdp bench`: contenders take turns on the same work; options and output after the kernel's demand_paging_test."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from kvmdp.bench.access import AccessCosts
from kvmdp.bench.check import Bound, judge, read_bounds
from kvmdp.bench.comparison import BASELINE, Comparison
from kvmdp.bench.contender import DEFAULT, SHARDED, Contender, contender
from kvmdp.bench.measure import Measurement, check
from kvmdp.bench.report.table import lines
from kvmdp.bench.work import Work
from kvmdp.cli.lists import parse_backing
from kvmdp.cli.output import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_LACKING,
    EXIT_OK,
    UsageError,
    check_json_target,
    check_trace_target,
    say,
    write_file,
    write_json,
)
from kvmdp.memory.size import format_size, parse_size
from kvmdp.paging.trap.userfaultfd import parse_mode
from kvmdp.source.network import parse_bandwidth, parse_latency

_UFFD_MODES = ("MISSING", "MINOR")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="measure ways of demand paging next to each other",
        description="Let contenders take turns on the same work, and report medians, ratios, latencies and CPU time. "
        "Letters are those of the kernel's demand_paging_test.",
        epilog="contenders: present, the traps (marker, memory-fault, mmio, userfaultfd, hybrid-memory-fault, "
        "hybrid-mmio), userfaultfd-rN (N readers), userfaultfd-sharded (a descriptor a vCPU), userfaultfd-missing "
        "(filled by UFFDIO_COPY also where RAM is shared). One may do other work than the rest: marker:vcpus=2, "
        "mmio:fault-around=16, hybrid-mmio:device=1000 (a device thread reads the last 1000 pages meanwhile). "
        "SIZE is in bytes, or has K, M, G or T behind it (powers of 1024).",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("contenders", nargs="*", metavar="CONTENDER", help=f"what to compare (default: {' '.join(DEFAULT)})")
    add("-b", "--bytes", default="64M", metavar="SIZE", help="RAM a vCPU (default: 64M)")
    add("-v", "--vcpus", type=int, default=1, metavar="N", help="vCPUs, 1 to 16 (default: 1)")
    add("-o", "--overlap", action="store_true", help="every vCPU touches all RAM (default: a share each)")
    add(
        "-u",
        "--uffd",
        choices=_UFFD_MODES,
        help="measure userfaultfd only, in this mode: MISSING fills by UFFDIO_COPY, MINOR maps by UFFDIO_CONTINUE "
        "what has been filled in place (default: the contenders given)",
    )
    add(
        "-a",
        "--one-uffd",
        action="store_true",
        help="with -u: one userfaultfd for all RAM (default: one a vCPU)",
    )
    add(
        "-r",
        "--readers",
        type=int,
        default=1,
        metavar="N",
        help="with -u: reader threads a userfaultfd (default: 1)",
    )
    add(
        "-d",
        "--delay",
        type=int,
        default=0,
        metavar="USEC",
        help="microseconds that each fetch is delayed (default: 0)",
    )
    add(
        "-s",
        "--memory-kind",
        metavar="KIND",
        help="RAM: shmem (memfd) or anonymous (default: shmem; anonymous with -u MISSING)",
    )
    add("-c", "--pin", metavar="CPUS", help="host CPUs for the vCPUs, as 0,1 (default: not pinned)")
    _add_our_options(parser)


def _add_our_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ring", type=int, default=3, help="privilege ring of the workload, 3 or 0 (default: 3)")
    add("--workload", default="touch", metavar="W", help="what the guest does (default: touch)")
    add(
        "--order",
        default="sequential",
        choices=("sequential", "strided", "random"),
        help="(default: sequential)",
    )
    add("--read", action="store_true", help="touch by reading (default: by writing)")
    add("--touches", type=int, metavar="N", help="of each vCPU (default: one for each of its pages)")
    add("--fault-around", type=int, default=1, metavar="N", help="pages fetched a fault (default: 1)")
    add(
        "--granule",
        metavar="SIZE",
        help="memory a memslot covers (default: least with at most 16384 memslots)",
    )
    add("--latency", default="0", metavar="TIME", help="of a simulated network, as 30us (default: 0)")
    add(
        "--bandwidth",
        default="0",
        metavar="RATE",
        help="of a simulated network, as 10Gbit (default: 0, no limit)",
    )
    add("--rounds", type=int, default=5, metavar="N", help="measured rounds (default: 5)")
    add("--warm-up", type=int, default=1, metavar="N", help="rounds not measured before them (default: 1)")
    add("--seed", type=int, default=0, help="of synthetic pages and random orders (default: 0)")
    add(
        "--device",
        action="store_true",
        help="measure also what memory costs a device: accesses to present pages, faults of each contender while "
        "its guest does not run, and the rate of a disk (default: no)",
    )
    add(
        "--trace",
        metavar="FILE",
        help="write one record a fault of each contender's last round (default: none)",
    )
    add("--check", metavar="FILE", help="hold the result against the bounds in FILE (default: no bounds)")
    add("--json", metavar="FILE", help="write the result as JSON to FILE, - is stdout (default: no JSON)")


def run(options: argparse.Namespace) -> int:
    """Measure, print, hold against bounds, return the exit status."""
    check_json_target(options.json)
    check_trace_target(options.trace)
    try:
        bounds = read_bounds(options.check) if options.check else []
        work = _work(options)
        contenders = _contenders(options, work)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"--check {options.check}: {error.strerror}") from None
    device = AccessCosts() if options.device else None
    comparison = Comparison(work, contenders, options.rounds, options.trace is not None, device)
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


def _work(options: argparse.Namespace) -> Work:
    """Return the work that all contenders do unless they say otherwise. Raises ValueError."""
    kind = options.memory_kind or ("anonymous" if options.uffd == "MISSING" else "shmem")
    backing = parse_backing(kind)
    if options.uffd == "MINOR" and backing == "anonymous":
        raise ValueError("-u MINOR: anonymous memory has no minor faults; use -s shmem")
    for name, value, least in (("--rounds", options.rounds, 1), ("--warm-up", options.warm_up, 0)):
        if value < least:
            raise ValueError(f"{name} {value}: give at least {least}")
    if options.delay < 0:
        raise ValueError(f"-d {options.delay}: a delay cannot be negative")
    return Work(
        bytes_per_vcpu=parse_size(options.bytes),
        vcpus=options.vcpus,
        ring=options.ring,
        workload=options.workload,
        order=options.order,
        write=not options.read,
        touches=options.touches,
        overlap=options.overlap,
        backing=backing,
        granule=parse_size(options.granule) if options.granule else None,
        fault_around=options.fault_around,
        latency=parse_latency(options.latency) + options.delay * 1e-6,
        bandwidth=parse_bandwidth(options.bandwidth),
        seed=options.seed,
        pin=_cpus(options.pin, options.vcpus),
        uffd_mode=parse_mode(options.uffd) if options.uffd else None,
    )


def _cpus(text: str | None, vcpus: int) -> tuple[int, ...]:
    if text is None:
        return ()
    if not all(part.isdecimal() for part in text.split(",")):
        raise ValueError(f"-c {text}: give a host CPU for each vCPU, as 0,1")
    cpus = tuple(int(part) for part in text.split(","))
    if len(cpus) != vcpus:
        raise ValueError(f"-c {text}: that is {len(cpus)} CPUs for {vcpus} vCPUs")
    if absent := set(cpus) - os.sched_getaffinity(0):
        raise ValueError(f"-c {text}: this process cannot run on CPU {min(absent)}")
    return cpus


def _contenders(options: argparse.Namespace, work: Work) -> list[Contender]:
    """Return the contenders, their work checked. Raises ValueError."""
    names = options.contenders or list(DEFAULT)
    if options.uffd:
        if options.contenders:
            raise ValueError("-u chooses the contender by itself: leave the names out, or -u")
        if not 1 <= options.readers <= 99:
            raise ValueError(f"-r {options.readers}: give 1 to 99 readers")
        names = [f"userfaultfd-r{options.readers}" if options.one_uffd or options.overlap else SHARDED]
    elif options.one_uffd or options.readers != 1:
        raise ValueError("-a and -r go with -u; without it name contenders, as userfaultfd-r4")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{repeated[0]} is named twice: a contender takes part once")
    contenders = [contender(name, work) for name in names]
    for each in contenders:
        check(each)
    return contenders


def _tell(name: str, turn: int, measurement: Measurement | None) -> None:
    if measurement is not None:
        say(f"round {turn + 1}: {name} {measurement.round.pages_per_second:.0f} pgs/sec")


def print_document(document: dict[str, Any]) -> None:
    """Print the result for people: the kernel tool's lines for each contender, then the table."""
    options = document["options"]
    partial = "" if document["complete"] else ", PARTIAL"
    print(
        f"{options['vcpus']} vCPUs, {format_size(options['bytes_per_vcpu'])} each on {options['backing']}, "
        f"{options['order']} {options['workload']}, {options['rounds']} rounds{partial}"
    )
    for each in document["contenders"]:
        print("", *lines(each), sep="\n")
        if device := each["device"]:
            latency = device["latency_us"]
            print(
                f"Device: {device['pages']} pages read, p50 {latency['p50']:.1f} us, p99 {latency['p99']:.1f} us"
            )
    print()
    floors = {trap: spread for trap, spread in document["floor_us"].items() if spread}
    for trap, spread in floors.items():
        print(f"floor of {trap}: {_words(spread)} us an exit")
    print(f"{'':<28}{'us a page':>20}{'own us':>8}{'cpu us':>8}{'p50':>8}{'p99':>9}  x userfaultfd")
    for each in document["contenders"]:
        own = f"{each['own_cost_us']['median']:.1f}" if each["own_cost_us"] else ""
        latency = each["latency_us"]
        print(
            f"{each['name']:<28}{_words(each['page_us']):>20}{own:>8}{each['cpu_us_per_fault']['median']:>8.1f}"
            f"{latency['p50']:>8.1f}{latency['p99']:>9.1f}  {_against(each['name'], document)}"
        )
    if document["device"]:
        _print_device(document["device"])


def _print_device(device: dict[str, Any]) -> None:
    """Print what memory costs a device: a line a kind of access, then a line a contender."""
    print(f"\n{'device, page present':<28}{'us a call':>20}")
    for kind in ("slice_4k", "read_4k", "write_4k", "view_4k", "slice_8", "read_8", "load64", "store64"):
        against = device.get(f"{kind}_ratio")
        times = f"  {_words(against, 2)} x slice" if against else ""
        print(f"{kind:<28}{_words(device[f'{kind}_us'], 2):>20}{times}")
    print(f"\n{'device, page absent':<28}{'faults':>8}{'p50':>8}{'p90':>8}{'p99':>9}{'max':>9} us")
    for each in device["faults"]:
        latency = each["latency_us"]
        print(
            f"{each['name']:<28}{each['faults']:>8}{latency['p50']:>8.1f}{latency['p90']:>8.1f}"
            f"{latency['p99']:>9.1f}{latency['max']:>9.1f}"
        )
    disk = device["disk"]
    print(f"\n{'disk, memory under ' + disk['trap']:<36}{'MB a second':>20}")
    for place, states in disk["bytes_per_second"].items():
        for state, rate in states.items():
            megabytes = {name: value / 1e6 for name, value in rate.items()}
            print(f"{place.replace('_', ' ') + ', ' + state:<36}{_words(megabytes):>20}")


def _words(spread: dict[str, float], digits: int = 1) -> str:
    least, most = (f"{spread[name]:.{digits if digits > 1 else 0}f}" for name in ("min", "max"))
    return f"{spread['median']:.{digits}f} ({least}-{most})"


def _against(name: str, document: dict[str, Any]) -> str:
    for row in document["ratios"]:
        if (row["a"], row["b"], row["metric"]) == (name, BASELINE, "pages_per_second"):
            return f"{row['median']:.2f} ({row['min']:.2f}-{row['max']:.2f})"
    return ""


def _hold(bounds: list[Bound], document: dict[str, Any]) -> int:
    """Say how each bound fares; EXIT_FAILED if one does not hold."""
    status = EXIT_OK
    for bound in bounds:
        good, sentence = judge(bound, document)
        say(f"{'ok' if good else 'FELL SHORT'}: {sentence}")
        if not good:
            status = EXIT_FAILED
    return status
