"""`/dev/kvm` itself: capabilities, supported CPUID, and the making of VMs."""

from __future__ import annotations

import ctypes
import errno
import os

from kvmdp.abi import kvm as abi
from kvmdp.abi import libc
from kvmdp.abi.kvm_x86 import kvm_cpuid2, kvm_cpuid_entry2
from kvmdp.closing import Closing
from kvmdp.kvm.errors import CREATE_VM_REMEDIES, OPEN_REMEDIES, KvmError, failed
from kvmdp.kvm.vm import Vm

_MAX_CPUID_ENTRIES = 1024


class Kvm(Closing):
    """An open `/dev/kvm`.

    Raises `KvmError` with a remedy where the device is absent, not permitted, or speaks
    another API version than 12 (the only one there has been since Linux 2.6.22).
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise failed(error, f"opening {path}", OPEN_REMEDIES) from None
        try:
            version = libc.ioctl(self.fd, abi.KVM_GET_API_VERSION, None, "KVM_GET_API_VERSION")
            self.vcpu_mmap_size = libc.ioctl(
                self.fd, abi.KVM_GET_VCPU_MMAP_SIZE, None, "KVM_GET_VCPU_MMAP_SIZE"
            )
        except OSError as error:
            self.close()
            raise failed(error, f"KVM_GET_API_VERSION on {path}", OPEN_REMEDIES) from None
        if version != abi.KVM_API_VERSION:
            self.close()
            raise KvmError(
                errno.EINVAL,
                "KVM_GET_API_VERSION",
                f"{path} speaks version {version}, this program {abi.KVM_API_VERSION}",
            )

    def check_extension(self, capability: int) -> int:
        """Return what KVM_CHECK_EXTENSION says of `capability` (`KVM_CAP_*`): 0 if absent."""
        return libc.ioctl(self.fd, abi.KVM_CHECK_EXTENSION, capability, "KVM_CHECK_EXTENSION")

    def supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """Return the CPUID leaves that host CPU and KVM can give a guest.  KVM_CAP_EXT_CPUID."""

        class Table(ctypes.Structure):
            _fields_ = [("header", kvm_cpuid2), ("entries", kvm_cpuid_entry2 * _MAX_CPUID_ENTRIES)]

        table = Table()
        table.header.nent = _MAX_CPUID_ENTRIES
        try:
            libc.ioctl(self.fd, abi.KVM_GET_SUPPORTED_CPUID, ctypes.byref(table))
        except OSError as error:
            raise failed(error, "KVM_GET_SUPPORTED_CPUID") from None
        return [kvm_cpuid_entry2.from_buffer_copy(table.entries[index]) for index in range(table.header.nent)]

    def mce_capabilities(self) -> int:
        """Return the MCG_CAP bits that a guest may be given.  KVM_CAP_MCE."""
        value = ctypes.c_uint64()
        try:
            libc.ioctl(self.fd, abi.KVM_X86_GET_MCE_CAP_SUPPORTED, ctypes.byref(value))
        except OSError as error:
            raise failed(error, "KVM_X86_GET_MCE_CAP_SUPPORTED") from None
        return value.value

    def create_vm(self, vm_type: int = 0) -> Vm:
        """Make a virtual machine of `vm_type` (0, the default kind, everywhere)."""
        try:
            fd = libc.ioctl(self.fd, abi.KVM_CREATE_VM, vm_type)
        except OSError as error:
            raise failed(error, "KVM_CREATE_VM", CREATE_VM_REMEDIES) from None
        return Vm(fd, self.vcpu_mmap_size)

    def close(self) -> None:
        """Close the device; a second call does nothing.  VMs made from it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
