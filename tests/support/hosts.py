"""Hosts other than this one, for the calling process alone: another /dev, another user.  Needs root.

A test's child process calls these before it does what is tested.  Nothing has to be undone: the mounts end with the
process.
"""

import ctypes
import os
import stat
import tempfile
from pathlib import Path

NOBODY = 65534

_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_MOVE, _MS_REC, _MS_PRIVATE = 1 << 12, 1 << 13, 1 << 14, 1 << 18
_PR_SET_DUMPABLE = 4

# name -> major and minor number of what every host has
_USUAL = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9)}
_KVM = (10, 232)

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name, *arguments):
    if getattr(_libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source, target, kind, flags, options=None):
    _call("mount", os.fsencode(source), os.fsencode(target), kind, flags, options)


def _mount_empty(target):
    _mount("kvmdp", target, b"tmpfs", 0, b"mode=755")


def have_own_mounts():
    """Keep what is mounted from now on to this process and its children."""
    _call("unshare", _CLONE_NEWNS)
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)


def replace_dev(*, kvm=None):
    """Put a /dev in place that has no userfaultfd, and /dev/kvm only where its mode is given."""
    devices = Path(tempfile.mkdtemp())
    _mount_empty(devices)
    for name, numbers in _USUAL.items():
        _make_device(devices / name, numbers, 0o666)
    if kvm is not None:
        _make_device(devices / "kvm", _KVM, kvm)
    (devices / "fd").symlink_to("/proc/self/fd")
    (devices / "shm").mkdir()
    _mount(devices, "/dev", None, _MS_MOVE)
    devices.rmdir()


def _make_device(path, numbers, mode):
    os.mknod(path, stat.S_IFCHR, os.makedev(*numbers))
    path.chmod(mode)


def open_to_all(*paths):
    """Let every user reach `paths`, though they lie in a directory that only its owner can enter."""
    closed = {path: folder for path in paths if (folder := _closed_above(path))}
    kept = {path: Path(tempfile.mkdtemp()) for path in closed}
    for path, place in kept.items():
        _mount(path, place, None, _MS_BIND | _MS_REC)
    for folder in set(closed.values()):
        _mount_empty(folder)
    for path, place in kept.items():
        path.mkdir(parents=True, exist_ok=True)
        _mount(place, path, None, _MS_MOVE)
        place.rmdir()


def _closed_above(path):
    """The outermost directory on the way to `path` that other users cannot enter, or None."""
    closed = [folder for folder in path.parents if not folder.stat().st_mode & stat.S_IXOTH]
    return closed[-1] if closed else None


def become_nobody():
    """Go on as a user without privileges or groups."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    # A process that changed its user is kept from its own /proc/self; one that the user started is not.
    _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)
