"""`kvmdp run`: boot the guest under demand paging and prove what it saw."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvmdp import __version__
from kvmdp.cli.output import (
    EXIT_FAILED,
    EXIT_OK,
    UsageError,
    check_json_target,
    check_trace_target,
    say,
    write_file,
    write_json,
)
from kvmdp.cli.progress import Progress
from kvmdp.cli.summary import leak_records, print_leaks, print_summary, results
from kvmdp.cli.supervise import TouchedError, is_supervised, supervise
from kvmdp.kvm import Kvm
from kvmdp.machine.boot import GuestImageError, read_program, vector_flags
from kvmdp.machine.detector import LeakDetector
from kvmdp.machine.experiment import RunResult, run_program, run_workload, usable_memory
from kvmdp.machine.machine import Machine, MachineOptions
from kvmdp.machine.probe import choose_trap, working_traps
from kvmdp.machine.pv import pv_flags
from kvmdp.machine.runloop import GuestError
from kvmdp.machine.workloads import (
    WORKLOADS,
    WorkloadOptions,
    make_workload,
    program_blocks,
)
from kvmdp.memory.backing import BACKINGS, MemfdBacking
from kvmdp.memory.layout import MIN_MEMORY, PAGE_SIZE, GuestLayout
from kvmdp.memory.size import format_size, parse_size
from kvmdp.paging.fault import PagingError, UnsupportedError
from kvmdp.paging.policy import FaultAround
from kvmdp.paging.trap.registry import ALL_TRAPS, SLOT_TRAPS, check_backing
from kvmdp.paging.trap.slots import MAX_SLOTS, check_granule, least_granule
from kvmdp.paging.trap.userfaultfd import UffdOptions, check_mode, parse_mode
from kvmdp.source.base import PageSource, SourceError
from kvmdp.source.handler import DEFAULT_TIMEOUT, HandlerSource
from kvmdp.source.image import ImageError, ImageSource
from kvmdp.source.network import NetworkSource, parse_bandwidth, parse_latency
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.wire.endpoint import EndpointError

SCHEMA = "kvmdp.run/1"

_DEFAULT_MEMORY = 64 << 20


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
    parser.add_argument("--trace", metavar="FILE", help="write one record a fault to FILE (default: none)")
    parser.add_argument(
        "--detect-leaks",
        action="store_true",
        help="find accesses that bypass the pager; the run is supervised for it (default: no)",
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="give up after S seconds (default: never)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON to FILE, - is stdout (default: no JSON)"
    )


def _add_machine_options(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option("--image", metavar="FILE", help="raw memory image to fetch pages from (default: synthetic pages)")
    option("--handler", metavar="PATH", help="socket of a kvmdp handler to fetch pages from (default: none)")
    option(
        "--handler-timeout",
        type=float,
        default=DEFAULT_TIMEOUT,
        metavar="S",
        help=f"wait S seconds for an answer of the handler, or for another one (default: {DEFAULT_TIMEOUT:g})",
    )
    option("--memory", metavar="SIZE", help="RAM, 2M to 256G (default: 64M, or the image's size)")
    option(
        "--trap",
        default="auto",
        metavar="TRAP",
        help=f"auto, {', '.join(ALL_TRAPS)} (default: auto, the fastest proven one with exits)",
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
        help="memory a memslot covers, for memory-fault and mmio, hybrid or not (default: least that "
        "makes at most 16384 memslots)",
    )
    option(
        "--page-tables",
        default="boot",
        choices=("boot", "paged"),
        help="where the guest's lie: in the boot slot, or paged, in RAM's last pages (default: boot)",
    )
    option(
        "--readers",
        type=int,
        default=1,
        metavar="N",
        help="userfaultfd, hybrids: reader threads, 1 to 99 (default: 1)",
    )
    option(
        "--uffd-per-vcpu",
        action="store_true",
        help="userfaultfd, hybrids: a descriptor for each vCPU's share of RAM (default: one)",
    )
    option(
        "--uffd-mode",
        metavar="MODE",
        help="userfaultfd: missing (filled by UFFDIO_COPY) or minor (filled in place, mapped by UFFDIO_CONTINUE) "
        "(default: minor; missing on anonymous)",
    )
    option(
        "--fault-around",
        type=int,
        default=1,
        metavar="N",
        help="pages fetched a fault, a power of two to 512 (default: 1)",
    )
    option(
        "--latency",
        default="0",
        metavar="TIME",
        help="of a simulated network to the source, as 30us (default: 0)",
    )
    option(
        "--bandwidth", default="0", metavar="RATE", help="of that network, as 10Gbit (default: 0, no limit)"
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
    check_trace_target(options.trace)
    if options.detect_leaks and not is_supervised():
        return _supervise(options)
    detector = LeakDetector() if options.detect_leaks else None
    with contextlib.ExitStack() as stack:
        try:
            source, reference = _sources(options, stack)
            memory, workload_options = _plan(options, source)
            machine = _machine_options(options, memory)
        except (ValueError, ImageError, GuestImageError, EndpointError) as error:
            raise UsageError(str(error)) from None
        _announce(options, machine, source)
        document = _document(options, machine)
        try:
            with _traced(options, document) as on_start:
                result = _execute(options, machine, workload_options, source, reference, on_start, detector)
        except (PagingError, GuestError, SourceError, UnsupportedError, OSError) as error:
            document["error"] = str(error)
            if detector is not None:
                document["leaks"] = leak_records(detector.leaks)
                if options.json != "-":
                    print_leaks(document)
            if options.json:
                write_json(options.json, document)
            raise
    document |= results(result)
    if detector is not None:
        document["leaks"] = leak_records(detector.leaks)
        document["ok"] = result.ok and not detector.leaks
    if options.json != "-":
        print_summary(document)
        if detector is not None:
            print_leaks(document)
    if options.json:
        write_json(options.json, document)
    return EXIT_OK if document["ok"] else EXIT_FAILED


def _supervise(options: argparse.Namespace) -> int:
    """Run in a child that is watched; a touch that ends it is the result then."""
    try:
        return supervise()
    except TouchedError as error:
        if options.json:
            leaks = leak_records([error.leak])
            write_json(options.json, {"schema": SCHEMA, "ok": False, "error": str(error), "leaks": leaks})
        raise PagingError(str(error)) from None


def _sources(
    options: argparse.Namespace, stack: contextlib.ExitStack
) -> tuple[PageSource, PageSource | None]:
    """Return where pages come from, and what they are compared with if that is something else."""
    if options.handler is None:
        return stack.enter_context(_source(options)), None
    if not BACKINGS.get(options.backing, MemfdBacking).shared:
        raise ValueError(
            f"--handler with --backing {options.backing}: memory of one process alone cannot be handed to a handler "
            "in another; use --backing memfd"
        )
    if (options.uffd_mode or "").lower() == "missing":
        raise ValueError(
            "--handler with --uffd-mode missing: a handler fills pages in the memory file, where in that mode no "
            "absent page may be; leave --uffd-mode out"
        )
    reference = None if options.image is None else stack.enter_context(_source(options))
    handler = HandlerSource(options.handler, options.handler_timeout, say)
    stack.callback(handler.close)
    if reference is not None and reference.size != handler.size:
        raise ValueError(
            f"the image has {format_size(reference.size)}, that of the handler {format_size(handler.size)}: --image "
            "beside --handler names a copy of what the handler serves, to compare with"
        )
    return handler, reference


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
        latency, bandwidth = parse_latency(options.latency), parse_bandwidth(options.bandwidth)
        yield NetworkSource(source, latency, bandwidth) if latency or bandwidth else source
    finally:
        source.close()


def _plan(options: argparse.Namespace, source: PageSource) -> tuple[int, WorkloadOptions]:
    """Return the size of RAM and the workload's options. Raises ValueError."""
    if options.memory is not None:
        memory = parse_size(options.memory)
        if source.size > memory:
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
        vector, pv = vector_flags(kvm), pv_flags(kvm)
    if options.workload == "clock" and not pv:
        raise UnsupportedError(
            "the workload clock needs kvmclock, and an MSR filter to intercept it (KVM_CAP_X86_MSR_FILTER, "
            "KVM_CAP_X86_USER_SPACE_MSR), which this kernel's KVM lacks: use Linux 5.10 or later"
        )
    return memory, WorkloadOptions(
        memory_bytes=usable_memory(memory, options.page_tables),
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
        pv=pv,
    )


