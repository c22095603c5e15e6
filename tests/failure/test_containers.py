"""In a container: system calls that its seccomp profile refuses, and no /dev/userfaultfd.

What needs none of them works. What does ends with the call and what would allow it, in one sentence.
"""

import functools
import re
import signal

import pytest
from command import Running, kvmdp, require_trap
from commands import RUN
from handlers import MEMORY, SEED, HandlerProcess

SMALL = ("run", "--memory", "2M")
EVICTING = ("--resident-limit", "1M", "--workload", "atomic", "--iterations", 1)
ALLOW = r"allow it there \(docker run --security-opt seccomp=FILE\)"
# As Docker's default profile has it: no userfaultfd(2), whose device a container has not got either.
WITHOUT_USERFAULTFD = """
import sys
sys.path[:0] = ["tests/support"]
import hosts, seccomp
hosts.have_own_mounts()
hosts.replace_dev(kvm=0o666)
seccomp.refuse("userfaultfd")
"""
NO_USERFAULTFD = (
    "no userfaultfd, for this process may not make that system call (Operation not permitted), as in a container: give "
    "the container the device (docker run --device /dev/userfaultfd), or a seccomp profile that allows the call "
    "(--security-opt seccomp=FILE), or use the trap memory-fault or mmio"
)
# What Docker's profiles have refused, of the last years, to a container without privileges.
REFUSED_BY_DEFAULT = (
    *("close_range", "get_mempolicy", "io_uring_setup", "kcmp", "mbind", "perf_event_open", "pidfd_getfd"),
    *(
        "pidfd_open",
        "pidfd_send_signal",
        "process_madvise",
        "process_vm_readv",
        "process_vm_writev",
        "unshare",
    ),
)
DONTNEED, DONTFORK, COLLAPSE = 4, 10, 25  # linux/mman.h

pytestmark = [pytest.mark.kvm, pytest.mark.root, pytest.mark.hugepage_pool]
without_userfaultfd = pytest.mark.usefixtures("own_mounts")


def refusing(*calls, number="EPERM"):
    imports = "import errno, sys; sys.path.insert(0, 'tests/support'); import seccomp"
    return f"{imports}; seccomp.refuse(*{calls}, number=errno.{number})"


def in_container(*arguments):
    return kvmdp(*arguments, prelude=WITHOUT_USERFAULTFD)


@functools.cache
def working():
    return kvmdp("probe", "--json", "-").document["working"]


# Without userfaultfd


@without_userfaultfd
def test_a_probe_has_its_table_with_the_reason_in_the_cells():
    few = "from kvmdp.cli import probe\nprobe.BACKINGS = {'memfd': probe.BACKINGS['memfd']}\n"
    done = kvmdp("probe", "--json", "-", prelude=few + WITHOUT_USERFAULTFD)
    assert done.status == 0, done.err
    traps = done.document["traps"]
    for trap in ("marker", "layered", "userfaultfd"):
        assert {cell["error"] for cell in traps[trap]["memfd"].values()} == {NO_USERFAULTFD}
    assert {cell["status"] for cell in traps["mmio"]["memfd"].values()} == {"exact"}
    assert done.document["working"] == [trap for trap in working() if trap in ("memory-fault", "mmio")]
    told = kvmdp("probe", prelude=few + WITHOUT_USERFAULTFD)
    assert told.status == 0
    assert told.out.startswith(
        "use memory-fault: 2 of 5 traps work here\n"
        if "memory-fault" in working()
        else "use mmio: 1 of 5 traps work here\n"
    )
    assert re.search(r"^memfd +NO ", told.out, re.MULTILINE)
    reason, _, remedy = NO_USERFAULTFD.partition(": ")
    traps = "trap marker on memfd; trap layered on memfd; trap userfaultfd on memfd; userfaultfd for kernel faults"
    assert f"  {traps}: {reason}\n    {remedy}\n" in told.out
    assert told.out.count(remedy) == 1


@without_userfaultfd
@pytest.mark.parametrize(
    "options",
    [(), ("--detect-leaks",), EVICTING, ("--backing", "anonymous"), ("--workload", "disk")],
    ids=["plain", "leaks", "evicting", "anonymous", "disk"],
)
def test_auto_takes_what_works(options):
    done = in_container(*SMALL, *options, "--json", "-")
    assert done.status == 0, done.err
    assert done.document["trap"] == next(trap for trap in working() if trap in ("memory-fault", "mmio"))
    assert done.document["wrong_pages"] == []


@without_userfaultfd
@pytest.mark.parametrize("trap", ["marker", "layered", "userfaultfd"])
def test_a_trap_that_needs_it_ends_with_the_remedy(trap):
    done = in_container(*SMALL, "--trap", trap)
    assert (done.status, done.error) == (4, NO_USERFAULTFD)


