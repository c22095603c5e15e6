"""`kvmdp bench`: contenders take turns on the same work; options and output after the kernel's demand_paging_test."""

from __future__ import annotations

import argparse
import os
from typing import Any

from kvmdp.bench.access import AccessCosts
from kvmdp.bench.check import Bound, read_bounds
from kvmdp.bench.comparison import BASELINE, Comparison
from kvmdp.bench.contender import DEFAULT, MISSING, OFF, PRESENT, SHARDED, Contender, contender
from kvmdp.bench.huge import CONTENDERS as HUGE_CONTENDERS
from kvmdp.bench.huge import check_work, is_huge
from kvmdp.bench.measure import Measurement, check
from kvmdp.bench.memorycost import CONTENDERS as MEMORY_CONTENDERS
from kvmdp.bench.memorycost import memory_contender
from kvmdp.bench.report.table import lines
from kvmdp.bench.work import Work
from kvmdp.cli.bench_modes import hold, run_huge, run_memory_cost, say_losses
from kvmdp.cli.lists import parse_backing
from kvmdp.cli.output import (
    EXIT_INTERRUPTED,
    EXIT_LACKING,
    EXIT_OK,
    UsageError,
    check_json_target,
    check_trace_target,
    say,
)
from kvmdp.cli.paths import check_distinct, reads, writes
from kvmdp.cli.result_files import ResultFiles
from kvmdp.memory.backings import BACKINGS, check_backing_options, check_huge_pages
from kvmdp.size import format_size, parse_size
from kvmdp.source.network import parse_bandwidth, parse_latency
from kvmdp.trap.registry import TRAPS
from kvmdp.trap.uffd.options import parse_mode

