"""What guest RAM is made of, and how it is mapped.

Shared memory is mapped twice. The *guest view* is what memslots point to and what may trap. The *VMM view*
never traps: pages are filled through it, in place, and user space reads and writes there. Private memory has one
mapping only, so both names mean the same one, and a trap on its pages traps an access of
our own too.

`kvmdp.memory.backings` has the list of all kinds.

Units: bytes; offsets are into RAM, in the order of the RAM file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from kvmdp.abi import libc
from kvmdp.abi.kvm_cap import Cap
from kvmdp.abi.mman import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    MADV_DONTDUMP,
    MADV_DONTFORK,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
)
from kvmdp.closing import Closing
from kvmdp.errors import UnsupportedError
from kvmdp.memory.mapping import Mapping
from kvmdp.page import PAGE_SIZE
from kvmdp.shortage import of_errno
from kvmdp.size import format_size
from kvmdp.temporary import temporary_folder, unnamed_file


class MemoryMaker(Protocol):
    """What is needed of a VM: a guest_memfd belongs to one."""

    def check_extension(self, capability: Cap) -> int:
        """Return what KVM_CHECK_EXTENSION says of `capability`."""
        ...

    def create_guest_memfd(self, size: int, flags: int) -> int:
        """Return the descriptor of a new guest_memfd."""
        ...


@dataclass(frozen=True, slots=True)
class BackingOptions:
    """What may be chosen of a backing that has the ability to it.

    `thp` lets the kernel put small pages together into huge ones (`transparent`); `path` is the file that RAM is to be
    in (`takes_path`), None for a temporary one; `reserve` has huge pages reserved, and given back at its close
    (`reservable`).
    """

    thp: bool = False
    path: str | None = None
    reserve: bool = False


class Backing(Closing):
    """Guest RAM of `size` bytes; owns its mappings.

    Of the kind: `name`; `page_size`, bytes of the pages the host has it in, the least that userfaultfd can map;
    `shared`, whether there are two views of the same pages; `sealed`, whether it is a memory file of sealed size,
    fit to be handed to other processes; `registrable`, whether userfaultfd takes it; `transparent`, whether its pages
    can be put together into huge ones (`thp`); `frees`, whether `forget` gives memory back to the host; `refusable`,
    whether the host may refuse a page at its first touch, so that `populate` has to come before a store; `reads_ahead`,
    whether the kernel may give memory to what lies beside a page that is touched; `takes_path`, `reservable`: whether
    these of `BackingOptions` are for it.

    Of the object: `size`; `thp`; `on_disk`, whether the kernel may put its pages on a disk, so that an access has to
    wait for one; `fd`, the sealed memory file, and `guest_memfd`, a guest_memfd that memslots are to be bound to, -1
    where there is none; `guest` and `vmm`, the mappings.
    """

    name: str
    shared: bool
    page_size: int = PAGE_SIZE
    sealed: bool = False
    registrable: bool = True
    transparent: bool = False
    frees: bool = True
    on_disk: bool = False
    refusable: bool = False
    reads_ahead: bool = False
    takes_path: bool = False
    reservable: bool = False

    @classmethod
    @abstractmethod
    def make(cls, size: int, vm: MemoryMaker, options: BackingOptions) -> Backing:
        """Make `size` bytes of it for `vm`; of the options only those are looked at that it has the ability to.

        Raises UnsupportedError where the host lacks what it needs, OSError.
        """

    def __init__(
        self,
        size: int,
        guest: Mapping,
        vmm: Mapping,
        fd: int = -1,
        *,
        thp: bool = False,
        guest_memfd: int = -1,
    ) -> None:
        self.size = size
        self.guest = guest
        self.vmm = vmm
        self.fd = fd
        self.thp = thp
        self.guest_memfd = guest_memfd
        # A child would have a copy of the guest view without its traps.
        guest.advise(MADV_DONTFORK)
        guest.advise(MADV_DONTDUMP)
        if self.transparent:
            # Off unless it is wanted: a huge page that the kernel puts together by itself has memory for absent pages.
            # In both views, because it is the one a page is first touched through that decides.
            for view in {guest.hva: guest, vmm.hva: vmm}.values():
                _advise_transparent(view, thp)

    @abstractmethod
    def forget(self, offset: int, length: int) -> None:
        """Give up the bytes of absent pages, and the memory they take where it can be freed.

        They read as zeros then, or as they were where nothing could be freed: their bytes mean nothing.
        """

    def populate(self, offset: int, length: int) -> None:
        """Have a range of the VMM view in memory. Raises ShortageError where the host refuses it."""
        self.vmm.populate(offset, length)

    def close(self) -> None:
        """Unmap all views; a second call does nothing."""
        self.guest.close()
        self.vmm.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _advise_transparent(view: Mapping, thp: bool) -> None:
    try:
        view.advise(MADV_HUGEPAGE if thp else MADV_NOHUGEPAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        if thp:
            raise UnsupportedError(
                "this kernel has no transparent huge pages: use one built with CONFIG_TRANSPARENT_HUGEPAGE, "
                "or leave --thp out"
            ) from None


def _has_swap() -> bool:
    """Whether the host swaps now; what has been switched on later is not seen."""
    try:
        return len(Path("/proc/swaps").read_text().splitlines()) > 1  # the first is a heading
    except FileNotFoundError:
        return False  # a kernel built without


def map_twice(fd: int, size: int, stack: contextlib.ExitStack) -> tuple[Mapping, Mapping]:
    """Map a file as guest view and as VMM view; `stack` unmaps them should anything fail after this."""
    guest = stack.enter_context(Mapping.shared(fd, size))
    return guest, stack.enter_context(Mapping.shared(fd, size))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free a range of a file, which reads as zeros then."""
    libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