@without_userfaultfd
@pytest.mark.parametrize(
    "command",
    [
        ("bench", "-b", "2M", "--rounds", 1, "--warm-up", 0),
        ("compare", "-b", "2M", "-v", 1, "--latencies", 0, "--rounds", 1, "--memory-sizes", "none"),
    ],
    ids=["bench", "compare"],
)
def test_what_compares_skips_it(command):
    done = in_container(*command, "marker", "mmio", "present")
    assert done.status == 0, done.err
    assert f"skipped marker: {NO_USERFAULTFD}\n" in done.err


@without_userfaultfd
def test_a_table_of_coverage_skips_it():
    few = "from kvmdp.lab import coverage\ncoverage.ACCESSES = {'read': coverage.ACCESSES['read']}\n"
    done = kvmdp("compare", "--coverage", "--json", "-", prelude=few + WITHOUT_USERFAULTFD)
    assert done.status == 0, done.err
    assert done.document["skipped"]["marker"] == done.document["skipped"]["userfaultfd"] == NO_USERFAULTFD


# Without other calls


@pytest.mark.parametrize("number", ["EPERM", "ENOSYS"])
@pytest.mark.parametrize(
    "options",
    [(), ("--detect-leaks",), EVICTING, ("--workload", "disk")],
    ids=["plain", "leaks", "evicting", "disk"],
)
def test_what_default_profiles_refuse_is_not_needed(options, number):
    prelude = refusing(*REFUSED_BY_DEFAULT, "sched_setaffinity", number=number)
    done = kvmdp(*SMALL, *options, prelude=prelude, fresh=True)
    assert done.status == 0, done.err
    assert "exact" in done.out


def test_nor_by_a_handler_and_its_machine(socket_path):
    prelude = refusing(*REFUSED_BY_DEFAULT)
    with HandlerProcess(socket_path, "--synthetic", f"{MEMORY},{SEED}", prelude=prelude) as handler:
        done = kvmdp("run", "--trap", "mmio", "--handler", socket_path, prelude=prelude)
        assert done.status == 0, done.err
        assert "512 of 512 present: 512 fetched" in done.out
        assert handler.end(signal.SIGTERM) == 130


def test_nor_by_a_device_and_its_machine(tmp_path):
    disk, path, prelude = tmp_path / "disk", tmp_path / "socket", refusing(*REFUSED_BY_DEFAULT)
    disk.write_bytes(bytes(2 << 20))
    with Running(*RUN, "--workload", "disk", "--device-socket", path, prelude=prelude) as machine:
        machine.wait_until(path.exists)
        assert kvmdp("device", "--connect", path, "--file", disk, prelude=prelude).status == 0
        assert machine.finish().status == 0


CALLS = {
    "memfd_create": ("memfd_create", (), "memfd_create: "),
    "memfd_create, supervised": ("memfd_create", ("--detect-leaks",), "memfd_create: "),
    "memfd_create, file": ("memfd_create", ("--backing", "file"), "memfd_create: "),
    "fallocate": ("fallocate", ("--trap", "mmio", *EVICTING), r"cannot be freed: fallocate\(mode 0x3\) of "),
    "fallocate, file": ("fallocate", ("--trap", "mmio", "--backing", "file"), "fallocate: "),
    "mincore": ("mincore", ("--trap", "mmio", "--detect-leaks"), "mincore of "),
    "eventfd": ("eventfd2", ("--trap", "marker"), "eventfd: "),
    "epoll": ("epoll_create1", ("--trap", "userfaultfd"), "epoll_create1: "),
    "DONTNEED": (("madvise", 2, DONTNEED), ("--trap", "marker", *EVICTING), r"madvise\(4\) of "),
    "DONTFORK": (("madvise", 2, DONTFORK), (), r"madvise\(10\) of "),
    "COLLAPSE": (
        ("madvise", 2, COLLAPSE),
        ("--trap", "marker", "--collapse", "background"),
        r"madvise\(25\) of ",
    ),
}


@pytest.mark.parametrize(("call", "options", "named"), CALLS.values(), ids=CALLS)
def test_a_call_that_is_needed_is_named_with_the_remedy(call, options, named):
    if "--trap" in options:
        require_trap(options[options.index("--trap") + 1])
    done = kvmdp(*SMALL, *options, prelude=refusing(call))
    assert done.status == 4
    assert re.search(
        rf"{named}.*Operation not permitted: that is a system call which .*; {ALLOW}", done.error
    ), done.err
    assert done.error.count("seccomp=FILE") == 1
    assert "no trap works" not in done.error


def test_a_trap_that_makes_a_call_of_its_own_is_passed_over_or_named():
    require_trap("memory-fault")
    prelude = refusing("close_range")
    done = kvmdp(*SMALL, "--trap", "memory-fault", prelude=prelude)
    assert done.status == 4
    assert "seccomp profile allow close_range, or use marker or mmio" in done.error
    assert kvmdp(*SMALL, prelude=prelude).status == 0


def test_a_vcpu_that_may_not_be_pinned():
    done = kvmdp("bench", "-b", "2M", "--rounds", 1, "-c", 0, "mmio", prelude=refusing("sched_setaffinity"))
    assert done.status == 4
    assert (
        "skipped mmio: vCPU 0 cannot be pinned to host CPU 0: Operation not permitted: that is a system"
        in done.err
    )
