"""A virtual CPU: run it, read and write its registers, get it out of KVM_RUN."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import signal
import threading

from kvmdp.abi import kvm as abi
from kvmdp.abi import libc
from kvmdp.abi.ioctl import flexible
from kvmdp.abi.kvm_cap import Cap
from kvmdp.abi.kvm_x86 import KVM_SYNC_X86_REGS, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_x86_mce
from kvmdp.closing import Closing
from kvmdp.kvm import exits
from kvmdp.kvm.errors import failed, run_failed
from kvmdp.kvm.handle import Handle
from kvmdp.kvm.machine_check import MC_VECTOR, PoisonedAccess, memory_error
from kvmdp.kvm.registers import Registers
from kvmdp.kvm.signals import KICK_SIGNAL, VcpuSignals
from kvmdp.kvm.stats import Statistics, open_statistics

_EXIT_REASON = abi.kvm_run.exit_reason.offset // 4  # index in a view of 32-bit words
_UNION = abi.kvm_run.exit.offset
_IMMEDIATE_EXIT = abi.kvm_run.immediate_exit.offset
_RUN_SIZE = ctypes.sizeof(abi.kvm_run)
_SIGSET_BYTES = 8  # the kernel's sigset_t
_EHWPOISON = 133  # asm-generic/errno.h; Python's errno has no name for it
_INTERRUPTED = exits.Interrupted()
_BAD_ADDRESS = exits.BadAddress()


class Vcpu(Closing):
    """One virtual CPU; owns its descriptor `handle` and the shared `kvm_run` page.

    `registers` has what is not here of its registers. All but `kick` belongs to one thread at a time, as KVM demands.
    Every call raises KvmError with the kernel's errno, EINVAL for values that KVM refuses; and UnsupportedError (the
    same exception is both) if the reason is that this KVM lacks the capability that the method names.
    """

    def __init__(self, handle: Handle, index: int, mmap_size: int) -> None:
        self.index = index
        self.registers = Registers(handle)
        self._handle = handle
        self._call = handle.call
        try:
            self._map = mmap.mmap(handle.fd, mmap_size)
        except BaseException as error:
            handle.close()
            if isinstance(error, OSError):
                raise failed(error, f"mmap of kvm_run of vCPU {index}") from None
            raise
        self._look_at(self._map)
        self._ioctl = libc.libc.ioctl
        self._signals: VcpuSignals | None = None
        self._thread = 0
        self._kick_lock = threading.Lock()  # guards _thread: no signal to a thread that has ended
        self._synced = False

    def _look_at(self, page: mmap.mmap | bytearray) -> None:
        self.kvm_run = abi.kvm_run.from_buffer(page)
        # Views made once: slicing a memoryview costs a tenth of reading a nested ctypes field.
        self._bytes = memoryview(page)
        self._words = self._bytes[:_RUN_SIZE].cast("I")
        self._quads = self._bytes[:_RUN_SIZE].cast("Q")
        self._regs: kvm_regs = self.kvm_run.s.regs.regs

    @property
    def fd(self) -> int:
        """The descriptor, -1 once it is closed."""
        return self._handle.fd

    # Running

    def run(self) -> exits.Exit:
        """Enter the guest (KVM_RUN) and return why it came back.

        A fault that KVM reports through errno (EFAULT; EHWPOISON with KVM_EXIT_MEMORY_FAULT) and
        an interruption (EINTR) are exits like any other; any other errno raises `KvmError`.
        """
        words = self._words
        # Kernels before 6.8 do not reset the reason when KVM_RUN fails: a stale one must not be read.
        words[_EXIT_REASON] = abi.KVM_EXIT_UNKNOWN
        if self._ioctl(self._handle.fd, abi.KVM_RUN, None) < 0:
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

        From then on `kick` works and a SIGBUS becomes a `BusError`. Raises KvmError if the vCPU is closed; then the
        thread's signals are as before.
        """
        signals = VcpuSignals()
        try:
            self.set_signal_mask(signals.run_mask)
        except BaseException:
            signals.restore()
            raise
        self._signals = signals
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
        """Get the vCPU out of KVM_RUN, or keep it from entering, from any thread; does nothing to a closed one.

        It returns `Interrupted` at once and on each further run, until
        `immediate_exit` is cleared.  The caller sets first what the vCPU's thread is
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
        request = flexible(abi.kvm_signal_mask, ctypes.c_uint8, _SIGSET_BYTES)()
        request.header.len = _SIGSET_BYTES
        request.entries[:] = mask.to_bytes(_SIGSET_BYTES, "little")
        self._call(abi.KVM_SET_SIGNAL_MASK, "KVM_SET_SIGNAL_MASK", request)

    # Registers

    def sync_registers(self) -> None:
        """Have KVM leave the general registers in `kvm_run` at every exit. Needs KVM_CAP_SYNC_REGS.

        Saves an ioctl wherever `regs` is read after an exit.
        """
        self._handle.require(Cap.SYNC_REGS, KVM_SYNC_X86_REGS)
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
        """Pending and injected events. Needs KVM_CAP_VCPU_EVENTS."""
        events = kvm_vcpu_events()
        self._call(abi.KVM_GET_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS", events, needs=Cap.VCPU_EVENTS)
        return events

    def set_events(self, events: kvm_vcpu_events) -> None:
        """Set pending and injected events; its flags say which. Needs KVM_CAP_VCPU_EVENTS."""
        self._call(abi.KVM_SET_VCPU_EVENTS, "KVM_SET_VCPU_EVENTS", events, needs=Cap.VCPU_EVENTS)

    def complete_msr(self, value: int = 0, error: bool = False) -> None:
        """Answer an MsrRead or MsrWrite exit: `value` for a read; `error` gives the guest a #GP."""
        self.kvm_run.msr.data = value
        self.kvm_run.msr.error = error

    def setup_mce(self, mcg_cap: int) -> None:
        """Give the guest machine-check banks; `mcg_cap` is of `Kvm.mce_capabilities`. Needs KVM_CAP_MCE."""
        self._call(abi.KVM_X86_SETUP_MCE, "KVM_X86_SETUP_MCE", ctypes.c_uint64(mcg_cap), needs=Cap.MCE)

    def set_mce(self, mce: kvm_x86_mce) -> None:
        """Raise a machine check in the guest; EINVAL for a bank that it has not. Needs KVM_CAP_MCE."""
        self._call(abi.KVM_X86_SET_MCE, "KVM_X86_SET_MCE", mce, needs=Cap.MCE)

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
        """Open the vCPU's statistics; the caller closes them. Needs KVM_CAP_BINARY_STATS_FD."""
        return open_statistics(self._handle)

    # Ownership

    def close(self) -> None:
        """Unmap `kvm_run` and close the descriptor; a second call does nothing."""
        if self._handle.fd < 0:
            return
        self._handle.close()
        before = (self._words, self._quads, self._bytes)
        # So that each call fails at the descriptor, with a KvmError, and a late `kick` finds something to write to.
        self._synced = False
        self._look_at(bytearray(_RUN_SIZE))
        for view in before:
            view.release()
        # An exit's data view may still be alive in a traceback: then the map goes with it.
        with contextlib.suppress(BufferError):
            self._map.close()

    # Decoding of kvm_run, one method an exit reason

    def _io(self) -> exits.Exit:
        io = self.kvm_run.io
        end = io.data_offset + io.size * io.count
        kind = exits.IoOut if io.direction == abi.KVM_EXIT_IO_OUT else exits.IoIn
        return kind(io.port, io.size, io.count, self._bytes[io.data_offset : end])

    def _mmio(self) -> exits.Exit:
        mmio = self.kvm_run.mmio
        data = self._bytes[_UNION + 8 : _UNION + 8 + mmio.len]
        kind = exits.MmioWrite if mmio.is_write else exits.MmioRead
        return kind(mmio.phys_addr, mmio.len, data)

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
