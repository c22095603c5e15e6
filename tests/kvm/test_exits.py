"""KVM_RUN's exits as typed values, each brought about by a guest of a few bytes."""

import os
import signal
import subprocess
import time

import pytest
from toy import CODE, Toy, in_thread

from kvmdp.abi.kvm import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    KVM_MSR_EXIT_REASON_FILTER,
)
from kvmdp.kvm import (
    BadAddress,
    Cap,
    DeniedMsrs,
    Hlt,
    InternalError,
    Interrupted,
    IoIn,
    IoOut,
    MemoryFault,
    Mmio,
    MmioRead,
    MmioWrite,
    MsrRead,
    MsrWrite,
    Shutdown,
)
from kvmdp.kvm.signals import KICK_SIGNAL, VcpuSignals
from kvmdp.memory.mapping import Mapping
from kvmdp.thread import run_in_thread

pytestmark = pytest.mark.kvm

FOREVER = "ebfe"  # jmp to itself
MSR = 0x10A


def test_port_io_carries_the_guests_bytes_out_and_the_answer_in():
    # mov dx,0x3f8; mov al,0x41; out dx,al; in al,dx; out 0x80,al; mov ax,0x1234; out 0x81,ax; hlt
    with Toy("baf803 b041 ee ec e680 b83412 e781 f4") as toy:
        out = toy.vcpu.run()
        assert isinstance(out, IoOut)
        assert (out.port, out.size, out.count) == (0x3F8, 1, 1)
        assert bytes(out.data) == b"A"
        into = toy.vcpu.run()
        assert isinstance(into, IoIn)
        assert (into.port, into.size) == (0x3F8, 1)
        into.data[:] = b"Z"
        assert bytes(toy.vcpu.run().data) == b"Z"
        word = toy.vcpu.run()
        assert (word.port, word.size, bytes(word.data)) == (0x81, 2, b"\x34\x12")
        assert isinstance(toy.vcpu.run(), Hlt)
        del out, into, word  # views of memory that goes with the vCPU


def test_string_port_io_comes_as_one_exit_or_as_several_with_the_same_bytes():
    # cld; mov si,0x2000; mov cx,5; mov dx,0x3f8; rep outsb; hlt
    with Toy("fc be0020 b90500 baf803 f36e f4") as toy:
        toy.memory[0x2000:0x2005] = b"hello"
        text = b""
        while not isinstance(exit := toy.vcpu.run(), Hlt):
            assert isinstance(exit, IoOut)
            assert (exit.size, len(exit.data)) == (1, exit.count)
            text += bytes(exit.data)
        assert text == b"hello"
    # cld; xor ax,ax; mov es,ax; mov di,0x2000; mov cx,4; mov dx,0x3f8; rep insb; hlt
    with Toy("fc 31c0 8ec0 bf0020 b90400 baf803 f36c f4") as toy:
        answer = bytearray(b"KVMD")
        while not isinstance(exit := toy.vcpu.run(), Hlt):
            assert isinstance(exit, IoIn)
            exit.data[:] = answer[: exit.count]
            del answer[: exit.count]
        assert bytes(toy.memory[0x2000:0x2004]) == b"KVMD"
        del exit


def test_an_access_outside_memory_is_mmio_both_ways():
    # mov ax,0xf000; mov ds,ax; mov ax,[0x10]; inc ax; mov [0x12],ax; hlt
    with Toy("b800f0 8ed8 a11000 40 a31200 f4") as toy:
        read = toy.vcpu.run()
        assert isinstance(read, MmioRead)
        assert (read.gpa, read.size) == (0xF0010, 2)
        read.data[:] = b"\xff\x01"
        write = toy.vcpu.run()
        assert isinstance(write, MmioWrite)
        assert (write.gpa, write.size, bytes(write.data)) == (0xF0012, 2, b"\x00\x02")
        assert isinstance(toy.vcpu.run(), Hlt)
        del read, write


