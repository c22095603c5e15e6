"""Bare bindings to `/dev/kvm`: open it, make a VM, give it memory and vCPUs, run.

Knows nothing of demand paging.  A toy hypervisor needs no more than this::

    from kvmdp.kvm import Kvm

    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vm.set_user_memory_region(slot=0, gpa=0, size=4096, hva=address)
        ...
        match vcpu.run():
            case Io(port=0x3F8, direction="out", data=data): ...
            case Hlt(): ...
"""

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
    MemoryFault,
    Mmio,
    MsrRead,
    MsrWrite,
    Shutdown,
    SystemEvent,
    Unknown,
)
from kvmdp.kvm.stats import Statistics
from kvmdp.kvm.system import Kvm
from kvmdp.kvm.vcpu import Vcpu
from kvmdp.kvm.vm import DeniedMsrs, Vm

__all__ = [
    "BadAddress",
    "BusError",
    "DeniedMsrs",
    "Exit",
    "FailEntry",
    "Hlt",
    "InternalError",
    "Interrupted",
    "Io",
    "Kvm",
    "KvmError",
    "MemoryFault",
    "Mmio",
    "MsrRead",
    "MsrWrite",
    "Shutdown",
    "Statistics",
    "SystemEvent",
    "Unknown",
    "Vcpu",
    "Vm",
]
