"""Which errors are shortages, and what is said of them."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kvmdp import shortage
from kvmdp.errors import PagingError, UnsupportedError
from kvmdp.shortage import NoThreadError, ShortageError, named

MEMORY = "the host has no more to give: free some, or ask for less"


def raised_from(error, cause):
    error.__cause__ = cause
    return error


@pytest.fixture(autouse=True)
def no_limit(monkeypatch):
    monkeypatch.setattr(shortage.cgroup, "tightest", lambda *_: None)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), f"out of memory: {MEMORY}"),
        (ImportError("libm.so: failed to map segment from shared object"), f"out of memory: {MEMORY}"),
        (raised_from(ImportError("pages of advice"), MemoryError()), f"out of memory: {MEMORY}"),
        (
            raised_from(PagingError("filling page 7 broke: no memory"), MemoryError()),
            "filling page 7 broke: no memory",
        ),
        (OSError(errno.ENOMEM, "mmap of 4096 bytes"), f"mmap of 4096 bytes; {MEMORY}"),
        (
            OSError(errno.ENFILE, "Too many open files in system", "disk"),
            f"too many open files: {shortage._more_open_files()}",
        ),
        (ShortageError("no more of it"), "no more of it"),
    ],
)
def test_a_shortage_is_a_sentence(error, sentence):
    with pytest.raises(ShortageError) as caught, named():
        raise error
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "error", [OSError(errno.EFBIG, "File too large"), ImportError("no such module"), KeyError(1)]
)
def test_what_is_none_is_raised_as_it_is(error):
    with pytest.raises(type(error)) as caught, named():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_a_refused_system_call_is_said_once(number):
    with pytest.raises(UnsupportedError) as caught, named(), named():
        raise OSError(number, f"memfd_create: {os.strerror(number)}")
    message = str(caught.value)
    assert message.startswith(
        f"memfd_create: {os.strerror(number)}: that is a system call which this process may not"
    )
    assert message.count("seccomp") == 2  # the profile, and the option that names one


def test_a_file_that_may_not_be_opened_is_no_refused_call():
    error = PermissionError(errno.EPERM, "Operation not permitted", "disk")
    with pytest.raises(PermissionError) as caught, named():
        raise error
    assert caught.value is error


def test_a_thread_is_not_begun_without_the_memory_to_begin():
    """threading.Thread.start waits for ever for one that dies before it can tell that it has begun."""
    code = """
import resource, sys
sys.path[:0] = ["tests/support"]
import limits
from kvmdp.shortage import NoThreadError
from kvmdp.thread import JoinableThread
stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
limits.limit_data((8 << 20 if stack == resource.RLIM_INFINITY else stack) + (1 << 20))
try:
    JoinableThread(lambda: None, "thread", print).start()
except NoThreadError as error:
    print(error)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(
        "there is no memory for the stack of another thread: this process may have "
    ), done
    assert issubclass(NoThreadError, ShortageError)
