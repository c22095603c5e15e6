"""Reserving HugeTLB pages for a run, and giving them back.

2 MiB pages: `nr_overcommit_hugepages` is raised, which lets the kernel make pages when they are mapped and frees them
with their last user, even one that was killed. 1 GiB pages cannot be made so: `nr_hugepages` is raised, and lowered
again.

What a run has raised is also in a file, so that the next run can undo it if this one is killed. The files are in
/run/kvmdp or, of another user than root, in kvmdp under XDG_RUNTIME_DIR; a run that changes them or the
kernel's numbers holds a lock on that folder. It goes with the last file.

No run takes another's pages: they are reserved and mapped under the lock, so what is free when a run looks belongs to
none of them. And a number is only lowered by what it was raised by, under which the kernel keeps all pages in use.

Source: `Documentation/admin-guide/mm/hugetlbpage.rst`. Units: bytes for the size of a page, else pages.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from kvmdp.cgroup import GroupLimit, tightest
from kvmdp.errors import UnsupportedError
from kvmdp.memory.mapping import Mapping
from kvmdp.shortage import ShortageError
from kvmdp.size import format_size

# The largest size of which the kernel makes pages on demand: larger ones are gigantic.
_OVERCOMMITTED = 2 << 20
_Entry = dict[str, int | str | bool]
_serial = itertools.count()


def pool_path(page_size: int) -> Path:
    """Return the kernel's folder of the pool of such pages."""
    return Path(f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB")


def check_pool(page_size: int) -> None:
    """Raise UnsupportedError if this kernel has no huge pages of that size."""
    if not pool_path(page_size).parents[1].is_dir():
        raise UnsupportedError("the host's huge pages cannot be seen: mount /sys, or use another backing")
    if not pool_path(page_size).is_dir():
        raise UnsupportedError(
            f"this host has no huge pages of {format_size(page_size)}: use a kernel with CONFIG_HUGETLBFS, and for 1G "
            "a CPU with pdpe1gb, or another backing"
        )


def _read(page_size: int, name: str) -> int:
    return int((pool_path(page_size) / name).read_text())


def _limit(page_size: int, name: str) -> int:
    """Return what a number of the pool was set to: `nr_hugepages` as it is read has pages made on demand in it."""
    surplus = _read(page_size, "surplus_hugepages") if name == "nr_hugepages" else 0
    return _read(page_size, name) - surplus


def free_pages(page_size: int) -> int:
    """Return how many pages of the pool are free and not set aside."""
    return _read(page_size, "free_hugepages") - _read(page_size, "resv_hugepages")


def check_pages(page_size: int, count: int) -> None:
    """Raise UnsupportedError if `count` pages cannot be had now without a reservation; only a mapping is certain."""
    check_pool(page_size)
    room = _read(page_size, "nr_overcommit_hugepages") - _read(page_size, "surplus_hugepages")
    if free_pages(page_size) + max(room, 0) < count:
        raise too_few(page_size, count, reserved=False)


def can_overcommit(page_size: int) -> bool:
    """Return whether such pages can be made on demand, and we may say how many, and can leave a record of that."""
    number = pool_path(page_size) / "nr_overcommit_hugepages"
    return page_size <= _OVERCOMMITTED and os.access(number, os.W_OK) and _can_record()


def how_to_reserve(page_size: int, count: int) -> str:
    """Return the command that makes `count` more pages than are free now part of the pool."""
    total = _limit(page_size, "nr_hugepages") + max(count - free_pages(page_size), 0)
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"echo {total} | {sudo}tee {pool_path(page_size) / 'nr_hugepages'}"


def too_few(page_size: int, count: int, *, reserved: bool) -> UnsupportedError:
    """Return the error of pages that could not be mapped; `reserved` says that the pool had been enlarged for it."""
    size = format_size(page_size)
    group = _group_limit(page_size, "rsvd.")
    if group is not None and group.value - group.used < count * page_size:
        return UnsupportedError(
            f"RAM takes {count} huge page{'s' if count > 1 else ''} of {size}, and this control group may set aside "
            f"{format_size(group.value)} of them ({group.file}): raise that, or use another backing"
        )
    wanted = (
        f"RAM takes {count} huge page{'s' if count > 1 else ''} of {size}, {free_pages(page_size)} are free"
    )
    if reserved:
        return UnsupportedError(
            f"{wanted}, and memory is too full or too fragmented to make the rest: free some, or reserve them after "
            f"boot ({how_to_reserve(page_size, count)})"
        )
    return UnsupportedError(
        f"{wanted}: reserve them ({how_to_reserve(page_size, count)}), or give --reserve-hugepages"
    )


class HugePageRefusedError(ShortageError):
    """The host has no huge page for a first touch, although pages were set aside when RAM was mapped."""

    def __init__(self, page_size: int) -> None:
        size, group = format_size(page_size), _group_limit(page_size)
        if group is not None and group.value - group.used < page_size:
            why = (
                f"this control group may have {format_size(group.value)} of them ({group.file}); raise that, or use "
                "another backing"
            )
        else:
            why = (
                "a control group has a limit that cannot be seen from here, or a peer has given pages away that others "
                "have taken; raise that limit, or use another backing"
            )
        super().__init__(f"the host refuses a huge page of {size} that it had set aside: {why}")


def populate(mapping: Mapping, offset: int, length: int, page_size: int) -> None:
    """Have a part of a mapping of such pages in memory. Raises HugePageRefusedError.

    Pages that are set aside are not there yet, and a control group counts them as they are touched: the first store in
    one that it does not get ends the process with a SIGBUS, and a system call with EFAULT. This tells, one huge page at
    a time if it is asked so, and costs a microsecond where the page is there.
    """
    try:
        mapping.populate(offset, length)
    except OSError as error:
        if error.errno not in (errno.EFAULT, errno.ENOMEM):
            raise
        raise HugePageRefusedError(page_size) from error


def _group_limit(page_size: int, kind: str = "") -> GroupLimit | None:
    """Return the limit of this process's control groups on such pages: on those in use, or set aside ("rsvd.")."""
    pool = f"hugetlb.{page_size >> 20}MB" if page_size < 1 << 30 else f"hugetlb.{page_size >> 30}GB"
    return tightest(
        "hugetlb",
        (f"{pool}.{kind}max", f"{pool}.{kind}current"),
        (f"{pool}.{kind}limit_in_bytes", f"{pool}.{kind}usage_in_bytes"),
    )


class Reservation:
    """Makes sure of `count` pages from `enter` on, and gives back what was added at the end of the block.

    The caller holds the lock from `enter` until `settle`, which is to follow as soon as the pages are mapped.

    Raises UnsupportedError if the pool may not be changed, or cannot be made large enough.
    """

    def __init__(self, page_size: int, count: int) -> None:
        check_pool(page_size)
        self._page_size = page_size
        self._count = count
        self._number = "nr_overcommit_hugepages" if page_size <= _OVERCOMMITTED else "nr_hugepages"
        self._locked = contextlib.ExitStack()
        self._record: Path | None = None

    def __enter__(self) -> Self:
        if not os.access(pool_path(self._page_size) / self._number, os.W_OK):
            if free_pages(self._page_size) >= self._count:
                return self  # a user that may not reserve can still use what is there
            raise UnsupportedError(
                f"{format_size(self._page_size)} huge pages cannot be reserved: no permission; as root, "
                f"{how_to_reserve(self._page_size, self._count)}"
            )
        if not _can_record():
            raise UnsupportedError(
                f"huge pages are reserved with a record of it, for which {_folder()} has to be writable and /proc "
                f"there; or reserve them yourself ({how_to_reserve(self._page_size, self._count)})"
            )
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(_locked_folder())
            self._add(folder)
            self._locked = stack.pop_all()
        return self

    def _add(self, folder: Path) -> None:
        """Raise the pool's number."""
        size, number = self._page_size, self._number
        before = _limit(size, number)
        if size <= _OVERCOMMITTED:
            # By all of them, whatever is free now or could be made: that may be of a run that is just ending, or has
            # freed a page for a moment. A limit that is too high takes no page from another run. It may be below what
            # there is already, if root has lowered it.
            missing = self._count + max(_read(size, "surplus_hugepages") - before, 0)
        else:
            missing = self._count - free_pages(size)
            if missing <= 0:
                return
            # The kernel counts pages in use that are above its number (surplus) as the first it was to make.
            missing += _read(size, "surplus_hugepages")
        record = folder / f"{os.getpid()}-{_start_time(os.getpid())}-{next(_serial)}.json"
        entry: _Entry = {
            "page_size": size,
            "number": number,
            "before": before,
            "added": missing,
            "settled": False,
        }
        _write_record(record, entry)
        self._record = record
        try:
            _write_pool(size, number, before + missing)
            got = _limit(size, number) - before
            _write_record(record, entry | {"added": max(got, 0), "settled": True})
            if got < missing:
                raise too_few(size, self._count, reserved=True)
        except BaseException:
            _give_back(record)
            self._record = None
            raise

    def settle(self) -> None:
        """Let others reserve: the pages are mapped."""
        self._locked.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()
        if self._record is not None:
            with _locked_folder():
                _give_back(self._record)
                self._record = None


def _write_pool(page_size: int, name: str, value: int) -> None:
    (pool_path(page_size) / name).write_text(str(value))


def _write_record(record: Path, entry: _Entry) -> None:
    """Write it whole or not at all: a run that is killed meanwhile leaves the one before."""
    draft = record.with_suffix(".new")
    draft.write_text(json.dumps(entry))
    draft.replace(record)


def _give_back(record: Path) -> None:
    """Lower a number by what the run that wrote `record` has raised it; under the lock."""
    record.with_suffix(".new").unlink(missing_ok=True)
    entry = json.loads(record.read_text())
    size, number, added = entry["page_size"], entry["number"], entry["added"]
    now = _limit(size, number)
    if not entry["settled"]:
        # It was killed in the middle, and no run has held the lock since: what it did is what differs.
        added = min(added, max(now - entry["before"], 0))
    if added:
        _write_pool(size, number, max(now - added, 0))
    record.unlink()


def _start_time(pid: int) -> int | None:
    """Return when a process began, in clock ticks since boot, None if there is none: a pid alone may be another's."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _can_record() -> bool:
    """Return whether a record can be left, and others be judged by whether their processes live (/proc)."""
    folder = _folder()
    return _start_time(os.getpid()) is not None and os.access(
        folder if folder.is_dir() else folder.parent, os.W_OK
    )


def _folder() -> Path:
    if os.geteuid() == 0:
        return Path("/run/kvmdp")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        raise UnsupportedError(
            "huge pages are reserved by root, or with a folder for the record of it: set XDG_RUNTIME_DIR"
        )
    return Path(runtime, "kvmdp")


@contextlib.contextmanager
def _locked_folder() -> Iterator[Path]:
    """Hold the lock for the time of the block; what dead runs left has been given back when it begins."""
    folder = _folder()
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # the run that had it last has taken it away
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_still(folder, descriptor):
                continue
            try:
                for record in _records_of_the_dead(folder):
                    _give_back(record)
                yield folder
            finally:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # fails while there is a record in it
            return
        finally:
            os.close(descriptor)


def _is_still(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def _records_of_the_dead(folder: Path) -> list[Path]:
    try:
        records = [*folder.glob("*.json")]
    except FileNotFoundError:  # another run has taken the folder away, at this very moment
        return []
    dead = []
    for record in records:
        pid, started, _ = record.stem.split("-")
        if _start_time(int(pid)) != int(started):
            dead.append(record)
    return dead


def give_back_what_is_left() -> None:
    """Give back what runs have left that were killed. Raises OSError, UnsupportedError if it may not be done."""
    if (os.geteuid() and not os.environ.get("XDG_RUNTIME_DIR")) or not _can_record():
        return  # nothing can have been recorded
    if _records_of_the_dead(_folder()):
        with _locked_folder():
            pass