def test_a_triple_fault_is_a_shutdown():
    with Toy("0f0b") as toy:  # ud2 in protected mode, without an IDT
        sregs = toy.vcpu.sregs
        sregs.cr0 |= 1
        sregs.cs.limit, sregs.cs.g, sregs.cs.db, sregs.cs.selector, sregs.cs.type = 0xFFFFFFFF, 1, 1, 8, 0xB
        sregs.idt.limit = 0
        toy.vcpu.set_sregs(sregs)
        assert isinstance(toy.vcpu.run(), Shutdown)


def test_an_instruction_that_cannot_be_emulated_comes_with_its_bytes():
    # mov ax,0xf000; mov ds,ax; paddq xmm0,[0x10]; hlt
    with Toy("b800f0 8ed8 660fd4061000 f4") as toy:
        sregs = toy.vcpu.sregs
        sregs.cr4 |= 1 << 9  # OSFXSR
        toy.vcpu.set_sregs(sregs)
        error = toy.vcpu.run()
        assert isinstance(error, InternalError)
        assert error.is_emulation_failure
        assert error.instruction.startswith(bytes.fromhex("660fd4061000"))
        assert toy.vcpu.regs.rip == CODE + 5
        assert str(error).startswith(
            "KVM internal error 1 (instruction emulation failed), instruction bytes 66 0f d4"
        )


def test_an_event_that_could_not_be_delivered_says_where():
    # As kvm_prepare_event_vectoring_exit of arch/x86/kvm/x86.c fills it: the last is the CPU.
    assert InternalError(3, (0x2017F8, 0x400, 0xE, 0x2017F8, 1), b"").delivery_gpa == 0x2017F8
    assert InternalError(3, (0x80000B0E, 0x30, 0xE, 1), b"").delivery_gpa is None
    assert InternalError(1, (0, 0, 0, 0x2017F8, 1), b"").delivery_gpa is None


def test_immediate_exit_returns_before_the_guest_runs():
    with Toy("b80500 f4") as toy:  # mov ax,5; hlt
        toy.vcpu.immediate_exit = True
        assert isinstance(toy.vcpu.run(), Interrupted)
        assert isinstance(toy.vcpu.run(), Interrupted)
        assert toy.vcpu.regs.rip == CODE
        toy.vcpu.immediate_exit = False
        assert isinstance(toy.vcpu.run(), Hlt)
        assert toy.vcpu.regs.rax & 0xFFFF == 5


def test_immediate_exit_completes_the_access_that_is_pending():
    with Toy("ec f4") as toy:  # in al,dx; hlt
        toy.vcpu.run().data[:] = b"\x77"
        toy.vcpu.immediate_exit = True
        assert isinstance(toy.vcpu.run(), Interrupted)
        assert toy.vcpu.regs.rax & 0xFF == 0x77
        assert toy.vcpu.regs.rip == CODE + 1


def test_a_kick_gets_a_vcpu_out_of_an_endless_loop_each_time():
    with Toy(FOREVER) as toy:

        def run_twice():
            first = toy.vcpu.run()
            toy.vcpu.immediate_exit = False
            return first, toy.vcpu.run()

        def kick_twice():
            for _ in range(2):
                time.sleep(0.05)
                toy.vcpu.kick()

        assert all(isinstance(exit, Interrupted) for exit in in_thread(toy.vcpu, run_twice, kick_twice))
        assert toy.vcpu.regs.rip == CODE


def test_a_kick_before_the_entry_is_not_lost():
    with Toy(FOREVER) as toy:

        def kicked_outside():
            toy.vcpu.immediate_exit = False
            toy.vcpu.kick()
            return toy.vcpu.run()

        assert isinstance(in_thread(toy.vcpu, kicked_outside), Interrupted)
        toy.vcpu.kick()  # no thread any more: nobody is hit by a signal


def test_a_thread_that_has_run_a_vcpu_has_its_signals_back():
    masks = []
    with Toy(FOREVER) as toy:

        def run_and_turn_to_other_things():
            masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            toy.vcpu.attach_thread()
            toy.vcpu.kick()
            toy.vcpu.run()
            toy.vcpu.detach_thread()
            masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

        run_in_thread(run_and_turn_to_other_things, "vcpu")
    assert masks[0] == masks[1]


