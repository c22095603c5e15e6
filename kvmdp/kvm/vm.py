"""A virtual machine: memslots, guest_memfd, capabilities, MSR filter, statistics, vCPUs."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass

from kvmdp.abi import kvm as abi
from kvmdp.abi import libc
from kvmdp.abi.kvm_x86 import (
    KVM_MSR_FILTER_DEFAULT_ALLOW,
    KVM_MSR_FILTER_MAX_RANGES,
    KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE,
    kvm_msr_filter,
)
from kvmdp.closing import Closing
from kvmdp.kvm.errors import MEMSLOT_REMEDIES, failed
from kvmdp.kvm.stats import Statistics, open_statistics
from kvmdp.kvm.vcpu import Vcpu


@dataclass(frozen=True, slots=True)
class DeniedMsrs:
    """MSRs `base` to `base + count - 1`, whose reads and/or writes go to user space."""

    base: int
    count: int
    read: bool = True
    write: bool = True


class Vm(Closing):
    """One virtual machine; owns its descriptor.

    Memslot changes are serialised by KVM itself and may be made from any thread, while vCPUs run.
    """

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        self.fd = fd
        self._vcpu_mmap_size = vcpu_mmap_size

    def check_extension(self, capability: int) -> int:
        """Return what KVM_CHECK_EXTENSION says of `capability` for this VM: 0 if absent."""
        return libc.ioctl(self.fd, abi.KVM_CHECK_EXTENSION, capability, "KVM_CHECK_EXTENSION")

    def enable_cap(self, capability: int, *arguments: int) -> None:
        """Switch `capability` (`KVM_CAP_*`) on, with up to four `arguments`."""
        request = abi.kvm_enable_cap(cap=capability)
        request.args[: len(arguments)] = arguments
        try:
            libc.ioctl(self.fd, abi.KVM_ENABLE_CAP, ctypes.byref(request))
        except OSError as error:
            raise failed(error, f"KVM_ENABLE_CAP of capability {capability}") from None

    def disable_quirks(self, quirks: int) -> int:
        """Switch off those of `quirks` (`KVM_X86_QUIRK_*`) that this kernel lets go; return them.

        KVM_CAP_DISABLE_QUIRKS2; without it nothing is done and 0 returned.
        """
        quirks &= self.check_extension(abi.KVM_CAP_DISABLE_QUIRKS2)
        if quirks:
            self.enable_cap(abi.KVM_CAP_DISABLE_QUIRKS2, quirks)
        return quirks

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """Create, move or change memslot `slot`; `size` 0 deletes it.  All in bytes, page-aligned."""
        region = abi.kvm_userspace_memory_region(slot, flags, gpa, size, hva)
        try:
            libc.ioctl(self.fd, abi.KVM_SET_USER_MEMORY_REGION, ctypes.byref(region))
        except OSError as error:
            raise failed(
                error,
                f"KVM_SET_USER_MEMORY_REGION of slot {slot}, gpa {gpa:#x}, {size} bytes",
                MEMSLOT_REMEDIES,
            ) from None

    def set_user_memory_region2(
        self, slot: int, gpa: int, size: int, hva: int, flags: int, guest_memfd: int, offset: int
    ) -> None:
        """Create memslot `slot`, bound to `guest_memfd` at `offset` if `flags` has KVM_MEM_GUEST_MEMFD.

        KVM_CAP_USER_MEMORY2.
        """
        region = abi.kvm_userspace_memory_region2(
            slot=slot,
            flags=flags,
            guest_phys_addr=gpa,
            memory_size=size,
            userspace_addr=hva,
            guest_memfd_offset=offset,
            guest_memfd=guest_memfd,
        )
        try:
            libc.ioctl(self.fd, abi.KVM_SET_USER_MEMORY_REGION2, ctypes.byref(region))
        except OSError as error:
            raise failed(
                error,
                f"KVM_SET_USER_MEMORY_REGION2 of slot {slot}, gpa {gpa:#x}, {size} bytes",
                MEMSLOT_REMEDIES,
            ) from None

    def create_guest_memfd(self, size: int, flags: int) -> int:
        """Return a new guest_memfd of `size` bytes (page-aligned).  KVM_CAP_GUEST_MEMFD."""
        request = abi.kvm_create_guest_memfd(size=size, flags=flags)
        try:
            fd = libc.ioctl(self.fd, abi.KVM_CREATE_GUEST_MEMFD, ctypes.byref(request))
        except OSError as error:
            raise failed(error, f"KVM_CREATE_GUEST_MEMFD of {size} bytes, flags {flags:#x}") from None
        # Unlike a VM or vCPU, a guest_memfd would be inherited by a child.
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        return fd

    def set_msr_filter(self, denied: Sequence[DeniedMsrs]) -> None:
        """Let KVM ask user space about the `denied` MSRs and handle all others itself.

        KVM_CAP_X86_MSR_FILTER; the accesses become exits only with KVM_CAP_X86_USER_SPACE_MSR
        enabled for KVM_MSR_EXIT_REASON_FILTER.
        """
        if len(denied) > KVM_MSR_FILTER_MAX_RANGES:
            raise ValueError(
                f"{len(denied)} MSR ranges: KVM takes {KVM_MSR_FILTER_MAX_RANGES} at the most; merge some"
            )
        request = kvm_msr_filter(flags=KVM_MSR_FILTER_DEFAULT_ALLOW)
        bitmaps = []  # the ioctl reads them: they must live until it returns
        for target, msrs in zip(request.ranges, denied, strict=False):
            bitmap = (ctypes.c_uint8 * ((msrs.count + 7) // 8))()
            bitmaps.append(bitmap)
            target.flags = KVM_MSR_FILTER_READ * msrs.read | KVM_MSR_FILTER_WRITE * msrs.write
            target.nmsrs = msrs.count
            target.base = msrs.base
            target.bitmap = ctypes.cast(bitmap, ctypes.POINTER(ctypes.c_uint8))
        try:
            libc.ioctl(self.fd, abi.KVM_X86_SET_MSR_FILTER, ctypes.byref(request))
        except OSError as error:
            raise failed(error, "KVM_X86_SET_MSR_FILTER") from None

    def create_vcpu(self, index: int) -> Vcpu:
        """Make virtual CPU number `index` (its APIC id) and return it."""
        try:
            fd = libc.ioctl(self.fd, abi.KVM_CREATE_VCPU, index)
        except OSError as error:
            raise failed(error, f"KVM_CREATE_VCPU of vCPU {index}") from None
        return Vcpu(fd, index, self._vcpu_mmap_size)

    def statistics(self) -> Statistics:
        """Open the VM's statistics.  KVM_CAP_BINARY_STATS_FD."""
        return open_statistics(self.fd)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing.

        The kernel frees the VM with its last descriptor: its vCPUs hold it too.
        """
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
