"""Every call raises what its docstring says: of a descriptor that is closed, and of a KVM that lacks the capability."""

import errno

import pytest
from toy import Toy

from kvmdp.abi.kvm_x86 import kvm_x86_mce
from kvmdp.errors import UnsupportedError
from kvmdp.kvm import Cap, DeniedMsrs, Kvm, KvmError
from kvmdp.kvm.handle import Handle
from kvmdp.kvm.vcpu import Vcpu

pytestmark = pytest.mark.kvm

ON_KVM = {
    "KVM_CHECK_EXTENSION of KVM_CAP_XCRS": lambda kvm: kvm.check_extension(Cap.XCRS),
    "KVM_GET_SUPPORTED_CPUID": lambda kvm: kvm.supported_cpuid(),
    "KVM_GET_MSR_INDEX_LIST": lambda kvm: kvm.msr_indices(),
    "KVM_X86_GET_MCE_CAP_SUPPORTED": lambda kvm: kvm.mce_capabilities(),
    "KVM_CREATE_VM": lambda kvm: kvm.create_vm(),
}
ON_VM = {
    "KVM_CHECK_EXTENSION of KVM_CAP_XCRS": lambda vm: vm.check_extension(Cap.XCRS),
    "KVM_ENABLE_CAP of KVM_CAP_XCRS": lambda vm: vm.enable_cap(Cap.XCRS),
    "KVM_CHECK_EXTENSION of KVM_CAP_DISABLE_QUIRKS2": lambda vm: vm.disable_quirks(1),
    "KVM_SET_USER_MEMORY_REGION of slot 3, gpa 0x1000, 4096 bytes": lambda vm: vm.set_user_memory_region(
        3, 0x1000, 4096, 0x1000
    ),
    "KVM_SET_USER_MEMORY_REGION2 of slot 3, gpa 0x1000, 4096 bytes": lambda vm: vm.set_user_memory_region2(
        3, 0x1000, 4096, 0x1000, 0, 0, 0
    ),
    "KVM_CREATE_GUEST_MEMFD of 4096 bytes, flags 0x0": lambda vm: vm.create_guest_memfd(4096, 0),
    "KVM_CHECK_EXTENSION of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2": lambda vm: vm.protect_dirty_log_manually(),
    "KVM_GET_DIRTY_LOG of slot 1": lambda vm: vm.get_dirty_log(1),
    "KVM_CLEAR_DIRTY_LOG of slot 1, 64 pages from 0": lambda vm: vm.clear_dirty_log(1, bytes(8)),
    "KVM_GET_CLOCK": lambda vm: vm.clock,
    "KVM_X86_SET_MSR_FILTER": lambda vm: vm.set_msr_filter([DeniedMsrs(0x11, 1)]),
    "KVM_CREATE_VCPU of vCPU 1": lambda vm: vm.create_vcpu(1),
    "KVM_GET_STATS_FD": lambda vm: vm.statistics(),
}
ON_VCPU = {
    "KVM_RUN of vCPU 0": lambda vcpu: vcpu.run(),
    "KVM_SET_SIGNAL_MASK of vCPU 0": lambda vcpu: vcpu.attach_thread(),
    "KVM_GET_REGS of vCPU 0": lambda vcpu: vcpu.regs,
    "KVM_SET_REGS of vCPU 0": lambda vcpu: vcpu.set_regs(vcpu.kvm_run.s.regs.regs),
    "KVM_GET_SREGS of vCPU 0": lambda vcpu: vcpu.sregs,
    "KVM_SET_SREGS of vCPU 0": lambda vcpu: vcpu.set_sregs(vcpu.kvm_run.s.regs.sregs),
    "KVM_GET_VCPU_EVENTS of vCPU 0": lambda vcpu: vcpu.events,
    "KVM_SET_VCPU_EVENTS of vCPU 0": lambda vcpu: vcpu.set_events(vcpu.kvm_run.s.regs.events),
    "KVM_X86_SETUP_MCE of vCPU 0": lambda vcpu: vcpu.setup_mce(10),
    "KVM_X86_SET_MCE of vCPU 0": lambda vcpu: vcpu.set_mce(kvm_x86_mce()),
    "KVM_TRANSLATE of vCPU 0": lambda vcpu: vcpu.translate(0),
    "KVM_GET_STATS_FD of vCPU 0": lambda vcpu: vcpu.statistics(),
}


def assert_bad_descriptor(name, call, owner):
    with pytest.raises(KvmError) as failure:
        call(owner)
    assert failure.value.errno == errno.EBADF
    assert str(failure.value) == (
        f"{name} failed: Bad file descriptor; it has been closed: keep it open for as long as it is used"
    )
    assert not isinstance(failure.value, UnsupportedError)


@pytest.mark.parametrize("name", ON_KVM)
def test_a_closed_device_says_so(name):
    kvm = Kvm()
    kvm.close()
    assert_bad_descriptor(f"{name} on /dev/kvm", ON_KVM[name], kvm)