_UFFD_MODES = ("MISSING", "MINOR")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="measure ways of demand paging next to each other",
        description="Let contenders take turns on the same work, and report medians, ratios, latencies and CPU time. "
        "Letters are those of the kernel's demand_paging_test.",
        epilog=f"contenders: {PRESENT}, the traps ({', '.join(TRAPS)}), userfaultfd-rN (N readers), {SHARDED} "
        f"(a descriptor a vCPU), {MISSING} (filled by UFFDIO_COPY also where RAM is shared), {OFF}TRAP (all present, "
        "a trap that has been switched off). One may do other work than the rest: marker:vcpus=2, "
        "mmio:fault-around=16, mmio:device-view,device=1000 (a device thread reads the last 1000 pages meanwhile, by "
        "plain loads on a view of its own). "
        "SIZE is in bytes, or has K, M, G or T behind it (powers of 1024).",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("contenders", nargs="*", metavar="CONTENDER", help=f"what to compare (default: {' '.join(DEFAULT)})")
    add("-b", "--bytes", metavar="SIZE", help="RAM a vCPU (default: 64M; 1G with --memory-cost)")
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
        "--backing",
        dest="memory_kind",
        metavar="KIND",
        help=f"RAM: shmem (memfd) or {', '.join(BACKINGS)} (default: memfd; anonymous with -u MISSING; hugetlb-2m with "
        "--huge)",
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
        "--reserve-hugepages",
        action="store_true",
        help="hugetlb: reserve the huge pages that are missing, give them back at the end; as root (default: no)",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--huge",
        action="store_true",
        help="compare faults on HugeTLB memory instead: bytes and time until the first access goes on, and in all, of "
        "a sparse and a full workload without a network, at 30us, and at 30us with 10Gbit (default: no)",
    )
    modes.add_argument(
        "--memory-cost",
        action="store_true",
        help="measure instead what RAM costs in memory, armed and full: page tables of each view, bitmap, memslots "
        "(default: no)",
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
    check_distinct(
        reads("--check", options.check), writes("--trace", options.trace), writes("--json", options.json)
    )
    check_json_target(options.json)
    check_trace_target(options.trace)
    bounds = _bounds(options.check)
    try:
        work = _work(options)
        # First, for planning the work in absurdly much memory takes minutes by itself.
        if is_huge(work.backing) and not work.reserve_hugepages:
            check_backing_options(work.backing, work.memory_bytes)
            check_huge_pages(work.backing, work.memory_bytes)
        contenders = _contenders(options, work)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if options.huge:
        return run_huge(options, work, contenders, bounds)
    if options.memory_cost:
        return run_memory_cost(options, work, contenders, bounds)
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
    files = ResultFiles()
    files.json(options.json, document)
    if options.trace:
        files.trace(options.trace, comparison.trace_lines())
    lost = say_losses(document["skipped"], document["failed"])
    status = status or lost
    if status == EXIT_OK and len(document["contenders"]) < min(2, len(contenders) + len(document["skipped"])):
        status = EXIT_LACKING
    if status == EXIT_OK:
        status = hold(bounds, document)
    return files.settle(status)


def _bounds(path: str | None) -> list[Bound]:
    if path is None:
        return []
    try:
        return read_bounds(path)
    except ValueError as error:
        raise UsageError(f"--check {error}") from None
    except OSError as error:
        raise UsageError(f"--check {path}: {error.strerror}; give a file that can be read") from None


def _work(options: argparse.Namespace) -> Work:
    """Return the work that all contenders do unless they say otherwise. Raises ValueError."""
    _check_mode(options)
    size = options.bytes if options.bytes is not None else "1G" if options.memory_cost else "64M"
    usual = "hugetlb-2m" if options.huge else "anonymous" if options.uffd == "MISSING" else "shmem"
    kind = usual if options.memory_kind is None else options.memory_kind
    backing = parse_backing(kind)
    if options.uffd == "MINOR" and backing == "anonymous":
        raise ValueError("-u MINOR: anonymous memory has no minor faults; use -s shmem")
    for name, value, least in (("--rounds", options.rounds, 1), ("--warm-up", options.warm_up, 0)):
        if value < least:
            raise ValueError(f"{name} {value}: give at least {least}")
    if options.delay < 0:
        raise ValueError(f"-d {options.delay}: a delay cannot be negative")
    return Work(
        bytes_per_vcpu=parse_size(size),
        vcpus=options.vcpus,
        ring=options.ring,
        workload=options.workload,
        order=options.order,
        write=not options.read,
        touches=options.touches,
        overlap=options.overlap,
        backing=backing,
        reserve_hugepages=options.reserve_hugepages,
        granule=None if options.granule is None else parse_size(options.granule),
        fault_around=options.fault_around,
        latency=parse_latency(options.latency) + options.delay * 1e-6,
        bandwidth=parse_bandwidth(options.bandwidth),
        seed=options.seed,
        pin=_cpus(options.pin, options.vcpus),
        uffd_mode=parse_mode(options.uffd) if options.uffd else None,
    )


def _check_mode(options: argparse.Namespace) -> None:
    """Raise ValueError for an option that a mode has no use for: it has its own work."""
    mode = "--huge" if options.huge else "--memory-cost" if options.memory_cost else None
    if mode is None:
        return
    given = {
        "--trace": options.trace,
        "--device": options.device,
        "-u": options.uffd,
        "--touches": options.touches,
        "--latency": options.latency != "0",
        "--bandwidth": options.bandwidth != "0",
        "-d": options.delay,
        "--workload": options.workload != "touch",
        "--order": options.order != "sequential",
        "--fault-around": options.fault_around != 1,
    }
    for name, value in given.items():
        if value:
            raise ValueError(f"{name} with {mode}: that mode does work of its own; leave {name} out")


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
    usual = HUGE_CONTENDERS if options.huge else MEMORY_CONTENDERS if options.memory_cost else DEFAULT
    names = options.contenders or list(usual)
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
    make = memory_contender if options.memory_cost else contender
    contenders = [make(name, work) for name in names]
    if options.huge:
        check_work(work, contenders)
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
    # Against the baseline; where that has not run, against a guest that never pages.
    names = [each["name"] for each in document["contenders"]]
    other = PRESENT if PRESENT in names and BASELINE not in names else BASELINE
    print(f"{'':<28}{'us a page':>20}{'own us':>8}{'cpu us':>8}{'p50':>8}{'p99':>9}  x {other}")
    for each in document["contenders"]:
        own = f"{each['own_cost_us']['median']:.1f}" if each["own_cost_us"] else ""
        latency = each["latency_us"]
        print(
            f"{each['name']:<28}{_words(each['page_us']):>20}{own:>8}{each['cpu_us_per_fault']['median']:>8.1f}"
            f"{latency['p50']:>8.1f}{latency['p99']:>9.1f}  {_against(each['name'], other, document)}"
        )
    _print_memory(document["contenders"])
    if document["device"]:
        _print_device(document["device"])


def _print_memory(contenders: list[dict[str, Any]]) -> None:
    """Print how even the latencies are, what arming took, and what memory was taken, a line a contender."""
    print(
        f"\n{'':<28}{'p99 / p50':>10}{'arm ms':>9}{'memslots':>10}{'slots MiB':>11}{'tables MiB':>12}{'beyond MiB':>12}"
    )
    for each in contenders:
        memory, apart = each["memory"], each["latency_us"]["p99_over_p50"]
        print(
            f"{each['name']:<28}{'' if apart is None else f'{apart:.1f}':>10}{each['arm_ms']['median']:>9.1f}"
            f"{memory['memslots']:>10}{memory['slot_kib'] / 1024:>11.1f}{memory['vmpte_kib'] / 1024:>12.1f}"
            f"{memory['resident_beyond_kib'] / 1024:>12.1f}"
        )
    print("beyond: what this process grew by beyond the pages it fetched, without page tables")


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


def _against(name: str, other: str, document: dict[str, Any]) -> str:
    for row in document["ratios"]:
        if (row["a"], row["b"], row["metric"]) == (name, other, "pages_per_second"):
            return f"{row['median']:.2f} ({row['min']:.2f}-{row['max']:.2f})"
    return ""
