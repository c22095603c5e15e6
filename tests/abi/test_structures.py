"""Golden layout of kvmdp.abi on x86-64.

The numbers were printed by a C program that was compiled against the headers of Linux 7.2, not
by ctypes.
"""

import ctypes
import re
from collections.abc import Iterator

import pytest

from kvmdp.abi import kvm, kvm_cap, kvm_para, kvm_x86, mman, signal, userfaultfd

MODULES = (kvm, kvm_cap, kvm_para, kvm_x86, mman, signal, userfaultfd)

# structure size: field offset, ... (bytes); a dot leads into a structure that has no name in C
LAYOUTS = """
kvm_userspace_memory_region 32: slot 0, flags 4, guest_phys_addr 8, memory_size 16, userspace_addr 24
kvm_userspace_memory_region2 160: slot 0, flags 4, guest_phys_addr 8, memory_size 16, userspace_addr 24,
    guest_memfd_offset 32, guest_memfd 40, pad1 44, pad2 48
kvm_create_guest_memfd 64: size 0, flags 8, reserved 16
kvm_dirty_log 16: slot 0, padding1 4, dirty_bitmap 8, padding2 8
kvm_clear_dirty_log 24: slot 0, num_pages 4, first_page 8, dirty_bitmap 16, padding2 16
kvm_clock_data 48: clock 0, flags 8, pad0 12, realtime 16, host_tsc 24, pad 32
kvm_mp_state 4: mp_state 0
kvm_enable_cap 104: cap 0, flags 4, args 8, pad 40
kvm_translation 24: linear_address 0, physical_address 8, valid 16, writeable 17, usermode 18, pad 19
kvm_signal_mask 4: len 0
kvm_stats_header 24: flags 0, name_size 4, num_desc 8, id_offset 12, desc_offset 16, data_offset 20
kvm_stats_desc 16: flags 0, exponent 4, size 6, offset 8, bucket_size 12
kvm_run 2352: request_interrupt_window 0, immediate_exit 1, padding1 2, exit_reason 8,
    ready_for_interrupt_injection 12, if_flag 13, flags 14, cr8 16, apic_base 24, fail_entry 32,
    fail_entry.hardware_entry_failure_reason 32, fail_entry.cpu 40, io 32, io.direction 32, io.size 33,
    io.port 34, io.count 36, io.data_offset 40, mmio 32, mmio.phys_addr 32, mmio.data 40, mmio.len 48,
    mmio.is_write 52, internal 32, internal.suberror 32, internal.ndata 36, internal.data 40,
    emulation_failure 32, emulation_failure.suberror 32, emulation_failure.ndata 36,
    emulation_failure.flags 40, emulation_failure.insn_size 48, emulation_failure.insn_bytes 49,
    system_event 32, system_event.type 32, system_event.ndata 36, system_event.data 40, msr 32,
    msr.error 32, msr.pad 33, msr.reason 40, msr.index 44, msr.data 48, memory_fault 32,
    memory_fault.flags 32, memory_fault.gpa 40, memory_fault.size 48, padding 32, kvm_valid_regs 288,
    kvm_dirty_regs 296, s 304, s.regs 304, s.padding 304
kvm_regs 144: rax 0, rbx 8, rcx 16, rdx 24, rsi 32, rdi 40, rsp 48, rbp 56, r8 64, r9 72, r10 80, r11 88,
    r12 96, r13 104, r14 112, r15 120, rip 128, rflags 136
kvm_segment 24: base 0, limit 8, selector 12, type 14, present 15, dpl 16, db 17, s 18, l 19, g 20, avl 21,
    unusable 22, padding 23
kvm_dtable 16: base 0, limit 8, padding 10
kvm_sregs 312: cs 0, ds 24, es 48, fs 72, gs 96, ss 120, tr 144, ldt 168, gdt 192, idt 208, cr0 224,
    cr2 232, cr3 240, cr4 248, cr8 256, efer 264, apic_base 272, interrupt_bitmap 280
kvm_sregs2 320: cs 0, ds 24, es 48, fs 72, gs 96, ss 120, tr 144, ldt 168, gdt 192, idt 208, cr0 224,
    cr2 232, cr3 240, cr4 248, cr8 256, efer 264, apic_base 272, flags 280, pdptrs 288
kvm_fpu 416: fpr 0, fcw 128, fsw 130, ftwx 132, pad1 133, last_opcode 134, last_ip 136, last_dp 144,
    xmm 152, mxcsr 408, pad2 412
kvm_lapic_state 1024: regs 0
kvm_vcpu_events 64: exception 0, exception.injected 0, exception.nr 1, exception.has_error_code 2,
    exception.pending 3, exception.error_code 4, interrupt 8, interrupt.injected 8, interrupt.nr 9,
    interrupt.soft 10, interrupt.shadow 11, nmi 12, nmi.injected 12, nmi.pending 13, nmi.masked 14,
    nmi.pad 15, sipi_vector 16, flags 20, smi 24, smi.smm 24, smi.pending 25, smi.smm_inside_nmi 26,
    smi.latched_init 27, triple_fault 28, reserved 29, exception_has_payload 55, exception_payload 56
kvm_sync_regs 520: regs 0, sregs 144, events 456
kvm_cpuid_entry2 40: function 0, index 4, flags 8, eax 12, ebx 16, ecx 20, edx 24, padding 28
kvm_cpuid2 8: nent 0, padding 4
kvm_msr_entry 16: index 0, reserved 4, data 8
kvm_msrs 8: nmsrs 0, pad 4
kvm_msr_list 4: nmsrs 0
kvm_msr_filter_range 24: flags 0, nmsrs 4, base 8, bitmap 16
kvm_msr_filter 392: flags 0, ranges 8
kvm_xcr 16: xcr 0, reserved 4, value 8
kvm_xcrs 392: nr_xcrs 0, flags 4, xcrs 8, padding 264
kvm_debugregs 128: db 0, dr6 32, dr7 40, flags 48, reserved 56
kvm_xsave 4096: region 0
kvm_nested_state 128: flags 0, format 2, size 4, hdr 8, hdr.pad 8
kvm_x86_mce 64: status 0, addr 8, misc 16, mcg_status 24, bank 32, pad1 33, pad2 40
siginfo_t 128: si_signo 0, si_errno 4, si_code 8, si_addr 16, si_addr_lsb 24
timespec 16: tv_sec 0, tv_nsec 8
uffdio_api 24: api 0, features 8, ioctls 16
uffdio_range 16: start 0, len 8
uffdio_register 32: range 0, mode 16, ioctls 24
uffdio_copy 40: dst 0, src 8, len 16, mode 24, copy 32
uffdio_zeropage 32: range 0, mode 16, zeropage 24
uffdio_continue 32: range 0, mode 16, mapped 24
uffdio_poison 32: range 0, mode 16, updated 24
uffd_msg 32: event 0, reserved1 1, reserved2 2, reserved3 4, arg 8, arg.pagefault 8, arg.pagefault.flags 8,
    arg.pagefault.address 16, arg.pagefault.ptid 24, arg.remove 8, arg.remove.start 8, arg.remove.end 16
"""