@pytest.mark.parametrize("name", ON_VM)
def test_a_closed_vm_says_so(name):
    with Toy("f4") as toy:
        toy.vm.close()
        assert_bad_descriptor(name, ON_VM[name], toy.vm)


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("name", ON_VCPU)
def test_a_closed_vcpu_says_so(name, synced):
    with Toy("f4") as toy:
        if synced:
            toy.vcpu.sync_registers()
        toy.vcpu.close()
        assert_bad_descriptor(name, ON_VCPU[name], toy.vcpu)
        toy.vcpu.kick()  # is too late, and no error


def test_closed_statistics_say_so():
    with Toy("f4") as toy:
        if not toy.vm.check_extension(Cap.BINARY_STATS_FD):
            pytest.skip("no KVM_CAP_BINARY_STATS_FD: use Linux 5.14 or later")
        statistics = toy.vm.statistics()
        statistics.close()
        for call in (statistics.read, lambda: statistics.get(statistics.names[0])):
            assert_bad_descriptor("reading KVM's statistics", lambda _, call=call: call(), None)


def test_a_call_that_kvm_lacks_is_unsupported_and_names_the_capability(monkeypatch):
    """As an old kernel has it: the call is not known, and the capability not there."""
    with Toy("f4") as toy:
        monkeypatch.setattr(Handle, "check_extension", lambda handle, capability: 0)
        monkeypatch.setattr("kvmdp.abi.libc.ioctl", refuse)
        for call, capability in (
            (lambda: toy.vm.create_guest_memfd(4096, 0), "GUEST_MEMFD"),
            (lambda: toy.vm.statistics(), "BINARY_STATS_FD"),
            (lambda: toy.vm.clock, "ADJUST_CLOCK"),
            (lambda: toy.vcpu.events, "VCPU_EVENTS"),
            (lambda: toy.vcpu.registers.debug, "DEBUGREGS"),
            (lambda: toy.vcpu.registers.xsave, "XSAVE"),
            (lambda: toy.vcpu.registers.sregs2, "SREGS2"),
            (lambda: toy.kvm.mce_capabilities(), "MCE"),
        ):
            with pytest.raises(
                UnsupportedError, match=f"this KVM lacks KVM_CAP_{capability}: use a newer"
            ) as failure:
                call()
            assert isinstance(failure.value, KvmError)
            assert failure.value.errno == errno.ENOTTY
        with pytest.raises(KvmError, match="KVM_GET_SREGS of vCPU 0 failed: Inapp") as failure:
            _ = toy.vcpu.sregs  # every KVM has had that
        assert not isinstance(failure.value, UnsupportedError)
        with pytest.raises(UnsupportedError, match=r"use of KVM_CAP_SYNC_REGS of vCPU 0 failed.*with 0x1"):
            toy.vcpu.sync_registers()


def refuse(*_arguments):
    raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")


def test_a_capability_is_switched_on_with_what_it_takes():
    with Toy("f4") as toy:
        with pytest.raises(
            KvmError, match="KVM_ENABLE_CAP of KVM_CAP_EXIT_ON_EMULATION_FAILURE failed: Invalid"
        ):
            toy.vm.enable_cap(Cap.EXIT_ON_EMULATION_FAILURE, 2)
        with pytest.raises(ValueError, match="5 arguments: KVM_ENABLE_CAP takes 4 at the most"):
            toy.vm.enable_cap(Cap.EXIT_ON_EMULATION_FAILURE, 1, 2, 3, 4, 5)


def test_what_kvm_refuses_is_said_with_its_arguments():
    with Toy("f4") as toy:
        with pytest.raises(KvmError, match=f"KVM_CREATE_VCPU of vCPU {1 << 20} failed: Invalid"):
            toy.vm.create_vcpu(1 << 20)
        with pytest.raises(KvmError, match="KVM_CREATE_VM on /dev/kvm failed: Invalid"):
            toy.kvm.create_vm(99)
        with pytest.raises(KvmError, match="KVM_X86_SETUP_MCE of vCPU 0 failed: Invalid"):
            toy.vcpu.setup_mce(0)  # no banks
        with pytest.raises(KvmError, match="KVM_X86_SET_MCE of vCPU 0 failed: Invalid"):
            toy.vcpu.set_mce(kvm_x86_mce(bank=200))
        if toy.vm.check_extension(Cap.GUEST_MEMFD):
            with pytest.raises(
                KvmError, match="KVM_CREATE_GUEST_MEMFD of 5 bytes, flags 0x0 failed: Invalid"
            ):
                toy.vm.create_guest_memfd(5, 0)


def test_a_vcpu_without_memory_for_its_page_gives_its_descriptor_back(monkeypatch):
    class NoRoom:
        fd = -1

        def __init__(self):
            self.call = self.check_extension = None
            self.closed = False

        def close(self):
            self.closed = True

    handle = NoRoom()

    def refuse_map(*_arguments):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse_map)
    with pytest.raises(KvmError, match="mmap of kvm_run of vCPU 4 failed: Cannot allocate memory"):
        Vcpu(handle, 4, 4096)
    assert handle.closed
