"""One measurement: a contender does the work once, in a machine of its own.

Units: seconds, pages of 4 KiB, latencies in nanoseconds.
"""

from __future__ import annotations

import contextlib
import resource
import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvmdp.bench.contender import Contender
from kvmdp.bench.device import DeviceThread
from kvmdp.bench.trace import Record, Tracer
from kvmdp.bench.work import Work
from kvmdp.errors import PagingError
from kvmdp.interruption import entered
from kvmdp.kvm import BusError, Interrupted, Kvm, MemoryFault
from kvmdp.lab.experiment import in_process_disk
from kvmdp.machine.boot import vector_flags
from kvmdp.machine.hostinfo import page_table_memory, proportional_memory, vmalloc_used
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.workloads import WORKLOADS, Workload, WorkloadOptions, check_ring, make_workload
from kvmdp.memory.backings import backing_class, check_backing_options
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE, Outcome
from kvmdp.paging.policy import FaultAround
from kvmdp.source.base import PageSource
from kvmdp.source.network import NetworkSource
from kvmdp.source.patched import PatchedSource
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.thread import run_in_thread
from kvmdp.trap.fits import granule_of
from kvmdp.trap.registry import trap_class

_TIMEOUT = 300.0
_FLOOR_EXITS = 2000


@dataclass(frozen=True, slots=True)
class Round:
    """What one round took."""

    seconds: float
    pages: int
    faults: int
    user_s: float
    system_s: float
    voluntary_switches: int
    involuntary_switches: int

    @property
    def pages_per_second(self) -> float:
        """Rate at which the guest got through the pages it touched."""
        return self.pages / self.seconds


@dataclass(slots=True)
class Measurement:
    """A round with what is not part of the JSON's round: latencies, of vCPUs and the device, memory, network.

    `slot_bytes` is kernel memory (vmalloc) of the memslots, `arm_seconds` what arming took, `resident_beyond_bytes`
    what this process grew by beyond the pages it fetched.
    """

    round: Round
    latencies: npt.NDArray[np.uint64]
    device_latencies: npt.NDArray[np.uint64]
    vmpte_bytes: int
    bitmap_bytes: int
    memslots: int
    slot_bytes: int
    arm_seconds: float
    resident_beyond_bytes: int
    in_flight: float
    memory_bytes: int
    trace: list[Record]


def measure(contender: Contender, *, traced: bool = False) -> Measurement:
    """Let the contender do its work once. Raises what `Machine` and `Machine.run` raise."""
    work = contender.work
    source, network = source_of(work)
    workload = plan(work)
    if workload.patches:
        source = PatchedSource(source, workload.patches)
    tables, resident = page_table_memory(), proportional_memory()
    never = contender.trap is None and contender.off is None
    options = replace(machine_options(contender), demand_paging=not never)
    disk = in_process_disk(workload.disk_bytes) if workload.disk_bytes else contextlib.nullcontext
    with entered(Machine, options, source) as machine, entered(disk, machine):
        vmalloc = vmalloc_used()
        if contender.trap is None:
            make_plain(machine)
        machine.set_parameters(workload.blocks)
        tracer = Tracer(machine.layout) if traced else None
        if tracer is not None:
            machine.pager.jobs.add(tracer)
        before = resource.getrusage(resource.RUSAGE_SELF)
        faults = machine.pager.counters.claims
        device = DeviceThread(machine, work.device_pages)
        try:
            device.start()
            machine.run(_TIMEOUT)
        finally:
            device.join()  # run has stopped the machine, however it ended
        after = resource.getrusage(resource.RUSAGE_SELF)
        latencies = [thread.latencies for thread in machine.threads]
        latencies += machine.pager.trap.latencies
        touched = workload.touched
        in_place, fetched = machine.layout.pages, machine.pager.counters.pages_fetched
        return Measurement(
            Round(
                seconds=machine.guest_seconds,
                pages=len(touched),
                faults=machine.pager.counters.claims - faults,
                user_s=after.ru_utime - before.ru_utime,
                system_s=after.ru_stime - before.ru_stime,
                voluntary_switches=after.ru_nvcsw - before.ru_nvcsw,
                involuntary_switches=after.ru_nivcsw - before.ru_nivcsw,
            ),
            latencies=np.concatenate([np.frombuffer(each, dtype=np.uint64) for each in latencies]),
            device_latencies=np.frombuffer(device.latencies, dtype=np.uint64),
            vmpte_bytes=max(page_table_memory() - tables, 0),
            bitmap_bytes=machine.pager.bitmap.mapped_bytes,
            memslots=machine.pager.trap.memslots,
            # What arming took, and what was made since: mmio has no memslots to begin with.
            slot_bytes=machine.slot_bytes + max(vmalloc_used() - vmalloc, 0),
            arm_seconds=machine.setup_seconds["arm"],
            resident_beyond_bytes=max(
                proportional_memory() - resident - (in_place if never else fetched) * PAGE_SIZE, 0
            ),
            in_flight=network.in_flight if network else 0.0,
            memory_bytes=work.memory_bytes,
            trace=tracer.records() if tracer else [],
        )


