"""`asm/kvm.h` for x86: registers, CPUID, MSRs, extended control registers, machine checks.

API document: `Documentation/virt/kvm/api.rst`.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64

KVM_NR_INTERRUPTS = 256
KVM_APIC_REG_SIZE = 0x400

# kvm_run.kvm_valid_regs and kvm_dirty_regs, KVM_CAP_SYNC_REGS
KVM_SYNC_X86_REGS = 1 << 0
KVM_SYNC_X86_SREGS = 1 << 1
KVM_SYNC_X86_EVENTS = 1 << 2

# KVM_CAP_DISABLE_QUIRKS2
KVM_X86_QUIRK_SLOT_ZAP_ALL = 1 << 7  # 6.12

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0  # the header's spelling

# kvm_sregs2.flags
KVM_SREGS2_FLAGS_PDPTRS_VALID = 1 << 0

# kvm_vcpu_events.flags: which of its fields KVM_SET_VCPU_EVENTS is to take
KVM_VCPUEVENT_VALID_NMI_PENDING = 1 << 0
KVM_VCPUEVENT_VALID_SIPI_VECTOR = 1 << 1
KVM_VCPUEVENT_VALID_SHADOW = 1 << 2
KVM_VCPUEVENT_VALID_SMM = 1 << 3
KVM_VCPUEVENT_VALID_PAYLOAD = 1 << 4  # KVM_CAP_EXCEPTION_PAYLOAD
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 1 << 5  # KVM_CAP_X86_TRIPLE_FAULT_EVENT

# kvm_msr_filter, KVM_CAP_X86_MSR_FILTER
KVM_MSR_FILTER_MAX_RANGES = 16
KVM_MSR_FILTER_READ = 1 << 0
KVM_MSR_FILTER_WRITE = 1 << 1
KVM_MSR_FILTER_DEFAULT_ALLOW = 0 << 0
KVM_MSR_FILTER_DEFAULT_DENY = 1 << 0


class kvm_regs(ctypes.Structure):
    """General registers."""

    _fields_ = [
        (name, c_uint64)
        for name in (
            "rax",
            "rbx",
            "rcx",
            "rdx",
            "rsi",
            "rdi",
            "rsp",
            "rbp",
            "r8",
            "r9",
            "r10",
            "r11",
            "r12",
            "r13",
            "r14",
            "r15",
            "rip",
            "rflags",
        )
    ]


class kvm_segment(ctypes.Structure):
    """A segment register with its hidden part."""

    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    ]


class kvm_dtable(ctypes.Structure):
    """GDTR or IDTR."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class kvm_sregs(ctypes.Structure):
    """Segment, descriptor-table and control registers."""

    _fields_ = [
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        ("cr0", c_uint64),
        ("cr2", c_uint64),
        ("cr3", c_uint64),
        ("cr4", c_uint64),
        ("cr8", c_uint64),
        ("efer", c_uint64),
        ("apic_base", c_uint64),
        ("interrupt_bitmap", c_uint64 * ((KVM_NR_INTERRUPTS + 63) // 64)),
    ]


class kvm_sregs2(ctypes.Structure):
    """Segment, descriptor-table and control registers, and PAE's page table pointers, KVM_CAP_SREGS2."""

    _fields_ = [
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base", "flags")),
        ("pdptrs", c_uint64 * 4),
    ]


class kvm_fpu(ctypes.Structure):
    """x87 and SSE state; `ftwx` is abridged, as FXSAVE has it."""

    _fields_ = [
        ("fpr", c_uint8 * 16 * 8),
        ("fcw", c_uint16),
        ("fsw", c_uint16),
        ("ftwx", c_uint8),
        ("pad1", c_uint8),
        ("last_opcode", c_uint16),
        ("last_ip", c_uint64),
        ("last_dp", c_uint64),
        ("xmm", c_uint8 * 16 * 16),
        ("mxcsr", c_uint32),
        ("pad2", c_uint32),
    ]


class kvm_lapic_state(ctypes.Structure):
    """Registers of the local APIC that KVM has for a vCPU, at their offsets in its page. KVM_CAP_IRQCHIP."""

    _fields_ = [("regs", c_uint8 * KVM_APIC_REG_SIZE)]


class _vcpu_events_exception(ctypes.Structure):
    _fields_ = [
        ("injected", c_uint8),
        ("nr", c_uint8),
        ("has_error_code", c_uint8),
        ("pending", c_uint8),
        ("error_code", c_uint32),
    ]


class _vcpu_events_interrupt(ctypes.Structure):
    _fields_ = [("injected", c_uint8), ("nr", c_uint8), ("soft", c_uint8), ("shadow", c_uint8)]


class _vcpu_events_nmi(ctypes.Structure):
    _fields_ = [("injected", c_uint8), ("pending", c_uint8), ("masked", c_uint8), ("pad", c_uint8)]


class _vcpu_events_smi(ctypes.Structure):
    _fields_ = [
        ("smm", c_uint8),
        ("pending", c_uint8),
        ("smm_inside_nmi", c_uint8),
        ("latched_init", c_uint8),
    ]


class kvm_vcpu_events(ctypes.Structure):
    """Exceptions, interrupts and NMIs that are pending or being delivered."""

    _fields_ = [
        ("exception", _vcpu_events_exception),
        ("interrupt", _vcpu_events_interrupt),
        ("nmi", _vcpu_events_nmi),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi", _vcpu_events_smi),
        ("triple_fault", c_uint8),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    ]


class kvm_sync_regs(ctypes.Structure):
    """Registers shared through `kvm_run`, KVM_CAP_SYNC_REGS."""

    _fields_ = [("regs", kvm_regs), ("sregs", kvm_sregs), ("events", kvm_vcpu_events)]


class kvm_cpuid_entry2(ctypes.Structure):
    """One CPUID leaf."""

    _fields_ = [
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    ]


class kvm_cpuid2(ctypes.Structure):
    """Header of a CPUID table; `nent` entries follow."""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32)]


