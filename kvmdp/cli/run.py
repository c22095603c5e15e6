"""`kvmdp run`: boot the guest under demand paging and prove what it saw."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvmdp import __version__
from kvmdp.cli.disk_options import disk_device
from kvmdp.cli.output import (
    EXIT_FAILED,
    EXIT_OK,
    UsageError,
    check_json_target,
    check_trace_target,
    remark,
    say,
    write_file,
    write_json,
)
from kvmdp.cli.progress import Progress
from kvmdp.cli.run_options import add_options, machine_options, plan
from kvmdp.cli.summary import leak_records, print_leaks, print_summary, results
from kvmdp.cli.supervise import TouchedError, is_supervised, supervise
from kvmdp.machine.boot import GuestImageError
from kvmdp.machine.detector import LeakDetector
from kvmdp.machine.experiment import RunResult, run_program, run_workload
from kvmdp.machine.machine import Machine, MachineOptions
from kvmdp.machine.runloop import GuestError
from kvmdp.machine.workloads import (
    WorkloadOptions,
    make_workload,
    program_blocks,
)
from kvmdp.machine.workloads.poison import choose_pages
from kvmdp.memory.backing import MemfdBacking
from kvmdp.memory.backings import BACKINGS
from kvmdp.memory.layout import PAGE_SIZE, GuestLayout
from kvmdp.memory.size import format_size, parse_size
from kvmdp.paging.fault import PagingError, UnsupportedError
from kvmdp.source.base import PageSource, SourceError
from kvmdp.source.handler import HandlerSource
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
    add_options(parser)


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
            memory, workload_options = plan(options, source)
            machine = machine_options(options, memory, workload_options)
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
    if not BACKINGS.get(options.backing, MemfdBacking).sealed:
        raise ValueError(
            f"--handler with --backing {options.backing}: such memory cannot be handed to a handler in another "
            "process; use --backing memfd"
        )
    if (options.uffd_mode or "").lower() == "missing":
        raise ValueError(
            "--handler with --uffd-mode missing: a handler fills pages in the memory file, where in that mode no "
            "absent page may be; leave --uffd-mode out"
        )
    reference = None if options.image is None else stack.enter_context(_source(options))
    handler = HandlerSource(options.handler, options.handler_timeout, remark)
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
            poisoned = choose_pages(work, np.arange(work.memory_bytes // PAGE_SIZE))
            with disk_device(options, 0) as device:
                return run_program(
                    machine,
                    blocks,
                    source,
                    timeout=options.timeout,
                    on_tick=progress,
                    on_start=on_start,
                    detector=detector,
                    device=device,
                    poisoned=poisoned,
                    collapse=options.collapse,
                )
        try:
            workload = make_workload(options.workload, work)
        except ValueError as error:
            raise UsageError(str(error)) from None
        with disk_device(options, workload.disk_bytes) as device:
            return run_workload(
                machine,
                workload,
                source,
                reference=reference,
                timeout=options.timeout,
                on_tick=progress,
                on_start=on_start,
                detector=detector,
                device=device,
                collapse=options.collapse,
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
        "host_page_size": BACKINGS[machine.backing].page_size,
        "thp": machine.thp,
        "fault_around": machine.fault_around,
        "resident_limit_bytes": machine.resident_limit,
        "page_tables": machine.page_tables,
        "latency_s": parse_latency(options.latency),
        "bandwidth_bytes_per_s": parse_bandwidth(options.bandwidth),
        "workload": options.workload if options.guest is None else "program",
        "image": options.image,
        "handler": options.handler,
        "seed": options.seed,
        "leaks": None,  # not looked for
    }
