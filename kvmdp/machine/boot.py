"""The boot slot and the state every vCPU starts in: the host's half of the guest ABI (`guest/README.md`).

The boot slot lies in the hole of the guest-physical map and is always present. It holds what must never be absent:
the guest's code, its descriptor tables and stacks, the parameter blocks, and (`kvmdp.machine.page_tables`) page
tables.

Sources: Intel SDM volume 3, chapters 2 (control registers), 13 (XCR0).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from kvmdp.abi.kvm_cap import Cap
from kvmdp.abi.kvm_para import KVM_CPUID_FEATURES
from kvmdp.abi.kvm_x86 import kvm_cpuid_entry2, kvm_regs, kvm_segment
from kvmdp.errors import KvmdpError
from kvmdp.kvm import Kvm, Vcpu, Vm
from kvmdp.machine import guest_abi as guest
from kvmdp.machine.page_tables import PageTables
from kvmdp.memory.mapping import Mapping
from kvmdp.page import PAGE_SIZE
from kvmdp.size import format_size
from kvmdp.source.formats import HEAD_BYTES, TAIL_BYTES, recognise

BOOT_MEMSLOT, EMPTY_TABLE_MEMSLOT = 0, 7
# The gpa of a page of zeros, which the guest does not map: a page table with nothing in it
EMPTY_TABLE = 0xFE00_0000

_CR0 = 1 << 0 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31  # PE, MP, ET, NE, WP, PG
_CR4_PAE, _CR4_OSFXSR, _CR4_OSXMMEXCPT, _CR4_OSXSAVE = 1 << 5, 1 << 9, 1 << 10, 1 << 18
_EFER = 1 << 8 | 1 << 10  # LME, LMA
_RFLAGS = 1 << 1  # the bit that is always set

_XCR0_X87_SSE_AVX = 0b111

_CPUID1_ECX_X2APIC, _CPUID1_ECX_TSC_DEADLINE, _CPUID1_EDX_APIC = 1 << 21, 1 << 24, 1 << 9
_CPUID1_ECX_XSAVE, _CPUID1_ECX_AVX, _CPUID7_EBX_AVX2 = 1 << 26, 1 << 28, 1 << 5


class GuestImageError(KvmdpError, ValueError):
    """A guest program cannot be loaded; the message says why and what would do."""


def stock_image() -> bytes:
    """Return the guest image that comes with kvmdp."""
    packaged = Path(__file__).with_name("guest.bin")
    checkout = Path(__file__).parents[2] / "guest" / "guest.bin"
    return (packaged if packaged.exists() else checkout).read_bytes()


def read_program(path: str) -> bytes:
    """Return a flat binary for the guest's program area. Raises GuestImageError."""
    try:
        with open(path, "rb") as file:
            program = file.read(guest.PROGRAM_SIZE + 1)  # a device may go on for ever
    except OSError as error:
        raise GuestImageError(f"cannot read the guest program {path}: {error.strerror}") from None
    if not program:
        raise GuestImageError(
            f"the guest program {path} is empty: give a flat binary for {guest.PROGRAM_BASE:#x}"
        )
    if len(program) > guest.PROGRAM_SIZE:
        raise GuestImageError(
            f"the guest program {path} is too large: the program area takes {format_size(guest.PROGRAM_SIZE)}"
        )
    found = recognise(program[:HEAD_BYTES], program[-TAIL_BYTES:])
    if found is not None:
        name = shlex.quote(path)
        remedy = (
            f"objcopy -O binary {name} {name}.bin makes one" if found.name == "elf" else found.remedy(path)
        )
        raise GuestImageError(f"the guest program {path} is {found.title}, not a flat binary: {remedy}")
    return program


