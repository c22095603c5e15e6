"""Bare bindings to `/dev/kvm`: open it, make a VM, give it memory and vCPUs, run.

Knows nothing of demand paging.  A toy hypervisor needs no more than this::

    from kvmdp.kvm import Hlt, IoOut, Kvm, kvm_regs

    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vm.set_user_memory_region(slot=0, gpa=0, size=4096, hva=address)
        sregs = vcpu.sregs
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        vcpu.set_regs(kvm_regs(rip=0, rflags=2))
        while not isinstance(exit := vcpu.run(), Hlt):
            match exit:
                case IoOut(port=0x3F8, data=data): ...

tests/kvm/test_toy.py runs one.
"""

from kvmdp.abi.kvm import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CLOCK_HOST_TSC,
    KVM_CLOCK_REALTIME,
    KVM_CLOCK_TSC_STABLE,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN,
    kvm_clock_data,
    kvm_run,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
)
from kvmdp.abi.kvm_cap import Cap
from kvmdp.abi.kvm_x86 import (
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_dtable,
    kvm_fpu,
    kvm_lapic_state,
    kvm_regs,
    kvm_segment,
    kvm_sregs,
    kvm_sregs2,
    kvm_vcpu_events,
    kvm_x86_mce,
    kvm_xcr,
    kvm_xcrs,
)
from kvmdp.kvm.errors import KvmError
from kvmdp.kvm.exits import (
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
    MemoryFault,
    Mmio,
    MmioRead,
    MmioWrite,
    MsrRead,
    MsrWrite,
    Shutdown,
    SystemEvent,
    Unknown,
)
from kvmdp.kvm.registers import Registers
from kvmdp.kvm.stats import Statistics
from kvmdp.kvm.system import Kvm
from kvmdp.kvm.vcpu import Vcpu
from kvmdp.kvm.vm import DeniedMsrs, Vm

__all__ = [
    "GUEST_MEMFD_FLAG_INIT_SHARED",
    "GUEST_MEMFD_FLAG_MMAP",
    "KVM_CLOCK_HOST_TSC",
    "KVM_CLOCK_REALTIME",
    "KVM_CLOCK_TSC_STABLE",
    "KVM_MEM_GUEST_MEMFD",
    "KVM_MEM_LOG_DIRTY_PAGES",
    "KVM_MEM_READONLY",
    "KVM_MP_STATE_HALTED",
    "KVM_MP_STATE_RUNNABLE",
    "KVM_MSR_EXIT_REASON_FILTER",
    "KVM_MSR_EXIT_REASON_INVAL",
    "KVM_MSR_EXIT_REASON_UNKNOWN",
    "BadAddress",
    "BusError",
    "Cap",
    "DeniedMsrs",
    "Exit",
    "FailEntry",
    "Hlt",
    "InternalError",
    "Interrupted",
    "Io",
    "IoIn",
    "IoOut",
    "Kvm",
    "KvmError",
    "MemoryFault",
    "Mmio",
    "MmioRead",
    "MmioWrite",
    "MsrRead",
    "MsrWrite",
    "Registers",
    "Shutdown",
    "Statistics",
    "SystemEvent",
    "Unknown",
    "Vcpu",
    "Vm",
    "kvm_clock_data",
    "kvm_cpuid2",
    "kvm_cpuid_entry2",
    "kvm_debugregs",
    "kvm_dtable",
    "kvm_fpu",
    "kvm_lapic_state",
    "kvm_regs",
    "kvm_run",
    "kvm_segment",
    "kvm_sregs",
    "kvm_sregs2",
    "kvm_userspace_memory_region",
    "kvm_userspace_memory_region2",
    "kvm_vcpu_events",
    "kvm_x86_mce",
    "kvm_xcr",
    "kvm_xcrs",
]
