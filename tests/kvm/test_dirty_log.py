"""The dirty log: which pages the guest has written, asked for, cleared in parts, and set from the beginning."""

import errno
import os

import pytest
from toy import Toy

from kvmdp.errors import UnsupportedError
from kvmdp.kvm import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    Cap,
    Hlt,
    KvmError,
)
from kvmdp.kvm.errors import KvmUnsupportedError
from kvmdp.memory.mapping import Mapping

pytestmark = pytest.mark.kvm

SLOT, GPA, PAGES = 1, 0x10000, 200
WRITTEN = {0, 3, 64, 130, 199}


def store(page):
    """mov ax, segment of the page; mov ds,ax; inc byte [5]; what real mode reaches."""
    return bytes([0xB8, *((GPA >> 4) + (page << 8)).to_bytes(2, "little"), 0x8E, 0xD8, 0xFE, 0x06, 5, 0])


class Logged(Toy):
    """A toy whose second memslot has a log, and whose code writes a byte to each page of `WRITTEN`."""

    def __init__(self, prepare=lambda vm: None):
        code = b"".join(store(page) for page in sorted(WRITTEN)) + b"\xf4"
        super().__init__(code.hex())
        prepare(self.vm)
        self.logged = Mapping.anonymous(PAGES * 4096)
        self.log(KVM_MEM_LOG_DIRTY_PAGES)

    def log(self, flags):
        self.vm.set_user_memory_region(SLOT, GPA, PAGES * 4096, self.logged.hva, flags)

    def write(self):
        regs = self.vcpu.regs
        regs.rip = 0x1000
        self.vcpu.set_regs(regs)
        assert isinstance(self.vcpu.run(), Hlt)

    def dirty(self):
        return set_bits(self.vm.get_dirty_log(SLOT))

    def __exit__(self, *error):
        super().__exit__(*error)
        self.logged.close()


def set_bits(bitmap):
    return {bit for bit in range(len(bitmap) * 8) if bitmap[bit // 8] >> bit % 8 & 1}


def bits(*pages, length):
    bitmap = bytearray(length)
    for page in pages:
        bitmap[page // 8] |= 1 << page % 8
    return bytes(bitmap)


def manual(vm, **options):
    try:
        vm.protect_dirty_log_manually(**options)
    except UnsupportedError as error:
        pytest.skip(str(error))


def test_what_the_guest_writes_is_dirty_until_it_is_asked_for():
    with Logged() as toy:
        assert toy.dirty() == set()
        toy.write()
        assert len(toy.vm.get_dirty_log(SLOT)) == 32  # 200 bits in whole words
        assert toy.dirty() == set()
        toy.write()
        assert toy.dirty() == WRITTEN
        assert toy.dirty() == set()


def test_what_this_process_writes_is_not_dirty():
    with Logged() as toy:
        toy.logged.view[0x7000] = 1
        assert toy.dirty() == set()


def test_with_manual_clearing_pages_stay_dirty_until_they_are_cleared_and_are_dirty_again_when_written():
    with Logged(manual) as toy:
        toy.write()
        assert toy.dirty() == WRITTEN
        assert toy.dirty() == WRITTEN
        toy.vm.clear_dirty_log(SLOT, bits(0, 64, length=32))
        assert toy.dirty() == WRITTEN - {0, 64}
        toy.vm.clear_dirty_log(SLOT, bits(130 - 128, length=8), first_page=128)
        assert toy.dirty() == {3, 199}
        toy.vm.clear_dirty_log(
            SLOT, bits(199 - 192, length=8), first_page=192
        )  # to the slot's end, within a word
        assert toy.dirty() == {3}
        toy.write()
        assert toy.dirty() == WRITTEN
        toy.vm.clear_dirty_log(SLOT, toy.vm.get_dirty_log(SLOT))
        assert toy.dirty() == set()


def test_all_pages_can_be_dirty_from_the_beginning():
    with Logged(lambda vm: manual(vm, initially_set=True)) as toy:
        assert toy.dirty() == set(range(PAGES))
        toy.vm.clear_dirty_log(SLOT, toy.vm.get_dirty_log(SLOT))
        assert toy.dirty() == set()
        toy.write()
        assert toy.dirty() == WRITTEN


def test_a_slot_without_a_log_is_refused_with_the_remedy():
    with Logged(manual) as toy:
        for slot in (0, 5):
            with pytest.raises(KvmError, match=f"of slot {slot}.*KVM_MEM_LOG_DIRTY_PAGES") as failure:
                toy.vm.get_dirty_log(slot)
            assert failure.value.errno == errno.ENOENT
            with pytest.raises(KvmError, match=f"KVM_CLEAR_DIRTY_LOG of slot {slot}, 64 pages from 0 failed"):
                toy.vm.clear_dirty_log(slot, bytes(8))
        toy.log(0)
        with pytest.raises(KvmError, match="KVM_GET_DIRTY_LOG of slot 1 failed"):
            toy.vm.get_dirty_log(SLOT)
        toy.log(KVM_MEM_LOG_DIRTY_PAGES)
        assert toy.dirty() == set()
        toy.vm.set_user_memory_region(SLOT, 0, 0, 0)
        with pytest.raises(KvmError, match="KVM_GET_DIRTY_LOG of slot 1 failed"):
            toy.vm.get_dirty_log(SLOT)


@pytest.mark.parametrize(("first", "length"), [(1, 8), (64, 32), (256, 8)])
def test_a_part_that_is_none_of_the_slot_is_refused(first, length):
    with Logged(manual) as toy:
        with pytest.raises(KvmError, match="multiple of 64 pages") as failure:
            toy.vm.clear_dirty_log(SLOT, bytes(length), first_page=first)
        assert failure.value.errno == errno.EINVAL
        with pytest.raises(ValueError, match="a bitmap of 7 bytes: KVM takes whole words of 8"):
            toy.vm.clear_dirty_log(SLOT, bytes(7))


def test_a_slot_number_that_there_is_not_is_refused():
    with Toy("f4") as toy:
        beyond = toy.vm.check_extension(Cap.NR_MEMSLOTS) + 1
        with pytest.raises(KvmError, match="no such memslot"):
            toy.vm.get_dirty_log(beyond)


def test_a_kvm_without_manual_clearing_says_so(monkeypatch):
    with Toy("f4") as toy:
        monkeypatch.setattr(type(toy.vm._handle), "check_extension", lambda handle, capability: 0)
        with pytest.raises(KvmUnsupportedError, match="lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with 0x3"):
            toy.vm.protect_dirty_log_manually(initially_set=True)


def test_memory_of_a_guest_memfd_has_no_log():
    with Toy("f4") as toy:
        if not toy.vm.check_extension(Cap.GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_MMAP:
            pytest.skip("no guest_memfd that a plain VM can have: use Linux 6.18 or later")
        fd = toy.vm.create_guest_memfd(0x1000, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)
        try:
            flags = KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES
            with pytest.raises(
                KvmError, match="KVM_SET_USER_MEMORY_REGION2 of slot 1, gpa 0x10000"
            ) as failure:
                toy.vm.set_user_memory_region2(1, 0x10000, 0x1000, toy.mapping.hva, flags, fd, 0)
            assert failure.value.errno == errno.EINVAL
        finally:
            os.close(fd)