def test_a_signal_for_the_process_that_a_vcpu_takes_for_a_kick_reaches_the_process():
    caught = []
    handler = signal.signal(KICK_SIGNAL, lambda *_: caught.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
    try:

        def take():
            signals = VcpuSignals()
            subprocess.run(["kill", f"-{int(KICK_SIGNAL)}", str(os.getpid())], check=True)
            signals.take()
            signals.restore()

        run_in_thread(take, "vcpu")
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert caught == [True]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(KICK_SIGNAL, handler)


def test_memory_that_the_host_has_no_page_for_is_an_exit_without_an_address():
    # mov ax,0x1000; mov ds,ax; mov ax,[0x20]; hlt
    with Toy("b80010 8ed8 a12000 f4") as toy, Mapping.reserved(0x1000) as nothing:
        toy.vm.set_user_memory_region(slot=1, gpa=0x10000, size=0x1000, hva=nothing.hva)
        exit = toy.vcpu.run()
        if isinstance(exit, BadAddress):
            assert str(exit).startswith("KVM_RUN failed with EFAULT: the host gives KVM no page")
        else:  # where KVM emulates real mode
            assert isinstance(exit, Mmio)
        assert toy.vcpu.regs.rip == CODE + 5
        del exit


def require(toy, capability, bits=1):
    if toy.vm.check_extension(capability) & bits != bits:
        pytest.skip(f"this KVM lacks {capability.in_header}: use a newer kernel")


def test_a_closed_guest_memfd_slot_faults_and_leaves_no_stale_reason():
    # mov ax,0x1000; mov ds,ax; mov ax,[0x20]; hlt
    with Toy("b80010 8ed8 a12000 f4") as toy, Mapping.reserved(0x1000) as nothing:
        require(toy, Cap.GUEST_MEMFD_FLAGS, GUEST_MEMFD_FLAG_MMAP)
        fd = toy.vm.create_guest_memfd(0x1000, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)
        toy.vm.set_user_memory_region2(1, 0x10000, 0x1000, nothing.hva, KVM_MEM_GUEST_MEMFD, fd, 0)
        os.close(fd)
        fault = toy.vcpu.run()
        if isinstance(fault, MemoryFault):
            assert (fault.gpa & ~0xFFF, fault.size) == (0x10000, 0x1000)
        else:  # where KVM emulates real mode
            assert isinstance(fault, MmioRead)
            assert fault.gpa == 0x10020
        assert toy.vcpu.regs.rip == CODE + 5
        toy.vcpu.immediate_exit = True
        assert isinstance(toy.vcpu.run(), Interrupted)
        del fault


def test_filtered_msrs_are_asked_for_and_answered():
    # mov ecx,0x10a; rdmsr; wrmsr; hlt
    with Toy("66b90a010000 0f32 0f30 f4") as toy:
        require(toy, Cap.X86_USER_SPACE_MSR)
        require(toy, Cap.X86_MSR_FILTER)
        toy.vm.enable_cap(Cap.X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER)
        toy.vm.set_msr_filter([DeniedMsrs(MSR, 1)])
        read = toy.vcpu.run()
        assert isinstance(read, MsrRead)
        assert (read.index, read.reason) == (MSR, KVM_MSR_EXIT_REASON_FILTER)
        toy.vcpu.complete_msr(0x1111_2222_3333_4444)
        write = toy.vcpu.run()
        assert isinstance(write, MsrWrite)
        assert (write.index, write.data) == (MSR, 0x1111_2222_3333_4444)
        toy.vcpu.complete_msr()
        assert isinstance(toy.vcpu.run(), Hlt)


def test_more_msr_ranges_than_kvm_takes_are_refused():
    with Toy("f4") as toy, pytest.raises(ValueError, match="17 MSR ranges: KVM takes 16 at the most"):
        toy.vm.set_msr_filter([DeniedMsrs(number, 1) for number in range(17)])
