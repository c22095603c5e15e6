"""What this process runs out of, in a sentence: the resource, its limit, the remedy.

The kernel tells of it by an errno, Python by a MemoryError or by "can't start new thread", from wherever the last bit
was wanted. `named` is the one place where that becomes a sentence; every command is in such a block, and so is each
part of a command that goes on without what has failed. A caller with a better sentence raises a ShortageError itself.

A system call that is refused altogether, as in a container with a strict seccomp profile, is named here too.

Units: bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

from kvmdp import cgroup
from kvmdp.errors import KvmdpError, UnsupportedError
from kvmdp.size import format_size

_NO_THREAD = "can't start new thread"  # all that Python says
_UNMAPPED = "failed to map segment"  # and the loader of libraries, in an ImportError
_STACK = 8 << 20  # of a thread, where there is no limit to it
# What a thread needs beside its stack to get going. One that dies for want of memory before it has told so is waited
# for by threading.Thread.start for ever.
_BEGINNING = 4 << 20
_SCARCE = 64 << 20  # memory left of a control group that may well be too little
# As it is at the beginning: the kernel raises it by a second each time that it tells of it.
_CPU_SECONDS, _ = resource.getrlimit(resource.RLIMIT_CPU)
_UNSEEN_MAPPINGS = 64  # that /proc/self/maps may have less than the kernel counts


class ShortageError(KvmdpError):
    """This process or its host has run out of something: the message says of what, its limit, and what to do."""


class NoThreadError(ShortageError):
    """No more threads, or processes, can be started."""


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Have what the block raises because something has run out be a ShortageError.

    A system call that is refused becomes an UnsupportedError. All else is raised as it is.
    """
    try:
        yield
    except Exception as error:
        if (sentence := shortage(error)) is not None:
            raise ShortageError(sentence) from error
        if not isinstance(error, UnsupportedError) and any(_is_refusal(each) for each in causes(error)):
            raise UnsupportedError(
                f"{in_words(error)}: that is a system call which this process may not make, as in a container with a "
                "strict seccomp profile; allow it there (docker run --security-opt seccomp=FILE), or run elsewhere"
            ) from error
        raise


@contextlib.contextmanager
def starting_thread() -> Iterator[None]:
    """Raise NoThreadError if the block cannot start the thread that it is to start."""
    if _lacks_memory_for_a_thread():
        raise NoThreadError(more_threads())
    try:
        yield
    except RuntimeError as error:
        if str(error) != _NO_THREAD:
            raise
        raise NoThreadError(more_threads()) from error


@contextlib.contextmanager
def starting_process() -> Iterator[None]:
    """Raise NoThreadError if the block cannot start the process that it is to start."""
    try:
        yield
    except BlockingIOError as error:  # fork(2): EAGAIN
        raise NoThreadError(more_threads()) from error


def shortage(error: BaseException) -> str | None:
    """Return in a sentence what ran out, if `error` or what it was raised from came of that; else None.

    An error of ours that is raised from another has what that says in its own message (`in_words`).
    """
    for each in causes(error):
        if (sentence := _shortage_itself(each)) is not None:
            return str(error) if each is not error and _is_ours(error) else sentence
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def in_words(error: BaseException) -> str:
    """Return what to say of an error inside a sentence: what ran out, if it came of that.

    An error of ours is a sentence itself. What is neither ours nor the kernel's is not expected, and is shown as it is.
    """
    if (sentence := shortage(error)) is not None:
        return sentence
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) if _is_ours(error) else f"internal error: {error!r}"


def of_errno(number: int) -> str:
    """Return the sentence of a shortage that the kernel tells of by `number`, empty if it is none."""
    return _BY_ERRNO[number]() if number in _BY_ERRNO else ""


def _is_ours(error: BaseException) -> bool:
    return isinstance(error, KvmdpError)


def _shortage_itself(error: BaseException) -> str | None:
    if isinstance(error, ShortageError):
        return str(error)
    if isinstance(error, MemoryError) or (isinstance(error, ImportError) and _UNMAPPED in str(error)):
        return f"out of memory: {_more_memory()}"
    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        return more_threads()
    if isinstance(error, OSError) and (sentence := of_errno(error.errno or 0)):
        if error.errno in (errno.EMFILE, errno.ENFILE):  # which file it was is no matter
            return f"too many open files: {sentence}"
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; {sentence}"
    return None


