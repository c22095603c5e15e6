"""The toy computer: RAM under demand paging, vCPUs that run a guest, and an orderly end in every case."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from kvmdp.abi.kvm import KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SYNC_REGS
from kvmdp.abi.kvm_x86 import KVM_SYNC_X86_REGS
from kvmdp.kvm import Kvm, Vcpu, Vm
from kvmdp.machine import guest_abi as guest
from kvmdp.machine.boot import BootSlot, guest_cpuid, set_boot_state, stock_image, vector_flags
from kvmdp.machine.hostinfo import vmalloc_used
from kvmdp.machine.ports import Loopback, Ports
from kvmdp.machine.runloop import GuestError, VcpuThread
from kvmdp.memory.backing import BACKINGS
from kvmdp.memory.layout import GuestLayout
from kvmdp.paging.access import GuestMemory
from kvmdp.paging.fault import Origin, PagingError
from kvmdp.paging.gate import VcpuGate
from kvmdp.paging.pager import DemandPager
from kvmdp.paging.peers import DeviceServer
from kvmdp.paging.policy import FaultAround
from kvmdp.paging.trap.registry import create_trap
from kvmdp.paging.trap.userfaultfd import UffdOptions
from kvmdp.paging.vcpu import VcpuPaging
from kvmdp.source.base import PageSource

_TICK_SECONDS = 0.1
_STALL_SECONDS = 1.0
_JOIN_SECONDS = 30.0


class GuestTimeoutError(GuestError):
    """The guest did not get done in the time it was given."""


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """What the machine is to be.

    `memory_bytes` of RAM; `trap` and `backing` by name; `granule` in bytes or None for the trap's choice;
    `fault_around` in pages; `program`, a flat binary for the guest's program area. `uffd` is for the trap
    userfaultfd. `pin` has a host CPU for each vCPU, or none.
    """

    memory_bytes: int
    trap: str
    backing: str = "memfd"
    vcpus: int = 1
    granule: int | None = None
    fault_around: int = 1
    program: bytes = b""
    uffd: UffdOptions = field(default_factory=UffdOptions)
    pin: tuple[int, ...] = ()


class Machine:
    """A guest with demand-paged RAM; owns all it is made of.

    The source belongs to the caller. `set_parameters` comes before `run`. `setup_seconds` says what each phase
    took, `slot_bytes` what kernel memory (vmalloc) arming took; the rest of the machine's state is in `pager`,
    `memory` and `threads`.

    Raises ValueError for options that make no sense, KvmError or UnsupportedError where the host lacks what they
    need.
    """

    def __init__(self, options: MachineOptions, source: PageSource) -> None:
        self.options = options
        self.setup_seconds: dict[str, float] = {}
        self._ended = threading.Condition()
        with contextlib.ExitStack() as stack:
            self._build(options, source, stack)
            self._stack = stack.pop_all()

    def _build(self, options: MachineOptions, source: PageSource, stack: contextlib.ExitStack) -> None:
        with self._phase("memory"):
            self.layout = GuestLayout(options.memory_bytes)
            policy = FaultAround(options.fault_around)
            self.backing = stack.enter_context(BACKINGS[options.backing](options.memory_bytes))
        with self._phase("vm"):
            kvm = stack.enter_context(Kvm())
            self.vm: Vm = stack.enter_context(kvm.create_vm())
            if self.vm.check_extension(KVM_CAP_EXIT_ON_EMULATION_FAILURE):
                self.vm.enable_cap(KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
            boot = BootSlot(self.layout, stock_image(), options.program)
            stack.callback(boot.close)
            boot.map_into(self.vm)
            self._boot = boot
        with self._phase("trap"):
            trap = create_trap(
                options.trap, self.vm, self.layout, self.backing, options.granule, options.uffd
            )
            stack.callback(trap.close)
            self.gate = VcpuGate()
            self.pager = DemandPager(self.layout, trap, source, policy, self.gate)
            stack.callback(self.pager.close)
            self.memory = GuestMemory(self.layout, self.backing, self.pager)
            self._decoding = GuestMemory(self.layout, self.backing, self.pager, Origin.VCPU, -1)
        with self._phase("arm"):
            before = vmalloc_used()
            self.pager.enable()
            self.slot_bytes = max(vmalloc_used() - before, 0)
        with self._phase("vcpus"):
            cpuid = guest_cpuid(kvm)
            vector = vector_flags(kvm)
            self.ports = Ports()
            Loopback(self.ports, options.vcpus)
            self.threads: list[VcpuThread] = []
            for index in range(options.vcpus):
                vcpu = stack.enter_context(self.vm.create_vcpu(index))
                set_boot_state(vcpu, cpuid, vector)
                if kvm.check_extension(KVM_CAP_SYNC_REGS) & KVM_SYNC_X86_REGS:
                    vcpu.sync_registers()
                self.threads.append(self._thread_of(vcpu))

    def _thread_of(self, vcpu: Vcpu) -> VcpuThread:
        pin = self.options.pin
        cpu = pin[vcpu.index] if pin else None
        paging = VcpuPaging(self.pager, vcpu, self.backing, self._read_physical)
        parameters = self._boot.parameters(vcpu.index)
        return VcpuThread(vcpu, paging, self.gate, self.ports, parameters, self._wake, cpu)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.setup_seconds[name] = time.perf_counter() - started

    def set_parameters(self, blocks: Sequence[guest.ParameterBlock]) -> None:
        """Tell each vCPU what to do; before `run`. The results are in `threads[n].parameters`, after it."""
        for thread, block in zip(self.threads, blocks, strict=True):
            ctypes.pointer(thread.parameters)[0] = block

    def serve_devices(self, report: Callable[[str], None]) -> DeviceServer:
        """Let devices in other processes in; once a machine. `report` is told of those that end badly.

        Raises ValueError if RAM cannot be shared. What is returned is closed with the machine, before RAM is.
        """
        server = DeviceServer(self.layout, self.backing, self.pager, report)
        self._stack.callback(server.close)
        self.pager.peers = server
        return server

    def _read_physical(self, gpa: int, length: int) -> bytes | None:
        """Return bytes of guest memory that is present, for decoding an instruction."""
        page = self.layout.page_of_gpa(gpa)
        if page is None:
            return self._boot.read(gpa, length)
        return self._decoding.read(gpa, length) if self.pager.bitmap.test(page) else None

    def memory_for_device(self, number: int) -> GuestMemory:
        """Return the access to RAM of device `number`: its faults carry that number."""
        return GuestMemory(self.layout, self.backing, self.pager, Origin.DEVICE, number)

    # Running

    def run(self, timeout: float | None = None, on_tick: Callable[[], None] | None = None) -> None:
        """Run the guest until every vCPU has reported that it is done.

        `timeout` is in seconds; `on_tick` is called about ten times a second. Raises the first error of a
        vCPU: PagingError (a page cannot be had) or GuestError (the guest did something it must not, or was
        not done in time). Whatever happens, all vCPU threads have ended when this returns.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            for thread in self.threads:
                thread.start()
            self._monitor(deadline, on_tick)
        finally:
            self.stop()
        errors = [thread.error for thread in self.threads if thread.error is not None]
        if errors:
            raise errors[0]
        if not all(thread.done for thread in self.threads):
            if self.pager.error is not None:
                raise self.pager.error
            raise GuestTimeoutError(self._timeout_message(timeout))

    @property
    def guest_seconds(self) -> float:
        """How long the guest ran: from the first vCPU's entry to the end of the last."""
        return max(each.finished for each in self.threads) - min(each.began for each in self.threads)

    def _monitor(self, deadline: float | None, on_tick: Callable[[], None] | None) -> None:
        """Wait for the end; meanwhile watch for vCPUs on which KVM spins."""
        watched = {thread: (0, time.monotonic()) for thread in self.threads}
        while True:
            with self._ended:
                if self._is_over():
                    return
                self._ended.wait(_TICK_SECONDS)
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return
            for thread in self.threads:
                exits, since = watched[thread]
                if thread.exits.total() != exits or not self.gate.is_inside(thread.vcpu):
                    watched[thread] = (thread.exits.total(), now)
                elif now - since >= _STALL_SECONDS:
                    watched[thread] = (exits, now)
                    thread.suspect_stall()
            if on_tick is not None:
                on_tick()

    def _is_over(self) -> bool:
        if self.pager.error is not None or any(thread.error is not None for thread in self.threads):
            return True
        return all(thread.ended for thread in self.threads)

    def _wake(self) -> None:
        with self._ended:
            self._ended.notify_all()

    def _timeout_message(self, timeout: float | None) -> str:
        where = ", ".join(
            f"vCPU {thread.vcpu.index} at RIP {thread.vcpu.regs.rip:#x}"
            for thread in self.threads
            if not thread.done
        )
        return f"the guest was not done within {timeout:g} seconds ({where}): give it more with --timeout"

    def stop(self) -> None:
        """Get every vCPU out of the guest and wait for the threads' end. Raises PagingError if one stays."""
        self.gate.stop()
        self.pager.cancel()
        for thread in self.threads:
            if thread.started and not thread.join(_JOIN_SECONDS):
                raise PagingError(
                    f"vCPU {thread.vcpu.index} did not stop within {_JOIN_SECONDS:.0f} seconds: the source or "
                    "the kernel holds it"
                )

    def close(self) -> None:
        """Give everything back; a second call does nothing. No vCPU may be running."""
        self._stack.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
