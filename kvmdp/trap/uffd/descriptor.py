"""A userfaultfd descriptor: opening it with the privilege at hand, registering, resolving, reading events.

Source: `linux/userfaultfd.h`, `Documentation/admin-guide/mm/userfaultfd.rst`. Addresses (hva) and lengths in
bytes.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import time
from collections.abc import Callable
from ctypes import byref

from kvmdp.abi import libc
from kvmdp.abi import userfaultfd as abi
from kvmdp.errors import PagingError, UnsupportedError
from kvmdp.memory.hugepages import HugePageRefusedError
from kvmdp.page import PAGE_SIZE
from kvmdp.shortage import of_errno

_DEVICE = "/dev/userfaultfd"
# How often a page is put back that goes from the memory file before it is mapped. A peer that punches holes has to meet
# the moment between the two each time; this often in a row is no accident, and no machine could run.
_MAX_HOLES = 10_000
# How long a call may be told to try again, and how long it does so without a pause. That lasts until a reader has read
# of a discard and the discard has gone on: microseconds, unless the reader fetches a page meanwhile.
_PATIENCE_SECONDS, _EAGER_SECONDS, _PAUSE_SECONDS = 30.0, 0.001, 0.0005

_REMEDIES = (
    "run as root, or give yourself /dev/userfaultfd (sudo setfacl -m u:$USER:rw /dev/userfaultfd), "
    "or allow it for all (sudo sysctl vm.unprivileged_userfaultfd=1)"
)
_REFUSED = (
    "no userfaultfd, for this process may not make that system call ({}), as in a container: give the container the "
    "device (docker run --device /dev/userfaultfd), or a seccomp profile that allows the call (--security-opt "
    "seccomp=FILE), or use the trap memory-fault or mmio"
)


def _open(user_mode_only: bool) -> int:
    """Return a new descriptor: from the device, which has its own permissions, else by system call."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (abi.UFFD_USER_MODE_ONLY if user_mode_only else 0)
    try:
        device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        pass  # absent before Linux 6.1, or not permitted: the system call has rules of its own
    else:
        try:
            return libc.ioctl(device, abi.USERFAULTFD_IOC_NEW, flags, "USERFAULTFD_IOC_NEW")
        finally:
            os.close(device)
    return libc.syscall(abi.NR_userfaultfd, flags, what="userfaultfd")


def _open_permitted(kernel_faults: bool) -> tuple[int, bool]:
    """Return a descriptor, and whether it takes kernel-mode faults too: if that is permitted or demanded.

    Raises UnsupportedError; OSError if what is missing has nothing to do with userfaultfd.
    """
    try:
        return _open(user_mode_only=False), True
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise UnsupportedError(
                "this kernel has no userfaultfd: use one built with CONFIG_USERFAULTFD"
            ) from None
        if of_errno(error.errno or 0):
            raise
        why = os.strerror(error.errno or 0)
    no_privilege = UnsupportedError(f"no userfaultfd that takes the kernel's own faults ({why}): {_REMEDIES}")
    try:
        descriptor = _open(user_mode_only=True)
    except PermissionError:  # every user may have such a one: it is the call that is refused
        raise UnsupportedError(_REFUSED.format(why)) from None
    except OSError:  # EINVAL: before Linux 5.11 there is no such kind
        raise no_privilege from None
    if kernel_faults:
        os.close(descriptor)
        raise no_privilege
    return descriptor, False


@functools.cache
def supported_features() -> int:
    """Return the feature bits (`UFFD_FEATURE_*`) this kernel offers. Raises UnsupportedError."""
    fd, _ = _open_permitted(kernel_faults=False)
    try:
        request = abi.uffdio_api(api=abi.UFFD_API, features=0)
        libc.ioctl(fd, abi.UFFDIO_API, request, "UFFDIO_API")
        return int(request.features)
    finally:
        os.close(fd)


