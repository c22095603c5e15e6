import ctypes
import errno
import mmap
import os
import re
import signal as python_signal
import struct
import threading

import pytest

from kvmdp.abi import libc, mman
from kvmdp.abi.ioctl import _IOWR, flexible
from kvmdp.abi.kvm_x86 import kvm_cpuid2, kvm_cpuid_entry2, kvm_msr_list, kvm_regs
from kvmdp.abi.signal import BUS_MCEERR_AR, siginfo_t, sigset_mask, timespec

PAGE = 4096
NR_GETPID = 39
NR_RT_TGSIGQUEUEINFO = 297
FIONREAD = 0x541B


def test_ioctl_returns_the_result_and_fills_its_argument(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    waiting = ctypes.c_int(-1)
    with path.open("rb") as file:
        assert libc.ioctl(file.fileno(), FIONREAD, waiting) == 0
    assert waiting.value == 5


SIZED = _IOWR(0xAE, 0x05, kvm_cpuid2)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (kvm_regs(), "KVM_X takes an argument of 8 bytes, and kvm_regs has 144"),
        (ctypes.c_uint32(), "KVM_X takes an argument of 8 bytes, and c_uint has 4"),
        (
            flexible(kvm_msr_list, ctypes.c_uint32, 2)(),
            "KVM_X takes an argument of 8 bytes, and kvm_msr_list has 4",
        ),
        (None, "KVM_X takes an argument of 8 bytes, not None"),
        (5, "KVM_X takes an argument of 8 bytes, not 5"),
    ],
)
def test_an_argument_that_has_not_the_size_of_its_request_never_reaches_the_kernel(argument, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        libc.ioctl(-1, SIZED, argument, "KVM_X")


@pytest.mark.parametrize("count", [0, 1, 7])
def test_an_array_at_the_end_of_an_argument_is_not_counted(count):
    argument = flexible(kvm_cpuid2, kvm_cpuid_entry2, count)()
    assert ctypes.sizeof(argument) == 8 + 40 * count
    with pytest.raises(OSError, match="KVM_X: Bad file descriptor"):
        libc.ioctl(-1, SIZED, argument, "KVM_X")


@pytest.mark.parametrize(
    ("call", "number", "message"),
    [
        (lambda: libc.ioctl(-1, FIONREAD, what="FIONREAD"), errno.EBADF, "FIONREAD: Bad file descriptor"),
        (lambda: libc.ioctl(-1, FIONREAD), errno.EBADF, "ioctl: Bad file descriptor"),
        (
            lambda: libc.mmap(0, 0, mman.MAP_PRIVATE | mman.MAP_ANONYMOUS),
            errno.EINVAL,
            "mmap of 0 bytes: Invalid argument",
        ),
        (lambda: libc.munmap(1, PAGE), errno.EINVAL, "munmap of 4096 bytes at 0x1: Invalid argument"),
        (
            lambda: libc.madvise(1, PAGE, mman.MADV_DONTNEED),
            errno.EINVAL,
            "madvise(4) of 4096 bytes at 0x1: Invalid argument",
        ),
        (
            lambda: libc.syscall(-1, what="no such call"),
            errno.ENOSYS,
            "no such call: Function not implemented",
        ),
    ],
)
def test_a_failed_call_raises_with_errno_and_its_name(call, number, message):
    with pytest.raises(OSError, match=re.escape(message)) as failure:
        call()
    assert failure.value.errno == number


def test_syscall_returns_the_result():
    assert libc.syscall(NR_GETPID, what="getpid") == os.getpid()


def test_two_mappings_of_a_file_share_its_bytes():
    memfd = os.memfd_create("test", mman.MFD_CLOEXEC)
    try:
        os.ftruncate(memfd, 2 * PAGE)
        writer = libc.mmap(2 * PAGE, mman.PROT_READ | mman.PROT_WRITE, mman.MAP_SHARED, memfd)
        reader = libc.mmap(PAGE, mman.PROT_READ, mman.MAP_SHARED, memfd, offset=PAGE)
        ctypes.memmove(writer + PAGE, b"second page", 11)
        assert ctypes.string_at(reader, 11) == b"second page"
        libc.munmap(writer, 2 * PAGE)
        libc.munmap(reader, PAGE)
    finally:
        os.close(memfd)


def test_a_mapping_at_a_fixed_address_and_dropped_pages():
    flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS
    hva = libc.mmap(2 * PAGE, mman.PROT_NONE, flags)
    second = libc.mmap(PAGE, mman.PROT_READ | mman.PROT_WRITE, flags | mman.MAP_FIXED, address=hva + PAGE)
    assert second == hva + PAGE
    ctypes.memset(second, 0xAA, PAGE)
    libc.madvise(second, PAGE, mman.MADV_DONTNEED)
    assert ctypes.string_at(second, PAGE) == bytes(PAGE)
    libc.munmap(hva, 2 * PAGE)


def test_constants_agree_with_pythons_own():
    for name in ("PROT_READ", "PROT_WRITE", "MAP_SHARED", "MAP_PRIVATE", "MADV_DONTNEED", "MADV_HUGEPAGE"):
        assert getattr(mman, name) == getattr(mmap, name), name


@pytest.mark.parametrize(
    ("signals", "mask"),
    [
        (set(), 0),
        ({1}, 1),
        ({python_signal.SIGBUS}, 0x40),
        ({python_signal.SIGBUS, python_signal.SIGUSR1}, 0x240),
        ({64}, 1 << 63),
        (set(range(1, 65)), (1 << 64) - 1),
    ],
)
def test_sigset_mask(signals, mask):
    assert sigset_mask(signals) == mask


@pytest.mark.parametrize("number", [0, -1, 65])
def test_sigset_mask_refuses_what_is_no_signal(number):
    with pytest.raises(ValueError, match=f"signal {number} does not exist: Linux has 1 to 64"):
        sigset_mask({number})


@pytest.fixture
def blocked_sigbus():
    before = python_signal.pthread_sigmask(python_signal.SIG_BLOCK, {python_signal.SIGBUS})
    yield
    python_signal.pthread_sigmask(python_signal.SIG_SETMASK, before)


@pytest.mark.parametrize("handle", [libc.libc, libc.libc_held], ids=["released", "held"])
def test_sigtimedwait_takes_a_pending_sigbus_with_its_address(handle, blocked_sigbus):
    address = 0x7F12_3456_7000
    sent = struct.pack("iii4xQh102x", python_signal.SIGBUS, 0, BUS_MCEERR_AR, address, 12)
    buffer = ctypes.create_string_buffer(sent, len(sent))
    libc.syscall(
        NR_RT_TGSIGQUEUEINFO,
        os.getpid(),
        threading.get_native_id(),
        python_signal.SIGBUS,
        ctypes.addressof(buffer),
        what="rt_tgsigqueueinfo",
    )

    # The C library's sigset_t is 128 bytes, of which the kernel reads 8
    sigset = (ctypes.c_uint64 * 16)(sigset_mask({python_signal.SIGBUS}))
    info = siginfo_t()
    now = timespec(0, 0)
    byref = ctypes.byref
    assert handle.sigtimedwait(byref(sigset), byref(info), byref(now)) == python_signal.SIGBUS
    assert (info.si_signo, info.si_code) == (python_signal.SIGBUS, BUS_MCEERR_AR)
    assert (info.si_addr, info.si_addr_lsb) == (address, 12)

    assert handle.sigtimedwait(byref(sigset), byref(info), byref(now)) == -1
    assert ctypes.get_errno() == errno.EAGAIN
