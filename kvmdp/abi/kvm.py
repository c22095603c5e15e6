"""`linux/kvm.h`: ioctls, structures and exits that this project uses; `kvmdp.abi.kvm_cap` has the capabilities.

API document: `Documentation/virt/kvm/api.rst`.  Addresses and sizes are bytes; `gpa` is a
guest-physical, `hva` a host virtual address.  A comment names the capability that gates an
ioctl, and the first kernel where that is recent.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int16, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p

from kvmdp.abi.ioctl import _IO, _IOR, _IOW, _IOWR
from kvmdp.abi.kvm_x86 import (
    kvm_cpuid2,
    kvm_debugregs,
    kvm_fpu,
    kvm_lapic_state,
    kvm_msr_filter,
    kvm_msr_list,
    kvm_msrs,
    kvm_nested_state,
    kvm_regs,
    kvm_sregs,
    kvm_sregs2,
    kvm_sync_regs,
    kvm_vcpu_events,
    kvm_x86_mce,
    kvm_xcrs,
    kvm_xsave,
)

KVMIO = 0xAE
KVM_API_VERSION = 12

# kvm_userspace_memory_region.flags
KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2  # 6.8

# kvm_create_guest_memfd.flags
GUEST_MEMFD_FLAG_MMAP = 1 << 0  # 6.18
GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1  # 6.18

# Argument of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1

# kvm_clock_data.flags
KVM_CLOCK_TSC_STABLE = 1 << 1
KVM_CLOCK_REALTIME = 1 << 2  # 5.16
KVM_CLOCK_HOST_TSC = 1 << 3  # 5.16

# kvm_mp_state.mp_state
KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4

# kvm_run.exit_reason
KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
KVM_EXIT_MEMORY_FAULT = 39  # 6.8

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

# kvm_run.internal.suberror
KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1 << 0

# kvm_run.msr.reason and the argument of KVM_CAP_X86_USER_SPACE_MSR
KVM_MSR_EXIT_REASON_INVAL = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN = 1 << 1
KVM_MSR_EXIT_REASON_FILTER = 1 << 2


class kvm_userspace_memory_region(ctypes.Structure):
    """A memslot: guest memory at a gpa, backed by process memory at an hva."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class kvm_userspace_memory_region2(ctypes.Structure):
    """A memslot that may also be bound to a guest_memfd, KVM_CAP_USER_MEMORY2."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
        ("guest_memfd_offset", c_uint64),
        ("guest_memfd", c_uint32),
        ("pad1", c_uint32),
        ("pad2", c_uint64 * 14),
    ]


class kvm_create_guest_memfd(ctypes.Structure):
    """Size and flags of a new guest_memfd, KVM_CAP_GUEST_MEMFD."""

    _fields_ = [("size", c_uint64), ("flags", c_uint64), ("reserved", c_uint64 * 6)]


class _dirty_bitmap(ctypes.Union):
    _fields_ = [("dirty_bitmap", c_void_p), ("padding2", c_uint64)]


class kvm_dirty_log(ctypes.Structure):
    """Where KVM puts which pages of a memslot are dirty, a bit each, in whole 64-bit words."""

    _anonymous_ = ("bitmap",)
    _fields_ = [("slot", c_uint32), ("padding1", c_uint32), ("bitmap", _dirty_bitmap)]


class kvm_clear_dirty_log(ctypes.Structure):
    """Pages of a memslot that are to count as clean, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2; bit 0 is `first_page`."""

    _anonymous_ = ("bitmap",)
    _fields_ = [
        ("slot", c_uint32),
        ("num_pages", c_uint32),
        ("first_page", c_uint64),
        ("bitmap", _dirty_bitmap),
    ]


class kvm_clock_data(ctypes.Structure):
    """kvmclock of a VM, KVM_CAP_ADJUST_CLOCK: `clock` and `realtime` in nanoseconds."""

    _fields_ = [
        ("clock", c_uint64),
        ("flags", c_uint32),
        ("pad0", c_uint32),
        ("realtime", c_uint64),
        ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    ]


class kvm_mp_state(ctypes.Structure):
    """Whether a vCPU runs, is halted, or waits to be started, KVM_CAP_MP_STATE."""

    _fields_ = [("mp_state", c_uint32)]


class kvm_enable_cap(ctypes.Structure):
    """A capability to be switched on, with its arguments."""

    _fields_ = [
        ("cap", c_uint32),
        ("flags", c_uint32),
        ("args", c_uint64 * 4),
        ("pad", c_uint8 * 64),
    ]


class kvm_translation(ctypes.Structure):
    """Linear to physical address by the guest's page tables."""

    _fields_ = [
        ("linear_address", c_uint64),
        ("physical_address", c_uint64),
        ("valid", c_uint8),
        ("writeable", c_uint8),
        ("usermode", c_uint8),
        ("pad", c_uint8 * 5),
    ]