_NEEDED_FROM = {
    abi.UFFD_FEATURE_MISSING_SHMEM: "missing faults on shared memory (Linux 4.11)",
    abi.UFFD_FEATURE_MISSING_HUGETLBFS: "missing faults on HugeTLB memory (Linux 4.11)",
    abi.UFFD_FEATURE_MINOR_HUGETLBFS: "minor faults on HugeTLB memory (Linux 5.13)",
    abi.UFFD_FEATURE_MINOR_SHMEM: "minor faults on shared memory (Linux 5.14)",
    abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM: "write protection of shared memory (Linux 5.19)",
    abi.UFFD_FEATURE_POISON: "poison markers (UFFDIO_POISON, Linux 6.6)",
}


class Uffd:
    """A userfaultfd; owns the descriptor, which is non-blocking.

    Arguments: `features`, bits that must be there, or UnsupportedError says which are not; `kernel_faults`, whether
    faults taken inside the kernel (KVM's own mapping of a page is one) must reach the reader; `page_size`, bytes of
    the pages of what is going to be registered: addresses and lengths are multiples of it.

    `takes_kernel_faults`: whether they do. Where they do not, such a fault on a hole of what is registered fails:
    KVM_RUN returns EFAULT. One on a marker gives its SIGBUS either way.
    """

    def __init__(self, features: int, *, kernel_faults: bool, page_size: int = PAGE_SIZE) -> None:
        missing = features & ~supported_features()
        if missing:
            names = ", ".join(name for bit, name in _NEEDED_FROM.items() if bit & missing)
            raise UnsupportedError(
                f"this kernel's userfaultfd lacks {names}: use a newer kernel, or another trap"
            )
        self._page_size = page_size
        self.fd, self.takes_kernel_faults = _open_permitted(kernel_faults)
        # One argument structure a call and thread would be safest; they are made per call because the calls
        # come from many threads at once. Keeping the GIL is right for those that never sleep long.
        self._ioctl = libc.libc_held.ioctl
        # Called when the kernel says "try again" without having done anything.
        self.on_again: Callable[[], None] = lambda: None
        # Called with the hva of a page that is to be mapped and that the page cache does not hold: puts one there.
        self.on_hole: Callable[[int], None] | None = None
        try:
            request = abi.uffdio_api(api=abi.UFFD_API, features=features)
            libc.ioctl(self.fd, abi.UFFDIO_API, request, "UFFDIO_API")
        except BaseException:
            self.close()
            raise

    def register(self, hva: int, length: int, mode: int) -> None:
        """Register a range; `mode` is of `UFFDIO_REGISTER_MODE_*`."""
        request = abi.uffdio_register(abi.uffdio_range(hva, length), mode)
        libc.ioctl(self.fd, abi.UFFDIO_REGISTER, request, f"UFFDIO_REGISTER of {length} bytes")

    def unregister(self, hva: int, length: int) -> None:
        """Unregister a range, and wake the threads that sleep on it."""
        request = abi.uffdio_range(hva, length)
        libc.ioctl(self.fd, abi.UFFDIO_UNREGISTER, request, f"UFFDIO_UNREGISTER of {length} bytes")

    def wake(self, hva: int, length: int) -> None:
        """Wake the threads that sleep on a range: the access is tried again."""
        request = abi.uffdio_range(hva, length)
        libc.ioctl(self.fd, abi.UFFDIO_WAKE, request, "UFFDIO_WAKE")

    def continue_(self, hva: int, length: int) -> int:
        """Map pages that the page cache holds; `on_hole` sees to those that it has lost. Pages already mapped stay.

        Returns how many bytes were not mapped before. Raises OSError, EFAULT for a page that is lost again each time
        it has been seen to.
        """
        request = abi.uffdio_continue((hva, length))
        if self._ioctl(self.fd, abi.UFFDIO_CONTINUE, byref(request)) == 0:
            return length
        done = max(int(request.mapped), 0)
        return done + self._each(
            abi.UFFDIO_CONTINUE, request, request.range, hva + done, length - done, "UFFDIO_CONTINUE"
        )

    def poison(self, hva: int, length: int) -> bool:
        """Put markers on absent pages; False if a page was mapped or had a marker already."""
        request = abi.uffdio_poison()
        return self._each(abi.UFFDIO_POISON, request, request.range, hva, length, "UFFDIO_POISON") == length

    def copy(self, hva: int, source: int, length: int) -> int:
        """Fill absent pages from `source` (hva): private ones, or holes of a memory file. Pages there already stay.

        Returns how many bytes were not there before.
        """
        done, skipped, told = 0, 0, 0.0
        while done < length:
            request = abi.uffdio_copy(hva + done, source + done, length - done)
            if self._ioctl(self.fd, abi.UFFDIO_COPY, byref(request)) == 0:
                break
            step, was_there = self._progress(int(request.copy), hva + done, "UFFDIO_COPY")
            if was_there:
                self._check_there(hva + done)
            told = 0.0 if step else self._try_again(told, hva + done, "UFFDIO_COPY")
            done += step
            skipped += step * was_there
        return length - skipped

    def _check_there(self, hva: int) -> None:
        """Raise HugePageRefusedError if the huge page at `hva`, of which the kernel says EEXIST, is not mapped.

        That is what it says too if it gets no page from the pool, and there is a page table (mm/hugetlb.c,
        hugetlb_mfill_atomic_pte). Small pages have no such case.
        """
        if self._page_size > PAGE_SIZE and not libc.mincore(hva, PAGE_SIZE)[0] & 1:
            raise HugePageRefusedError(self._page_size)

    def _each(
        self,
        number: int,
        request: ctypes.Structure,
        range_: abi.uffdio_range,
        hva: int,
        length: int,
        call: str,
    ) -> int:
        """Make a ranged call to the range's end; return its length less that of the pages that were there already."""
        result = type(request)._fields_[-1][0]
        done = skipped = holes = 0
        told = 0.0
        while done < length:
            range_.start, range_.len = hva + done, length - done
            # A kernel may turn a call away before it writes the result: then it is not that of the call before.
            setattr(request, result, 0)
            if self._ioctl(self.fd, number, byref(request)) == 0:
                break
            moved = int(getattr(request, result))
            if moved == -errno.EFAULT and self.on_hole is not None and holes < _MAX_HOLES:
                holes += 1
                self.on_hole(hva + done)
                continue
            step, was_there = self._progress(moved, hva + done, call)
            if step:
                holes, told = 0, 0.0
            else:
                told = self._try_again(told, hva + done, call)
            done += step
            skipped += step * was_there
        return length - skipped

    def _progress(self, result: int, hva: int, call: str) -> tuple[int, bool]:
        """Return how many bytes a failed ranged call got past, and whether a page was there already.

        Positive: it stopped in the middle. 0, of EAGAIN with none done: the address space was changing, try again.
        EEXIST: a page is there already. Another thread has put it there, which is no error.
        """
        if result > 0:
            return result, False
        number = ctypes.get_errno() if result == 0 else -result
        if number == errno.EAGAIN:
            return 0, False
        if number == errno.EEXIST:
            # A thread that sleeps on the page was meant to be woken by the call that found it there.
            self.wake(hva, self._page_size)
            return self._page_size, True
        if number == errno.ENOMEM and call == "UFFDIO_COPY" and self._page_size > PAGE_SIZE:
            raise HugePageRefusedError(self._page_size)
        raise OSError(number, f"{call} at {hva:#x}: {os.strerror(number)}")

    def _try_again(self, told: float, hva: int, call: str) -> float:
        """See to it that a call can be made again; `told` is when it was told so first (time.monotonic), 0 if now.

        Returns that time. Raises PagingError if it was long ago.
        """
        self.on_again()
        now = time.monotonic()
        if not told:
            return now
        if now - told > _PATIENCE_SECONDS:
            raise PagingError(
                f"{call} at {hva:#x} is told to try again for {_PATIENCE_SECONDS:.0f} seconds: a discard of guest "
                "memory waits for a userfaultfd reader, which the source or the kernel holds"
            )
        if now - told > _EAGER_SECONDS:
            time.sleep(_PAUSE_SECONDS)
        return told

    def read(self, messages: ctypes.Array[abi.uffd_msg]) -> int:
        """Read as many events as wait, up to the array's length; return how many, 0 if none."""
        try:
            length = os.readv(self.fd, [memoryview(messages).cast("B")])
        except BlockingIOError:
            return 0
        return length // ctypes.sizeof(abi.uffd_msg)

    def close(self) -> None:
        """Close the descriptor, which unregisters all; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
