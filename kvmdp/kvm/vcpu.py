"""A virtual CPU: run it, read and write its registers, get it out of KVM_RUN."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import threading
from collections.abc import Iterable, Sequence

from kvmdp.abi import kvm as abi
from kvmdp.abi import libc
from kvmdp.abi.kvm_x86 import (
    KVM_SYNC_X86_REGS,
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_msr_entry,
    kvm_msrs,
    kvm_regs,
    kvm_sregs,
    kvm_vcpu_events,
    kvm_x86_mce,
    kvm_xcrs,
    kvm_xsave,
)
from kvmdp.closing import Closing
from kvmdp.kvm import exits
from kvmdp.kvm.errors import KvmError, failed, run_failed
from kvmdp.kvm.machine_check import MC_VECTOR, PoisonedAccess, memory_error
from kvmdp.kvm.signals import KICK_SIGNAL, VcpuSignals
from kvmdp.kvm.stats import Statistics, open_statistics

_EXIT_REASON = abi.kvm_run.exit_reason.offset // 4  # index in a view of 32-bit words
_UNION = abi.kvm_run.exit.offset
_IMMEDIATE_EXIT = abi.kvm_run.immediate_exit.offset
_RUN_SIZE = ctypes.sizeof(abi.kvm_run)
_EHWPOISON = 133  # asm-generic/errno.h; Python's errno has no name for it
_INTERRUPTED = exits.Interrupted()
_BAD_ADDRESS = exits.BadAddress()


class Vcpu(Closing):
    """One virtual CPU; owns its descriptor and the shared `kvm_run` page.

    All but `kick` belongs to one thread at a time, as KVM demands.
    """

    def __init__(self, fd: int, index: int, mmap_size: int) -> None:
        self.fd = fd
        self.index = index
        try:
            self._map = mmap.mmap(fd, mmap_size)
        except BaseException:
            os.close(fd)
            raise
        self.kvm_run = abi.kvm_run.from_buffer(self._map)
        # Views made once: slicing a memoryview costs a tenth of reading a nested ctypes field.
        self._bytes = memoryview(self._map)
        self._words = self._bytes[:_RUN_SIZE].cast("I")
        self._quads = self._bytes[:_RUN_SIZE].cast("Q")
        self._ioctl = libc.libc.ioctl
        self._signals: VcpuSignals | None = None
        self._thread = 0
        self._kick_lock = threading.Lock()  # guards _thread: no signal to a thread that has ended
        self._synced = False
        self._regs: kvm_regs = self.kvm_run.s.regs.regs

    # Running

    def run(self) -> exits.Exit:
        """Enter the guest (KVM_RUN) and return why it came back.

        A fault that KVM reports through errno (EFAULT; EHWPOISON with KVM_EXIT_MEMORY_FAULT) and
        an interruption (EINTR) are exits like any other; any other errno raises `KvmError`.
        """
        words = self._words
        # Kernels before 6.8 do not reset the reason when KVM_RUN fails: a stale one must not be read.
        words[_EXIT_REASON] = abi.KVM_EXIT_UNKNOWN
        if self._ioctl(self.fd, abi.KVM_RUN, None) < 0:
            return self._failed_run(ctypes.get_errno())
        decode = _DECODERS.get(words[_EXIT_REASON])
        if decode is None:
            return exits.Unknown(words[_EXIT_REASON], 0)
        return decode(self)

    def _failed_run(self, number: int) -> exits.Exit:
        if number == errno.EINTR:
            pending = self._signals.take() if self._signals else None
            return exits.BusError(*pending) if pending else _INTERRUPTED
        if number in (errno.EFAULT, _EHWPOISON) and self._words[_EXIT_REASON] == abi.KVM_EXIT_MEMORY_FAULT:
            first = _UNION // 8
            quads = self._quads
            return exits.MemoryFault(quads[first], quads[first + 1], quads[first + 2])
        if number == errno.EFAULT:
            return _BAD_ADDRESS
        raise run_failed(number, self.index)

    def attach_thread(self) -> None:
        """Prepare the calling thread to run this vCPU: signals blocked, let through in KVM_RUN.

        From then on `kick` works and a SIGBUS becomes a `BusError`.
        """
        self._signals = VcpuSignals()
        self.set_signal_mask(self._signals.run_mask)
        with self._kick_lock:
            self._thread = threading.get_ident()

    def detach_thread(self) -> None:
        """Undo `attach_thread`, in the same thread, before it ends or turns to other things."""
        with self._kick_lock:
            self._thread = 0
        if self._signals is not None:
            self._signals.restore()
            self._signals = None

    def kick(self) -> None:
        """Get the vCPU out of KVM_RUN, or keep it from entering, from any thread.

        It returns `Interrupted` at once and on each further run, until
        `immediate_exit` is cleared.  Whoever kicks first sets whatever the vCPU's thread is
        to see; the thread clears `immediate_exit` before it looks.
        """
        self.immediate_exit = True
        with self._kick_lock:
            if self._thread:
                signal.pthread_kill(self._thread, KICK_SIGNAL)

    @property
    def immediate_exit(self) -> bool:
        """True if KVM_RUN is to complete what is pending and return without entering the guest."""
        return self._bytes[_IMMEDIATE_EXIT] != 0

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self._bytes[_IMMEDIATE_EXIT] = value

    def set_signal_mask(self, mask: int) -> None:
        """Set the signals blocked inside KVM_RUN, a 64-bit `sigset_t` (KVM_SET_SIGNAL_MASK)."""

        class Mask(ctypes.Structure):
            _pack_ = 1
            _layout_ = "ms"
            _fields_ = [("header", abi.kvm_signal_mask), ("sigset", ctypes.c_uint64)]

        request = Mask(abi.kvm_signal_mask(8), mask)
        try:
            libc.ioctl(self.fd, abi.KVM_SET_SIGNAL_MASK, ctypes.byref(request))
        except OSError as error:
            raise failed(error, "KVM_SET_SIGNAL_MASK") from None

    # Registers

    def sync_registers(self) -> None:
        """Have KVM leave the general registers in `kvm_run` at every exit (KVM_CAP_SYNC_REGS).

        Saves an ioctl wherever `regs` is read after an exit.
        """
        ctypes.pointer(self._regs)[0] = self.regs  # what is true until the first exit
        self.kvm_run.kvm_valid_regs = KVM_SYNC_X86_REGS
        self._synced = True

    @property
    def regs(self) -> kvm_regs:
        """The general registers: the shared copy if synced, else by ioctl."""
        if self._synced:
            return self._regs
        regs = kvm_regs()
        self._call(abi.KVM_GET_REGS, "KVM_GET_REGS", regs)
        return regs

    def set_regs(self, regs: kvm_regs) -> None:
        """Set the general registers, now."""
        self._call(abi.KVM_SET_REGS, "KVM_SET_REGS", regs)
        if self._synced and regs is not self._regs:
            ctypes.pointer(self._regs)[0] = regs

    @property
    def sregs(self) -> kvm_sregs:
        """Segment, descriptor-table and control registers."""
        sregs = kvm_sregs()
        self._call(abi.KVM_GET_SREGS, "KVM_GET_SREGS", sregs)
        return sregs

    def set_sregs(self, sregs: kvm_sregs) -> None:
        """Set segment, descriptor-table and control registers."""
        self._call(abi.KVM_SET_SREGS, "KVM_SET_SREGS", sregs)

    @property
    def events(self) -> kvm_vcpu_events:
        """Pending and injected events.  KVM_CAP_VCPU_EVENTS."""
        events = kvm_vcpu_events()
        self._call(abi.KVM_GET_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS", events)
        return events

    def set_events(self, events: kvm_vcpu_events) -> None:
        """Set pending and injected events.  KVM_CAP_VCPU_EVENTS."""
        self._call(abi.KVM_SET_VCPU_EVENTS, "KVM_SET_VCPU_EVENTS", events)

    @property
    def debug_registers(self) -> kvm_debugregs:
        """DR0 to DR3, DR6, DR7.  KVM_CAP_DEBUGREGS."""
        registers = kvm_debugregs()
        self._call(abi.KVM_GET_DEBUGREGS, "KVM_GET_DEBUGREGS", registers)
        return registers

    def set_debug_registers(self, registers: kvm_debugregs) -> None:
        """Set DR0 to DR3, DR6, DR7.  KVM_CAP_DEBUGREGS."""
        self._call(abi.KVM_SET_DEBUGREGS, "KVM_SET_DEBUGREGS", registers)

    @property
    def xsave(self) -> kvm_xsave:
        """x87, SSE and AVX state.  KVM_CAP_XSAVE."""
        state = kvm_xsave()
        self._call(abi.KVM_GET_XSAVE, "KVM_GET_XSAVE", state)
        return state

    def set_xsave(self, state: kvm_xsave) -> None:
        """Set x87, SSE and AVX state.  KVM_CAP_XSAVE."""
        self._call(abi.KVM_SET_XSAVE, "KVM_SET_XSAVE", state)

    @property
    def xcrs(self) -> kvm_xcrs:
        """Extended control registers.  KVM_CAP_XCRS."""
        xcrs = kvm_xcrs()
        self._call(abi.KVM_GET_XCRS, "KVM_GET_XCRS", xcrs)
        return xcrs

    def set_xcr0(self, value: int) -> None:
        """Set XCR0, the state components the guest may use.  KVM_CAP_XCRS."""
        xcrs = kvm_xcrs(nr_xcrs=1)
        xcrs.xcrs[0].value = value
        self._call(abi.KVM_SET_XCRS, "KVM_SET_XCRS", xcrs)

    def set_cpuid(self, entries: Sequence[kvm_cpuid_entry2]) -> None:
        """Give the guest these CPUID leaves; before the first run.  KVM_CAP_EXT_CPUID."""

        class Table(ctypes.Structure):
            _fields_ = [("header", kvm_cpuid2), ("entries", kvm_cpuid_entry2 * len(entries))]

        table = Table(kvm_cpuid2(nent=len(entries)))
        for index, entry in enumerate(entries):
            table.entries[index] = entry
        self._call(abi.KVM_SET_CPUID2, "KVM_SET_CPUID2", table)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Return the values of those MSRs that KVM lets user space read."""
        values = {}
        for index in indices:
            table = _OneMsr(kvm_msrs(nmsrs=1), kvm_msr_entry(index=index))
            if self._call(abi.KVM_GET_MSRS, "KVM_GET_MSRS", table) == 1:
                values[index] = int(table.entry.data)
        return values

    def set_msr(self, index: int, value: int) -> None:
        """Set one MSR; raises `KvmError` (EINVAL) if KVM refuses the value or the MSR."""
        table = _OneMsr(kvm_msrs(nmsrs=1), kvm_msr_entry(index=index, data=value))
        if self._call(abi.KVM_SET_MSRS, "KVM_SET_MSRS", table) != 1:
            raise KvmError(errno.EINVAL, f"KVM_SET_MSRS of MSR {index:#x} to {value:#x}")

    def complete_msr(self, value: int = 0, error: bool = False) -> None:
        """Answer an MsrRead or MsrWrite exit: `value` for a read; `error` gives the guest a #GP."""
        self.kvm_run.msr.data = value
        self.kvm_run.msr.error = error

    def setup_mce(self, mcg_cap: int) -> None:
        """Give the guest machine-check banks (MCG_CAP).  KVM_CAP_MCE."""
        self._call(abi.KVM_X86_SETUP_MCE, "KVM_X86_SETUP_MCE", ctypes.c_uint64(mcg_cap))

    def set_mce(self, mce: kvm_x86_mce) -> None:
        """Raise a machine check in the guest.  KVM_CAP_MCE."""
        self._call(abi.KVM_X86_SET_MCE, "KVM_X86_SET_MCE", mce)

    def inject_machine_check(self, gpa: int, access: PoisonedAccess) -> bool:
        """Have the guest take #MC for an access to poisoned memory at `gpa`, as its next step.

        No access may be waiting to be completed. Returns False if the guest cannot be told: it has machine checks
        switched off (CR4.MCE, MCi_CTL, MCG_CTL), or has not cleared MCG_STATUS after the last one. For CR4.MCE and
        MCG_STATUS KVM has then requested what the hardware does (arch/x86/kvm/x86.c, KVM_X86_SET_MCE): a triple fault,
        which is the next exit if the vCPU is entered again. Needs KVM_CAP_MCE, and MCG_SER_P of `setup_mce`.
        """
        self.set_mce(memory_error(gpa, access))
        exception = self.events.exception
        return bool(exception.injected or exception.pending) and exception.nr == MC_VECTOR

    def translate(self, linear_address: int) -> int | None:
        """Return the gpa behind `linear_address` by the guest's page tables, None if there is none."""
        translation = abi.kvm_translation(linear_address=linear_address)
        self._call(abi.KVM_TRANSLATE, "KVM_TRANSLATE", translation)
        return translation.physical_address if translation.valid else None

    def statistics(self) -> Statistics:
        """Open the vCPU's statistics.  KVM_CAP_BINARY_STATS_FD."""
        return open_statistics(self.fd)

    def _call(self, request: int, call: str, argument: ctypes.Structure | ctypes._SimpleCData[int]) -> int:
        try:
            return libc.ioctl(self.fd, request, ctypes.byref(argument))
        except OSError as error:
            raise failed(error, f"{call} of vCPU {self.index}") from None

    # Ownership

    def close(self) -> None:
        """Unmap `kvm_run` and close the descriptor; a second call does nothing."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        del self.kvm_run, self._regs
        self._words.release()
        self._quads.release()
        self._bytes.release()
        # An exit's data view may still be alive in a traceback: then the map goes with it.
        with contextlib.suppress(BufferError):
            self._map.close()

    # Decoding of kvm_run, one method an exit reason

    def _io(self) -> exits.Exit:
        io = self.kvm_run.io
        end = io.data_offset + io.size * io.count
        direction = "out" if io.direction == abi.KVM_EXIT_IO_OUT else "in"
        return exits.Io(direction, io.port, io.size, io.count, self._bytes[io.data_offset : end])

    def _mmio(self) -> exits.Exit:
        mmio = self.kvm_run.mmio
        data = self._bytes[_UNION + 8 : _UNION + 8 + mmio.len]
        return exits.Mmio(mmio.phys_addr, mmio.len, bool(mmio.is_write), data)

    def _internal_error(self) -> exits.Exit:
        internal = self.kvm_run.internal
        instruction = b""
        failure = self.kvm_run.emulation_failure
        if (
            internal.suberror == abi.KVM_INTERNAL_ERROR_EMULATION
            and internal.ndata >= 3
            and failure.flags & abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        ):
            instruction = bytes(failure.insn_bytes[: failure.insn_size])
        return exits.InternalError(
            internal.suberror, tuple(internal.data[: min(internal.ndata, 16)]), instruction
        )

    def _hlt(self) -> exits.Exit:
        return exits.Hlt()

    def _shutdown(self) -> exits.Exit:
        return exits.Shutdown()

    def _fail_entry(self) -> exits.Exit:
        entry = self.kvm_run.fail_entry
        return exits.FailEntry(entry.hardware_entry_failure_reason, entry.cpu)

    def _system_event(self) -> exits.Exit:
        return exits.SystemEvent(self.kvm_run.system_event.type)

    def _rdmsr(self) -> exits.Exit:
        return exits.MsrRead(self.kvm_run.msr.index, self.kvm_run.msr.reason)

    def _wrmsr(self) -> exits.Exit:
        msr = self.kvm_run.msr
        return exits.MsrWrite(msr.index, msr.data, msr.reason)

    def _interrupted(self) -> exits.Exit:
        return _INTERRUPTED

    def _unknown(self) -> exits.Exit:
        return exits.Unknown(abi.KVM_EXIT_UNKNOWN, self._quads[_UNION // 8])


class _OneMsr(ctypes.Structure):
    _fields_ = [("header", kvm_msrs), ("entry", kvm_msr_entry)]


_DECODERS = {
    abi.KVM_EXIT_UNKNOWN: Vcpu._unknown,
    abi.KVM_EXIT_IO: Vcpu._io,
    abi.KVM_EXIT_MMIO: Vcpu._mmio,
    abi.KVM_EXIT_HLT: Vcpu._hlt,
    abi.KVM_EXIT_SHUTDOWN: Vcpu._shutdown,
    abi.KVM_EXIT_FAIL_ENTRY: Vcpu._fail_entry,
    abi.KVM_EXIT_INTR: Vcpu._interrupted,
    abi.KVM_EXIT_IRQ_WINDOW_OPEN: Vcpu._interrupted,
    abi.KVM_EXIT_INTERNAL_ERROR: Vcpu._internal_error,
    abi.KVM_EXIT_SYSTEM_EVENT: Vcpu._system_event,
    abi.KVM_EXIT_X86_RDMSR: Vcpu._rdmsr,
    abi.KVM_EXIT_X86_WRMSR: Vcpu._wrmsr,
}
