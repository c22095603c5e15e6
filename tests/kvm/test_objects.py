"""Kvm, Vm and Vcpu: errors that say what to do, registers, statistics, and descriptors given back."""

import os
from pathlib import Path

import pytest
from toy import CODE, MEMORY, Toy

from kvmdp.abi.kvm_x86 import KVM_SYNC_X86_REGS, kvm_regs
from kvmdp.kvm import Cap, Hlt, IoOut, Kvm, KvmError


def test_an_absent_device_is_said_with_its_remedy(tmp_path):
    with pytest.raises(KvmError, match=r"opening .*/kvm failed: No such file.*modprobe") as caught:
        Kvm(str(tmp_path / "kvm"))
    assert caught.value.errno == 2
    assert caught.value.call == f"opening {tmp_path}/kvm"
    assert "nested virtualisation" in caught.value.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open anything: run as another user")
def test_a_device_that_is_not_permitted_is_said_with_its_remedy(tmp_path):
    path = tmp_path / "kvm"
    path.touch(mode=0)
    with pytest.raises(KvmError, match="add yourself to group kvm"):
        Kvm(str(path))


def test_refused_permission_names_the_group(monkeypatch):
    def refuse(*_arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KvmError, match="group kvm") as caught:
        Kvm()
    assert caught.value.errno == 13


def test_a_file_that_is_no_kvm_is_refused(tmp_path):
    path = tmp_path / "kvm"
    path.touch()
    with pytest.raises(KvmError, match="KVM_GET_API_VERSION on"):
        Kvm(str(path))


@pytest.mark.kvm
def test_a_memslot_that_overlaps_another_is_refused_with_the_remedy():
    with Toy("f4") as toy:
        with pytest.raises(
            KvmError, match=r"of slot 1, gpa 0x8000, 4096 bytes failed: .*overlaps another memslot"
        ):
            toy.vm.set_user_memory_region(1, 0x8000, 4096, toy.mapping.hva)
        with pytest.raises(KvmError, match="unaligned address"):
            toy.vm.set_user_memory_region(1, MEMORY + 1, 4096, toy.mapping.hva)
        beyond = toy.vm.check_extension(Cap.NR_MEMSLOTS)
        with pytest.raises(KvmError, match="slot number out of range"):
            toy.vm.set_user_memory_region(beyond, MEMORY, 4096, toy.mapping.hva)
        toy.vm.set_user_memory_region(0, 0, 0, 0)
        toy.vm.set_user_memory_region(1, 0x8000, 4096, toy.mapping.hva)


@pytest.mark.kvm
def test_a_vcpu_that_exists_already_is_refused():
    with Toy("f4") as toy, pytest.raises(KvmError, match="KVM_CREATE_VCPU of vCPU 0 failed"):
        toy.vm.create_vcpu(0)


@pytest.mark.kvm
@pytest.mark.parametrize("synced", [False, True])
def test_registers_are_what_was_set_and_what_the_guest_left(synced):
    with Toy("83c007 e610 f4") as toy:  # add ax,7; out 0x10,al; hlt
        if synced:
            if not toy.kvm.check_extension(Cap.SYNC_REGS) & KVM_SYNC_X86_REGS:
                pytest.skip("no KVM_CAP_SYNC_REGS: use Linux 4.17 or later")
            toy.vcpu.sync_registers()
        toy.vcpu.set_regs(kvm_regs(rip=CODE, rflags=2, rax=5, r15=0x1234))
        assert (toy.vcpu.regs.rip, toy.vcpu.regs.rax, toy.vcpu.regs.r15) == (CODE, 5, 0x1234)
        assert isinstance(toy.vcpu.run(), IoOut)
        assert toy.vcpu.regs.rax == 12
        toy.vcpu.immediate_exit = True
        toy.vcpu.run()
        toy.vcpu.immediate_exit = False
        assert toy.vcpu.regs.rip == CODE + 5
        changed = kvm_regs.from_buffer_copy(toy.vcpu.regs)
        changed.rip, changed.rax = CODE, 100
        toy.vcpu.set_regs(changed)
        assert toy.vcpu.regs.rax == 100
        toy.vcpu.run()
        assert toy.vcpu.regs.rax == 107


@pytest.mark.kvm
def test_registers_are_right_before_the_first_run_too():
    with Toy("f4") as toy:
        toy.vcpu.sync_registers()
        assert (toy.vcpu.regs.rip, toy.vcpu.regs.rsp) == (CODE, 0x8000)


@pytest.mark.kvm
def test_translate_follows_the_guests_mapping():
    with Toy("f4") as toy:
        assert toy.vcpu.translate(0x1234) == 0x1234  # no paging in real mode


@pytest.mark.kvm
def test_msrs_read_back_what_was_set_and_refuse_what_is_not_there():
    with Toy("f4") as toy:
        toy.vcpu.registers.set_msr(0xC0000102, 0x1000)  # KERNEL_GS_BASE
        assert toy.vcpu.registers.get_msrs([0xC0000102]) == {0xC0000102: 0x1000}
        with pytest.raises(KvmError, match="MSR 0xc0000102 to 0x8000000000000000"):
            toy.vcpu.registers.set_msr(0xC0000102, 1 << 63)  # not canonical


@pytest.mark.kvm
def test_statistics_count_by_name():
    with Toy("e610 e610 f4") as toy:  # out 0x10,al, twice; hlt
        if not toy.kvm.check_extension(Cap.BINARY_STATS_FD):
            pytest.skip("no KVM_CAP_BINARY_STATS_FD: use Linux 5.14 or later")
        with toy.vcpu.statistics() as vcpu, toy.vm.statistics() as vm:
            before = vcpu.get("exits")
            while not isinstance(toy.vcpu.run(), Hlt):
                pass
            assert vcpu.get("exits") >= before + 3
            values = vcpu.read()
            assert values.keys() == set(vcpu.names)
            assert values["exits"] == vcpu.get("exits")
            assert {"pages_4k", "pages_2m", "pages_1g"} <= set(vm.names)
            assert any(isinstance(value, tuple) for value in values.values())  # histograms
            with pytest.raises(KeyError):
                vm.get("no such statistic")
        vm.close()
        vcpu.close()


def open_descriptors():
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


@pytest.mark.kvm
def test_closing_in_any_order_and_twice_gives_all_descriptors_back():
    before = open_descriptors()
    kvm = Kvm()
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    for owner in (kvm, vm, vcpu, vcpu, vm, kvm):
        owner.close()
    assert open_descriptors() == before


@pytest.mark.kvm
def test_an_exit_kept_beyond_its_vcpu_keeps_nothing_else():
    with Toy("e610 f4") as toy:
        kept = toy.vcpu.run()
    assert bytes(kept.data) == b"\0"


@pytest.mark.kvm
def test_descriptors_are_not_inherited():
    with Toy("f4") as toy:
        for fd in (toy.kvm.fd, toy.vm.fd, toy.vcpu.fd):
            assert not os.get_inheritable(fd)
