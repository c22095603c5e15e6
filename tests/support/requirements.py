"""What a test may need of the machine, how to find out, and how to get it.

Each check returns None where the need is met, else one sentence: what is missing and the remedy.
They look and try, but reserve nothing and install nothing.
"""

import ctypes
import errno
import fcntl
import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

_KVM_GET_API_VERSION = 0xAE00
_KVM_API_VERSION = 12
_NR_USERFAULTFD = 323
_USERFAULTFD_IOC_NEW = 0xAA00
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_HUGE_PAGE = 2 << 20
_HUGE_PAGES_WANTED = 64  # what the tests reserve at most at one time


def _kvm() -> str | None:
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return "no /dev/kvm: load kvm_intel or kvm_amd, or pass the device in (docker run --device /dev/kvm)"
    except PermissionError:
        return "no permission for /dev/kvm: add yourself to group kvm (sudo usermod -aG kvm $USER)"
    except OSError as error:
        return (
            f"/dev/kvm does not open ({error.strerror}): load kvm_intel or kvm_amd (sudo modprobe kvm_intel)"
        )
    try:
        version = fcntl.ioctl(device, _KVM_GET_API_VERSION)
    except OSError as error:
        return (
            f"/dev/kvm is no KVM device ({error.strerror}): pass the host's in (docker run --device /dev/kvm)"
        )
    finally:
        os.close(device)
    if version != _KVM_API_VERSION:
        return f"/dev/kvm speaks API version {version}, not {_KVM_API_VERSION}: use a kernel from 2.6.22 on"
    return None


def _userfaultfd() -> str | None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(_NR_USERFAULTFD, os.O_CLOEXEC)
    if descriptor >= 0:
        os.close(descriptor)
        return None
    if ctypes.get_errno() == errno.ENOSYS:
        return "the kernel has no userfaultfd: use one built with CONFIG_USERFAULTFD"
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return (
            "no userfaultfd for kernel-mode faults: sudo sysctl vm.unprivileged_userfaultfd=1, "
            "or give yourself /dev/userfaultfd (sudo setfacl -m u:$USER:rw /dev/userfaultfd)"
        )
    try:
        os.close(fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/userfaultfd gives no descriptor ({error.strerror}): pass the host's device in"
    finally:
        os.close(device)
    return None


def _root() -> str | None:
    return None if os.geteuid() == 0 else "not root: run the tests with sudo"


def _hugepages() -> str | None:
    if not _HUGE_PAGES.is_dir():
        return "the kernel has no 2 MiB huge pages: use one built with CONFIG_HUGETLBFS"
    if int((_HUGE_PAGES / "free_hugepages").read_text()) >= _HUGE_PAGES_WANTED:
        return None
    reserve = f"echo {_HUGE_PAGES_WANTED} | sudo tee {_HUGE_PAGES / 'nr_hugepages'}"
    if not os.access(_HUGE_PAGES / "nr_hugepages", os.W_OK):
        return f"no huge pages reserved, and no permission to reserve them: {reserve}"
    available = next(
        int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    if available < 2 * _HUGE_PAGES_WANTED * _HUGE_PAGE:
        return f"too little free memory for {_HUGE_PAGES_WANTED} huge pages: free some, then {reserve}"
    return None


def _programs(package: str, *names: str) -> str | None:
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} on PATH: sudo apt-get install {package}"
    return None


def _qemu() -> str | None:
    return _programs("qemu-system-x86", "qemu-system-x86_64")


def _binutils() -> str | None:
    return _programs("binutils", "as", "ld", "objcopy")


def _assembled() -> str | None:
    return None if os.environ.get("KVMDP_PROGRAMS") else _binutils()


def _compiler() -> str | None:
    if missing := _programs("gcc", "cc"):
        return missing
    probe = subprocess.run(
        ["cc", "-fsyntax-only", "-x", "c", "-"], input=b"#include <linux/kvm.h>\n", capture_output=True
    )
    if probe.returncode != 0:
        return "no <linux/kvm.h> for the C compiler: sudo apt-get install linux-libc-dev libc6-dev"
    return None


CHECKS: dict[str, Callable[[], str | None]] = {
    "kvm": _kvm,
    "userfaultfd": _userfaultfd,
    "root": _root,
    "hugepages": _hugepages,
    "qemu": _qemu,
    "binutils": _binutils,
    "assembled": _assembled,
    "compiler": _compiler,
}


@functools.cache
def missing(need: str) -> str | None:
    """Return why `need` (a key of CHECKS) is not met and what to do, or None if it is met."""
    return CHECKS[need]()


def required(text: str) -> frozenset[str]:
    """Read KVMDP_REQUIRE: a comma-separated list of needs, or `all`; ValueError for another word."""
    words = {word.strip() for word in text.split(",")} - {""}
    if unknown := words - CHECKS.keys() - {"all"}:
        raise ValueError(
            f"KVMDP_REQUIRE names {', '.join(sorted(unknown))}; it knows {', '.join(CHECKS)}, and all"
        )
    return frozenset(CHECKS if "all" in words else words)