def source_of(work: Work) -> tuple[PageSource, NetworkSource | None]:
    """Return the synthetic image, as far away as the work says, and the network in front of it if there is one."""
    image = SyntheticSource(work.memory_bytes, work.seed)
    if not work.latency and not work.bandwidth:
        return image, None
    network = NetworkSource(image, work.latency, work.bandwidth)
    return network, network


def plan(work: Work) -> Workload:
    """Return the workload. Raises ValueError if it cannot be done, UnsupportedError if this host cannot do it."""
    check_ring(work.workload, work.ring)
    with Kvm() as kvm:
        vector = vector_flags(kvm)
    options = WorkloadOptions(
        memory_bytes=work.memory_bytes,
        vcpus=work.vcpus,
        ring=work.ring,
        seed=work.seed,
        order=work.order,
        stride=work.stride,
        write=work.write,
        overlap=work.overlap,
        touches=work.touches,
        vector=vector,
    )
    return make_workload(work.workload, options)


def check(contender: Contender) -> None:
    """Raise ValueError, one sentence, if the contender's work cannot be done; KvmError where there is no KVM."""
    work = contender.work
    if work.vcpus > 0:
        GuestLayout(work.memory_bytes)
    if not len(plan(work).touched):
        raise ValueError(f"the workload {work.workload} touches no page here to be measured: give another")
    FaultAround(work.fault_around)
    check_backing_options(work.backing, work.memory_bytes, reserve=work.reserve_hugepages)
    machine_options(contender)


def machine_options(contender: Contender) -> MachineOptions:
    """Return the machine a contender runs in. Raises ValueError for a granule that RAM cannot have."""
    work = contender.work
    trap = contender.trap or contender.off or "mmio"  # present: any trap by memslot, for it is never armed
    kind = trap_class(trap)
    # The granule of the work is for all contenders, and means nothing to those that have none.
    granule = granule_of(
        kind,
        GuestLayout(work.memory_bytes),
        backing_class(work.backing),
        work.granule if kind.by_memslot else None,
        work.fault_around,
    )
    return MachineOptions(
        memory_bytes=work.memory_bytes,
        trap=trap,
        backing=work.backing,
        vcpus=work.vcpus,
        granule=granule,
        fault_around=work.fault_around,
        program=WORKLOADS[work.workload].program,
        uffd=contender.uffd_options,
        pin=work.pin,
        device_view=work.device_view,
        reserve_hugepages=work.reserve_hugepages,
    )


def make_plain(machine: Machine) -> None:
    """Put everything in place, and switch demand paging off where it is on. Raises what the pager does."""
    if machine.pager.enabled:
        outcome = machine.pager.mark_present(0, machine.layout.pages)
        if outcome is not Outcome.PRESENT:
            raise machine.pager.error or PagingError(
                f"memory could not be made present: {outcome.name.lower()}"
            )
        machine.pager.disable()
    machine.backing.guest.populate(0, machine.backing.size)


def floor(contender: Contender) -> float | None:
    """Return what a bare fault exit costs in seconds: the vCPU is entered again and again on a page left absent.

    It is KVM_RUN and the decoding of its exit, no more. Only for a trap that `repeats`: under the others a fault
    cannot be left unresolved. None where the access is no such exit either: in ring 0 where KVM emulates that.
    """
    workload = plan(contender.work)
    source = SyntheticSource(contender.work.memory_bytes)
    with entered(Machine, machine_options(contender), source) as machine:
        machine.set_parameters(workload.blocks)
        vcpu = machine.threads[0].vcpu
        seconds: list[float] = []

        def enter() -> None:
            while isinstance(exit := vcpu.run(), Interrupted):
                pass
            if isinstance(exit, (BusError, MemoryFault)):
                started = time.perf_counter()
                for _ in range(_FLOOR_EXITS):
                    vcpu.run()
                seconds.append((time.perf_counter() - started) / _FLOOR_EXITS)

        def run() -> None:
            vcpu.attach_thread()
            try:
                enter()
            finally:
                vcpu.detach_thread()

        # In a thread like any vCPU's: the signals it blocks stay blocked for the thread's life.
        run_in_thread(run, "floor")
        return seconds[0] if seconds else None