def _machine_options(options: argparse.Namespace, memory: int) -> MachineOptions:
    """Check what concerns the machine and choose the trap. Raises ValueError."""
    FaultAround(options.fault_around)
    if not 1 <= options.readers <= 99:
        raise ValueError(f"--readers {options.readers}: give 1 to 99")
    if options.backing not in BACKINGS:
        raise ValueError(f"there is no backing {options.backing!r}: choose from {', '.join(BACKINGS)}")
    if options.trap != "auto" and options.trap not in ALL_TRAPS:
        proven = ", ".join(working_traps(options.backing)) or "none"
        raise ValueError(
            f"there is no trap {options.trap!r}: there are auto, {', '.join(ALL_TRAPS)}; this host proves {proven}"
        )
    if options.guest is None and options.workload not in WORKLOADS:
        raise ValueError(f"there is no workload {options.workload!r}: choose from {', '.join(WORKLOADS)}")
    mode = None if options.uffd_mode is None else parse_mode(options.uffd_mode)
    if mode is not None and options.trap != "userfaultfd":
        raise ValueError("--uffd-mode is for the trap userfaultfd: give --trap userfaultfd, or leave it out")
    check_backing(options.trap, BACKINGS[options.backing])
    check_mode(mode, BACKINGS[options.backing])
    trap = choose_trap(options.backing) if options.trap == "auto" else options.trap
    granule = None if options.granule is None else parse_size(options.granule)
    if trap in SLOT_TRAPS:
        layout = GuestLayout(memory)
        # What is fetched together is one memslot: the fewer flips the better.
        granule = granule or max(least_granule(layout), options.fault_around * PAGE_SIZE)
        check_granule(granule, layout, MAX_SLOTS)
    elif granule not in (None, PAGE_SIZE):
        raise ValueError(f"--granule is for memory-fault and mmio: the trap {trap} works by single pages")
    return MachineOptions(
        memory_bytes=memory,
        trap=trap,
        backing=options.backing,
        vcpus=options.vcpus,
        granule=granule,
        fault_around=options.fault_around,
        uffd=UffdOptions(options.readers, options.vcpus if options.uffd_per_vcpu else 1, mode),
        page_tables=options.page_tables,
        program=b"" if options.guest is None else read_program(options.guest),
    )


