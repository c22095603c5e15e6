"""`kvmdp run`: boot the guest under demand paging and prove what it saw."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from kvmdp.cli.output import (
    EXIT_FAILED,
    EXIT_OK,
    UsageError,
    check_json_target,
    say,
    write_json,
)
from kvmdp.cli.progress import Progress
from kvmdp.cli.summary import print_summary, results
from kvmdp.kvm import Kvm
from kvmdp.machine.boot import GuestImageError, read_program, vector_flags
from kvmdp.machine.experiment import RunResult, run_program, run_workload
from kvmdp.machine.machine import MachineOptions
from kvmdp.machine.probe import choose_trap, working_traps
from kvmdp.machine.runloop import GuestError
from kvmdp.machine.workloads import (
    WORKLOADS,
    WorkloadOptions,
    make_workload,
    program_blocks,
)
from kvmdp.memory.backing import BACKINGS
from kvmdp.memory.layout import MIN_MEMORY, PAGE_SIZE, GuestLayout
from kvmdp.memory.size import format_size, parse_size
from kvmdp.paging.fault import PagingError
from kvmdp.paging.policy import FaultAround
from kvmdp.paging.trap.registry import SLOT_TRAPS, TRAPS
from kvmdp.paging.trap.slots import check_granule, least_granule
from kvmdp.source.base import PageSource, SourceError
from kvmdp.source.image import ImageError, ImageSource
from kvmdp.source.synthetic import SyntheticSource

SCHEMA = "kvmdp.run/1"

_DEFAULT_MEMORY = 64 << 20
_MAX_SLOTS = 32764 - 8  # KVM_CAP_NR_MEMSLOTS on x86 since Linux 5.11, less the machine's own


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="boot a guest under demand paging and prove what it saw",
        description="Boot a guest whose memory starts non-present, fetch pages as it touches them, and compare "
        "what it saw and wrote with what the host expects.",
        epilog=f"workloads: {', '.join(WORKLOADS)}. Sizes take K, M, G or T (powers of 1024).",
    )
    parser.set_defaults(run=run)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--image", metavar="FILE", help="raw memory image to fetch pages from (default: synthetic pages)"
    )
    machine.add_argument("--memory", metavar="SIZE", help="RAM (default: 64M, or the image's size)")
    machine.add_argument(
        "--trap",
        default="auto",
        metavar="TRAP",
        help=f"auto, {', '.join(TRAPS)} (default: auto, the fastest proven)",
    )
    machine.add_argument(
        "--backing", default="memfd", metavar="KIND", help=f"{', '.join(BACKINGS)} (default: memfd)"
    )
    machine.add_argument("--vcpus", type=int, default=1, metavar="N", help="1 to 16 (default: 1)")
    machine.add_argument(
        "--ring", type=int, default=3, metavar="R", help="privilege ring of the workload, 3 or 0 (default: 3)"
    )
    machine.add_argument(
        "--granule",
        metavar="SIZE",
        help="memory a memslot covers, for memory-fault and mmio (default: least that "
        "makes at most 16384 memslots)",
    )
    machine.add_argument(
        "--fault-around",
        type=int,
        default=1,
        metavar="N",
        help="pages fetched a fault, a power of two to 512 (default: 1)",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--workload", default="checksum", metavar="W", help="what the guest does (default: checksum)"
    )
    work.add_argument(
        "--guest", metavar="FILE", help="run this flat binary instead of a workload (guest/README.md)"
    )
    work.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of synthetic pages and random orders (default: 0)"
    )
    work.add_argument(
        "--pages", type=int, metavar="N", help="use only the first N pages of RAM (default: all)"
    )
    work.add_argument(
        "--order",
        default="sequential",
        choices=("sequential", "strided", "random"),
        help="of touch (default: sequential)",
    )
    work.add_argument(
        "--stride", type=int, default=16, metavar="N", help="of strided touch, in pages (default: 16)"
    )
    work.add_argument("--write", action="store_true", help="touch writes (default: reads)")
    work.add_argument(
        "--overlap", action="store_true", help="touch: every vCPU on all pages (default: a share each)"
    )
    work.add_argument(
        "--touches", type=int, metavar="N", help="of touch, a vCPU (default: one for each of its pages)"
    )
    work.add_argument("--iterations", type=int, default=1, metavar="N", help="passes of atomic (default: 1)")
    work.add_argument(
        "--operation",
        default="add",
        choices=("add", "inc", "xadd", "cmpxchg"),
        help="of atomic (default: add)",
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="give up after S seconds (default: never)")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON to FILE (- is stdout)")


def run(options: argparse.Namespace) -> int:
    """Run the guest, print the summary, return the exit status."""
    check_json_target(options.json)
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(_source(options))
            memory, workload_options = _plan(options, source)
            machine = _machine_options(options, memory)
        except (ValueError, ImageError, GuestImageError) as error:
            raise UsageError(str(error)) from None
        _announce(options, machine, source)
        document = _document(options, machine)
        try:
            result = _execute(options, machine, workload_options, source)
        except (PagingError, GuestError, SourceError) as error:
            document["error"] = str(error)
            if options.json:
                write_json(options.json, document)
            raise
    document |= results(result)
    if options.json != "-":
        print_summary(document)
    if options.json:
        write_json(options.json, document)
    return EXIT_OK if result.ok else EXIT_FAILED


@contextlib.contextmanager
def _source(options: argparse.Namespace) -> Iterator[PageSource]:
    """Open the image, or make the synthetic source as large as the memory asked for."""
    source: PageSource
    if options.image is None:
        memory = parse_size(options.memory) if options.memory else _DEFAULT_MEMORY
        GuestLayout(memory)  # says what is wrong with the size, before anything takes so much memory
        source = SyntheticSource(memory, options.seed)
    else:
        source = ImageSource(options.image)
        if source.tail_bytes:
            say(
                f"the image's last page has {source.tail_bytes} of {PAGE_SIZE} bytes: the rest of it reads as zeros"
            )
    try:
        yield source
    finally:
        source.close()


def _plan(options: argparse.Namespace, source: PageSource) -> tuple[int, WorkloadOptions]:
    """Return the size of RAM and the workload's options. Raises ValueError."""
    if options.memory:
        memory = parse_size(options.memory)
        if options.image and source.size > memory:
            raise ValueError(
                f"the image has {format_size(source.size)}, more than --memory {options.memory}: "
                "give at least as much"
            )
    else:
        memory = max(source.size, MIN_MEMORY)
    GuestLayout(memory)
    if options.timeout is not None and not options.timeout > 0:
        raise ValueError(f"--timeout {options.timeout:g}: give more than 0 seconds")
    with Kvm() as kvm:
        vector = vector_flags(kvm)
    return memory, WorkloadOptions(
        memory_bytes=memory,
        vcpus=options.vcpus,
        ring=options.ring,
        seed=options.seed,
        pages=options.pages,
        order=options.order,
        stride=options.stride,
        write=options.write,
        overlap=options.overlap,
        touches=options.touches,
        iterations=options.iterations,
        operation=options.operation,
        vector=vector,
    )


