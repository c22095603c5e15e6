"""Run a workload under demand paging and prove the result: the guest's checksums and every present page's bytes.

Units: seconds, pages of 4 KiB, latencies in nanoseconds.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvmdp.interruption import entered
from kvmdp.jobs.collapse import CollapsePolicy, Collapser
from kvmdp.lab.collapse_cost import CollapseResult, measure_collapse
from kvmdp.lab.detector import LeakDetector
from kvmdp.lab.poison import PoisonResult, poison_pages, poison_result
from kvmdp.machine.disk import disk_file
from kvmdp.machine.disk_ports import DiskThread
from kvmdp.machine.hostinfo import resident_memory
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions, PageTablePlace
from kvmdp.machine.page_tables import page_table_bytes
from kvmdp.machine.vcpu_thread import EXIT_NAMES
from kvmdp.machine.workloads import Program, Task, Workload, combined_checksum
from kvmdp.memory.layout import LOW_RAM_END, GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.claim import Counters, State
from kvmdp.source.base import PageSource, ram_source, read_pages
from kvmdp.source.patched import PatchedSource

# Attaches a device to a machine before its vCPUs run, and takes it away at the end of the block.
DeviceFactory = Callable[[Machine], AbstractContextManager[object]]

_CHUNK_PAGES = 1024
_WITH_BYTES = np.array((int(State.PRESENT), int(State.BACKED), int(State.SINK)), dtype=np.uint8)
_MAX_NAMED = 8  # wrong pages named in a result


@dataclass(frozen=True, slots=True)
class RunResult:
    """What came of a run.

    `emulated` counts what KVM's emulator has completed, by form (`kvmdp.vcpu.emulated.Form`).
    `resident_peak` is the most pages that were in memory while there was a limit to that, else None.
    `expected_checksum` is None where the host expects nothing: of a program of the user's own, of pages that it cannot
    read again. `wrong_pages`
    are the gpas of the first pages whose bytes are not what they must be, `pages_checked` how many were compared;
    `poison` is about pages that were poisoned, if any.
    `cpu_seconds` is this process's CPU time from its start to the guest's first instruction. `collapse` is None if
    nothing was to be collapsed.
    """

    seconds: float
    cpu_seconds: float
    resident_bytes: int
    counters: Counters
    pages_present: int
    resident_peak: int | None
    memslots: int
    slot_bytes: int
    granule: int
    exits: dict[str, int]
    emulated: dict[str, int]
    latencies: npt.NDArray[np.uint64]
    stalls: int
    stops: int
    longest_stop: float
    setup_seconds: dict[str, float]
    guest_checksum: int
    expected_checksum: int | None
    accesses: int
    pages_checked: int
    wrong_pages: list[int]
    poison: PoisonResult
    collapse: CollapseResult | None = None

    @property
    def ok(self) -> bool:
        """Whether all that the host can expect holds."""
        exact = not self.wrong_pages and self.expected_checksum in (None, self.guest_checksum)
        return exact and self.poison.ok


def usable_memory(memory_bytes: int, page_tables: PageTablePlace, low_ram_end: int = LOW_RAM_END) -> int:
    """Return how much of RAM, from its beginning, is left to the guest's work (`MachineOptions.page_tables`).

    Raises ValueError for a size that RAM cannot have, or a hole that it cannot have at `low_ram_end`.
    """
    layout = GuestLayout(memory_bytes, low_ram_end)
    return memory_bytes if page_tables == "boot" else memory_bytes - page_table_bytes(layout)


def run_workload(
    options: MachineOptions,
    task: Task,
    source: PageSource,
    *,
    reference: PageSource | None = None,
    timeout: float | None = None,
    on_tick: Callable[[Machine], None] | None = None,
    on_start: Callable[[Machine], None] | None = None,
    detector: LeakDetector | None = None,
    device: DeviceFactory | None = None,
    collapse: CollapsePolicy = "off",
    machine_class: type[Machine] = Machine,
) -> RunResult:
    """Boot a machine, have it do `task` on the memory that `source` delivers, compare. The sources stay the caller's.

    The task's `poisoned` pages are poisoned before it begins; afterwards it names those that the trap could not but
    poison along, too: it cannot be run again as it was planned.

    Compared is with `reference`, by default the source itself. A source that fills RAM only (a handler in another
    process) cannot be read for that: without a reference nothing is expected of its guest. Nor is anything of a
    `Program`, the user's own (`options.program`). A task that needs a disk gets `device`; without one, a thread with a
    temporary file.

    `collapse` is when present pages are put together; what came of it is measured once the guest is done.
    `on_start` is called with the machine before the guest runs, `on_tick` about ten times a second while it does.
    `detector`, if given, looks for leaks meanwhile and has them afterwards. `machine_class` is for an experiment
    that changes what a machine does.
    Raises what `Machine`, `Machine.run` and `poison_pages` raise, and ValueError if the task is planned for RAM with
    another hole, would use pages that hold page tables (`usable_memory` says how much memory to plan it for), is a
    program and the machine has none, or brings its own and the machine has another.
    """

    def patched(unpatched: PageSource) -> PageSource:
        return PatchedSource(unpatched, task.patches) if task.patches else unpatched

    if reference is None and ram_source(source) is None:
        reference = source
    options = _with_program(options, task)
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(entered(machine_class, options, patched(source)))
        _check_plan(machine, task)
        if device is None and task.disk_bytes:
            device = in_process_disk(task.disk_bytes)
        if device is not None:
            stack.enter_context(entered(device, machine))
        task.poisoned = poison_pages(machine, task.poisoned, task.touched)
        if on_start is not None:
            on_start(machine)
        measured = _run(machine, task, timeout, on_tick, detector, collapse)
        if reference is None or not isinstance(task, Workload):
            return measured
        expected_image = patched(reference)
        if machine.page_tables.patches:
            expected_image = PatchedSource(expected_image, machine.page_tables.patches)
        expected, checked, wrong = _compare(machine, task, expected_image)
        return replace(measured, expected_checksum=expected, pages_checked=checked, wrong_pages=wrong)


def _with_program(options: MachineOptions, task: Task) -> MachineOptions:
    """Return the options with the program that the task brings, if it does. Raises ValueError if they have another."""
    if not task.program or task.program == options.program:
        return options
    if options.program:
        raise ValueError(f"the workload {task.name} brings its own program: leave MachineOptions.program out")
    return replace(options, program=task.program)


def _check_plan(machine: Machine, task: Task) -> None:
    if isinstance(task, Program) and not machine.options.program:
        raise ValueError(
            "the machine is to run a program and has none: give it one with MachineOptions.program"
        )
    planned, made = task.options.low_ram_end, machine.layout.low_ram_end
    if planned != made:
        raise ValueError(f"{task.name} is planned for a hole at {planned:#x}, and RAM has one at {made:#x}")
    tables, touched = machine.page_tables, task.touched
    if touched is not None and tables.pages and len(touched) and touched[-1] >= tables.first_page:
        raise ValueError(
            f"{task.name} would use page {touched[-1]} of RAM, and from {tables.first_page} on there "
            "are page tables: plan it for less memory"
        )


def _compare(machine: Machine, workload: Workload, source: PageSource) -> tuple[int, int, list[int]]:
    """Compare all bytes with what the workload makes of `source`.

    Returns the checksum to expect, how many pages were compared, and the gpas of the first wrong ones.
    """

    def image(pages: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        return read_pages(source, pages)

    checked, wrong = 0, []
    for pages in _pages_with_bytes(machine):
        checked += len(pages)
        difference = _contents(machine, pages) ^ workload.expected_pages(image, pages)
        machine.page_tables.ignore_walks(pages, difference)
        machine.pv.ignore_writes(pages, difference)
        wrong += [machine.layout.gpa_of_page(page) for page in pages[difference.any(axis=1)].tolist()]
    return combined_checksum(workload.expected_checksums(image)), checked, wrong[:_MAX_NAMED]


def in_process_disk(size: int, path: str | None = None, *, any_format: bool = False) -> DeviceFactory:
    """Return what gives a machine a disk of at least `size` bytes, in a thread; `path` None is a temporary file.

    `any_format` takes also a file that seems to be no raw sectors.
    """

    @contextlib.contextmanager
    def attach(machine: Machine) -> Iterator[DiskThread]:
        with disk_file(path, size, any_format=any_format) as file, DiskThread(machine, file) as thread:
            yield thread

    return attach


def _run(
    machine: Machine,
    task: Task,
    timeout: float | None,
    on_tick: Callable[[Machine], None] | None,
    detector: LeakDetector | None,
    policy: CollapsePolicy,
) -> RunResult:
    """Run the machine; returns the result as it is while nothing has been compared."""
    machine.set_parameters(task.blocks)
    cpu_seconds = time.process_time()

    def tick() -> None:
        if on_tick is not None:
            on_tick(machine)
        if detector is not None:
            detector.tick(machine)

    if detector is not None:
        detector.attach(machine)
    machine.gate.forget_stops()  # arming is one, of no fault
    try:
        with entered(Collapser, machine.pager, policy) as collapser:
            machine.run(timeout, tick)
    finally:
        if detector is not None:
            detector.finish(machine)
    resident = resident_memory()
    exits: Counter[str] = Counter()
    emulated: Counter[str] = Counter()
    for thread in machine.threads:
        emulated.update(thread.emulated)
        for kind, count in thread.exits.items():
            exits[EXIT_NAMES.get(kind, kind.__name__)] += count
    pager, threads = machine.pager, machine.threads
    present = pager.bitmap.count()
    arrays = [thread.latencies for thread in threads] + list(pager.trap.latencies)
    found = RunResult(
        seconds=machine.guest_seconds,
        cpu_seconds=cpu_seconds,
        resident_bytes=resident,
        counters=pager.counters,
        pages_present=present,
        resident_peak=None if machine.limit is None else machine.limit.peak,
        memslots=pager.trap.memslots,
        slot_bytes=machine.slot_bytes,
        granule=pager.trap.granule,
        exits=dict(exits),
        emulated=dict(emulated),
        latencies=np.concatenate([np.frombuffer(each, dtype=np.uint64) for each in arrays]),
        stalls=sum(thread.stalls for thread in threads),
        stops=machine.gate.stops,
        longest_stop=machine.gate.longest_stop,
        setup_seconds=machine.setup_seconds,
        guest_checksum=combined_checksum(thread.parameters.checksum for thread in threads),
        expected_checksum=None,
        accesses=sum(thread.parameters.accesses for thread in threads),
        pages_checked=0,
        wrong_pages=[],
        poison=poison_result(machine, task.poisoned, task.touched, [thread.parameters for thread in threads]),
    )
    # Last, for the guest runs again for it, in the same parameter blocks; it only reads.
    return (
        found if policy == "off" else replace(found, collapse=measure_collapse(machine, collapser, timeout))
    )


def _pages_with_bytes(machine: Machine) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the numbers of all pages that are present or were, and have not been thrown away; a chunk at a time."""
    states = np.frombuffer(machine.pager.ledger.states, dtype=np.uint8)
    pages = np.flatnonzero(np.isin(states, _WITH_BYTES))
    for start in range(0, len(pages), _CHUNK_PAGES):
        yield pages[start : start + _CHUNK_PAGES]


def _contents(machine: Machine, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return the bytes of such pages, wherever they are: uint64[n, 512]. The machine has stopped."""
    content = np.empty((len(pages), PAGE_SIZE // 8), dtype=np.uint64)
    rows = content.data.cast("B")
    borders = [0, *(np.flatnonzero(np.diff(pages) != 1) + 1).tolist(), len(pages)]
    for first, end in itertools.pairwise(borders):  # rows of neighbouring pages, which are read as one
        if first < end:
            machine.pager.content(int(pages[first]), end - first, rows[first * PAGE_SIZE : end * PAGE_SIZE])
    return content
