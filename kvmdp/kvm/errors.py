"""The error every KVM call raises: what failed, with what, why, and what to do about it."""

from __future__ import annotations

import errno
import os


class KvmError(OSError):
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
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
}

MEMSLOT_REMEDIES = {
    errno.EEXIST: "the range overlaps another memslot: delete that one first",
    errno.EINVAL: (
        "slot number out of range, an unaligned address, or a change that this kind of slot does not take: "
        "delete it and create it anew"
    ),
    errno.ENOMEM: "the kernel has no memory for another memslot: use fewer or larger ones",
}


def failed(error: OSError, call: str, remedies: dict[int, str] | None = None) -> KvmError:
    """Turn `error` of a C call into a `KvmError` that names `call` and the remedy."""
    number = error.errno or 0
    return KvmError(number, call, (remedies or {}).get(number, ""))
