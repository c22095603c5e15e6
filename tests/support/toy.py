"""A toy hypervisor on the bindings alone: 64 KiB of memory at gpa 0 and one vCPU in real mode."""

import contextlib
import threading

from kvmdp.kvm import Cap, Kvm, kvm_regs
from kvmdp.memory.mapping import Mapping

MEMORY = 64 << 10
CODE = 0x1000


class Toy:
    """`vm`, `vcpu` and `memory` (a view) of a guest that starts at `CODE` with `code` there."""

    def __init__(self, code):
        with contextlib.ExitStack() as stack:
            self.mapping = stack.enter_context(contextlib.closing(Mapping.anonymous(MEMORY)))
            self.memory = self.mapping.view
            self.kvm = stack.enter_context(Kvm())
            self.vm = stack.enter_context(self.kvm.create_vm())
            if self.vm.check_extension(Cap.EXIT_ON_EMULATION_FAILURE):
                self.vm.enable_cap(Cap.EXIT_ON_EMULATION_FAILURE, 1)
            self.vm.set_user_memory_region(slot=0, gpa=0, size=MEMORY, hva=self.mapping.hva)
            self.vcpu = stack.enter_context(self.vm.create_vcpu(0))
            sregs = self.vcpu.sregs
            sregs.cs.base = sregs.cs.selector = 0
            self.vcpu.set_sregs(sregs)
            self.vcpu.set_regs(kvm_regs(rip=CODE, rflags=2, rsp=0x8000))
            code = bytes.fromhex(code)
            self.memory[CODE : CODE + len(code)] = code
            self._stack = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stack.close()


def in_thread(vcpu, body, meanwhile=None):
    """Run `body()` in a thread that belongs to `vcpu`, `meanwhile()` here; return what body returned."""
    results = []

    def main():
        vcpu.attach_thread()
        try:
            results.append(body())
        finally:
            vcpu.detach_thread()

    thread = threading.Thread(target=main)
    thread.start()
    try:
        if meanwhile is not None:
            meanwhile()
    finally:
        thread.join()
    return results[0]
