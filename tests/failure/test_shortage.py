"""What a command's process, or its host, runs out of is a sentence: the resource, its limit, and what to do.

No traceback, no signal, no other accusation: not of the traps, not of the process itself, not of an interruption.
"""

import os
import re
import signal
import time
from pathlib import Path

import control_groups
import limits
import pytest
from command import Running, kvmdp
from commands import RUN, SLOW

SMALL = ("run", "--memory", "2M")
FOUR_VCPUS = (*SMALL, "--trap", "userfaultfd", "--vcpus", 4)
LEAKS = ("--detect-leaks",)
# More memory is written than may be in RAM, so most pages are evicted.
EVICTING = (
    *RUN,
    "--backing",
    "anonymous",
    "--resident-limit",
    "1M",
    "--workload",
    "atomic",
    "--iterations",
    1,
)
COMMANDS = pytest.mark.parametrize("command", [SMALL, (*SMALL, *LEAKS)], ids=["plain", "supervised"])

WRONG = ("no trap works", "interrupted", "our own process", "internal error")

pytestmark = [pytest.mark.kvm, pytest.mark.hugepage_pool]


def limited(name, value, then=""):
    return f"import resource; resource.setrlimit(resource.{name}, ({value}, {value})); {then}"


def helped(call):
    """A prelude that calls a helper of the tests: "module.function(...)"."""
    return f"import sys; sys.path.insert(0, 'tests/support'); import {call.partition('.')[0]}; {call}"


def check_named(done, sentence):
    """The command failed, and for that reason alone."""
    assert done.status in (1, 4)
    assert re.search(sentence, done.error), done.err
    assert not [each for each in WRONG if each in done.err], done.err


def check_exact_or_named(done, sentence):
    if done.status:
        check_named(done, sentence)


# Huge pages


@pytest.fixture
def huge_pages():
    """A control group that may have no huge page, and the file that says so."""
    with control_groups.control_group("hugetlb") as group:
        yield group, control_groups.write_limit(group, 0, "hugetlb.2MB.max", "hugetlb.2MB.limit_in_bytes")


def on_huge_pages(group, *arguments, size="4M"):
    arguments = arguments or ("run",)
    return kvmdp(
        *arguments,
        *(("--memory", size, "--reserve-hugepages") if arguments[0] == "run" else ()),
        prelude=helped(f"control_groups.join({str(group)!r})"),
    )


@pytest.mark.root
@pytest.mark.parametrize("leaks", [(), LEAKS], ids=["plain", "supervised"])
@pytest.mark.parametrize(
    ("trap", "backing"),
    [
        ("auto", "hugetlb-2m"),
        ("mmio", "hugetlb-2m"),
        ("marker", "hugetlb-2m"),
        ("userfaultfd", "hugetlb-2m"),
        ("userfaultfd", "private-hugetlb-2m"),
    ],
)
def test_huge_pages_that_a_control_group_refuses(huge_pages, trap, backing, leaks):
    group, file = huge_pages
    done = on_huge_pages(group, "run", "--trap", trap, "--backing", backing, *leaks)
    check_named(
        done, rf"refuses a huge page of 2M .*this control group may have 0 of them \({file}\); raise that, or"
    )


@pytest.mark.root
@pytest.mark.parametrize("trap", ["memory-fault", "userfaultfd"])
def test_a_huge_page_that_is_refused_in_the_middle_of_a_run(huge_pages, trap):
    group, file = huge_pages
    file.write_text(str(2 << 20))
    done = on_huge_pages(group, "run", "--trap", trap, "--backing", "hugetlb-2m")
    check_named(done, r"the page at gpa 0x200000 cannot be fetched: .*may have 2M of them .*; raise that, or")


@pytest.mark.root
def test_a_probe_of_huge_pages_that_are_refused_proves_nothing(huge_pages):
    group, file = huge_pages
    few = "from kvmdp.cli import probe\nprobe.TRAPS = {'mmio': probe.TRAPS['mmio']}\n"
    backings = "probe.BACKINGS = {name: probe.BACKINGS[name] for name in ('memfd', 'hugetlb-2m')}\n"
    prelude = few + backings + helped(f"control_groups.join({str(group)!r})")
    document = kvmdp("probe", "--json", "-", prelude=prelude).document
    assert {cell["status"] for cell in document["traps"]["mmio"]["memfd"].values()} == {"exact"}
    refused = document["traps"]["mmio"]["hugetlb-2m"].values()
    assert {cell["status"] for cell in refused} == {"not run"}
    assert all(str(file) in cell["error"] for cell in refused)
    (lack,) = (lack for lack in document["missing"] if lack["what"] == "a proof on hugetlb-2m")
    assert str(file) in f"{lack['why']}: {lack['remedy']}"


# Threads and processes


@pytest.mark.root
@pytest.mark.parametrize("most", [1, 3, 5])
@pytest.mark.parametrize(
    "command", [SMALL, (*SMALL, *LEAKS), FOUR_VCPUS], ids=["plain", "supervised", "4 vCPUs"]
)
def test_few_threads(command, most):
    user = limits.user_of_ones_own()
    done = kvmdp(*command, prelude=helped(f"limits.limit_threads({most}, {user})"), fresh=True)
    check_exact_or_named(
        done,
        rf"user {user} may have {most} processes and threads \(ulimit -u\), and needs more: raise the limit",
    )
    assert done.status or most > 3