class kvm_signal_mask(ctypes.Structure):
    """Header of the signal mask that holds during KVM_RUN; `len` bytes of sigset follow."""

    _fields_ = [("len", c_uint32)]


class kvm_stats_header(ctypes.Structure):
    """First bytes of a statistics descriptor, KVM_CAP_BINARY_STATS_FD."""

    _fields_ = [
        ("flags", c_uint32),
        ("name_size", c_uint32),
        ("num_desc", c_uint32),
        ("id_offset", c_uint32),
        ("desc_offset", c_uint32),
        ("data_offset", c_uint32),
    ]


class kvm_stats_desc(ctypes.Structure):
    """Description of one statistic; `name_size` bytes of name follow."""

    _fields_ = [
        ("flags", c_uint32),
        ("exponent", c_int16),
        ("size", c_uint16),
        ("offset", c_uint32),
        ("bucket_size", c_uint32),
    ]


class _exit_fail_entry(ctypes.Structure):
    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class _exit_io(ctypes.Structure):
    _fields_ = [
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    ]


class _exit_mmio(ctypes.Structure):
    _fields_ = [
        ("phys_addr", c_uint64),
        ("data", c_uint8 * 8),
        ("len", c_uint32),
        ("is_write", c_uint8),
    ]


class _exit_internal(ctypes.Structure):
    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _exit_emulation_failure(ctypes.Structure):
    _fields_ = [
        ("suberror", c_uint32),
        ("ndata", c_uint32),
        ("flags", c_uint64),
        ("insn_size", c_uint8),
        ("insn_bytes", c_uint8 * 15),
    ]


