"""A toy hypervisor of what kvmdp.kvm exports, and nothing else: what a reader of its docstring writes first."""

import ctypes
import mmap

import pytest

import kvmdp.kvm
from kvmdp.kvm import Hlt, IoOut, Kvm, MmioRead, kvm_regs

SIZE = 4096
# mov al,0x41; out 0x10,al; mov ax,0x1000; mov ds,ax; mov al,[0x20]; out 0x10,al; hlt
CODE = bytes.fromhex("b041 e610 b80010 8ed8 a02000 e610 f4")


@pytest.mark.kvm
def test_a_toy_hypervisor_needs_nothing_but_kvmdp_kvm():
    said = b""
    with mmap.mmap(-1, SIZE) as memory, Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        memory[: len(CODE)] = CODE
        start = ctypes.c_char.from_buffer(memory)
        vm.set_user_memory_region(slot=0, gpa=0, size=SIZE, hva=ctypes.addressof(start))
        sregs = vcpu.sregs
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        vcpu.set_regs(kvm_regs(rip=0, rflags=2))
        while not isinstance(exit := vcpu.run(), Hlt):
            match exit:
                case IoOut(port=0x10, data=data):
                    said += bytes(data)
                case MmioRead(gpa=0x10020, data=data):
                    data[:] = b"B"
                case _:
                    pytest.fail(str(exit))
        del start
    assert said == b"AB"


def test_all_that_is_exported_is_there():
    assert sorted(kvmdp.kvm.__all__) == sorted(set(kvmdp.kvm.__all__))
    assert all(hasattr(kvmdp.kvm, name) for name in kvmdp.kvm.__all__)