@pytest.mark.root
@pytest.mark.parametrize("most", [1, 3])
@COMMANDS
def test_a_control_group_with_few_threads(command, most):
    with control_groups.control_group("pids") as group:
        file = control_groups.write_limit(group, most, "pids.max")
        done = kvmdp(*command, prelude=helped(f"control_groups.join({str(group)!r})"), fresh=True)
    check_named(
        done, rf"this control group may have {most} processes and threads \({file}\), and needs more: raise"
    )


# Memory

MEMORY = {
    "RLIMIT_AS": (r"of address space \(ulimit -v\)", (64, 136, 144, 152)),
    "RLIMIT_DATA": (r"of data \(ulimit -d\)", (32, 80, 84, 90)),
}
NO_COMPARISON = """
import sys; sys.path.insert(0, 'tests/support')
import limits
from kvmdp.lab import experiment
compare = experiment._compare
def compare_without_memory(*arguments):
    limits.limit_data(0)
    return compare(*arguments)
experiment._compare = compare_without_memory
"""


@pytest.mark.parametrize(("name", "most"), [(name, most) for name in MEMORY for most in MEMORY[name][1]])
@COMMANDS
def test_little_memory(command, name, most):
    done = kvmdp(*command, prelude=limited(name, most << 20), fresh=True)
    check_exact_or_named(
        done, rf"this process may have {most}M {MEMORY[name][0]}, and needs .*: raise the limit"
    )


def test_no_memory_for_the_comparison():
    done = kvmdp("run", "--memory", "8M", "--trap", "mmio", prelude=NO_COMPARISON, fresh=True)
    check_named(
        done,
        r"out of memory: this process may have \S+ of data \(ulimit -d\), and needs more: raise the limit",
    )


def test_no_memory_for_a_machine_that_a_comparison_of_traps_needs():
    arguments = ("bench", "-b", "256M", "--rounds", 1, "--warm-up", 0, "mmio")
    done = kvmdp(*arguments, prelude=limited("RLIMIT_AS", 256 << 20), fresh=True)
    assert done.status == 1
    assert re.search(r"FAILED mmio: .*this process may have 256M of address space \(ulimit -v\)", done.err), (
        done.err
    )


# Descriptors


@pytest.mark.parametrize("most", [4, 8, 12])
@COMMANDS
def test_few_descriptors(command, most):
    done = kvmdp(*command, prelude=limited("RLIMIT_NOFILE", most), fresh=True)
    check_exact_or_named(
        done, rf"this process may have {most} descriptors open at once \(ulimit -n\).*raise the limit"
    )
    assert done.status or most > 8


@pytest.mark.parametrize("trap", ["memory-fault", "userfaultfd", "layered"])
def test_no_descriptors_for_a_trap(trap):
    done = kvmdp(*SMALL, "--trap", trap, prelude=limited("RLIMIT_NOFILE", 8), fresh=True)
    check_named(done, r"this process may have 8 descriptors open at once \(ulimit -n\)")


# Files


@pytest.mark.parametrize(("most", "size"), [(0, "0"), (65536, "64K")])
@COMMANDS
def test_small_files(command, most, size):
    done = kvmdp(*command, prelude=limited("RLIMIT_FSIZE", most))
    check_named(done, rf"this process may make no file larger than {size} \(ulimit -f\).*: raise the limit")


@pytest.mark.parametrize("backing", ["file", "anonymous"])
def test_files_that_are_too_small_for_pages(backing):
    done = kvmdp(*EVICTING, "--backing", backing, prelude=limited("RLIMIT_FSIZE", 256 << 10))
    check_named(done, r"this process may make no file larger than 256K \(ulimit -f\).*: raise the limit")


@pytest.mark.root
def test_a_full_disk_for_evicted_pages(small_disk):
    done = kvmdp(*EVICTING, prelude=f"import os; os.environ['TMPDIR'] = {str(small_disk)!r}")
    check_named(
        done,
        rf"No space left on device in {small_disk}, where evicted pages go: name a folder with room .* TMPDIR",
    )
    assert not [*small_disk.iterdir()]


@pytest.mark.parametrize(
    ("what", "command"),
    [
        ("evicted pages", EVICTING),
        ("the pages of RAM", (*RUN, "--backing", "file")),
        ("the sectors of a disk that has no file", (*RUN, "--workload", "disk")),
    ],
)
def test_a_folder_that_takes_no_temporary_files(what, command):
    """They go nowhere else in silence."""
    done = kvmdp(*command, prelude="import os; os.environ['TMPDIR'] = '/proc/self'")
    check_named(done, rf"/proc/self is where {what} go; name a folder with room for them in TMPDIR")


# A stopped child is not a guilty one


def test_a_child_that_is_stopped_is_not_taken_for_one_that_stalls():
    prelude = "from kvmdp.cli import supervise; supervise._STALL_BEATS = 5"
    with Running(*SLOW, *LEAKS, prelude=prelude) as command:
        command.wait_for_progress()
        supervisor = command.process.pid
        child = int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text())
        os.kill(child, signal.SIGSTOP)
        time.sleep(2)  # twice as long as one that stalls is given
        os.kill(child, signal.SIGCONT)
        done = command.finish()
    assert done.status == 0, done.err
