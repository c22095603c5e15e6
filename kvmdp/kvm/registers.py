"""What a vCPU is at beyond `Vcpu.regs`, `sregs` and `events`: the rest of what a save and a load of it need.

Each is read and written as a whole, by one ioctl. Sources: `asm/kvm.h`, and `Documentation/virt/kvm/api.rst`, section
4, which has a section for each call that is named here. What a load does first, and what cannot be loaded: CPUID before
all else, for it decides which bits other registers may have; events after `Vcpu.set_regs`, which drops a pending
exception.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvmdp.abi import kvm as abi
from kvmdp.abi.ioctl import FlexibleArgument, flexible
from kvmdp.abi.kvm_cap import Cap
from kvmdp.abi.kvm_x86 import (
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_fpu,
    kvm_lapic_state,
    kvm_msr_entry,
    kvm_msrs,
    kvm_nested_state,
    kvm_sregs2,
    kvm_xcrs,
    kvm_xsave,
)
from kvmdp.kvm.errors import LAPIC_REMEDIES, KvmError
from kvmdp.kvm.handle import Handle

_MAX_CPUID_ENTRIES = 256  # KVM_MAX_CPUID_ENTRIES of arch/x86/include/asm/kvm_host.h
_MSRS_AT_ONCE = 128  # KVM takes fewer than 256


class Registers:
    """The registers of one vCPU, `Vcpu.registers`; belongs to the thread that the vCPU belongs to.

    A property reads, `set_` writes. Every call raises KvmError with the kernel's errno, EINVAL for values that KVM
    refuses; and UnsupportedError (the same exception is both) if the reason is that this KVM lacks the capability that
    the method names.
    """

    def __init__(self, handle: Handle) -> None:
        self._call = handle.call
        self._handle = handle
        self._xsave2_size: int | None = None  # bytes; 0 without KVM_CAP_XSAVE2

    @property
    def sregs2(self) -> kvm_sregs2:
        """What `Vcpu.sregs` has but for `interrupt_bitmap`, and PAE's page table pointers. Needs KVM_CAP_SREGS2."""
        sregs = kvm_sregs2()
        self._call(abi.KVM_GET_SREGS2, "KVM_GET_SREGS2", sregs, needs=Cap.SREGS2)
        return sregs

    def set_sregs2(self, sregs: kvm_sregs2) -> None:
        """Set segment, descriptor-table and control registers, and with its flag PAE's. Needs KVM_CAP_SREGS2."""
        self._call(abi.KVM_SET_SREGS2, "KVM_SET_SREGS2", sregs, needs=Cap.SREGS2)

    @property
    def fpu(self) -> kvm_fpu:
        """x87 and SSE state; a part of `xsave`."""
        fpu = kvm_fpu()
        self._call(abi.KVM_GET_FPU, "KVM_GET_FPU", fpu)
        return fpu

    def set_fpu(self, fpu: kvm_fpu) -> None:
        """Set x87 and SSE state."""
        self._call(abi.KVM_SET_FPU, "KVM_SET_FPU", fpu)

    @property
    def xsave(self) -> bytes:
        """x87, SSE, AVX and further state, as XSAVE's standard format has it. Needs KVM_CAP_XSAVE.

        4096 bytes, or as many as KVM_CAP_XSAVE2 says where KVM has it.
        """
        area = self._xsave_area()
        if self._xsave2_size:
            self._call(abi.KVM_GET_XSAVE2, "KVM_GET_XSAVE2", area, needs=Cap.XSAVE2)
        else:
            self._call(abi.KVM_GET_XSAVE, "KVM_GET_XSAVE", area, needs=Cap.XSAVE)
        return bytes(area)

    def set_xsave(self, state: bytes) -> None:
        """Set what `xsave` reads. Raises ValueError for another length than that has here. Needs KVM_CAP_XSAVE."""
        area = self._xsave_area()
        if len(state) != ctypes.sizeof(area):
            raise ValueError(
                f"an XSAVE area of {len(state)} bytes: this KVM has one of {ctypes.sizeof(area)}"
            )
        ctypes.memmove(ctypes.addressof(area), state, len(state))
        self._call(abi.KVM_SET_XSAVE, "KVM_SET_XSAVE", area, needs=Cap.XSAVE)

    def _xsave_area(self) -> FlexibleArgument:
        if self._xsave2_size is None:
            self._xsave2_size = self._handle.check_extension(Cap.XSAVE2)
        extra = max(self._xsave2_size - ctypes.sizeof(kvm_xsave), 0)
        return flexible(kvm_xsave, ctypes.c_uint8, extra)()

    @property
    def xcrs(self) -> kvm_xcrs:
        """Extended control registers. Needs KVM_CAP_XCRS."""
        xcrs = kvm_xcrs()
        self._call(abi.KVM_GET_XCRS, "KVM_GET_XCRS", xcrs, needs=Cap.XCRS)
        return xcrs

    def set_xcrs(self, xcrs: kvm_xcrs) -> None:
        """Set extended control registers; their bits are those that CPUID has. Needs KVM_CAP_XCRS."""
        self._call(abi.KVM_SET_XCRS, "KVM_SET_XCRS", xcrs, needs=Cap.XCRS)

    def set_xcr0(self, value: int) -> None:
        """Set XCR0, the state components the guest may use. Needs KVM_CAP_XCRS."""
        xcrs = kvm_xcrs(nr_xcrs=1)
        xcrs.xcrs[0].value = value
        self.set_xcrs(xcrs)

    @property
    def debug(self) -> kvm_debugregs:
        """DR0 to DR3, DR6, DR7. Needs KVM_CAP_DEBUGREGS."""
        registers = kvm_debugregs()
        self._call(abi.KVM_GET_DEBUGREGS, "KVM_GET_DEBUGREGS", registers, needs=Cap.DEBUGREGS)
        return registers

    def set_debug(self, registers: kvm_debugregs) -> None:
        """Set DR0 to DR3, DR6, DR7. Needs KVM_CAP_DEBUGREGS."""
        self._call(abi.KVM_SET_DEBUGREGS, "KVM_SET_DEBUGREGS", registers, needs=Cap.DEBUGREGS)

    @property
    def lapic(self) -> kvm_lapic_state:
        """The local APIC. Raises KvmError (EINVAL) if KVM has none for this vCPU: a toy machine's VM has none."""
        lapic = kvm_lapic_state()
        self._call(abi.KVM_GET_LAPIC, "KVM_GET_LAPIC", lapic, needs=Cap.IRQCHIP, remedies=LAPIC_REMEDIES)
        return lapic

    def set_lapic(self, lapic: kvm_lapic_state) -> None:
        """Set the local APIC. Raises KvmError (EINVAL) if KVM has none for this vCPU."""
        self._call(abi.KVM_SET_LAPIC, "KVM_SET_LAPIC", lapic, needs=Cap.IRQCHIP, remedies=LAPIC_REMEDIES)

    @property
    def mp_state(self) -> int:
        """Whether the vCPU runs, is halted, or waits to be started: a KVM_MP_STATE_*. Needs KVM_CAP_MP_STATE."""
        state = abi.kvm_mp_state()
        self._call(abi.KVM_GET_MP_STATE, "KVM_GET_MP_STATE", state, needs=Cap.MP_STATE)
        return int(state.mp_state)

    def set_mp_state(self, state: int) -> None:
        """Set it to a KVM_MP_STATE_*. Needs KVM_CAP_MP_STATE, and for another than RUNNABLE a local APIC in KVM."""
        argument = abi.kvm_mp_state(state)
        self._call(abi.KVM_SET_MP_STATE, "KVM_SET_MP_STATE", argument, needs=Cap.MP_STATE)

    @property
    def cpuid(self) -> list[kvm_cpuid_entry2]:
        """The guest's CPUID leaves, in the order in which they were set. Needs KVM_CAP_EXT_CPUID."""
        table = flexible(kvm_cpuid2, kvm_cpuid_entry2, _MAX_CPUID_ENTRIES)()
        table.header.nent = _MAX_CPUID_ENTRIES
        self._call(abi.KVM_GET_CPUID2, "KVM_GET_CPUID2", table, needs=Cap.EXT_CPUID)
        return [kvm_cpuid_entry2.from_buffer_copy(table.entries[index]) for index in range(table.header.nent)]

    def set_cpuid(self, entries: Sequence[kvm_cpuid_entry2]) -> None:
        """Give the guest these CPUID leaves; before the first run, after which other ones are refused (EINVAL).

        Raises KvmError, E2BIG for more than KVM takes. Needs KVM_CAP_EXT_CPUID.
        """
        table = flexible(kvm_cpuid2, kvm_cpuid_entry2, len(entries))()
        table.header.nent = len(entries)
        for index, entry in enumerate(entries):
            table.entries[index] = entry
        self._call(abi.KVM_SET_CPUID2, "KVM_SET_CPUID2", table, needs=Cap.EXT_CPUID)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Return the values of those MSRs that KVM lets user space read, in the order of `indices`."""
        asked = [(index, 0) for index in indices]
        return {
            index: value
            for index, value, taken in self._msrs(abi.KVM_GET_MSRS, "KVM_GET_MSRS", asked)
            if taken
        }

    def set_msrs(self, values: Mapping[int, int]) -> list[int]:
        """Set MSRs in the order of `values`; return the numbers of those that KVM refuses. The others are set."""
        rows = self._msrs(abi.KVM_SET_MSRS, "KVM_SET_MSRS", list(values.items()))
        return [index for index, _, taken in rows if not taken]

    def set_msr(self, index: int, value: int) -> None:
        """Set one MSR; raises `KvmError` (EINVAL) if KVM refuses the value or the MSR."""
        if self.set_msrs({index: value}):
            raise KvmError(errno.EINVAL, f"KVM_SET_MSRS of MSR {index:#x} to {value:#x}")

    def _msrs(self, request: int, name: str, rows: list[tuple[int, int]]) -> list[tuple[int, int, bool]]:
        """Return (number, value, whether KVM took it) of each MSR. A call stops at the first that KVM does not take."""
        found: list[tuple[int, int, bool]] = []
        while len(found) < len(rows):
            part = rows[len(found) : len(found) + _MSRS_AT_ONCE]
            table: Any = flexible(kvm_msrs, kvm_msr_entry, _MSRS_AT_ONCE if len(part) > 1 else 1)()
            table.header.nmsrs = len(part)
            for entry, (index, value) in zip(table.entries, part, strict=False):
                entry.index, entry.data = index, value
            done = self._call(request, name, table)
            found += [(entry.index, entry.data, True) for entry in table.entries[:done]]
            if done < len(part):
                found.append((*part[done], False))
        return found

    @property
    def tsc_khz(self) -> int:
        """The frequency of the guest's TSC in kHz. Needs KVM_CAP_GET_TSC_KHZ."""
        return self._call(abi.KVM_GET_TSC_KHZ, "KVM_GET_TSC_KHZ", needs=Cap.GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the frequency of the guest's TSC. Another than the host's needs KVM_CAP_TSC_CONTROL."""
        self._call(abi.KVM_SET_TSC_KHZ, f"KVM_SET_TSC_KHZ to {khz}", khz, needs=Cap.TSC_CONTROL)

    @property
    def nested_state(self) -> bytes:
        """What a hypervisor in the guest has of its own guest, with its header. Needs KVM_CAP_NESTED_STATE."""
        name, header = "KVM_GET_NESTED_STATE", ctypes.sizeof(kvm_nested_state)
        size = max(self._handle.check_extension(Cap.NESTED_STATE), header)
        table = flexible(kvm_nested_state, ctypes.c_uint8, size - header)()
        table.header.size = size
        self._call(abi.KVM_GET_NESTED_STATE, name, table, needs=Cap.NESTED_STATE)
        return bytes(table)[: table.header.size]

    def set_nested_state(self, state: bytes) -> None:
        """Set what `nested_state` reads. Raises ValueError if it is cut short. Needs KVM_CAP_NESTED_STATE."""
        header = ctypes.sizeof(kvm_nested_state)
        if len(state) < header or kvm_nested_state.from_buffer_copy(state).size > len(state):
            raise ValueError(
                f"a nested state of {len(state)} bytes is cut short: its header says how long it is"
            )
        table = flexible(kvm_nested_state, ctypes.c_uint8, len(state) - header).from_buffer_copy(state)
        self._call(abi.KVM_SET_NESTED_STATE, "KVM_SET_NESTED_STATE", table, needs=Cap.NESTED_STATE)
