"""Skips what this machine cannot run, and fails every test that leaves something behind.

A test marked with a need that is not met (tests/support/requirements.py) is skipped with the reason and the
remedy.  Where the environment variable KVMDP_REQUIRE names the need, it fails instead.  A test in
which a thread dies of an exception fails too: pytest warns of it, and `filterwarnings` in
pyproject.toml makes warnings errors.
"""

import contextlib
import fcntl
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from chosen import choose
from effort import EFFORT, EFFORTS
from requirements import CHECKS, missing, required

# What a test starts shall not compile all modules anew each time, which takes half of the time of a short command.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell has what it starts in the background ignore these, and so would every command of a test, which then cannot be
# interrupted.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

_REQUIRED = pytest.StashKey[frozenset[str]]()
_FAILED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[_REQUIRED] = required(os.environ.get("KVMDP_REQUIRE", ""))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if EFFORT not in EFFORTS:
        raise pytest.UsageError(f"KVMDP_EFFORT is {EFFORT!r}: set it to one of {', '.join(EFFORTS)}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:], left_out = choose(items)
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item: pytest.Item) -> None:
    needs = [need for need in CHECKS if item.get_closest_marker(need)]
    unmet = {need: reason for need in needs if (reason := missing(need))}
    demanded = item.config.stash[_REQUIRED]
    for need in unmet.keys() & demanded:
        pytest.fail(f"KVMDP_REQUIRE names {need}, but: {unmet[need]}", pytrace=False)
    for need, reason in unmet.items():
        pytest.skip(f"needs {need}: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if call.when == "call":
        item.stash[_FAILED] = call.excinfo is not None
    return (yield)


def _descriptors() -> dict[int, str]:
    """Open descriptors and what each one is."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:  # the one that listed the directory
            continue
    return found


@pytest.fixture(autouse=True)
def pools_to_itself(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let no two tests reserve huge pages at the same time: other streams of tests may run on this host."""
    if not any(request.node.get_closest_marker(name) for name in ("hugepages", "hugepage_pool")):
        yield
        return
    with open(Path(tempfile.gettempdir()) / f"kvmdp-tests-hugepages-{os.getuid()}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which there are more threads or descriptors than before."""
    threads = set(threading.enumerate())
    descriptors = _descriptors()
    yield
    if request.node.stash.get(_FAILED, False):
        return  # its traceback keeps objects alive, and one failure is enough
    if left_threads := set(threading.enumerate()) - threads:
        names = ", ".join(sorted(thread.name for thread in left_threads))
        pytest.fail(f"the test left threads running: {names}", pytrace=False)
    if _descriptors().keys() - descriptors.keys():
        gc.collect()  # an exception's traceback may be all that holds them
        after = _descriptors()
        if left := after.keys() - descriptors.keys():
            names = ", ".join(f"{number} ({after[number]})" for number in sorted(left))
            pytest.fail(f"the test left descriptors open: {names}", pytrace=False)


@pytest.fixture(autouse=True, scope="session")
def forking() -> Iterator[None]:
    """Start the server that forks commands (tests/support/forked.py), if there are tests which start some."""
    with sys.modules["forked"].server() if "forked" in sys.modules else contextlib.nullcontext():
        yield


@pytest.fixture
def own_mounts() -> None:
    """Skip the test where a process cannot have mounts of its own, as root of a container often cannot."""
    command = [sys.executable, "-c", "from hosts import have_own_mounts; have_own_mounts()"]
    done = subprocess.run(command, cwd=Path(__file__).parent / "support", capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.splitlines()[-1]
        pytest.skip(
            f"cannot make mounts of its own ({reason}): in a container, docker run --cap-add SYS_ADMIN"
        )
