"""`kvmdp run`: boot the guest under demand paging and prove what it saw."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from kvmdp.cli.disk_options import add_disk_options, disk_device
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
from kvmdp.paging.fault import PagingError, UnsupportedError
from kvmdp.paging.policy import FaultAround
from kvmdp.paging.trap.registry import SLOT_TRAPS, TRAPS
from kvmdp.paging.trap.slots import check_granule, least_granule
from kvmdp.paging.trap.userfaultfd import UffdOptions
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
        epilog="SIZE is in bytes, or has K, M, G or T behind it (powers of 1024). A page has 4096 bytes.",
    )
    parser.set_defaults(run=run)
    _add_machine_options(parser.add_argument_group("machine"))
    _add_work_options(parser.add_argument_group("work"))
    add_disk_options(parser.add_argument_group("disk"))
    parser.add_argument("--timeout", type=float, metavar="S", help="give up after S seconds (default: never)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON to FILE, - is stdout (default: no JSON)"
    )


def _add_machine_options(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option("--image", metavar="FILE", help="raw memory image to fetch pages from (default: synthetic pages)")
    option("--memory", metavar="SIZE", help="RAM, 2M to 256G (default: 64M, or the image's size)")
    option(
        "--trap",
        default="auto",
        metavar="TRAP",
        help=f"auto, {', '.join(TRAPS)} (default: auto, the fastest proven one with exits)",
    )
    option(
        "--backing",
        default="memfd",
        metavar="KIND",
        help=f"what RAM is made of: {', '.join(BACKINGS)} (default: memfd)",
    )
    option("--vcpus", type=int, default=1, metavar="N", help="vCPUs, 1 to 16 (default: 1)")
    option(
        "--ring", type=int, default=3, metavar="R", help="privilege ring of the workload, 3 or 0 (default: 3)"
    )
    option(
        "--granule",
        metavar="SIZE",
        help="memory a memslot covers, for memory-fault and mmio (default: least that "
        "makes at most 16384 memslots)",
    )
    option(
        "--readers",
        type=int,
        default=1,
        metavar="N",
        help="userfaultfd: reader threads, 1 to 99 (default: 1)",
    )
    option(
        "--uffd-per-vcpu",
        action="store_true",
        help="userfaultfd: a descriptor for each vCPU's share of RAM (default: one)",
    )
    option(
        "--fault-around",
        type=int,
        default=1,
        metavar="N",
        help="pages fetched a fault, a power of two to 512 (default: 1)",
    )


def _add_work_options(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option(
        "--workload",
        default="checksum",
        metavar="W",
        help=f"what the guest does: {', '.join(WORKLOADS)} (default: checksum)",
    )
    option(
        "--guest",
        metavar="FILE",
        help="flat binary to run instead, see guest/README.md (default: the workload)",
    )
    option(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="number that decides synthetic pages and random orders (default: 0)",
    )
    option("--pages", type=int, metavar="N", help="use only the first N pages of RAM (default: all)")
    option(
        "--order",
        default="sequential",
        choices=("sequential", "strided", "random"),
        help="touch: in which order (default: sequential)",
    )
    option(
        "--stride",
        type=int,
        default=16,
        metavar="N",
        help="touch: pages from one to the next if strided (default: 16)",
    )
    option("--write", action="store_true", help="touch: write (default: read)")
    option("--overlap", action="store_true", help="touch: every vCPU on all pages (default: a share each)")
    option(
        "--touches",
        type=int,
        metavar="N",
        help="touch: accesses a vCPU makes (default: one for each of its pages)",
    )
    option(
        "--iterations", type=int, default=1, metavar="N", help="atomic: passes over the pages (default: 1)"
    )
    option(
        "--operation",
        default="add",
        choices=("add", "inc", "xadd", "cmpxchg"),
        help="atomic: which instruction (default: add)",
    )


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
        except (PagingError, GuestError, SourceError, UnsupportedError, OSError) as error:
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
        memory = parse_size(options.memory) if options.memory is not None else _DEFAULT_MEMORY
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
    if options.memory is not None:
        memory = parse_size(options.memory)
        if options.image is not None and source.size > memory:
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
    if not 1 <= options.readers <= 99:
        raise ValueError(f"--readers {options.readers}: give 1 to 99")
    if options.backing not in BACKINGS:
        raise ValueError(f"there is no backing {options.backing!r}: choose from {', '.join(BACKINGS)}")
    if options.trap != "auto" and options.trap not in TRAPS:
        proven = ", ".join(working_traps(options.backing)) or "none"
        raise ValueError(
            f"there is no trap {options.trap!r}: there are auto, {', '.join(TRAPS)}; this host proves {proven}"
        )
    if options.guest is None and options.workload not in WORKLOADS:
        raise ValueError(f"there is no workload {options.workload!r}: choose from {', '.join(WORKLOADS)}")
    trap = choose_trap(options.backing) if options.trap == "auto" else options.trap
    granule = None if options.granule is None else parse_size(options.granule)
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
        uffd=UffdOptions(options.readers, options.vcpus if options.uffd_per_vcpu else 1),
        program=b"" if options.guest is None else read_program(options.guest),
    )


def _announce(options: argparse.Namespace, machine: MachineOptions, source: PageSource) -> None:
    what = f"workload {options.workload}" if options.guest is None else f"program {options.guest}"
    say(
        f"{format_size(machine.memory_bytes)} of {machine.backing} RAM from {source.name}, trap {machine.trap}, "
        f"{machine.vcpus} vCPU{'s' if machine.vcpus > 1 else ''} in ring {options.ring}, {what}"
    )


def _execute(
    options: argparse.Namespace, machine: MachineOptions, work: WorkloadOptions, source: PageSource
) -> RunResult:
    progress = Progress()
    try:
        if options.guest is not None:
            with disk_device(options, 0) as device:
                return run_program(
                    machine,
                    program_blocks(work),
                    source,
                    timeout=options.timeout,
                    on_tick=progress,
                    device=device,
                )
        try:
            workload = make_workload(options.workload, work)
        except ValueError as error:
            raise UsageError(str(error)) from None
        with disk_device(options, workload.disk_bytes) as device:
            return run_workload(
                machine, workload, source, timeout=options.timeout, on_tick=progress, device=device
            )
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
        "workload": options.workload if options.guest is None else "program",
        "image": options.image,
        "seed": options.seed,
    }
