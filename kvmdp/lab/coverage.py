"""Which accesses each trap catches, and how: a micro guest, or a thread of the host, for every kind of access.

The question behind it: userfaultfd works for every access in every form; what do traps that exit see? Nothing here
is declared. Each cell is run, its bytes are compared, and what it says is what was seen.

The in-kernel design (KVM Demand Paging, KVM Userfault) would stop every access of KVM's in one place. From user space
some are caught otherwise, or only because kvmdp sees to it: the notes say which.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from kvmdp.child import ChildProcess
from kvmdp.errors import PagingError, UnsupportedError
from kvmdp.interruption import entered
from kvmdp.kvm import Kvm
from kvmdp.lab.coverage_cell import EMULATED, Cell, Seen, seen_by, vcpu_exits
from kvmdp.lab.coverage_programs import descriptor_store, event_frame, far_call, selector_and_flags
from kvmdp.lab.detector import LeakDetector
from kvmdp.lab.experiment import run_workload, usable_memory
from kvmdp.lab.probe import ACCESSES as GUEST_ACCESSES
from kvmdp.machine.boot import vector_flags
from kvmdp.machine.guest_abi import PvFlag
from kvmdp.machine.hostinfo import emulates_ring_0
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions, PageTablePlace, catches_page_walks
from kvmdp.machine.pv_msrs import pv_flags
from kvmdp.machine.vcpu_thread import GuestError, GuestTimeoutError
from kvmdp.machine.workloads import WorkloadOptions, make_workload
from kvmdp.page import PAGE_SIZE, Origin, PageFault
from kvmdp.paging.access import GuestMemory
from kvmdp.paging.jobs import Observer
from kvmdp.shortage import in_words, named
from kvmdp.source.base import read_pages
from kvmdp.source.patched import PatchedSource
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.thread import run_in_thread
from kvmdp.trap.registry import TRAPS, trap_class

_MEMORY = 2 << 20
_PAGES = 8
_SEED = 2023
_TIMEOUT = 10.0
_CHILD_TIMEOUT = 60.0  # of a process that has to load all this first, on a host that may be busy


@dataclass(frozen=True, slots=True)
class Coverage:
    """The table: cells by access, then trap; `skipped` has the traps this host cannot have, with the reason."""

    cells: list[Cell]
    skipped: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether every cell was exact or is known not to be."""
        return all(cell.ok for cell in self.cells)


def covered_traps() -> list[str]:
    """Return the traps that have a column: those with a way of their own to catch an access."""
    return [name for name, kind in TRAPS.items() if kind.is_pure]


def coverage(on_cell: Callable[[str, str], None] | None = None) -> Coverage:
    """Run every cell; `on_cell` is told of each (access, trap) before it runs. Raises KvmError without KVM."""
    with Kvm():
        pass
    skipped: dict[str, str] = {}
    cells = []
    for access in ACCESSES:
        for trap in covered_traps():
            if trap in skipped:
                continue
            if on_cell is not None:
                on_cell(access, trap)
            try:
                cells.append(run_cell(access, trap))
            except UnsupportedError as error:
                skipped[trap] = str(error)
    return Coverage([cell for cell in cells if cell.trap not in skipped], skipped)


def run_cell(access: str, trap: str) -> Cell:
    """Run one cell; one that fails has the reason as its note. Raises UnsupportedError if this host lacks the trap."""
    try:
        with named():
            cell = ACCESSES[access](access, trap)
    except UnsupportedError:
        raise
    except Exception as error:  # whatever it is, the other cells are not lost to it
        return Cell(access, trap, Seen.MISSED, {}, exact=False, note=in_words(error), ok=False)
    if cell.note:
        return cell
    if not cell.exact:
        return replace(cell, seen=Seen.MISSED, note="the bytes were wrong", ok=False)
    if cell.seen is Seen.MISSED:
        return replace(cell, note="nothing trapped", ok=False)
    if "emulation_failure" in cell.exits:
        return replace(cell, note=_DECODED)
    return replace(cell, note=_NOTES.get((access, cell.seen), ""))


# Accesses of a guest that a workload makes


