"""All registers of a vCPU, read and written: what is loaded is what a save has read, in a vCPU of another VM too."""

import contextlib
import ctypes
import errno

import pytest
from toy import Toy

from kvmdp.abi.kvm import KVM_MP_STATE_HALTED
from kvmdp.abi.kvm_x86 import KVM_VCPUEVENT_VALID_SHADOW, kvm_cpuid_entry2, kvm_nested_state
from kvmdp.errors import UnsupportedError
from kvmdp.kvm import (
    KVM_CLOCK_REALTIME,
    KVM_MP_STATE_RUNNABLE,
    Cap,
    Hlt,
    IoOut,
    Kvm,
    KvmError,
)

pytestmark = pytest.mark.kvm

KERNEL_GS_BASE, STAR, NO_MSR = 0xC0000102, 0xC0000081, 0xDEAD0000
NOT_CANONICAL = 1 << 63


def need(capability):
    with Kvm() as kvm:
        if not kvm.check_extension(capability):
            pytest.skip(f"this KVM lacks {capability.in_header}: use a newer kernel")


@pytest.fixture
def registers():
    with Toy("f4") as toy:
        toy.vcpu.registers.set_cpuid(toy.kvm.supported_cpuid())
        yield toy.vcpu.registers


def test_fpu(registers):
    fpu = registers.fpu
    fpu.fcw, fpu.xmm[3][5] = 0x27F, 0xAB
    registers.set_fpu(fpu)
    assert (registers.fpu.fcw, registers.fpu.xmm[3][5]) == (0x27F, 0xAB)
    assert bytes(registers.fpu) == bytes(fpu)


def test_xsave_is_all_there_and_the_fpu_is_a_part_of_it(registers):
    need(Cap.XSAVE)
    state = bytearray(registers.xsave)
    with Kvm() as kvm:
        assert len(state) == max(4096, kvm.check_extension(Cap.XSAVE2))
    state[512] |= 0b11  # x87 and SSE are not in their initial state
    state[160 + 16 * 3 + 5] = 0xCD
    state[24:28] = (0x1F80).to_bytes(4, "little")
    registers.set_xsave(bytes(state))
    assert registers.fpu.xmm[3][5] == 0xCD
    again = registers.xsave
    registers.set_xsave(again)
    assert registers.xsave == again
    with pytest.raises(ValueError, match="an XSAVE area of 100 bytes: this KVM has one of"):
        registers.set_xsave(bytes(100))


def test_xcrs(registers):
    need(Cap.XCRS)
    xcrs = registers.xcrs
    assert (xcrs.nr_xcrs, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) == (1, 0, 1)
    registers.set_xcr0(0b11)
    assert registers.xcrs.xcrs[0].value == 0b11
    registers.set_xcrs(xcrs)
    assert registers.xcrs.xcrs[0].value == 1
    with pytest.raises(KvmError, match="KVM_SET_XCRS of vCPU 0 failed: Invalid") as failure:
        registers.set_xcr0(0)
    assert failure.value.errno == errno.EINVAL


def test_debug_registers(registers):
    debug = registers.debug
    debug.db[:] = (0x1000, 0x2000, 0x3000, 0x4000)
    debug.dr7 = 0x400 | 0b101
    registers.set_debug(debug)
    assert (list(registers.debug.db), registers.debug.dr7) == ([0x1000, 0x2000, 0x3000, 0x4000], 0x405)
    debug.flags = 1
    with pytest.raises(KvmError, match="KVM_SET_DEBUGREGS of vCPU 0 failed"):
        registers.set_debug(debug)


def test_sregs2_has_what_sregs_has():
    need(Cap.SREGS2)
    with Toy("f4") as toy:
        sregs2, sregs = toy.vcpu.registers.sregs2, toy.vcpu.sregs
        assert (
            bytes(sregs2)[: type(sregs2).flags.offset] == bytes(sregs)[: type(sregs).interrupt_bitmap.offset]
        )
        sregs2.fs.base, sregs2.cr2 = 0x5000, 0x1234
        toy.vcpu.registers.set_sregs2(sregs2)
        assert (toy.vcpu.sregs.fs.base, toy.vcpu.sregs.cr2) == (0x5000, 0x1234)
        sregs2.flags = 1 << 31
        with pytest.raises(KvmError, match="KVM_SET_SREGS2 of vCPU 0 failed"):
            toy.vcpu.registers.set_sregs2(sregs2)


