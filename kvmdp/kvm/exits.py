"""Why KVM_RUN returned: one small class an exit reason.

After `struct kvm_run` in `linux/kvm.h`; section 5 of the API document says what each means.
Addresses are guest-physical bytes (gpa) unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmdp.abi import kvm as abi


@dataclass(slots=True)
class Io:
    """KVM_EXIT_IO: port I/O of `count` items of `size` bytes; an exit is an `IoIn` or an `IoOut`.

    `data` is a view of the items in the shared page, valid until the vCPU runs again.
    """

    port: int
    size: int
    count: int
    data: memoryview


class IoIn(Io):
    """The guest reads a port: the answer goes to `data`."""

    __slots__ = ()


class IoOut(Io):
    """The guest writes `data` to a port."""

    __slots__ = ()


@dataclass(slots=True)
class Mmio:
    """KVM_EXIT_MMIO: an access to a gpa that no memslot covers, emulated by KVM; a `MmioRead` or a `MmioWrite`.

    `data` is a view of the `size` bytes in the shared page, valid until the vCPU runs again. The access is complete
    only after the vCPU has been re-entered.
    """

    gpa: int
    size: int
    data: memoryview


class MmioRead(Mmio):
    """The guest loads: the answer goes to `data`."""

    __slots__ = ()


class MmioWrite(Mmio):
    """The guest stores `data`."""

    __slots__ = ()


@dataclass(slots=True)
class MemoryFault:
    """KVM_EXIT_MEMORY_FAULT (KVM_RUN failed with EFAULT or EHWPOISON): KVM could not map `gpa`.

    The instruction has not run; re-entering retries it.  KVM does not say whether it read, wrote
    or fetched.
    """

    flags: int
    gpa: int
    size: int


@dataclass(slots=True)
class BadAddress:
    """KVM_RUN failed with EFAULT and does not say where: the host has no page for guest memory in an open memslot.

    KVM annotates (KVM_EXIT_MEMORY_FAULT) what lies in a guest_memfd, not a failed access by host address, whatever
    KVM_CAP_MEMORY_FAULT_INFO says. The instruction has not run; re-entering retries it.
    """

    def __str__(self) -> str:
        return (
            "KVM_RUN failed with EFAULT: the host gives KVM no page for memory that the guest needs here. Something "
            "has unmapped or protected it, or it is registered with a userfaultfd that is not told of the kernel's own "
            "faults"
        )


@dataclass(slots=True)
class BusError:
    """A SIGBUS that KVM raised for this vCPU: the host page at `hva` is poisoned.

    `code` is `si_code` (`BUS_MCEERR_AR` for an access).  The instruction has not run.
    """

    hva: int
    code: int


@dataclass(slots=True)
class Interrupted:
    """KVM_RUN was left on request: `immediate_exit` or a signal, no access of the guest."""


@dataclass(slots=True)
class Hlt:
    """KVM_EXIT_HLT: the guest halted (only without an in-kernel interrupt controller)."""


@dataclass(slots=True)
class Shutdown:
    """KVM_EXIT_SHUTDOWN: triple fault."""


_SUBERRORS = {
    abi.KVM_INTERNAL_ERROR_EMULATION: "instruction emulation failed",
    abi.KVM_INTERNAL_ERROR_SIMUL_EX: "two exceptions at once",
    abi.KVM_INTERNAL_ERROR_DELIVERY_EV: "an exit while an event was being delivered",
    abi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "the CPU gave an unexpected exit reason",
}


# In the data of KVM_INTERNAL_ERROR_DELIVERY_EV (arch/x86/kvm/x86.c, kvm_prepare_event_vectoring_exit); the CPU is last.
_DELIVERY_GPA = 3


@dataclass(slots=True)
class InternalError:
    """KVM_EXIT_INTERNAL_ERROR: KVM cannot go on with this vCPU as it is.

    `instruction` has the bytes at RIP after an emulation failure, where KVM gave them.
    """

    suberror: int
    data: tuple[int, ...]
    instruction: bytes

    @property
    def is_emulation_failure(self) -> bool:
        """True if KVM's emulator did not know the instruction; RIP has not moved."""
        return self.suberror == abi.KVM_INTERNAL_ERROR_EMULATION

    @property
    def delivery_gpa(self) -> int | None:
        """Where KVM found no memory when it was to deliver an event; None for another error, or if KVM does not say.

        The event is pending, and is delivered when the vCPU is entered again. Since Linux 6.14 with kvm_amd, before
        that with kvm_intel alone; a guest-physical address only with nested paging.
        """
        is_delivery = self.suberror == abi.KVM_INTERNAL_ERROR_DELIVERY_EV
        return self.data[_DELIVERY_GPA] if is_delivery and len(self.data) > _DELIVERY_GPA + 1 else None

    def __str__(self) -> str:
        what = _SUBERRORS.get(self.suberror, "unknown kind")
        at = f", instruction bytes {self.instruction.hex(' ')}" if self.instruction else ""
        return f"KVM internal error {self.suberror} ({what}){at}"


@dataclass(slots=True)
class FailEntry:
    """KVM_EXIT_FAIL_ENTRY: the CPU refused the guest's state."""

    reason: int
    cpu: int


@dataclass(slots=True)
class SystemEvent:
    """KVM_EXIT_SYSTEM_EVENT: the guest asked for a reset or power-off."""

    type: int


@dataclass(slots=True)
class MsrRead:
    """KVM_EXIT_X86_RDMSR: answer with `Vcpu.complete_msr`.  Needs KVM_CAP_X86_USER_SPACE_MSR."""

    index: int
    reason: int


@dataclass(slots=True)
class MsrWrite:
    """KVM_EXIT_X86_WRMSR: answer with `Vcpu.complete_msr`.  Needs KVM_CAP_X86_USER_SPACE_MSR."""

    index: int
    data: int
    reason: int


@dataclass(slots=True)
class Unknown:
    """An exit reason that has no class here; `hardware_reason` only for KVM_EXIT_UNKNOWN."""

    reason: int
    hardware_reason: int


Exit = (
    IoIn
    | IoOut
    | MmioRead
    | MmioWrite
    | MemoryFault
    | BadAddress
    | BusError
    | Interrupted
    | Hlt
    | Shutdown
    | InternalError
    | FailEntry
    | SystemEvent
    | MsrRead
    | MsrWrite
    | Unknown
)
