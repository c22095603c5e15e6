"""`kvmdp run`: boot the guest under demand paging and prove what it saw."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from kvmdp import __version__
from kvmdp.cli.disk_options import disk_device
from kvmdp.cli.leftovers import Leftovers
from kvmdp.cli.output import (
    EXIT_FAILED,
    EXIT_OK,
    UsageError,
    check_json_target,
    check_trace_target,
    say,
)
from kvmdp.cli.paths import check_distinct, reads, writes
from kvmdp.cli.progress import Progress
from kvmdp.cli.result_files import ResultFiles
from kvmdp.cli.run_options import add_options, machine_options, plan
from kvmdp.cli.sources import Sources, open_sources
from kvmdp.cli.summary import leak_records, print_leaks, print_summary, results
from kvmdp.cli.supervise import TouchedError, is_supervised, supervise
from kvmdp.errors import PagingError, UnsupportedError
from kvmdp.lab.detector import LeakDetector
from kvmdp.lab.experiment import DeviceFactory, RunResult, run_workload
from kvmdp.last_acts import last_act
from kvmdp.machine.boot import GuestImageError
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.machine.workloads import Program, Task, WorkloadOptions, make_workload
from kvmdp.memory.backings import backing_class
from kvmdp.page import PAGE_SIZE
from kvmdp.peers.wire.endpoint import EndpointError
from kvmdp.shortage import ShortageError, named
from kvmdp.size import format_size
from kvmdp.source.base import PageSource, SourceError
from kvmdp.source.image import ImageError
from kvmdp.source.network import parse_bandwidth, parse_latency

SCHEMA = "kvmdp.run/1"


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
    check_distinct(
        reads("--image", options.image),
        reads("--guest", options.guest),
        reads("--handler", options.handler),
        writes("--disk", options.disk),
        writes("--device-socket", options.device_socket),
        writes("--backing-file", options.backing_file),
        writes("--trace", options.trace),
        writes("--json", options.json),
    )
    check_json_target(options.json)
    check_trace_target(options.trace)
    if options.detect_leaks and not is_supervised():
        return _supervise(options)
    detector = LeakDetector() if options.detect_leaks else None
    files = ResultFiles()
    with contextlib.ExitStack() as stack:
        try:
            sources = open_sources(options, stack)
            memory, workload_options = plan(options, sources.source, sources.low_ram_end)
            machine = machine_options(options, memory, workload_options)
            task = _task(options, workload_options)
        except (ValueError, ImageError, GuestImageError, EndpointError) as error:
            raise UsageError(str(error)) from None
        leftovers = Leftovers(options)
        stack.enter_context(last_act(leftovers.announce))
        device = stack.enter_context(disk_device(options, task.disk_bytes))
        _announce(options, machine, sources.source)
        document = _document(options, machine, sources)
        try:
            with named(), _traced(options, document, files) as on_start:
                result = _execute(options, machine, task, sources, on_start, detector, device)
        except (PagingError, GuestError, SourceError, UnsupportedError, ShortageError, OSError) as error:
            document["error"] = str(error)
            document["image_changed"] = changed = sources.image_change()
            if changed is not None:
                say(changed)
            if detector is not None:
                document["leaks"] = leak_records(detector.leaks)
                if options.json != "-":
                    print_leaks(document)
            files.json(options.json, document)
            files.settle(EXIT_FAILED)
            raise
        document |= results(result)
        document["image_changed"] = sources.image_change()
    document["ok"] = result.ok and document["image_changed"] is None
    if detector is not None:
        document["leaks"] = leak_records(detector.leaks)
        document["ok"] = document["ok"] and not detector.leaks
    if options.json != "-":
        print_summary(document)
        if detector is not None:
            print_leaks(document)
    files.json(options.json, document)
    return files.settle(EXIT_OK if document["ok"] else EXIT_FAILED)


def _supervise(options: argparse.Namespace) -> int:
    """Run in a child that is watched; a touch that ends it is the result then."""
    try:
        return supervise(Leftovers(options).clear_up)
    except TouchedError as error:
        leaks = leak_records([error.leak])
        files = ResultFiles()
        files.json(options.json, {"schema": SCHEMA, "ok": False, "error": str(error), "leaks": leaks})
        files.settle(EXIT_FAILED)
        raise PagingError(str(error)) from None


def _announce(options: argparse.Namespace, machine: MachineOptions, source: PageSource) -> None:
    vcpus = f"{machine.vcpus} vCPU{'s' if machine.vcpus > 1 else ''}"
    what = f"workload {options.workload}" if options.guest is None else f"program {options.guest}"
    beside = " with a device view" if machine.device_view else ""
    say(
        f"{format_size(machine.memory_bytes)} of {machine.backing} RAM from {source.name}, "
        f"trap {machine.trap}{beside}, {vcpus} in ring {options.ring}, {what}"
    )


@contextlib.contextmanager
def _traced(
    options: argparse.Namespace, document: dict[str, Any], files: ResultFiles
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
        machine.pager.jobs.add(tracer := Tracer(machine.layout))
        tracers.append(tracer)

    def write() -> None:
        header = {"contender": None, "version": __version__}
        header |= {key: document[key] for key in ("trap", "vcpus", "memory_bytes")}
        records = tracers[0].records() if tracers else []
        files.trace(options.trace, lines(header, records))

    try:
        yield start
    except (PagingError, GuestError):
        write()
        raise
    write()


def _execute(
    options: argparse.Namespace,
    machine: MachineOptions,
    task: Task,
    sources: Sources,
    on_start: Callable[[Machine], None] | None,
    detector: LeakDetector | None,
    device: DeviceFactory | None,
) -> RunResult:
    progress = Progress()
    try:
        return run_workload(
            machine,
            task,
            sources.source,
            reference=sources.reference,
            timeout=options.timeout,
            on_tick=progress,
            on_start=on_start,
            detector=detector,
            device=device,
            collapse=options.collapse,
        )
    finally:
        progress.close()


def _task(options: argparse.Namespace, work: WorkloadOptions) -> Task:
    """Plan what the guest is to do. Raises ValueError."""
    return make_workload(options.workload, work) if options.guest is None else Program(work)


def _document(options: argparse.Namespace, machine: MachineOptions, sources: Sources) -> dict[str, Any]:
    """Return the part of the JSON document that is known before the run."""
    return {
        "schema": SCHEMA,
        "ok": False,
        "trap": machine.trap,
        "device_view": machine.device_view,
        "backing": machine.backing,
        "ring": options.ring,
        "vcpus": machine.vcpus,
        "memory_bytes": machine.memory_bytes,
        "page_size": PAGE_SIZE,
        "host_page_size": backing_class(machine.backing).page_size,
        "thp": machine.thp,
        "fault_around": machine.fault_around,
        "resident_limit_bytes": machine.resident_limit,
        "page_tables": machine.page_tables,
        "latency_s": parse_latency(options.latency),
        "bandwidth_bytes_per_s": parse_bandwidth(options.bandwidth),
        "workload": options.workload if options.guest is None else "program",
        "image": options.image,
        "image_layout": None if sources.image is None else sources.image.layout.kind,
        "low_ram_end": sources.low_ram_end,
        "handler": options.handler,
        "seed": options.seed,
        "leaks": None,  # not looked for
    }