class MemfdBacking(Backing):
    """RAM in a memfd (tmpfs), sealed so that no process it is handed to can change its size."""

    name = "memfd"
    shared = True
    sealed = True
    transparent = True

    @classmethod
    def make(cls, size: int, _vm: MemoryMaker, options: BackingOptions) -> Backing:
        """Make it, of whichever VM."""
        return cls(size, thp=options.thp)

    def __init__(self, size: int, *, thp: bool = False) -> None:
        with contextlib.ExitStack() as stack:
            with libc.named_call("memfd_create"):
                fd = os.memfd_create("kvmdp-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            stack.callback(os.close, fd)
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            super().__init__(size, *map_twice(fd, size, stack), fd, thp=thp)
            self.on_disk = _has_swap()
            stack.pop_all()

    def forget(self, offset: int, length: int) -> None:
        """Punch a hole. Markers in the guest view stay, present pages of a huge page around it too."""
        punch_hole(self.fd, offset, length)


class AnonymousBacking(Backing):
    """RAM in private anonymous memory: one mapping, nothing that another process could be handed."""

    name = "anonymous"
    shared = False
    transparent = True

    @classmethod
    def make(cls, size: int, _vm: MemoryMaker, options: BackingOptions) -> Backing:
        """Make it, of whichever VM."""
        return cls(size, thp=options.thp)

    def __init__(self, size: int, *, thp: bool = False) -> None:
        with contextlib.ExitStack() as stack:
            mapping = stack.enter_context(Mapping.anonymous(size))
            super().__init__(size, mapping, mapping, thp=thp)
            self.on_disk = _has_swap()
            stack.pop_all()

    def forget(self, offset: int, length: int) -> None:
        """Drop the pages. Not for pages under markers, which would go too, and have no bytes to give up."""
        self.guest.drop(offset, length)


class FileBacking(Backing):
    """RAM in a file on disk, mapped MAP_SHARED: at `path`, new or empty, or a temporary one without a name.

    What the guest wrote is in the file at `path` afterwards. An exception that leaves a `with` of it undoes the file,
    so that nothing stays of a machine that could not be made.

    The disk's space is taken at once: a fault that found none would be a SIGBUS. It is not handed to peers, for a file
    cannot be sealed, and a peer that cuts it short ends all processes that have it mapped.

    Raises UnsupportedError if the disk is too small, OSError; `check_file` says what else is wrong with a path.
    """

    name = "file"
    shared = True
    registrable = False
    transparent = True
    on_disk = True
    reads_ahead = True
    takes_path = True

    @classmethod
    def make(cls, size: int, _vm: MemoryMaker, options: BackingOptions) -> Backing:
        """Make it, of whichever VM."""
        return cls(size, options.path, thp=options.thp)

    def __init__(self, size: int, path: str | None = None, *, thp: bool = False) -> None:
        with contextlib.ExitStack() as stack:
            self._file, self._created = _open_file(path)  # not `fd`, which may be handed over
            stack.callback(os.close, self._file)
            stack.callback(self._undo)
            try:
                with libc.named_call("fallocate"):
                    os.posix_fallocate(self._file, 0, size)
            except OSError as error:
                number = error.errno or 0
                if number in (errno.EPERM, errno.ENOSYS) or of_errno(number):
                    raise  # it is not about the disk
                where = path or temporary_folder()
                raise UnsupportedError(
                    f"{where} has no room for {format_size(size)} of RAM ({os.strerror(number)}): free some, or "
                    "name a file on another disk with --backing-file"
                ) from None
            super().__init__(size, *map_twice(self._file, size, stack), thp=thp)
            stack.pop_all()

    def forget(self, offset: int, length: int) -> None:
        """Drop the bytes and keep the disk's space, if the file system can; else free that too, or nothing."""
        for mode in (FALLOC_FL_ZERO_RANGE, FALLOC_FL_PUNCH_HOLE):
            try:
                libc.fallocate(self._file, mode | FALLOC_FL_KEEP_SIZE, offset, length)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
            else:
                return

    def close(self) -> None:
        """Unmap and close the file; a second call does nothing."""
        super().close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._file >= 0:
            self._undo()
        super().__exit__(kind, error, trace)

    def _undo(self) -> None:
        """Leave the path as it was found: without a file, or with an empty one; as far as that can be.

        It is done on the way of another error, which is the one that counts.
        """
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
        if self._created is not None:
            with contextlib.suppress(OSError):
                self._created.unlink(missing_ok=True)


def _open_file(path: str | None) -> tuple[int, Path | None]:
    """Return the descriptor, and the file's path if it was not there before."""
    if path is None:
        return unnamed_file("the pages of RAM"), None
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), Path(path)
    except FileExistsError:
        return os.open(path, flags | os.O_CREAT, 0o600), None  # a link to nothing yet is there too


def check_file(path: str) -> None:
    """Raise ValueError if RAM cannot be in a file at `path`: it has to be new or empty."""
    where, file = f"--backing-file {path}", Path(path)
    try:
        status = file.stat()
    except FileNotFoundError:
        if not file.parent.is_dir():
            raise ValueError(f"{where}: there is no directory {file.parent}") from None
        return
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}; give a new file's name") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{where}: that is no regular file; give a new file's name")
    if status.st_size:
        raise ValueError(
            f"{where}: there is something in it, which RAM would overwrite; give a new file's name"
        )
