"""One vCPU's thread: enter the guest, deal with why it came back, again, until the guest is done."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NoReturn

from kvmdp.abi.kvm_x86 import kvm_regs
from kvmdp.errors import KvmdpError, PagingError
from kvmdp.kvm import (
    BadAddress,
    BusError,
    Exit,
    FailEntry,
    Hlt,
    InternalError,
    Interrupted,
    Io,
    IoIn,
    IoOut,
    KvmError,
    MemoryFault,
    Mmio,
    MmioRead,
    MmioWrite,
    MsrWrite,
    Shutdown,
    Vcpu,
)
from kvmdp.machine import guest_abi as guest
from kvmdp.machine.ports import Ports
from kvmdp.machine.pv_msrs import PvMsrs
from kvmdp.shortage import ShortageError, in_words
from kvmdp.thread import JoinableThread
from kvmdp.vcpu.faults import VcpuPaging
from kvmdp.vcpu.gate import VcpuGate

EXIT_NAMES: dict[type, str] = {
    MemoryFault: "memory_fault",
    BusError: "sigbus",
    BadAddress: "efault",
    MmioRead: "mmio",
    MmioWrite: "mmio",
    InternalError: "emulation_failure",
    IoIn: "io",
    IoOut: "io",
    MsrWrite: "msr",
    Hlt: "hlt",
    Interrupted: "interrupted",
}

_EXCEPTIONS = {
    0: "#DE",
    1: "#DB",
    2: "NMI",
    3: "#BP",
    4: "#OF",
    5: "#BR",
    6: "#UD",
    7: "#NM",
    8: "#DF",
    10: "#TS",
    11: "#NP",
    12: "#SS",
    13: "#GP",
    14: "#PF",
    16: "#MF",
    17: "#AC",
    18: "#MC",
    19: "#XM",
    20: "#VE",
    21: "#CP",
}
_PAGE_FAULT = 14
_NO_REQUEST = (1 << 64) - 1


class GuestError(KvmdpError):
    """The guest did something that ends the run; the message says what and where."""


class GuestTimeoutError(GuestError):
    """The guest of these vCPU threads was not done within `timeout` seconds."""

    def __init__(self, threads: Sequence[VcpuThread], timeout: float | None) -> None:
        where = ", ".join(
            f"vCPU {thread.vcpu.index} at RIP {thread.vcpu.regs.rip:#x}"
            for thread in threads
            if not thread.done
        )
        super().__init__(
            f"the guest was not done within {timeout:g} seconds ({where}): give it more with --timeout"
        )


class VcpuThread:
    """Runs one vCPU in a thread of its own.

    After the thread has ended, `error` says what went wrong (None: the guest reported that it is done, or the
    machine was stopped) and `done` whether the guest got to its end. `started` is whether `start` was called; a
    thread starts once. `exits` counts exits by class and is this
    thread's own until then; `entries` counts entries into the guest and may be read at any time. `latencies` holds
    nanoseconds from KVM_RUN's return to the next entry, one a fault. `began` and `finished` are when the thread
    first entered the guest and when it was done with it (time.perf_counter).
    """

    def __init__(
        self,
        vcpu: Vcpu,
        paging: VcpuPaging,
        gate: VcpuGate,
        ports: Ports,
        pv: PvMsrs,
        parameters: guest.ParameterBlock,
        on_end: Callable[[], None],
        cpu: int | None = None,
    ) -> None:
        self.vcpu = vcpu
        self.parameters = parameters
        self.error: Exception | None = None
        self.began = self.finished = 0.0
        self.started = self.done = False
        self.exits: Counter[type] = Counter()
        self.entries = 0
        self.latencies = array("Q")
        self._paging = paging
        self._gate = gate
        self._ports = ports
        self._pv = pv
        self._on_end = on_end
        self.inspect: Callable[[Vcpu], None] | None = None  # called before an exit is dealt with
        self._cpu = cpu
        self._suspected = False  # set by the watchdog: in KVM_RUN for long without an exit
        self._thread = JoinableThread(self._main, f"vcpu-{vcpu.index}", self._broke)
        self.emulated = paging.emulated  # what KVM's emulator has completed, by form
        self.stalls = 0  # how often KVM was found to spin on an access without an exit

    def start(self) -> None:
        """Start the thread."""
        self.started = True
        self._thread.start()

    def join(self, timeout: float) -> bool:
        """Wait for the thread's end; False if it still runs after `timeout` seconds, True if it never ran."""
        return self._thread.join(timeout)

    @property
    def ended(self) -> bool:
        """Whether the guest is done, or the vCPU cannot go on."""
        return self.done or self.error is not None

    def suspect_stall(self) -> None:
        """Have the vCPU look whether KVM spins on the instruction it is at (called by the watchdog)."""
        self._suspected = True
        self.vcpu.kick()

    def _main(self) -> None:
        if self._cpu is not None:
            self._stay_on(self._cpu)
        self.vcpu.attach_thread()
        self.began = time.perf_counter()
        try:
            self._loop()
        finally:
            self.finished = time.perf_counter()
            self.vcpu.detach_thread()
        self._on_end()

    def _stay_on(self, cpu: int) -> None:
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError as error:
            why = f"vCPU {self.vcpu.index} cannot be pinned to host CPU {cpu}: {error.strerror}"
            if error.errno == errno.EINVAL:
                why += f"; pin it to one of {', '.join(map(str, sorted(os.sched_getaffinity(0))))}"
            raise GuestError(why) from error

    def _broke(self, error: BaseException) -> None:
        """Take note of what ended the thread. Whatever it is, the machine must stop, and the message must get out."""
        if isinstance(error, PagingError | GuestError | ShortageError):
            self.error = error
        elif isinstance(error, KvmError):
            self.error = GuestError(str(error))
        else:
            self.error = GuestError(f"vCPU {self.vcpu.index}: {in_words(error)}")
            self.error.__cause__ = error
        self._on_end()

    def _loop(self) -> None:
        gate, vcpu, exits, handle = self._gate, self.vcpu, self.exits, self._paging.handle
        settle, clock, inspect = self._paging.settle, time.perf_counter_ns, self.inspect
        while gate.enter(vcpu):
            self.entries += 1
            try:
                exit: Exit | None = vcpu.run()
                left = clock()
                if isinstance(exit, Mmio):
                    settle(exit)
            finally:
                gate.leave(vcpu)
            if inspect is not None:
                inspect(vcpu)
            while exit is not None:
                exits[type(exit)] += 1
                following = handle(exit)
                if following is exit:
                    if self._other(exit):
                        return
                    break
                exit = following
            else:
                self.latencies.append(clock() - left)

    def _other(self, exit: Exit) -> bool:
        """Deal with an exit that is not about paging; True if the guest is done."""
        if type(exit) is Interrupted:
            if self._suspected:
                self._suspected = False
                self.stalls += self._paging.resolve_stall()
            return False
        if type(exit) is IoIn:
            return self._input(exit)
        if type(exit) is IoOut:
            return self._port(exit)
        if type(exit) is MsrWrite:
            self._pv.write(self.vcpu, exit)
            return False
        raise GuestError(f"vCPU {self.vcpu.index}: {self._describe(exit)}, at RIP {self.vcpu.regs.rip:#x}")

    def _input(self, io: IoIn) -> bool:
        """Have a port answer, and see what a string instruction does with that; True if the guest is done."""
        following = self._paging.answer(io, lambda: self._answer(io))
        return following is not None and self._other(following)

    def _answer(self, io: IoIn) -> None:
        if io.port == guest.REPORT_PORT and io.size == 4:
            io.data[:] = self._is_to_run_again().to_bytes(4, "little")
        elif not self._ports.handle(self.vcpu.index, io):
            self._refuse(io)

    def _is_to_run_again(self) -> bool:
        """Answer the #UD handler of the guest: whether KVM refused the instruction for memory that is absent."""
        size = ctypes.sizeof(guest.SavedRegisters)
        stack = self._paging.instruction.read(self.vcpu.regs.rsp, size)
        if stack is None:
            return False
        saved = guest.SavedRegisters.from_buffer_copy(stack)
        registers = kvm_regs.from_buffer_copy(self.vcpu.regs)
        for name in ("rdi", "rbx", "rdx", "rcx", "rax", "rip", "rflags", "rsp"):
            setattr(registers, name, getattr(saved, name))
        return self._paging.resolve_refused(registers)

    def _port(self, io: IoOut) -> bool:
        if self._ports.handle(self.vcpu.index, io):
            return False
        if io.port != guest.REPORT_PORT or io.size != 4:
            self._refuse(io)
        report = int.from_bytes(io.data[:4], "little")
        if report == guest.Report.DONE:
            self.done = True
            return True
        if report == guest.Report.EXCEPTION:
            raise GuestError(f"vCPU {self.vcpu.index}: {self._describe_exception()}")
        raise GuestError(f"vCPU {self.vcpu.index}: {self._describe_failure()}")

    def _refuse(self, io: Io) -> NoReturn:
        direction = "out" if isinstance(io, IoOut) else "in"
        raise GuestError(
            f"vCPU {self.vcpu.index}: port I/O ({direction}, {io.size} bytes) on port {io.port:#x}, where "
            f"this machine has nothing, at RIP {self.vcpu.regs.rip:#x}"
        )

    def _describe_failure(self) -> str:
        block = self.parameters
        if block.failure != guest.Failure.DISK:
            return f"the guest reports failure {block.failure} of its own check"
        try:
            status = guest.DiskStatus(block.checksum).name
        except ValueError:
            status = f"{block.checksum:#x}, which there is none of"
        what = (
            "the disk does not serve its ring"
            if block.accesses == _NO_REQUEST
            else f"request {block.accesses}"
        )
        return f"the guest's disk failed: {what}, status {status} (guest/README.md, Disk)"

    def _describe_exception(self) -> str:
        block = self.parameters
        vector = block.exception_vector
        text = f"guest exception {_EXCEPTIONS.get(vector, vector)} at RIP {block.exception_rip:#x}"
        text += f", error code {block.exception_error_code:#x}, RSP {block.exception_rsp:#x}"
        if vector == _PAGE_FAULT:
            text += f": it touched address {block.exception_cr2:#x}, which is not mapped"
        return text

    def _describe(self, exit: Exit) -> str:
        match exit:
            case Shutdown():
                return "triple fault"  # some KVMs have reset the vCPU by now, so RIP may say nothing
            case Hlt():
                return "the guest halted without a report"
            case MmioRead() | MmioWrite():
                way = "wrote" if isinstance(exit, MmioWrite) else "read"
                return f"the guest {way} {exit.size} bytes at gpa {exit.gpa:#x}, which is outside RAM"
            case MemoryFault():
                return f"the guest touched gpa {exit.gpa:#x}, which is outside RAM"
            case InternalError() | BadAddress():
                return str(exit)
            case FailEntry():
                return f"the CPU refuses the guest's state (reason {exit.reason:#x})"
            case _:
                return f"unexpected exit {exit}"