def _machine_options(options: argparse.Namespace, memory: int) -> MachineOptions:
    """Check what concerns the machine and choose the trap. Raises ValueError."""
    FaultAround(options.fault_around)
    if options.backing not in BACKINGS:
        raise ValueError(f"there is no backing {options.backing!r}: choose from {', '.join(BACKINGS)}")
    if options.trap != "auto" and options.trap not in TRAPS:
        proven = ", ".join(working_traps(options.backing)) or "none"
        raise ValueError(
            f"there is no trap {options.trap!r}: there are auto, {', '.join(TRAPS)}; this host proves {proven}"
        )
    if not options.guest and options.workload not in WORKLOADS:
        raise ValueError(f"there is no workload {options.workload!r}: choose from {', '.join(WORKLOADS)}")
    trap = choose_trap(options.backing) if options.trap == "auto" else options.trap
    granule = parse_size(options.granule) if options.granule else None
    if trap in SLOT_TRAPS:
        layout = GuestLayout(memory)
        # What is fetched together is one memslot: the fewer flips the better.
        granule = granule or max(least_granule(layout), options.fault_around * PAGE_SIZE)
        check_granule(granule, layout, _MAX_SLOTS)
    elif granule not in (None, PAGE_SIZE):
        raise ValueError(f"--granule is for memory-fault and mmio: the trap {trap} works by single pages")
    return MachineOptions(
        memory_bytes=memory,
        trap=trap,
        backing=options.backing,
        vcpus=options.vcpus,
        granule=granule,
        fault_around=options.fault_around,
        program=read_program(options.guest) if options.guest else b"",
    )


def _announce(options: argparse.Namespace, machine: MachineOptions, source: PageSource) -> None:
    what = f"program {options.guest}" if options.guest else f"workload {options.workload}"
    say(
        f"{format_size(machine.memory_bytes)} of {machine.backing} RAM from {source.name}, trap {machine.trap}, "
        f"{machine.vcpus} vCPU{'s' if machine.vcpus > 1 else ''} in ring {options.ring}, {what}"
    )


def _execute(
    options: argparse.Namespace, machine: MachineOptions, work: WorkloadOptions, source: PageSource
) -> RunResult:
    progress = Progress()
    try:
        if options.guest:
            return run_program(
                machine, program_blocks(work), source, timeout=options.timeout, on_tick=progress
            )
        try:
            workload = make_workload(options.workload, work)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return run_workload(machine, workload, source, timeout=options.timeout, on_tick=progress)
    finally:
        progress.close()


def _document(options: argparse.Namespace, machine: MachineOptions) -> dict[str, Any]:
    """Return the part of the JSON document that is known before the run."""
    return {
        "schema": SCHEMA,
        "ok": False,
        "trap": machine.trap,
        "backing": machine.backing,
        "ring": options.ring,
        "vcpus": machine.vcpus,
        "memory_bytes": machine.memory_bytes,
        "page_size": PAGE_SIZE,
        "fault_around": machine.fault_around,
        "workload": "program" if options.guest else options.workload,
        "image": options.image,
        "seed": options.seed,
    }
