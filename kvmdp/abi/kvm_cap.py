"""`linux/kvm.h`: what KVM can do, by number, for KVM_CHECK_EXTENSION and KVM_ENABLE_CAP.

API document: `Documentation/virt/kvm/api.rst`, which says what a capability's value and arguments mean. A comment gives
the first kernel where that is recent.
"""

from __future__ import annotations

import enum


class Cap(enum.IntEnum):
    """The capabilities that this project asks for: `Cap.XCRS` is the header's KVM_CAP_XCRS."""

    IRQCHIP = 0
    USER_MEMORY = 3
    EXT_CPUID = 7
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    MP_STATE = 14
    SYNC_MMU = 16
    DESTROY_MEMORY_REGION_WORKS = 21
    MCE = 31
    ADJUST_CLOCK = 39
    INTERNAL_ERROR_DATA = 40
    VCPU_EVENTS = 41
    DEBUGREGS = 50
    XSAVE = 55
    XCRS = 56
    TSC_CONTROL = 60
    GET_TSC_KHZ = 61
    MAX_VCPUS = 66
    SYNC_REGS = 74
    SPLIT_IRQCHIP = 121
    IMMEDIATE_EXIT = 136
    NESTED_STATE = 157
    EXCEPTION_PAYLOAD = 164
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    X86_USER_SPACE_MSR = 188
    X86_MSR_FILTER = 189
    SREGS2 = 200  # 5.14
    BINARY_STATS_FD = 203  # 5.14
    EXIT_ON_EMULATION_FAILURE = 204  # 5.14
    XSAVE2 = 208  # 5.17
    DISABLE_QUIRKS2 = 213
    X86_TRIPLE_FAULT_EVENT = 218  # 6.1
    USER_MEMORY2 = 231  # 6.8
    MEMORY_FAULT_INFO = 232  # 6.8
    MEMORY_ATTRIBUTES = 233  # 6.8
    GUEST_MEMFD = 234  # 6.8
    VM_TYPES = 235  # 6.8
    PRE_FAULT_MEMORY = 236  # 6.11
    GUEST_MEMFD_FLAGS = 244  # 6.18

    @property
    def in_header(self) -> str:
        """The name that `linux/kvm.h` has for it."""
        return f"KVM_CAP_{self.name}"