class kvm_msr_entry(ctypes.Structure):
    """One model-specific register."""

    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class kvm_msrs(ctypes.Structure):
    """Header of an MSR table; `nmsrs` entries follow."""

    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32)]


class kvm_msr_list(ctypes.Structure):
    """Header of a list of MSR numbers; `nmsrs` of 32 bits each follow."""

    _fields_ = [("nmsrs", c_uint32)]


class kvm_msr_filter_range(ctypes.Structure):
    """MSRs `base` to `base + nmsrs - 1`; a clear bit in `bitmap` denies."""

    _fields_ = [
        ("flags", c_uint32),
        ("nmsrs", c_uint32),
        ("base", c_uint32),
        ("bitmap", ctypes.POINTER(c_uint8)),
    ]


class kvm_msr_filter(ctypes.Structure):
    """Which guest MSR accesses go to user space, KVM_CAP_X86_MSR_FILTER."""

    _fields_ = [("flags", c_uint32), ("ranges", kvm_msr_filter_range * KVM_MSR_FILTER_MAX_RANGES)]


class kvm_xcr(ctypes.Structure):
    """One extended control register."""

    _fields_ = [("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class kvm_xcrs(ctypes.Structure):
    """Extended control registers, KVM_CAP_XCRS."""

    _fields_ = [
        ("nr_xcrs", c_uint32),
        ("flags", c_uint32),
        ("xcrs", kvm_xcr * 16),
        ("padding", c_uint64 * 16),
    ]


class kvm_debugregs(ctypes.Structure):
    """Debug registers, KVM_CAP_DEBUGREGS."""

    _fields_ = [
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    ]


class kvm_xsave(ctypes.Structure):
    """x87, SSE and AVX state in XSAVE's standard format, KVM_CAP_XSAVE (`extra` has what KVM_GET_XSAVE2 adds)."""

    _fields_ = [("region", c_uint32 * 1024)]


class _nested_header(ctypes.Union):
    _fields_ = [("pad", c_uint8 * 120), ("_alignment", c_uint64)]


class kvm_nested_state(ctypes.Structure):
    """Header of what a guest hypervisor's guest is at, KVM_CAP_NESTED_STATE: `size` bytes, with this header."""

    _fields_ = [("flags", c_uint16), ("format", c_uint16), ("size", c_uint32), ("hdr", _nested_header)]


class kvm_x86_mce(ctypes.Structure):
    """A machine check to be injected, KVM_CAP_MCE."""

    _fields_ = [
        ("status", c_uint64),
        ("addr", c_uint64),
        ("misc", c_uint64),
        ("mcg_status", c_uint64),
        ("bank", c_uint8),
        ("pad1", c_uint8 * 7),
        ("pad2", c_uint64 * 3),
    ]