def _announce(options: argparse.Namespace, machine: MachineOptions, source: PageSource) -> None:
    what = f"workload {options.workload}" if options.guest is None else f"program {options.guest}"
    say(
        f"{format_size(machine.memory_bytes)} of {machine.backing} RAM from {source.name}, trap {machine.trap}, "
        f"{machine.vcpus} vCPU{'s' if machine.vcpus > 1 else ''} in ring {options.ring}, {what}"
    )


@contextlib.contextmanager
def _traced(
    options: argparse.Namespace, document: dict[str, Any]
) -> Iterator[Callable[[Machine], None] | None]:
    """Yield what starts a trace of a machine, None if none is asked for; write it when the run is over.

    A run that fails leaves its trace as it leaves its JSON document; one that is interrupted leaves neither.
    """
    if options.trace is None:
        yield None
        return
    from kvmdp.bench.trace import Tracer, lines  # here, for most runs do without

    tracers: list[Tracer] = []

    def start(machine: Machine) -> None:
        machine.pager.observer = tracer = Tracer(machine.layout)
        tracers.append(tracer)

    def write() -> None:
        header = {"contender": None, "version": __version__}
        header |= {key: document[key] for key in ("trap", "vcpus", "memory_bytes")}
        records = tracers[0].records() if tracers else []
        write_file(Path(options.trace), "".join(f"{line}\n" for line in lines(header, records)))

    try:
        yield start
    except (PagingError, GuestError):
        write()
        raise
    write()


def _execute(
    options: argparse.Namespace,
    machine: MachineOptions,
    work: WorkloadOptions,
    source: PageSource,
    reference: PageSource | None,
    on_start: Callable[[Machine], None] | None,
    detector: LeakDetector | None,
) -> RunResult:
    progress = Progress()
    try:
        if options.guest is not None:
            blocks = program_blocks(work)
            return run_program(
                machine,
                blocks,
                source,
                timeout=options.timeout,
                on_tick=progress,
                on_start=on_start,
                detector=detector,
            )
        try:
            workload = make_workload(options.workload, work)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return run_workload(
            machine,
            workload,
            source,
            reference=reference,
            timeout=options.timeout,
            on_tick=progress,
            on_start=on_start,
            detector=detector,
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
        "page_tables": machine.page_tables,
        "latency_s": parse_latency(options.latency),
        "bandwidth_bytes_per_s": parse_bandwidth(options.bandwidth),
        "workload": options.workload if options.guest is None else "program",
        "image": options.image,
        "handler": options.handler,
        "seed": options.seed,
        "leaks": None,  # not looked for
    }