def _workload_cell(
    access: str,
    trap: str,
    name: str,
    *,
    write: bool = False,
    ring: int = 3,
    page_tables: PageTablePlace = "boot",
    pv: PvFlag = PvFlag.NONE,
    machine: type[Machine] = Machine,
) -> Cell:
    with Kvm() as kvm:
        vector = vector_flags(kvm)
    memory = usable_memory(_MEMORY, page_tables)
    work = WorkloadOptions(
        memory_bytes=memory, pages=_PAGES, seed=_SEED, vector=vector, write=write, ring=ring, pv=pv
    )
    workload = make_workload(name, work)
    options = MachineOptions(_MEMORY, trap, page_tables=page_tables)
    source = SyntheticSource(_MEMORY, _SEED)
    result = run_workload(options, workload, source, timeout=_TIMEOUT, machine_class=machine)
    exits = {kind: count for kind, count in result.exits.items() if kind not in ("io", "interrupted")}
    if not exits and len(result.latencies):
        exits = {"uffd_event": len(result.latencies)}
    # A page that never became present is one that the guest used behind the trap's back.
    all_trapped = result.counters.pages_admitted >= len(workload.touched)
    seen = seen_by(exits, sum(result.emulated.values()))
    return Cell(access, trap, seen, exits, exact=result.ok and all_trapped)


def _guest(access: str, trap: str) -> Cell:
    name, write = GUEST_ACCESSES[access]
    return _workload_cell(access, trap, name, write=write)


def _string(access: str, trap: str) -> Cell:
    return _workload_cell(access, trap, "string")


def _emulator(access: str, trap: str) -> Cell:
    """All of ring 0 where KVM has no hardware behind it; elsewhere what it emulates of ring 3."""
    if emulates_ring_0():
        return _workload_cell(access, trap, "touch", write=True, ring=0)
    return _workload_cell(access, trap, "string")


def _kvm_write(access: str, trap: str) -> Cell:
    """Have KVM write to an absent page by itself."""
    wanted = {"kvmclock page": PvFlag.CLOCK, "steal time": PvFlag.STEAL_TIME}[access]
    with Kvm() as kvm:
        offered = pv_flags(kvm) & wanted
    if not offered:
        return Cell(access, trap, Seen.MISSED, {}, exact=False, note="this KVM does not offer it to a guest")
    return _workload_cell(access, trap, "clock", pv=wanted)


class UnpreparedMachine(Machine):
    """Leaves paged page tables absent whatever the trap, to see what comes of a walk."""

    def _fetch_page_tables(self) -> None:
        pass


def _page_walk(access: str, trap: str) -> Cell:
    """Leave the page tables absent; if that is no good, show that making them present first is."""
    try:
        return _workload_cell(
            access, trap, "touch", write=True, page_tables="paged", machine=UnpreparedMachine
        )
    except GuestTimeoutError:
        what = "the guest never got on"
    except (PagingError, GuestError) as error:
        what = str(error).removeprefix("vCPU 0: ")
    prepared = _workload_cell(access, trap, "touch", write=True, page_tables="paged")
    if not prepared.exact:
        raise PagingError(
            "the bytes were wrong, though page tables were made present before the guest was entered"
        )
    note = (
        f"no walk gets past an absent page table ({what}); --page-tables paged makes them present before the guest is "
        "entered, and was exact"
    )
    # Where a walk is said to trap, nothing makes the tables present first.
    return Cell(access, trap, Seen.MISSED, {}, exact=False, note=note, ok=not catches_page_walks(trap))


# Accesses without a vCPU


def _device(access: str, trap: str) -> Cell:
    """A thread reads and writes absent pages through GuestMemory; then a guest reads all of them."""
    source = SyntheticSource(_MEMORY, _SEED)
    writes = [(page * PAGE_SIZE + 100, bytes([page]) * 300) for page in range(1, _PAGES, 2)]
    workload = make_workload("checksum", WorkloadOptions(memory_bytes=_MEMORY, pages=2 * _PAGES, seed=_SEED))
    with entered(Machine, MachineOptions(_MEMORY, trap), source) as machine, _observed(machine) as origins:
        machine.set_parameters(workload.blocks)
        device = GuestMemory(machine.layout, machine.backing, machine.pager, Origin.DEVICE)
        read: list[bytes] = []

        def transfer() -> None:
            for gpa, data in writes:
                device.write(gpa, data)
            read.extend(device.read(page * PAGE_SIZE + 50, 2000) for page in range(0, _PAGES, 2))

        run_in_thread(transfer, "device")
        requests = origins[Origin.DEVICE]
        machine.run(_TIMEOUT)
        after = PatchedSource(source, writes)
        expected = workload.expected_checksums(lambda pages: read_pages(after, pages))
        image = source.pages(np.arange(0, _PAGES, 2)).view(np.uint8)
        exact = read == [row.tobytes() for row in image[:, 50:2050]]
        exact &= [thread.parameters.checksum for thread in machine.threads] == expected
        exits = {"request": requests} if requests else {}
        return Cell(access, trap, seen_by(exits), exits, exact=exact)