def _is_refusal(error: BaseException) -> bool:
    """Whether a system call was refused that is about nothing which has a name, and permissions of its own.

    Kinds of OSError that are ours say by themselves what to do.
    """
    if not isinstance(error, OSError) or type(error) not in (OSError, PermissionError):
        return False
    return error.errno in (errno.EPERM, errno.ENOSYS) and error.filename is None


# The sentences. Each can stand alone, or behind what failed.


def more_threads() -> str:
    """Return the sentence of threads, or processes, that cannot be started."""
    group = cgroup.tightest("pids", ("pids.max", "pids.current"))
    if group is not None and group.used >= group.value:
        return (
            f"this control group may have {group.value} processes and threads ({group.file}), and needs more: raise "
            "that, or end some of them"
        )
    if _lacks_memory_for_a_thread():
        return f"there is no memory for the stack of another thread: {_more_memory()}"
    most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.getuid() and most != resource.RLIM_INFINITY:
        return (
            f"user {os.getuid()} may have {most} processes and threads (ulimit -u), and needs more: raise the limit, "
            "or end some of them"
        )
    return "the host has as many processes and threads as it may (sysctl kernel.threads-max, kernel.pid_max): end some"


def more_cpu_time() -> str:
    """Return the sentence of a process that has used all the CPU time it may: it is told by SIGXCPU."""
    return f"this process may use {_CPU_SECONDS} s of CPU time (ulimit -t), and needs more: raise the limit"


_MEMORY_LIMITS = (
    (resource.RLIMIT_AS, "VmSize", "of address space (ulimit -v)"),
    (resource.RLIMIT_DATA, "VmData", "of data (ulimit -d)"),
)


def require_memory(address_space: int, data: int) -> None:
    """Raise ShortageError unless this process may have as many bytes of address space and of data, all told."""
    for (limit, _, what), least in zip(_MEMORY_LIMITS, (address_space, data), strict=True):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and most < least:
            raise ShortageError(
                f"this process may have {format_size(most)} {what}, and needs {format_size(least)} to begin with: "
                "raise the limit"
            )


def _lacks_memory_for_a_thread() -> bool:
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return _left_of_memory() < (_STACK if stack == resource.RLIM_INFINITY else stack) + _BEGINNING


def _left_of_memory() -> float:
    """Return how much more memory this process may have by its own limits."""
    left = float("inf")
    for limit, field, _ in _MEMORY_LIMITS:
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            left = min(left, most - _status(field))
    return left


def _status(field: str) -> int:
    """Return a field of this process's status; 0 if it cannot be read."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
    return 0


def _more_memory() -> str:
    limits = [
        f"{format_size(most)} {what}"
        for limit, _, what in _MEMORY_LIMITS
        if (most := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY
    ]
    if limits:
        return (
            f"this process may have {' and '.join(limits)}, and needs more: raise the limit, or ask for less"
        )
    group = cgroup.tightest(
        "memory",
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    )
    if group is not None and group.value - group.used < _SCARCE:
        return (
            f"this control group may have {format_size(group.value)} of memory ({group.file}), and needs more: raise "
            "that, or ask for less"
        )
    most = _sysctl("vm/max_map_count")
    if most and _mappings() > most - _UNSEEN_MAPPINGS:
        return f"a process may have {most} mappings (sysctl vm.max_map_count), and this one needs more: raise that"
    return "the host has no more to give: free some, or ask for less"


def _mappings() -> int:
    with contextlib.suppress(OSError):
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    return 0


def _sysctl(name: str) -> int:
    with contextlib.suppress(OSError):
        return int(Path("/proc/sys", name).read_text())
    return 0


def _more_descriptors() -> str:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"this process may have {most} descriptors open at once (ulimit -n), and needs more: raise the limit"
    )


def _more_open_files() -> str:
    return "the host has as many files open as it may (sysctl fs.file-max): raise that, or close some"


def _larger_files() -> str:
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most == resource.RLIM_INFINITY:
        return ""  # it is the file system that has no files as large
    return (
        f"this process may make no file larger than {format_size(most)} (ulimit -f), which is said of memory files "
        "too: raise the limit"
    )


_BY_ERRNO: dict[int, Callable[[], str]] = {
    errno.ENOMEM: _more_memory,
    errno.EMFILE: _more_descriptors,
    errno.ENFILE: _more_open_files,
    errno.EFBIG: _larger_files,
}
