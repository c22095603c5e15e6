"""A virtual machine: memslots, their dirty log, guest_memfd, capabilities, MSR filter, clock, statistics, vCPUs.

Source: `linux/kvm.h`, `Documentation/virt/kvm/api.rst`. Units: bytes; gpa is a guest-physical, hva a host virtual
address.
"""

from __future__ import annotations

import ctypes
import fcntl
from collections.abc import Sequence
from dataclasses import dataclass

from kvmdp.abi import kvm as abi
from kvmdp.abi.kvm_cap import Cap
from kvmdp.abi.kvm_x86 import (
    KVM_MSR_FILTER_DEFAULT_ALLOW,
    KVM_MSR_FILTER_MAX_RANGES,
    KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE,
    kvm_msr_filter,
)
from kvmdp.closing import Closing
from kvmdp.kvm.errors import DIRTY_LOG_REMEDIES, MEMSLOT_REMEDIES
from kvmdp.kvm.handle import Handle
from kvmdp.kvm.stats import Statistics, open_statistics
from kvmdp.kvm.vcpu import Vcpu

_PAGE = 4096
_WORD = 64  # KVM's bitmaps of dirty pages are whole words of so many bits


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
    Every call raises KvmError with the kernel's errno, and UnsupportedError (the same exception is both) if the reason
    is that this KVM lacks the capability that the method names.
    """

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        self._handle = Handle(fd)
        self._vcpu_mmap_size = vcpu_mmap_size
        # Pages of each memslot with a dirty log: KVM writes a bit for each, however short the buffer is.
        self._logged: dict[int, int] = {}

    @property
    def fd(self) -> int:
        """The descriptor, -1 once it is closed."""
        return self._handle.fd

    # Capabilities

    def check_extension(self, capability: Cap) -> int:
        """Return what KVM_CHECK_EXTENSION says of `capability` for this VM: 0 if it is absent."""
        return self._handle.check_extension(capability)

    def enable_cap(self, capability: Cap, *arguments: int) -> None:
        """Switch `capability` on, with up to four `arguments`, which the API document describes.

        Raises KvmError, EINVAL for arguments that it does not take; ValueError for more than four.
        """
        request = abi.kvm_enable_cap(cap=capability)
        if len(arguments) > len(request.args):
            raise ValueError(
                f"{len(arguments)} arguments: KVM_ENABLE_CAP takes {len(request.args)} at the most"
            )
        request.args[: len(arguments)] = arguments
        name = f"KVM_ENABLE_CAP of {capability.in_header}"
        self._handle.call(abi.KVM_ENABLE_CAP, name, request, needs=capability)

    def disable_quirks(self, quirks: int) -> int:
        """Switch off those of `quirks` (`KVM_X86_QUIRK_*`) that this kernel lets go; return them.

        Without KVM_CAP_DISABLE_QUIRKS2 nothing is done and 0 returned.
        """
        quirks &= self.check_extension(Cap.DISABLE_QUIRKS2)
        if quirks:
            self.enable_cap(Cap.DISABLE_QUIRKS2, quirks)
        return quirks

    # Memory

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """Create, move or change memslot `slot`; `size` 0 deletes it.  All in bytes, page-aligned.

        `flags` are of KVM_MEM_LOG_DIRTY_PAGES and KVM_MEM_READONLY. Raises KvmError: EEXIST if it overlaps another,
        EINVAL for what is not aligned, or a change that the slot does not take; a ShortageError for want of memory.
        """
        region = abi.kvm_userspace_memory_region(slot, flags, gpa, size, hva)
        self._handle.call(
            abi.KVM_SET_USER_MEMORY_REGION,
            "KVM_SET_USER_MEMORY_REGION",
            region,
            remedies=MEMSLOT_REMEDIES,
            details=lambda: f" of slot {slot}, gpa {gpa:#x}, {size} bytes",
        )
        self._note_log(slot, size, flags)

    def set_user_memory_region2(
        self, slot: int, gpa: int, size: int, hva: int, flags: int, guest_memfd: int, offset: int
    ) -> None:
        """Create memslot `slot`, bound to `guest_memfd` at `offset` if `flags` has KVM_MEM_GUEST_MEMFD.

        Raises as `set_user_memory_region`; needs KVM_CAP_USER_MEMORY2. A slot of a guest_memfd has no dirty log.
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
        self._handle.call(
            abi.KVM_SET_USER_MEMORY_REGION2,
            "KVM_SET_USER_MEMORY_REGION2",
            region,
            needs=Cap.USER_MEMORY2,
            remedies=MEMSLOT_REMEDIES,
            details=lambda: f" of slot {slot}, gpa {gpa:#x}, {size} bytes",
        )
        self._note_log(slot, size, flags)

    def create_guest_memfd(self, size: int, flags: int) -> int:
        """Return a new guest_memfd of `size` bytes (page-aligned), which the caller closes.

        `flags` are of GUEST_MEMFD_FLAG_*, as KVM_CAP_GUEST_MEMFD_FLAGS has them. Raises KvmError, EINVAL for a size or
        flags that it does not take; needs KVM_CAP_GUEST_MEMFD.
        """
        request = abi.kvm_create_guest_memfd(size=size, flags=flags)
        name = f"KVM_CREATE_GUEST_MEMFD of {size} bytes, flags {flags:#x}"
        fd = self._handle.call(abi.KVM_CREATE_GUEST_MEMFD, name, request, needs=Cap.GUEST_MEMFD)
        # Unlike a VM or vCPU, a guest_memfd would be inherited by a child.
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        return fd

    # Dirty log: which pages of a memslot with KVM_MEM_LOG_DIRTY_PAGES vCPUs, or KVM itself, have written to. What this
    # process writes leaves no trace. Deleting the slot, or taking the flag from it, loses the log.

    def protect_dirty_log_manually(self, *, initially_set: bool = False) -> None:
        """Have pages stay dirty until `clear_dirty_log`; before that `get_dirty_log` makes them clean itself.

        With `initially_set` all pages of a slot are dirty from the moment it has a log, which makes giving it one
        cheap; else none is. Before any slot has a log. Needs KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, with that bit.
        """
        bits = abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
        if initially_set:
            bits |= abi.KVM_DIRTY_LOG_INITIALLY_SET
        self._handle.require(Cap.MANUAL_DIRTY_LOG_PROTECT2, bits)
        self.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, bits)

    def get_dirty_log(self, slot: int) -> bytearray:
        """Return which pages of memslot `slot` are dirty, a bit each: page n of it is bit n % 8 of byte n // 8.

        The length is a multiple of 8 bytes. Unless `protect_dirty_log_manually` was called, the pages count as clean
        from now on. Raises KvmError: ENOENT for a slot without a log.
        """
        bitmap = bytearray(_bitmap_bytes(self._logged.get(slot, 0)))
        request = abi.kvm_dirty_log(slot=slot)
        request.dirty_bitmap = ctypes.addressof(ctypes.c_uint8.from_buffer(bitmap))
        name = f"KVM_GET_DIRTY_LOG of slot {slot}"
        self._handle.call(abi.KVM_GET_DIRTY_LOG, name, request, remedies=DIRTY_LOG_REMEDIES)
        return bitmap

    def clear_dirty_log(self, slot: int, bitmap: bytes | bytearray | memoryview, first_page: int = 0) -> None:
        """Have those pages of memslot `slot` count as clean whose bit in `bitmap` is set; the next write marks them.

        `bitmap` is as from `get_dirty_log`, or a part of such a one that begins at `first_page`, a multiple of 64, and
        has a multiple of 8 bytes, else ValueError. A page is to be copied after it has been made clean, not before.
        Raises KvmError: ENOENT for a slot without a log, EINVAL for what reaches beyond it; needs
        KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
        """
        if len(bitmap) % (_WORD // 8):
            raise ValueError(f"a bitmap of {len(bitmap)} bytes: KVM takes whole words of {_WORD // 8}")
        bits = (ctypes.c_uint8 * len(bitmap)).from_buffer_copy(bitmap)
        # The last word of a slot may have bits that are no pages.
        most = self._logged.get(slot, 0) - first_page
        pages = most if 0 < len(bitmap) * 8 - most < _WORD else len(bitmap) * 8
        request = abi.kvm_clear_dirty_log(slot=slot, num_pages=pages, first_page=first_page)
        request.dirty_bitmap = ctypes.addressof(bits)
        self._handle.call(
            abi.KVM_CLEAR_DIRTY_LOG,
            f"KVM_CLEAR_DIRTY_LOG of slot {slot}, {pages} pages from {first_page}",
            request,
            needs=Cap.MANUAL_DIRTY_LOG_PROTECT2,
            remedies=DIRTY_LOG_REMEDIES,
        )

    def _note_log(self, slot: int, size: int, flags: int) -> None:
        if size and flags & abi.KVM_MEM_LOG_DIRTY_PAGES:
            self._logged[slot] = size // _PAGE
        elif self._logged:
            self._logged.pop(slot, None)

    # The clock

    @property
    def clock(self) -> abi.kvm_clock_data:
        """What kvmclock shows in this VM, in ns; its flags say what else is filled in, and are true after a first run.

        Needs KVM_CAP_ADJUST_CLOCK.
        """
        clock = abi.kvm_clock_data()
        self._handle.call(abi.KVM_GET_CLOCK, "KVM_GET_CLOCK", clock, needs=Cap.ADJUST_CLOCK)
        return clock

    def set_clock(self, clock: abi.kvm_clock_data) -> None:
        """Have kvmclock go on from `clock.clock`; with KVM_CLOCK_REALTIME, as if it had run since `clock.realtime`.

        KVM_CLOCK_REALTIME (Linux 5.16) is the one flag that it takes: EINVAL for another. Needs KVM_CAP_ADJUST_CLOCK.
        """
        self._handle.call(abi.KVM_SET_CLOCK, "KVM_SET_CLOCK", clock, needs=Cap.ADJUST_CLOCK)

    # MSRs, vCPUs, statistics

    def set_msr_filter(self, denied: Sequence[DeniedMsrs]) -> None:
        """Let KVM ask user space about the `denied` MSRs and handle all others itself.

        The accesses become exits only with KVM_CAP_X86_USER_SPACE_MSR enabled for KVM_MSR_EXIT_REASON_FILTER.
        Raises KvmError; ValueError for more than 16 ranges; needs KVM_CAP_X86_MSR_FILTER.
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
        self._handle.call(
            abi.KVM_X86_SET_MSR_FILTER, "KVM_X86_SET_MSR_FILTER", request, needs=Cap.X86_MSR_FILTER
        )

    def create_vcpu(self, index: int) -> Vcpu:
        """Make virtual CPU number `index` (its APIC id) and return it; the caller closes it.

        Raises KvmError: EEXIST if there is one of that number, EINVAL beyond KVM_CAP_MAX_VCPUS.
        """
        fd = self._handle.call(abi.KVM_CREATE_VCPU, f"KVM_CREATE_VCPU of vCPU {index}", index)
        return Vcpu(Handle(fd, f" of vCPU {index}", self._handle), index, self._vcpu_mmap_size)

    def statistics(self) -> Statistics:
        """Open the VM's statistics; the caller closes them. Needs KVM_CAP_BINARY_STATS_FD."""
        return open_statistics(self._handle)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing.

        The kernel frees the VM with its last descriptor: its vCPUs hold it too.
        """
        self._handle.close()


def _bitmap_bytes(pages: int) -> int:
    """Return how long KVM's bitmap of so many pages is."""
    return max(-(-pages // _WORD), 1) * _WORD // 8