REQUESTS = {
    "KVM_GET_API_VERSION": 0x0000AE00,
    "KVM_CREATE_VM": 0x0000AE01,
    "KVM_CHECK_EXTENSION": 0x0000AE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0x0000AE04,
    "KVM_GET_SUPPORTED_CPUID": 0xC008AE05,
    "KVM_X86_GET_MCE_CAP_SUPPORTED": 0x8008AE9D,
    "KVM_CREATE_VCPU": 0x0000AE41,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_SET_USER_MEMORY_REGION2": 0x40A0AE49,
    "KVM_ENABLE_CAP": 0x4068AEA3,
    "KVM_X86_SET_MSR_FILTER": 0x4188AEC6,
    "KVM_GET_STATS_FD": 0x0000AECE,
    "KVM_CREATE_GUEST_MEMFD": 0xC040AED4,
    "KVM_RUN": 0x0000AE80,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_SET_REGS": 0x4090AE82,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_TRANSLATE": 0xC018AE85,
    "KVM_GET_MSRS": 0xC008AE88,
    "KVM_SET_MSRS": 0x4008AE89,
    "KVM_SET_SIGNAL_MASK": 0x4004AE8B,
    "KVM_SET_CPUID2": 0x4008AE90,
    "KVM_X86_SETUP_MCE": 0x4008AE9C,
    "KVM_X86_SET_MCE": 0x4040AE9E,
    "KVM_GET_VCPU_EVENTS": 0x8040AE9F,
    "KVM_SET_VCPU_EVENTS": 0x4040AEA0,
    "KVM_GET_DEBUGREGS": 0x8080AEA1,
    "KVM_SET_DEBUGREGS": 0x4080AEA2,
    "KVM_GET_XSAVE": 0x9000AEA4,
    "KVM_SET_XSAVE": 0x5000AEA5,
    "KVM_GET_XCRS": 0x8188AEA6,
    "KVM_SET_XCRS": 0x4188AEA7,
    "KVM_GET_MSR_INDEX_LIST": 0xC004AE02,
    "KVM_GET_DIRTY_LOG": 0x4010AE42,
    "KVM_SET_CLOCK": 0x4030AE7B,
    "KVM_GET_CLOCK": 0x8030AE7C,
    "KVM_CLEAR_DIRTY_LOG": 0xC018AEC0,
    "KVM_GET_FPU": 0x81A0AE8C,
    "KVM_SET_FPU": 0x41A0AE8D,
    "KVM_GET_LAPIC": 0x8400AE8E,
    "KVM_SET_LAPIC": 0x4400AE8F,
    "KVM_GET_CPUID2": 0xC008AE91,
    "KVM_GET_MP_STATE": 0x8004AE98,
    "KVM_SET_MP_STATE": 0x4004AE99,
    "KVM_SET_TSC_KHZ": 0x0000AEA2,
    "KVM_GET_TSC_KHZ": 0x0000AEA3,
    "KVM_GET_NESTED_STATE": 0xC080AEBE,
    "KVM_SET_NESTED_STATE": 0x4080AEBF,
    "KVM_GET_SREGS2": 0x8140AECC,
    "KVM_SET_SREGS2": 0x4140AECD,
    "KVM_GET_XSAVE2": 0x9000AECF,
    "USERFAULTFD_IOC_NEW": 0x0000AA00,
    "UFFDIO_API": 0xC018AA3F,
    "UFFDIO_REGISTER": 0xC020AA00,
    "UFFDIO_UNREGISTER": 0x8010AA01,
    "UFFDIO_WAKE": 0x8010AA02,
    "UFFDIO_COPY": 0xC028AA03,
    "UFFDIO_ZEROPAGE": 0xC020AA04,
    "UFFDIO_CONTINUE": 0xC020AA07,
    "UFFDIO_POISON": 0xC020AA08,
}