def test_mp_state_and_the_local_apic_without_one_in_kvm(registers):
    assert registers.mp_state == KVM_MP_STATE_RUNNABLE
    registers.set_mp_state(KVM_MP_STATE_RUNNABLE)
    with pytest.raises(KvmError, match="KVM_SET_MP_STATE of vCPU 0 failed"):
        registers.set_mp_state(KVM_MP_STATE_HALTED)
    with pytest.raises(KvmError, match=r"KVM_GET_LAPIC of vCPU 0 failed: .*KVM_CAP_SPLIT_IRQCHIP") as failure:
        _ = registers.lapic
    assert failure.value.errno == errno.EINVAL
    assert not isinstance(failure.value, UnsupportedError)


def test_the_local_apic_and_a_halted_vcpu_where_kvm_has_one():
    need(Cap.SPLIT_IRQCHIP)
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.enable_cap(Cap.SPLIT_IRQCHIP, 24)
        with vm.create_vcpu(0) as vcpu:
            lapic = vcpu.registers.lapic
            lapic.regs[0x80] = 0x20  # the task priority
            vcpu.registers.set_lapic(lapic)
            lapic = vcpu.registers.lapic
            assert lapic.regs[0x80] == 0x20
            vcpu.registers.set_lapic(lapic)
            assert bytes(vcpu.registers.lapic) == bytes(lapic)
            vcpu.registers.set_mp_state(KVM_MP_STATE_HALTED)
            assert vcpu.registers.mp_state == KVM_MP_STATE_HALTED


def test_cpuid_is_what_was_set(registers):
    with Kvm() as kvm:
        given = kvm.supported_cpuid()
    leaves = {(entry.function, entry.index): entry for entry in registers.cpuid}
    assert leaves.keys() == {(entry.function, entry.index) for entry in given}
    registers.set_cpuid(registers.cpuid)
    few = [kvm_cpuid_entry2(function=0, eax=0, ebx=0x6D766B), kvm_cpuid_entry2(function=0x80000000)]
    registers.set_cpuid(few)
    assert [(entry.function, entry.ebx) for entry in registers.cpuid] == [(0, 0x6D766B), (0x80000000, 0)]
    with pytest.raises(KvmError, match="KVM_SET_CPUID2 of vCPU 0 failed: Argument list too long"):
        registers.set_cpuid(few * 200)


def test_msrs_are_taken_one_by_one_and_those_that_are_refused_are_named(registers):
    values = {KERNEL_GS_BASE: 0x1000, NO_MSR: 1, STAR: 0x1234_0000_0000}
    assert registers.set_msrs(values) == [NO_MSR]
    assert registers.get_msrs([STAR, NO_MSR, KERNEL_GS_BASE]) == {
        STAR: 0x1234_0000_0000,
        KERNEL_GS_BASE: 0x1000,
    }
    assert list(registers.get_msrs([STAR, KERNEL_GS_BASE])) == [STAR, KERNEL_GS_BASE]
    assert registers.set_msrs({KERNEL_GS_BASE: NOT_CANONICAL}) == [KERNEL_GS_BASE]
    assert registers.get_msrs([KERNEL_GS_BASE]) == {KERNEL_GS_BASE: 0x1000}
    with pytest.raises(KvmError, match="KVM_SET_MSRS of MSR 0xdead0000 to 0x5 failed") as failure:
        registers.set_msr(NO_MSR, 5)
    assert failure.value.errno == errno.EINVAL
    assert (registers.get_msrs([]), registers.set_msrs({})) == ({}, [])


def test_more_msrs_than_one_call_takes(registers):
    asked = [NO_MSR + number for number in range(300)] + [KERNEL_GS_BASE] * 300
    assert registers.get_msrs(asked) == {KERNEL_GS_BASE: 0}


def test_the_list_of_msrs_is_what_can_be_read(registers):
    with Kvm() as kvm:
        indices = kvm.msr_indices()
    assert {KERNEL_GS_BASE, STAR, 0x10} <= set(indices)
    assert len(registers.get_msrs(indices)) > len(indices) // 2


