"""The error every KVM call raises: what failed, with what, why, and what to do about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from kvmdp.errors import KvmdpError, UnsupportedError
from kvmdp.shortage import ShortageError, more_threads, of_errno


class KvmError(KvmdpError, OSError):
    """A KVM call failed.

    `errno` is the kernel's; `call` names the ioctl; `remedy` says what the user can do, or
    is empty where nothing better than the errno is known.
    """

    def __init__(self, number: int, call: str, remedy: str = "") -> None:
        self.call = call
        self.remedy = remedy
        text = f"{call} failed: {os.strerror(number)}"
        super().__init__(number, f"{text}; {remedy}" if remedy else text)

    def __str__(self) -> str:
        return str(self.strerror)


class KvmShortageError(KvmError, ShortageError):
    """A KVM call failed because something has run out."""


class KvmUnsupportedError(KvmError, UnsupportedError):
    """A KVM call failed because this host's KVM does not have it."""


_CLOSED = "it has been closed: keep it open for as long as it is used"

OPEN_REMEDIES = {
    errno.ENOENT: (
        "this kernel offers no KVM: load kvm_intel or kvm_amd (modprobe), switch virtualisation on in "
        "the firmware, or enable nested virtualisation if this is a virtual machine"
    ),
    errno.EACCES: "no permission: add yourself to group kvm (sudo usermod -aG kvm $USER) and log in again",
    errno.EPERM: "no permission: a container needs --device /dev/kvm",
    errno.ENOTTY: "that device is not KVM's: pass the host's in (a container needs --device /dev/kvm)",
    errno.ENODEV: "no KVM module is behind the device: load kvm_intel or kvm_amd (modprobe)",
    errno.ENXIO: "no KVM module is behind the device: load kvm_intel or kvm_amd (modprobe)",
}

CREATE_VM_REMEDIES = {
    errno.EBUSY: "another hypervisor holds the CPU's virtualisation: stop it (VirtualBox, VMware, Xen)",
    errno.ENOMEM: "the kernel has no memory for another VM: close some",
}

MEMSLOT_REMEDIES = {
    errno.EEXIST: "the range overlaps another memslot: delete that one first",
    errno.EINVAL: (
        "slot number out of range, an unaligned address, or a change that this kind of slot does not take: "
        "delete it and create it anew"
    ),
    errno.ENOMEM: "the kernel has no memory for another memslot: use fewer or larger ones",
}


DIRTY_LOG_REMEDIES = {
    errno.ENOENT: "the memslot has no dirty log: give it the flag KVM_MEM_LOG_DIRTY_PAGES",
    errno.EINVAL: (
        "no such memslot, or a part of it that does not begin at a multiple of 64 pages, or ends at none before its end"
    ),
}

LAPIC_REMEDIES = {
    errno.EINVAL: "KVM has no local APIC for this vCPU: enable KVM_CAP_SPLIT_IRQCHIP before vCPUs are made"
}


def failed(error: OSError, call: str, remedies: Mapping[int, str] | None = None) -> KvmError:
    """Turn `error` of a C call into a `KvmError` that names `call` and the remedy."""
    number = error.errno or 0
    remedy = (remedies or {}).get(number, "") or (_CLOSED if number == errno.EBADF else "")
    if shortage := of_errno(number):
        return KvmShortageError(number, call, remedy or shortage)
    return KvmError(number, call, remedy)


def run_failed(number: int, vcpu: int) -> KvmError:
    """Return the error of a KVM_RUN that is no exit.

    At a VM's first KVM starts a thread of its own, which counts as this process's (EAGAIN).
    """
    call = f"KVM_RUN of vCPU {vcpu}"
    if number == errno.EAGAIN:
        return KvmShortageError(number, call, more_threads())
    return failed(OSError(number, os.strerror(number)), call)