# Constants younger than the headers that many machines have, where tools/abi_check cannot see them
YOUNG_CONSTANTS = {
    "KVM_CAP_USER_MEMORY2": 231,
    "KVM_CAP_MEMORY_FAULT_INFO": 232,
    "KVM_CAP_MEMORY_ATTRIBUTES": 233,
    "KVM_CAP_GUEST_MEMFD": 234,
    "KVM_CAP_VM_TYPES": 235,
    "KVM_CAP_PRE_FAULT_MEMORY": 236,
    "KVM_CAP_GUEST_MEMFD_FLAGS": 244,
    "KVM_MEM_GUEST_MEMFD": 4,
    "GUEST_MEMFD_FLAG_MMAP": 1,
    "GUEST_MEMFD_FLAG_INIT_SHARED": 2,
    "KVM_EXIT_MEMORY_FAULT": 39,
    "KVM_X86_QUIRK_SLOT_ZAP_ALL": 128,
    "UFFD_FEATURE_WP_UNPOPULATED": 8192,
    "UFFD_FEATURE_POISON": 16384,
    "UFFD_FEATURE_WP_ASYNC": 32768,
    "UFFD_FEATURE_MOVE": 65536,
    "UFFDIO_POISON_MODE_DONTWAKE": 1,
}


def public(kind: type) -> dict[str, object]:
    """What the modules define or import of this kind, private names left out."""
    found = {name: value for module in MODULES for name, value in vars(module).items()}
    return {name: value for name, value in found.items() if isinstance(value, kind) and name[0] != "_"}


STRUCTURES = {
    name: value
    for name, value in public(type).items()
    if issubclass(value, ctypes.Structure) and value is not ctypes.Structure
}


def parse(text: str) -> dict[str, tuple[int, dict[str, int]]]:
    """Size and offset of each field, by structure."""
    found = {}
    for name, size, fields in re.findall(r"^(\w+) (\d+): ((?:.|\n )*)$", text, re.MULTILINE):
        pairs = re.findall(r"([\w.]+) (\d+)", fields)
        found[name] = int(size), {field: int(offset) for field, offset in pairs}
    return found


GOLDEN = parse(LAYOUTS)


def offsets(structure, prefix: str = "", start: int = 0) -> Iterator[tuple[str, int]]:
    """Path and offset of each field; into helper types, which have no name in C."""
    for name, kind, *_ in structure._fields_:
        if name.startswith("_"):
            continue  # padding that the header does not name
        offset = start + getattr(structure, name).offset
        anonymous = name in getattr(structure, "_anonymous_", ())
        if not anonymous:
            yield prefix + name, offset
        if kind.__name__.startswith("_"):
            yield from offsets(kind, prefix if anonymous else f"{prefix}{name}.", offset)


def test_every_structure_has_golden_values():
    assert set(STRUCTURES) == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_structure(name):
    size, fields = GOLDEN[name]
    assert ctypes.sizeof(STRUCTURES[name]) == size
    assert dict(offsets(STRUCTURES[name])) == fields


def test_every_ioctl_request_has_a_golden_value():
    requests = {name: value for name, value in public(int).items() if value >> 8 & 0xFF in (0xAE, 0xAA)}
    assert requests == REQUESTS


@pytest.mark.parametrize("name", YOUNG_CONSTANTS)
def test_young_constant(name):
    constants = {**public(int), **{each.in_header: each for each in kvm_cap.Cap}}
    assert constants[name] == YOUNG_CONSTANTS[name]


def test_the_exit_union_and_the_shared_registers_have_the_room_the_kernel_gives_them():
    assert kvm.kvm_run.exit.size == 256
    assert kvm.kvm_run.s.size == 2048
