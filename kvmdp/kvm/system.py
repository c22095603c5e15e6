"""`/dev/kvm` itself: capabilities, supported CPUID and MSRs, and the making of VMs."""

from __future__ import annotations

import ctypes
import errno
import os

from kvmdp.abi import kvm as abi
from kvmdp.abi.ioctl import flexible
from kvmdp.abi.kvm_cap import Cap
from kvmdp.abi.kvm_x86 import kvm_cpuid2, kvm_cpuid_entry2, kvm_msr_list
from kvmdp.closing import Closing
from kvmdp.kvm.errors import CREATE_VM_REMEDIES, OPEN_REMEDIES, KvmError, failed
from kvmdp.kvm.handle import Handle
from kvmdp.kvm.vm import Vm

_MAX_CPUID_ENTRIES = 1024


class Kvm(Closing):
    """An open `/dev/kvm`.

    Raises `KvmError` with a remedy where the device is absent, not permitted, or speaks
    another API version than 12 (the only one there has been since Linux 2.6.22).
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        try:
            self._handle = Handle(os.open(path, os.O_RDWR | os.O_CLOEXEC), f" on {path}")
        except OSError as error:
            raise failed(error, f"opening {path}", OPEN_REMEDIES) from None
        try:
            version = self._handle.call(
                abi.KVM_GET_API_VERSION, "KVM_GET_API_VERSION", remedies=OPEN_REMEDIES
            )
            if version != abi.KVM_API_VERSION:
                raise KvmError(
                    errno.EINVAL,
                    "KVM_GET_API_VERSION",
                    f"{path} speaks version {version}, this program {abi.KVM_API_VERSION}",
                )
            self.vcpu_mmap_size = self._handle.call(abi.KVM_GET_VCPU_MMAP_SIZE, "KVM_GET_VCPU_MMAP_SIZE")
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """The descriptor, -1 once it is closed."""
        return self._handle.fd

    def check_extension(self, capability: Cap) -> int:
        """Return what KVM_CHECK_EXTENSION says of `capability`: 0 if it is absent. Raises KvmError if closed."""
        return self._handle.check_extension(capability)

    def supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """Return the CPUID leaves that host CPU and KVM can give a guest.

        Raises KvmError; UnsupportedError without KVM_CAP_EXT_CPUID.
        """
        table = flexible(kvm_cpuid2, kvm_cpuid_entry2, _MAX_CPUID_ENTRIES)()
        table.header.nent = _MAX_CPUID_ENTRIES
        self._handle.call(abi.KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID", table, needs=Cap.EXT_CPUID)
        return [kvm_cpuid_entry2.from_buffer_copy(table.entries[index]) for index in range(table.header.nent)]

    def msr_indices(self) -> list[int]:
        """Return the numbers of the MSRs that a save of a vCPU reads (KVM_GET_MSR_INDEX_LIST), in KVM's order.

        The banks of the machine checks (from 0x400) are not among them. Raises KvmError.
        """
        name, count = "KVM_GET_MSR_INDEX_LIST", 0
        while True:
            table = flexible(kvm_msr_list, ctypes.c_uint32, count)()
            table.header.nmsrs = count
            try:
                self._handle.call(abi.KVM_GET_MSR_INDEX_LIST, name, table)
            except KvmError as error:
                # KVM says in the header how many there are; only one that says no more than before is broken.
                if error.errno != errno.E2BIG or table.header.nmsrs <= count:
                    raise
                count = int(table.header.nmsrs)
            else:
                return list(table.entries[: table.header.nmsrs])

    def mce_capabilities(self) -> int:
        """Return the MCG_CAP bits that a guest may be given. Raises KvmError; UnsupportedError without KVM_CAP_MCE."""
        value = ctypes.c_uint64()
        self._handle.call(
            abi.KVM_X86_GET_MCE_CAP_SUPPORTED, "KVM_X86_GET_MCE_CAP_SUPPORTED", value, needs=Cap.MCE
        )
        return value.value

    def create_vm(self, vm_type: int = 0) -> Vm:
        """Make a virtual machine of `vm_type` (0, the default kind, everywhere); the caller closes it.

        Raises KvmError: EINVAL for a type that this KVM does not have; a ShortageError for want of memory.
        """
        fd = self._handle.call(abi.KVM_CREATE_VM, "KVM_CREATE_VM", vm_type, remedies=CREATE_VM_REMEDIES)
        return Vm(fd, self.vcpu_mmap_size)

    def close(self) -> None:
        """Close the device; a second call does nothing.  VMs made from it live on."""
        self._handle.close()