class BootSlot:
    """The boot slot's memory, and the empty page table beside it; owns their mappings.

    Made with everything in place but the parameter blocks, which the caller fills through `parameters`.
    """

    def __init__(self, tables: PageTables, image: bytes, program: bytes = b"") -> None:
        self.size = tables.boot_size
        self._mapping = Mapping.anonymous(self.size)
        self._empty_table = Mapping.anonymous(PAGE_SIZE)
        self._image, self._program = image, program
        self.load()
        self._put(guest.PAGE_TABLES_BASE, tables.boot_tables)

    def load(self) -> None:
        """Put the guest's code and data in place, as they were before it ran. No vCPU may run."""
        self._put(guest.BOOT_BASE, self._image)
        self._put(guest.PROGRAM_BASE, self._program)

    def _put(self, gpa: int, data: bytes) -> None:
        offset = gpa - guest.BOOT_BASE
        self._mapping.view[offset : offset + len(data)] = data

    def read(self, gpa: int, length: int) -> bytes | None:
        """Return bytes of the slot, or None if they are not all in it."""
        offset = gpa - guest.BOOT_BASE
        if not 0 <= offset <= self.size - length:
            return None
        return bytes(self._mapping.view[offset : offset + length])

    def parameters(self, vcpu: int) -> guest.ParameterBlock:
        """Return the parameter block of a vCPU, in place."""
        offset = guest.parameter_block_gpa(vcpu) - guest.BOOT_BASE
        return guest.ParameterBlock.from_address(self._mapping.hva + offset)

    def map_into(self, vm: Vm) -> None:
        """Give the slot to the VM, and the empty page table."""
        vm.set_user_memory_region(BOOT_MEMSLOT, guest.BOOT_BASE, self.size, self._mapping.hva)
        vm.set_user_memory_region(EMPTY_TABLE_MEMSLOT, EMPTY_TABLE, PAGE_SIZE, self._empty_table.hva)

    def close(self) -> None:
        """Unmap; the VM must be closed, or not run any more."""
        self._mapping.close()
        self._empty_table.close()


def guest_cpuid(kvm: Kvm, pv_features: int = 0) -> list[kvm_cpuid_entry2]:
    """Return the CPUID table for the guest: what the host has, less what this machine does not provide.

    There is no APIC. Of KVM's paravirtual features only the bits `pv_features` of KVM_CPUID_FEATURES are shown: each
    makes KVM write to guest memory by itself, which `kvmdp.machine.pv_msrs` has to know of.
    """
    entries = kvm.supported_cpuid()
    for entry in entries:
        if entry.function == 1:
            entry.ecx &= ~(_CPUID1_ECX_X2APIC | _CPUID1_ECX_TSC_DEADLINE)
            entry.edx &= ~_CPUID1_EDX_APIC
        elif entry.function == KVM_CPUID_FEATURES:
            entry.eax &= pv_features
    return entries


def vector_flags(kvm: Kvm) -> guest.VectorFlag:
    """Return the vector instructions the guest may use beyond SSE2: CPU and KVM_CAP_XCRS permitting."""
    leaves = {(entry.function, entry.index): entry for entry in guest_cpuid(kvm)}
    leaf1, leaf7 = leaves.get((1, 0)), leaves.get((7, 0))
    needed = _CPUID1_ECX_XSAVE | _CPUID1_ECX_AVX
    if not kvm.check_extension(Cap.XCRS) or leaf1 is None or leaf1.ecx & needed != needed:
        return guest.VectorFlag.NONE
    if leaf7 is None or not leaf7.ebx & _CPUID7_EBX_AVX2:
        return guest.VectorFlag.AVX
    return guest.VectorFlag.AVX | guest.VectorFlag.AVX2


def set_boot_state(
    vcpu: Vcpu, cpuid: Sequence[kvm_cpuid_entry2], vector: guest.VectorFlag, tables: PageTables
) -> None:
    """Put a new vCPU at the guest's entry: long mode, ring 0, flat segments, its parameter block in RDI."""
    vcpu.registers.set_cpuid(cpuid)
    sregs = vcpu.sregs
    code = kvm_segment(
        limit=0xFFFFFFFF, selector=guest.ENTRY_CODE_SELECTOR, type=0xB, present=1, s=1, l=1, g=1
    )
    data = kvm_segment(
        limit=0xFFFFFFFF, selector=guest.ENTRY_DATA_SELECTOR, type=0x3, present=1, s=1, db=1, g=1
    )
    sregs.cs = code
    # As after LLDT of 0. At its reset a CPU has a table of 64 KiB at address 0, which is RAM here.
    sregs.ldt = kvm_segment(unusable=1)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.cr0 = _CR0
    sregs.cr3 = tables.root
    sregs.cr4 = _CR4_PAE | _CR4_OSFXSR | _CR4_OSXMMEXCPT | (_CR4_OSXSAVE if vector else 0)
    sregs.efer = _EFER
    vcpu.set_sregs(sregs)
    if vector:
        vcpu.registers.set_xcr0(_XCR0_X87_SSE_AVX)
    vcpu.set_regs(
        kvm_regs(
            rip=guest.BOOT_BASE,
            rflags=_RFLAGS,
            rdi=guest.parameter_block_gpa(vcpu.index),
            rsi=vcpu.index,
            rsp=guest.ring0_stack_top(vcpu.index),
        )
    )