class _exit_system_event(ctypes.Structure):
    _fields_ = [("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _exit_msr(ctypes.Structure):
    _fields_ = [
        ("error", c_uint8),
        ("pad", c_uint8 * 7),
        ("reason", c_uint32),
        ("index", c_uint32),
        ("data", c_uint64),
    ]


class _exit_memory_fault(ctypes.Structure):
    _fields_ = [("flags", c_uint64), ("gpa", c_uint64), ("size", c_uint64)]


class _exit_union(ctypes.Union):
    _fields_ = [
        ("fail_entry", _exit_fail_entry),
        ("io", _exit_io),
        ("mmio", _exit_mmio),
        ("internal", _exit_internal),
        ("emulation_failure", _exit_emulation_failure),
        ("system_event", _exit_system_event),
        ("msr", _exit_msr),
        ("memory_fault", _exit_memory_fault),
        ("padding", c_uint8 * 256),
    ]


class _sync_union(ctypes.Union):
    _fields_ = [("regs", kvm_sync_regs), ("padding", c_uint8 * 2048)]


class kvm_run(ctypes.Structure):
    """The page a vCPU shares with user space: why KVM_RUN returned, and what it needs."""

    _anonymous_ = ("exit",)
    _fields_ = [
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exit", _exit_union),
        ("kvm_valid_regs", c_uint64),
        ("kvm_dirty_regs", c_uint64),
        ("s", _sync_union),
    ]


# On /dev/kvm
KVM_GET_API_VERSION = _IO(KVMIO, 0x00)
KVM_CREATE_VM = _IO(KVMIO, 0x01)
KVM_GET_MSR_INDEX_LIST = _IOWR(KVMIO, 0x02, kvm_msr_list)
KVM_CHECK_EXTENSION = _IO(KVMIO, 0x03)
KVM_GET_VCPU_MMAP_SIZE = _IO(KVMIO, 0x04)
KVM_GET_SUPPORTED_CPUID = _IOWR(KVMIO, 0x05, kvm_cpuid2)  # KVM_CAP_EXT_CPUID
KVM_X86_GET_MCE_CAP_SUPPORTED = _IOR(KVMIO, 0x9D, c_uint64)  # KVM_CAP_MCE

# On a VM
KVM_CREATE_VCPU = _IO(KVMIO, 0x41)
KVM_GET_DIRTY_LOG = _IOW(KVMIO, 0x42, kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = _IOW(KVMIO, 0x46, kvm_userspace_memory_region)
KVM_SET_USER_MEMORY_REGION2 = _IOW(KVMIO, 0x49, kvm_userspace_memory_region2)  # KVM_CAP_USER_MEMORY2
KVM_SET_CLOCK = _IOW(KVMIO, 0x7B, kvm_clock_data)  # KVM_CAP_ADJUST_CLOCK
KVM_GET_CLOCK = _IOR(KVMIO, 0x7C, kvm_clock_data)  # KVM_CAP_ADJUST_CLOCK
KVM_ENABLE_CAP = _IOW(KVMIO, 0xA3, kvm_enable_cap)
KVM_CLEAR_DIRTY_LOG = _IOWR(KVMIO, 0xC0, kvm_clear_dirty_log)  # KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
KVM_X86_SET_MSR_FILTER = _IOW(KVMIO, 0xC6, kvm_msr_filter)  # KVM_CAP_X86_MSR_FILTER
KVM_GET_STATS_FD = _IO(KVMIO, 0xCE)  # KVM_CAP_BINARY_STATS_FD; on a vCPU too
KVM_CREATE_GUEST_MEMFD = _IOWR(KVMIO, 0xD4, kvm_create_guest_memfd)  # KVM_CAP_GUEST_MEMFD

# On a vCPU
KVM_RUN = _IO(KVMIO, 0x80)
KVM_GET_REGS = _IOR(KVMIO, 0x81, kvm_regs)
KVM_SET_REGS = _IOW(KVMIO, 0x82, kvm_regs)
KVM_GET_SREGS = _IOR(KVMIO, 0x83, kvm_sregs)
KVM_SET_SREGS = _IOW(KVMIO, 0x84, kvm_sregs)
KVM_TRANSLATE = _IOWR(KVMIO, 0x85, kvm_translation)
KVM_GET_MSRS = _IOWR(KVMIO, 0x88, kvm_msrs)
KVM_SET_MSRS = _IOW(KVMIO, 0x89, kvm_msrs)
KVM_SET_SIGNAL_MASK = _IOW(KVMIO, 0x8B, kvm_signal_mask)
KVM_GET_FPU = _IOR(KVMIO, 0x8C, kvm_fpu)
KVM_SET_FPU = _IOW(KVMIO, 0x8D, kvm_fpu)
KVM_GET_LAPIC = _IOR(KVMIO, 0x8E, kvm_lapic_state)  # KVM_CAP_IRQCHIP
KVM_SET_LAPIC = _IOW(KVMIO, 0x8F, kvm_lapic_state)  # KVM_CAP_IRQCHIP
KVM_SET_CPUID2 = _IOW(KVMIO, 0x90, kvm_cpuid2)  # KVM_CAP_EXT_CPUID
KVM_GET_CPUID2 = _IOWR(KVMIO, 0x91, kvm_cpuid2)  # KVM_CAP_EXT_CPUID
KVM_GET_MP_STATE = _IOR(KVMIO, 0x98, kvm_mp_state)  # KVM_CAP_MP_STATE
KVM_SET_MP_STATE = _IOW(KVMIO, 0x99, kvm_mp_state)  # KVM_CAP_MP_STATE
KVM_X86_SETUP_MCE = _IOW(KVMIO, 0x9C, c_uint64)  # KVM_CAP_MCE
KVM_X86_SET_MCE = _IOW(KVMIO, 0x9E, kvm_x86_mce)  # KVM_CAP_MCE
KVM_GET_VCPU_EVENTS = _IOR(KVMIO, 0x9F, kvm_vcpu_events)  # KVM_CAP_VCPU_EVENTS
KVM_SET_VCPU_EVENTS = _IOW(KVMIO, 0xA0, kvm_vcpu_events)  # KVM_CAP_VCPU_EVENTS
KVM_GET_DEBUGREGS = _IOR(KVMIO, 0xA1, kvm_debugregs)  # KVM_CAP_DEBUGREGS
KVM_SET_DEBUGREGS = _IOW(KVMIO, 0xA2, kvm_debugregs)  # KVM_CAP_DEBUGREGS
KVM_SET_TSC_KHZ = _IO(KVMIO, 0xA2)  # KVM_CAP_TSC_CONTROL
KVM_GET_TSC_KHZ = _IO(KVMIO, 0xA3)  # KVM_CAP_GET_TSC_KHZ
KVM_GET_XSAVE = _IOR(KVMIO, 0xA4, kvm_xsave)  # KVM_CAP_XSAVE
KVM_SET_XSAVE = _IOW(KVMIO, 0xA5, kvm_xsave)  # KVM_CAP_XSAVE
KVM_GET_XCRS = _IOR(KVMIO, 0xA6, kvm_xcrs)  # KVM_CAP_XCRS
KVM_SET_XCRS = _IOW(KVMIO, 0xA7, kvm_xcrs)  # KVM_CAP_XCRS
KVM_GET_NESTED_STATE = _IOWR(KVMIO, 0xBE, kvm_nested_state)  # KVM_CAP_NESTED_STATE
KVM_SET_NESTED_STATE = _IOW(KVMIO, 0xBF, kvm_nested_state)  # KVM_CAP_NESTED_STATE
KVM_GET_SREGS2 = _IOR(KVMIO, 0xCC, kvm_sregs2)  # KVM_CAP_SREGS2
KVM_SET_SREGS2 = _IOW(KVMIO, 0xCD, kvm_sregs2)  # KVM_CAP_SREGS2
KVM_GET_XSAVE2 = _IOR(KVMIO, 0xCF, kvm_xsave)  # KVM_CAP_XSAVE2
