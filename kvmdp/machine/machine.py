"""The toy computer: RAM under demand paging, vCPUs that run a guest, and an orderly end in every case."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import time
from collections.abc import Callable, Iterator, Sequence

from kvmdp.abi.kvm_cap import Cap
from kvmdp.abi.kvm_x86 import KVM_SYNC_X86_REGS, kvm_regs, kvm_sregs, kvm_vcpu_events
from kvmdp.closing import Closing
from kvmdp.errors import BusyError, PagingError
from kvmdp.interruption import Interruptible, Uninterrupted
from kvmdp.jobs.resident_limit import ResidentLimit, check_limit
from kvmdp.kvm import Interrupted, Kvm, Vcpu, Vm
from kvmdp.kvm.machine_check import guest_mcg_cap
from kvmdp.machine import guest_abi as guest
from kvmdp.machine.boot import (
    EMPTY_TABLE,
    BootSlot,
    guest_cpuid,
    set_boot_state,
    stock_image,
    vector_flags,
)
from kvmdp.machine.hostinfo import vmalloc_used
from kvmdp.machine.options import MachineOptions, catches_page_walks, check_together
from kvmdp.machine.page_tables import PageTables
from kvmdp.machine.ports import Loopback, Ports
from kvmdp.machine.pv_msrs import PvMsrs
from kvmdp.machine.stall_watch import StallWatch
from kvmdp.machine.vcpu_thread import GuestError, GuestTimeoutError, VcpuThread
from kvmdp.memory.backings import create_backing
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE, Origin, Outcome
from kvmdp.paging.access import GuestMemory
from kvmdp.paging.pager import Pager
from kvmdp.peers.peers import DeviceServer
from kvmdp.source.base import PageSource, fetch, ram_source
from kvmdp.source.patched import PatchedSource
from kvmdp.source.request import FetchRequest
from kvmdp.trap.create import create_trap
from kvmdp.trap.uffd.device_view import DeviceView
from kvmdp.vcpu.faults import VcpuPaging
from kvmdp.vcpu.gate import VcpuGate

_TICK_SECONDS = 0.1
_JOIN_SECONDS = 30.0
_FILLED_AT_ONCE = 2 << 20
_RUN_IS_OVER = (
    "is absent and the run is over: call Machine.pager.reopen to have pages come again, or Machine.restart to run the "
    "guest again"
)


class Machine(Closing):
    """A guest with demand-paged RAM; owns all it is made of.

    The source belongs to the caller; `source` is that with the page tables in it, if they are paged: what RAM holds
    before the guest runs. `set_parameters` comes before `run`. `setup_seconds` says what each phase took, `slot_bytes`
    what kernel memory (vmalloc) arming took; all else is in `pager`, `memory` and `threads`. If it was asked for
    `device_view` is where threads of this process read and write RAM by plain loads and stores until the machine stops;
    else it is None. `has_machine_checks` says whether this KVM lets a guest know of poisoned memory.

    Raises ValueError for options that make no sense, KvmError or UnsupportedError where the host lacks what they
    need.
    """

    def __init__(self, options: MachineOptions, source: PageSource) -> None:
        self.options = options
        self.setup_seconds: dict[str, float] = {}
        # A word for each thread that ends. Not a condition: an interruption of the main thread in one can leave
        # its lock as no `with` expects it.
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._closed = False
        self._stack = contextlib.ExitStack()
        try:
            with Uninterrupted():
                self._build(options, source, self._stack)
        except BaseException as error:
            with Uninterrupted():  # no `close`: a file of RAM goes too
                self._stack.__exit__(type(error), error, error.__traceback__)
            raise

    def _build(self, options: MachineOptions, source: PageSource, stack: contextlib.ExitStack) -> None:
        check_together(options, handler=ram_source(source) is not None)
        with self._phase("memory"):
            self.layout = GuestLayout(options.memory_bytes, options.low_ram_end)
            self.page_tables = PageTables(self.layout, paged=options.page_tables != "boot")
            patches = self.page_tables.patches
            self.source = PatchedSource(source, patches) if patches else source
            policy = options.fault_policy()
            # Unmapped after the VM has gone: KVM would have to take it out of the guest first.
            memory = stack.enter_context(contextlib.ExitStack())
            kvm = stack.enter_context(Kvm())
            self.vm: Vm = stack.enter_context(kvm.create_vm())
            self.backing = memory.enter_context(
                create_backing(
                    options.backing,
                    options.memory_bytes,
                    self.vm,
                    thp=options.thp,
                    path=options.backing_file,
                    reserve=options.reserve_hugepages,
                )
            )
        with self._phase("vm"):
            if self.vm.check_extension(Cap.EXIT_ON_EMULATION_FAILURE):
                self.vm.enable_cap(Cap.EXIT_ON_EMULATION_FAILURE, 1)
            boot = BootSlot(self.page_tables, stock_image(), options.program)
            stack.callback(boot.close)
            boot.map_into(self.vm)
            self._boot = boot
        with self._phase("trap"):
            trap = create_trap(
                options.trap,
                self.vm,
                self.layout,
                self.backing,
                options.granule,
                options.uffd,
                options.slot_memory,
                device_view=options.device_view,
            )
            stack.callback(trap.close)
            self.gate = VcpuGate()
            self.pager = Pager(self.layout, trap, self.source, policy, self.gate)
            self.pager.holds = options.holds
            stack.callback(self.pager.close)
            self._memory = GuestMemory(self.layout, self.backing, self.pager, cancelled=_RUN_IS_OVER)
            self.device_view: DeviceView | None = trap.device_view
            self._decoding = GuestMemory(self.layout, self.backing, self.pager, Origin.VCPU, -1)
            self._bind(source)
        with self._phase("arm"):
            before = vmalloc_used()
            if options.demand_paging:
                self.pager.enable()
            else:
                self._fill()
            self.slot_bytes = max(vmalloc_used() - before, 0)
            self._secure_page_tables()
            self.limit = self._limit_resident(stack)
        with self._phase("vcpus"):
            self._make_vcpus(kvm, stack)

    def _make_vcpus(self, kvm: Kvm, stack: contextlib.ExitStack) -> None:
        self.pv = PvMsrs(
            kvm,
            self.vm,
            self.layout,
            self.pager,
            lambda gpa, length: self._boot.read(gpa, length) is not None,
        )
        cpuid = guest_cpuid(kvm, self.pv.features)
        vector = vector_flags(kvm)
        mcg_cap = guest_mcg_cap(kvm.mce_capabilities()) if kvm.check_extension(Cap.MCE) else None
        self.has_machine_checks = mcg_cap is not None
        self.ports = Ports()
        Loopback(self.ports, self.options.vcpus)
        self.threads: list[VcpuThread] = []
        self._at_boot: list[tuple[kvm_sregs, kvm_vcpu_events, kvm_regs]] = []
        for index in range(self.options.vcpus):
            vcpu = stack.enter_context(self.vm.create_vcpu(index))
            set_boot_state(vcpu, cpuid, vector, self.page_tables)
            if mcg_cap is not None:
                vcpu.setup_mce(mcg_cap)
            if kvm.check_extension(Cap.SYNC_REGS) & KVM_SYNC_X86_REGS:
                vcpu.sync_registers()
            self._at_boot.append((vcpu.sregs, vcpu.events, kvm_regs.from_buffer_copy(vcpu.regs)))
            self.threads.append(self._thread_of(vcpu))

    def _fill(self) -> None:
        """Put all of RAM in place, where nothing is ever armed."""
        if self.backing.refusable:
            self.backing.populate(0, self.backing.size)
        view = self.backing.vmm.view
        for offset, length in self.source.extents():
            end = offset + length
            for start in range(offset, end, _FILLED_AT_ONCE):
                with Interruptible():
                    fetch(self.source, FetchRequest(start), view[start : min(start + _FILLED_AT_ONCE, end)])
        self.pager.start_plain()

    def _secure_page_tables(self) -> None:
        """See to it that paged page tables stay, and are there before a walk that would not trap."""
        if not self.page_tables.pages:
            return
        self.pager.retain(self.page_tables.first_page, self.page_tables.pages)
        if not catches_page_walks(self.options.trap):
            self._fetch_page_tables()

    def _fetch_page_tables(self) -> None:
        """Make paged page tables present. The lab leaves them absent instead, to see what comes of it."""
        with Interruptible():
            outcome = self.pager.mark_present(self.page_tables.first_page, self.page_tables.pages)
        if outcome is not Outcome.PRESENT:
            raise self.pager.error or PagingError("the page tables cannot be made present")

    def _limit_resident(self, stack: contextlib.ExitStack) -> ResidentLimit | None:
        """Have pages evicted when more are in memory than the options allow. Raises ValueError."""
        if self.options.resident_limit is None:
            return None
        size, unit = self.options.resident_limit, self.pager.ledger.unit
        check_limit(size, self.options.vcpus, self.options.most_at_once, unit, self.page_tables.pages)
        limit = ResidentLimit(self.pager, size // PAGE_SIZE)
        stack.callback(limit.close)
        return limit

    def _bind(self, source: PageSource) -> None:
        """Hand RAM to a source that another process fills it from."""
        remote = ram_source(source)
        if remote is not None:
            regions = [(each.gpa, each.size, each.offset) for each in self.layout.regions]
            remote.bind(self.backing.vmm.view, self.backing.fd, self.pager.bitmap.fd, regions)

    def _thread_of(self, vcpu: Vcpu) -> VcpuThread:
        pin = self.options.pin
        cpu = pin[vcpu.index] if pin else None
        paging = VcpuPaging(self.pager, self.gate, vcpu, self.backing, self._read_physical, EMPTY_TABLE)
        parameters = self._boot.parameters(vcpu.index)
        return VcpuThread(
            vcpu, paging, self.gate, self.ports, self.pv, parameters, lambda: self._ended.put(None), cpu
        )

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.setup_seconds[name] = time.perf_counter() - started

    def set_parameters(self, blocks: Sequence[guest.ParameterBlock]) -> None:
        """Tell each vCPU what to do; before `run`. The results are in `threads[n].parameters`, after it.

        Raises ValueError unless there is a block for each vCPU.
        """
        if len(blocks) != len(self.threads):
            raise ValueError(
                f"{len(blocks)} parameter blocks for {len(self.threads)} vCPUs: give one for each"
            )
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

    @property
    def memory(self) -> GuestMemory:
        """RAM, to be read and written; once a run is over its present pages only. Raises ValueError after `close`."""
        if self._closed:
            raise ValueError("the machine is closed and its RAM is gone: read it before `close`")
        return self._memory

    def _read_physical(self, gpa: int, length: int) -> bytes | None:
        """Return bytes of guest memory that is present, for decoding an instruction; None if they are not all there.

        Fetches nothing and waits for no claim: what was there a moment ago may have been taken away or poisoned since.
        """
        page = self.layout.page_of_gpa(gpa)
        if page is None:
            return self._boot.read(gpa, length)
        try:
            return self._decoding.read(gpa, length, nowait=True)
        except BusyError:
            return None

    def memory_for_device(self, number: int) -> GuestMemory:
        """Return the access to RAM of device `number`: its faults carry that number."""
        return GuestMemory(self.layout, self.backing, self.pager, Origin.DEVICE, number)

    # Running

    def run(self, timeout: float | None = None, on_tick: Callable[[], None] | None = None) -> None:
        """Run the guest until every vCPU has reported that it is done.

        `timeout` is in seconds; `on_tick` is called about ten times a second. Raises the first error of a
        vCPU: PagingError (a page cannot be had) or GuestError (the guest did something it must not, or was
        not done in time). Whatever happens, all vCPU threads have ended when this returns. An interruption is taken
        while the guest runs, and not while it is started or stopped. Raises ValueError, and runs nothing, without
        `set_parameters`, and for a second run without `restart`.
        """
        self._check_ready()
        deadline = None if timeout is None else time.monotonic() + timeout
        with Uninterrupted():
            try:
                for thread in self.threads:
                    thread.start()
                with Interruptible():
                    self._monitor(deadline, on_tick)
                # Before the stop: a vCPU that is let go of while it walks an absent page table ends in a triple fault.
                errors = [thread.error for thread in self.threads if thread.error is not None]
            finally:
                self.stop()
        if errors:
            raise errors[0]
        if not all(thread.done for thread in self.threads):
            if self.pager.error is not None:
                raise self.pager.error
            raise GuestTimeoutError(self.threads, timeout)

    def _check_ready(self) -> None:
        if any(thread.started for thread in self.threads):
            raise ValueError("the machine has run: call restart before it runs again")
        if not all(thread.parameters.magic for thread in self.threads):
            raise ValueError("the vCPUs have not been told what to do: call set_parameters before run")

    @property
    def guest_seconds(self) -> float:
        """How long the guest ran: from the first vCPU's entry to the end of the last."""
        return max(each.finished for each in self.threads) - min(each.began for each in self.threads)

    def _monitor(self, deadline: float | None, on_tick: Callable[[], None] | None) -> None:
        """Wait for the end; meanwhile watch for vCPUs on which KVM spins."""
        watch = StallWatch(self.threads, self.gate)
        while not self._is_over():
            with contextlib.suppress(queue.Empty):
                self._ended.get(timeout=_TICK_SECONDS)
            if deadline is not None and time.monotonic() >= deadline:
                return
            watch.look()
            if on_tick is not None:
                on_tick()

    def _is_over(self) -> bool:
        if self.pager.error is not None or any(thread.error is not None for thread in self.threads):
            return True
        return all(thread.ended for thread in self.threads)

    def stop(self) -> None:
        """Get every vCPU out of the guest and wait for the threads' end. Raises PagingError if one stays.

        The vCPUs' faults are all counted, and pages that are being evicted have got where they go, when this returns.
        """
        self.gate.stop()
        try:
            self.pager.cancel()
        finally:  # if a sleeper could not be let go of, all other vCPUs end in any case
            self._join()

    def _join(self) -> None:
        for thread in self.threads:
            if not thread.join(_JOIN_SECONDS):
                raise PagingError(
                    f"vCPU {thread.vcpu.index} did not stop within {_JOIN_SECONDS:.0f} seconds: the source or "
                    "the kernel holds it"
                )
        if not self.pager.trap.settle(_JOIN_SECONDS):
            raise PagingError(
                f"a fault was not resolved within {_JOIN_SECONDS:.0f} seconds: the source or the kernel holds it"
            )
        if self.limit is not None and not self.limit.settle(_JOIN_SECONDS):
            raise PagingError(
                f"an eviction did not end within {_JOIN_SECONDS:.0f} seconds: the kernel holds it"
            )

    def restart(self, blocks: Sequence[guest.ParameterBlock]) -> None:
        """Make the vCPUs ready for another `run`, from the guest's entry, with RAM as it is; after one that went well.

        `threads` are new, so are their counts of exits; what the pager counts goes on. vCPUs are as at boot but for
        XCR0 and what the guest left in FPU and vector registers. A device view that the stop has ended stays so. Raises
        ValueError if the guest has not come to its end, or is running.
        """
        if not all(thread.done and thread.join(0) for thread in self.threads) or self.pager.error is not None:
            raise ValueError("a machine is restarted when all its vCPUs are done, not after a failure")
        with Uninterrupted():
            self._boot.load()  # with a task register that is not busy
            vcpus = [thread.vcpu for thread in self.threads]
            for vcpu in vcpus:
                self._reset(vcpu)
            self.threads = [self._thread_of(vcpu) for vcpu in vcpus]
            self.set_parameters(blocks)
            self.pager.reopen()
            self.gate.reopen()

    def _reset(self, vcpu: Vcpu) -> None:
        """Put a vCPU, whose last exit was its report, back to the guest's entry."""
        # KVM finishes what it has begun, or it would do so when the vCPU is entered, over the registers set here.
        vcpu.immediate_exit = True
        if type(exit := vcpu.run()) is not Interrupted:
            raise GuestError(f"vCPU {vcpu.index}: its report does not end: {exit}")
        self.pv.switch_off(vcpu)
        sregs, events, regs = self._at_boot[vcpu.index]
        vcpu.set_sregs(sregs)
        vcpu.set_events(events)
        vcpu.set_regs(regs)

    def close(self) -> None:
        """Give everything back; a second call does nothing. No vCPU may be running."""
        self._closed = True
        with Uninterrupted():
            self._stack.close()