def _system_call(access: str, trap: str) -> Cell:
    """The kernel reads an absent page of the guest view in a system call that did not ask for it."""
    source = SyntheticSource(_MEMORY, _SEED)
    with entered(Machine, MachineOptions(_MEMORY, trap), source) as machine:
        view = machine.backing.guest.view[:PAGE_SIZE]
        receiving, sending = os.pipe2(os.O_CLOEXEC)
        try:
            os.write(sending, view)
            found = os.read(receiving, PAGE_SIZE)
        except OSError as error:
            what = f"it fails ({error.strerror}), nothing wrong is read"
        else:
            what = "it reads memory that was never filled"
        finally:
            view.release()
            os.close(receiving)
            os.close(sending)
        exits = vcpu_exits(machine)
    if exits:
        return Cell(access, trap, seen_by(exits), exits, exact=found == source.pages(np.arange(1)).tobytes())
    # Sleeping is what userfaultfd has for this; a trap of KVM's cannot see it, and is not expected to.
    note, expected = f"{what}; devices have to ask the pager first", trap_class(trap).exits
    return Cell(access, trap, Seen.MISSED, {}, exact=False, note=note, ok=expected)


_TOUCH = (
    "import sys; sys.path[:] = {path!r}; "
    "from kvmdp.lab.coverage import touch_guest_view; touch_guest_view({trap!r})"
)


def touch_guest_view(trap: str) -> None:
    """Read an absent page through the guest view, past the pager, and print what came of it; may kill the process."""
    source = SyntheticSource(_MEMORY, _SEED)
    with entered(Machine, MachineOptions(_MEMORY, trap), source) as machine:
        found = ctypes.create_string_buffer(PAGE_SIZE)
        ctypes.memmove(
            found, machine.backing.guest.hva, 1
        )  # ctypes gives up the interpreter's lock meanwhile
        detector = LeakDetector()
        detector.finish(machine)
        exact = found.raw[:1] == source.pages(np.arange(1)).tobytes()[:1]
        print(json.dumps([exact, len(detector.leaks), vcpu_exits(machine)]))


def _touch(access: str, trap: str) -> Cell:
    """A user-space access of our own to the guest view, in a process that may die of it."""
    command = [sys.executable, "-c", _TOUCH.format(path=sys.path, trap=trap)]
    with entered(ChildProcess, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            out, error = child.communicate(timeout=_CHILD_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise PagingError(
                f"the process that was to touch it had not ended within {_CHILD_TIMEOUT:g} s"
            ) from None
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        note = f"it ends the process with {name}; run --detect-leaks says where it was"
        return Cell(access, trap, Seen.MISSED, {}, exact=False, note=note)
    if child.returncode:
        last_words = error.decode(errors="replace").strip().rpartition("\n")[2]
        raise PagingError(f"the touch failed: {last_words or f'exit status {child.returncode}'}")
    exact, leaks, exits = json.loads(out)
    if exits:
        return Cell(access, trap, seen_by(exits), exits, exact=exact)
    note = "it meets memory that was never filled" + ("; run --detect-leaks finds it" if leaks else "")
    return Cell(access, trap, Seen.MISSED, {}, exact=exact, note=note, ok=bool(leaks))


@contextlib.contextmanager
def _observed(machine: Machine) -> Iterator[Counter[Origin]]:
    """Count the faults that are resolved, by origin."""
    origins: Counter[Origin] = Counter()

    def observe(fault: PageFault, _claim: object, _began: int) -> None:
        origins[fault.origin] += 1

    observer = Observer(observe)
    machine.pager.jobs.add(observer)
    yield origins
    machine.pager.jobs.remove(observer)


ACCESSES: dict[str, Callable[[str, str], Cell]] = {
    **dict.fromkeys(GUEST_ACCESSES, _guest),
    "string": _string,
    "page walk": _page_walk,
    "emulator": _emulator,
    "sgdt": descriptor_store,
    "far call": far_call,
    "cs, flags": selector_and_flags,
    "event frame": event_frame,
    "kvmclock page": _kvm_write,
    "steal time": _kvm_write,
    "device thread": _device,
    "system call": _system_call,
    "user touch": _touch,
}

_DECODED = "KVM's emulator fails without an address; user space decodes the instruction and has it retried"
_TAKEN_BACK = (
    "KVM's emulator has begun it; user space takes it back and has the CPU run it once its page is there"
)
_FILTERED = "the MSR that enables it exits, and its page is made present before KVM is told"
_NOTES: dict[tuple[str, Seen], str] = {
    ("kvmclock page", Seen.EXIT): _FILTERED,
    ("steal time", Seen.EXIT): _FILTERED,
    **{
        (access, seen): note
        for access in ("read", "write", "vector", "fetch", "atomic", "string", "emulator")
        for seen, note in ((Seen.EMULATION, EMULATED), (Seen.RUN_AGAIN, _TAKEN_BACK))
    },
    (
        "device thread",
        Seen.SLEEP,
    ): "it asks the pager first and waits there; what does not ask is the row below",
}