def test_the_frequency_of_the_tsc(registers):
    need(Cap.GET_TSC_KHZ)
    khz = registers.tsc_khz
    assert khz > 0
    registers.set_tsc_khz(khz)
    with Kvm() as kvm, kvm.create_vm() as vm:
        scales = vm.check_extension(Cap.TSC_CONTROL)
    if not scales:
        with pytest.raises(
            UnsupportedError, match=r"KVM_SET_TSC_KHZ to \d+ of vCPU 0 failed.*lacks KVM_CAP_TSC_CONTROL"
        ):
            registers.set_tsc_khz(khz // 2)
    else:
        registers.set_tsc_khz(khz // 2)
        assert abs(registers.tsc_khz - khz // 2) <= 1


def test_the_state_of_a_guest_within_the_guest(registers):
    with Kvm() as kvm:
        size = kvm.check_extension(Cap.NESTED_STATE)
    if not size:
        with pytest.raises(UnsupportedError, match="lacks KVM_CAP_NESTED_STATE"):
            _ = registers.nested_state
        nothing = bytes(kvm_nested_state(size=ctypes.sizeof(kvm_nested_state)))
        with pytest.raises(UnsupportedError, match="lacks KVM_CAP_NESTED_STATE"):
            registers.set_nested_state(nothing)
        return
    state = registers.nested_state
    assert 128 <= len(state) <= size
    registers.set_nested_state(state)
    assert registers.nested_state == state
    with pytest.raises(ValueError, match="a nested state of 100 bytes is cut short"):
        registers.set_nested_state(state[:100])


def test_the_clock_of_a_vm_is_set_and_goes_on():
    with Toy("e610 f4") as toy:
        toy.vcpu.run()
        clock = toy.vm.clock
        clock.clock += 10**15
        clock.flags &= KVM_CLOCK_REALTIME
        toy.vm.set_clock(clock)
        assert toy.vm.clock.clock >= clock.clock
        clock.flags = 1 << 20
        with pytest.raises(KvmError, match="KVM_SET_CLOCK failed: Invalid"):
            toy.vm.set_clock(clock)


def everything(toy):
    """Return what a save reads, by name; only what this KVM has."""
    registers, found = toy.vcpu.registers, {}
    readers = {
        "regs": lambda: toy.vcpu.regs,
        "sregs2": lambda: registers.sregs2,
        "fpu": lambda: registers.fpu,
        "xsave": lambda: registers.xsave,
        "xcrs": lambda: registers.xcrs,
        "debug": lambda: registers.debug,
        "events": lambda: toy.vcpu.events,
        "nested": lambda: registers.nested_state,
    }
    for name, read in readers.items():
        try:
            found[name] = bytes(read())
        except UnsupportedError:
            found[name] = None
    return found


def test_a_vcpu_that_is_loaded_into_another_vm_goes_on_where_it_was_and_reads_the_same():
    # mov ax,0x1234; mov bx,ax; out 0x10,al; out 0x11,al; hlt
    code = "b83412 89c3 e610 e611 f4"
    with Toy(code) as source, Toy(code) as target:
        cpuid = source.kvm.supported_cpuid()
        source.vcpu.registers.set_cpuid(cpuid)
        assert isinstance(source.vcpu.run(), IoOut)
        source.vcpu.immediate_exit = True
        source.vcpu.run()
        old, new = source.vcpu, target.vcpu
        new.registers.set_cpuid(old.registers.cpuid)
        new.set_sregs(old.sregs)
        new.set_regs(old.regs)
        with contextlib.suppress(UnsupportedError):  # an old CPU
            new.registers.set_xcrs(old.registers.xcrs)
        new.registers.set_xsave(old.registers.xsave)
        new.registers.set_debug(old.registers.debug)
        events = old.events
        events.flags |= KVM_VCPUEVENT_VALID_SHADOW
        new.set_events(events)
        new.registers.set_mp_state(old.registers.mp_state)
        assert everything(target) == everything(source)
        answer = new.run()
        assert (answer.port, bytes(answer.data)) == (0x11, b"\x34")
        assert isinstance(new.run(), Hlt)
        assert new.regs.rbx & 0xFFFF == 0x1234


CALLS = {
    "KVM_GET_SREGS2": lambda it: it.sregs2,
    "KVM_GET_FPU": lambda it: it.fpu,
    "KVM_GET_XSAVE2?": lambda it: it.xsave,
    "KVM_GET_XCRS": lambda it: it.xcrs,
    "KVM_SET_XCRS": lambda it: it.set_xcr0(1),
    "KVM_GET_DEBUGREGS": lambda it: it.debug,
    "KVM_GET_LAPIC": lambda it: it.lapic,
    "KVM_GET_MP_STATE": lambda it: it.mp_state,
    "KVM_SET_MP_STATE": lambda it: it.set_mp_state(0),
    "KVM_GET_CPUID2": lambda it: it.cpuid,
    "KVM_SET_CPUID2": lambda it: it.set_cpuid([]),
    "KVM_GET_MSRS": lambda it: it.get_msrs([STAR]),
    "KVM_SET_MSRS": lambda it: it.set_msr(STAR, 0),
    "KVM_GET_TSC_KHZ": lambda it: it.tsc_khz,
    "KVM_SET_TSC_KHZ to 5": lambda it: it.set_tsc_khz(5),
    "KVM_GET_NESTED_STATE": lambda it: it.nested_state,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_closed_vcpu_says_so(call):
    with Toy("f4") as toy:
        toy.vcpu.close()
        with pytest.raises(KvmError, match=f"{call} of vCPU 0 failed: Bad file descriptor") as failure:
            CALLS[call](toy.vcpu.registers)
        assert failure.value.errno == errno.EBADF
