"""What the tests of a machine under demand paging share: making one, running it, seeing all of its memory."""

import contextlib
import errno
import functools
import os
import threading

import numpy as np
import pytest

from kvmdp.errors import UnsupportedError
from kvmdp.kvm import Kvm, Vm
from kvmdp.lab.experiment import run_workload
from kvmdp.machine.boot import vector_flags
from kvmdp.machine.guest_abi import VectorFlag
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.pv_msrs import pv_flags
from kvmdp.machine.workloads import Program, WorkloadOptions, make_workload
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.claim import State
from kvmdp.source.patched import PatchedSource
from kvmdp.source.request import FetchRequest
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap import registry
from kvmdp.trap.uffd import descriptor as uffd

TRAPS = ("memory-fault", "marker", "mmio")
BACKINGS = ("memfd", "anonymous")
MEMORY = 2 << 20
SEED = 11
LOOP_FOREVER = b"\xeb\xfe"  # a program that never reports: jmp to itself
TIMEOUT = 60  # seconds: a guest that hangs fails its test, it does not hang the suite

# Traps are named as on a command line: with `:device-view` behind it one has that beside.
WITH_DEVICE_VIEW = tuple(
    f"{name}:{registry.DEVICE_VIEW}" for name, kind in registry.TRAPS.items() if kind.by_memslot
)
ALL_TRAPS = (*registry.TRAPS, *WITH_DEVICE_VIEW)

_USERFAULTFD = pytest.mark.userfaultfd
every_trap = pytest.mark.parametrize(
    "trap", [*TRAPS, "layered", pytest.param("userfaultfd", marks=_USERFAULTFD)]
)
every_trap_and_backing = pytest.mark.parametrize(
    ("trap", "backing"),
    [
        *((trap, backing) for trap in TRAPS for backing in BACKINGS),
        ("layered", "memfd"),  # for shared memory alone
        *(pytest.param("userfaultfd", backing, marks=_USERFAULTFD) for backing in BACKINGS),
    ],
)


def options_of(trap, backing="memfd", **options):
    """The options of a machine under a trap that is named as above."""
    name, device_view = registry.parse_trap(trap)
    return MachineOptions(trap=name, device_view=device_view, backing=backing, **options)


@functools.cache
def _lacks(trap):
    """Why this host cannot have the trap, or None."""
    try:
        with Machine(options_of(trap, memory_bytes=MEMORY), SyntheticSource(MEMORY)):
            return None
    except UnsupportedError as error:
        return str(error)


def require_trap(trap):
    """Skip the test if this host cannot have the trap."""
    if reason := _lacks(trap):
        pytest.skip(reason)


def without_kernel_faults(monkeypatch):
    """Have userfaultfd give what an ordinary user gets: descriptors that are not told of the kernel's own faults."""
    opened = uffd._open

    def user_mode_only(user_mode_only):
        if not user_mode_only:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return opened(user_mode_only=True)

    monkeypatch.setattr(uffd, "_open", user_mode_only)


def without_msr_interception(monkeypatch):
    """Leave the guest's MSRs to KVM, as a VMM does that knows nothing of what KVM writes by itself."""
    monkeypatch.setattr(Vm, "set_msr_filter", lambda _vm, _ranges: None)


@functools.cache
def host_vectors():
    """The vector instructions a guest on this host may use beyond SSE2."""
    with Kvm() as kvm:
        return vector_flags(kvm)


@functools.cache
def host_pv():
    """What KVM can be made to write by itself on this host."""
    with Kvm() as kvm:
        return pv_flags(kvm)


def plan(name, *, vcpus=1, memory=MEMORY, **options):
    """Plan a workload with this suite's seed."""
    options = {"pv": host_pv(), **options}
    return make_workload(name, WorkloadOptions(memory_bytes=memory, vcpus=vcpus, seed=SEED, **options))


def prove(trap, backing, workload, **options):
    """Run a planned workload on the synthetic image; its result must be exact."""
    require_trap(trap)
    planned = workload.options
    options = {"memory_bytes": planned.memory_bytes, "vcpus": planned.vcpus, **options}
    machine = options_of(trap, backing, **options)
    result = run_workload(machine, workload, SyntheticSource(machine.memory_bytes, SEED), timeout=TIMEOUT)
    assert result.wrong_pages == []
    assert result.guest_checksum == result.expected_checksum
    assert result.pages_checked == result.pages_present
    assert result.ok
    return result


def make_machine(trap, backing="memfd", *, workload=None, source=None, machine_class=Machine, **options):
    """Make a machine for a planned workload; the source is the synthetic image with the workload's patches."""
    require_trap(trap)
    if workload is not None:
        options = {"memory_bytes": workload.options.memory_bytes, "vcpus": workload.options.vcpus, **options}
    options = {"memory_bytes": MEMORY, **options}
    source = source or SyntheticSource(options["memory_bytes"], SEED)
    if workload is not None and workload.patches:
        source = PatchedSource(source, workload.patches)
    machine = machine_class(options_of(trap, backing, **options), source)
    if workload is not None:
        machine.set_parameters(workload.blocks)
    return machine


def program_machine(trap, code, backing="memfd", *, ring=3, vcpus=1, patches=(), source=None, **options):
    """Make a machine that runs `code` in the program area; `patches` are (offset in RAM, bytes)."""
    assert len(code) <= PAGE_SIZE, "longer than any program of these tests"
    if source is None:
        memory = options.get("memory_bytes", MEMORY)
        source = SyntheticSource(memory, SEED)
    if patches:
        source = PatchedSource(source, list(patches))
    machine = make_machine(trap, backing, source=source, vcpus=vcpus, program=code, **options)
    flags = host_vectors() if ring == 3 else VectorFlag.NONE
    machine.set_parameters(
        Program(
            WorkloadOptions(
                memory_bytes=machine.options.memory_bytes, vcpus=vcpus, ring=ring, seed=SEED, vector=flags
            )
        ).blocks
    )
    return machine


def all_of_ram(machine):
    """Return every page's bytes wherever the trap keeps them, absent ones included: uint64[pages, 512].

    Only for a machine whose vCPUs have ended. A page that was never fetched is whatever lies there.
    """
    present = np.zeros(machine.layout.pages, dtype=bool)
    for first, count in machine.pager.bitmap.present_runs().tolist():
        present[first : first + count] = True
    ram = np.empty((machine.layout.pages, PAGE_SIZE // 8), dtype=np.uint64)
    rows = memoryview(ram).cast("B")
    for page in range(machine.layout.pages):
        # Reading an absent page of anonymous memory where the guest has it would kill this process.
        view = machine.backing.vmm.view if present[page] else machine.pager.trap.fill_view
        rows[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
    return ram


def contents(machine, pages):
    """Return the bytes of pages that are in RAM or in the sink, without making them present: uint64[n, 512]."""
    rows = np.empty((len(pages), PAGE_SIZE // 8), dtype=np.uint64)
    for row, page in zip(rows, pages, strict=True):
        part = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
        state = machine.pager.ledger.states[page]
        if state == State.PRESENT:
            row[:] = np.frombuffer(machine.backing.vmm.view[part], dtype=np.uint64)
        elif state == State.BACKED:
            row[:] = np.frombuffer(machine.pager.trap.fill_view[part], dtype=np.uint64)
        else:
            assert state == State.SINK
            buffer = bytearray(PAGE_SIZE)
            machine.pager.sink.fetch(FetchRequest(page * PAGE_SIZE), memoryview(buffer))
            row[:] = np.frombuffer(buffer, dtype=np.uint64)
    return rows


@contextlib.contextmanager
def meanwhile(*actions):
    """Run each action again and again in a thread of its own for the time of the block; errors come out at its end.

    An action is called with the number of the call, from 0, and says with False that it is done.
    """
    stop = threading.Event()
    errors = []

    def repeat(action):
        number = 0
        try:
            while not stop.is_set() and action(number) is not False:
                number += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
