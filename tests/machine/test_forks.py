"""A thread of the process forks while memslots are closed: what the guest writes and reads stays right.

Any library may do that, with os.fork or to run a program, and its child has a copy of every descriptor of that moment.
"""

import contextlib
import errno
import os
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
from harness import SEED, TIMEOUT, make_machine, meanwhile, plan, require_trap

from kvmdp import secluded
from kvmdp.errors import UnsupportedError
from kvmdp.kvm import Vm
from kvmdp.memory.layout import MIN_MEMORY
from kvmdp.source.base import read_pages
from kvmdp.source.synthetic import SyntheticSource

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),  # that is the point
]

PAGES = 64


def fork_briefly(_number):
    pid = os.fork()
    if not pid:
        time.sleep(0.002)  # stands for the time until another child execs
        os._exit(0)
    os.waitpid(pid, 0)


def run_a_program(_number):
    subprocess.run(["true"], check=True)


@pytest.mark.parametrize("fork", [fork_briefly, run_a_program])
def test_no_addition_is_lost_where_pages_are_shut_off_and_programs_run(fork):
    workload = plan("atomic", vcpus=2, memory=MIN_MEMORY, pages=PAGES, iterations=40)
    source = SyntheticSource(MIN_MEMORY, SEED)
    with make_machine("memory-fault", workload=workload, source=source) as machine:

        def shut_off(number):
            machine.pager.mark_nonpresent(13 * number % PAGES, min(8, PAGES - 13 * number % PAGES))
            time.sleep(0.0005)
            return number < 200  # a slow host would get nowhere while pages go faster than they come back

        with meanwhile(fork, shut_off):
            machine.run(TIMEOUT)
        pages = np.arange(PAGES)
        machine.pager.reopen()
        wanted = workload.expected_pages(lambda numbers: read_pages(source, numbers), pages)
        assert np.array_equal(machine.memory.read_pages(pages), wanted)
        assert machine.pager.counters.pages_revoked > 0


@contextlib.contextmanager
def child_with_copies(monkeypatch):
    """Have another thread fork when the next memslot is bound to a guest_memfd; the child lives until the end."""
    wanted, forked, children = threading.Event(), threading.Event(), []
    bind = Vm.set_user_memory_region2

    def bind_and_fork(self, *arguments):
        bind(self, *arguments)
        wanted.set()
        assert forked.wait(10)

    def fork():
        assert wanted.wait(10)
        pid = os.fork()
        if not pid:
            signal.pause()
        children.append(pid)
        forked.set()

    monkeypatch.setattr(Vm, "set_user_memory_region2", bind_and_fork)
    forker = threading.Thread(target=fork)
    forker.start()
    try:
        yield
        assert children
    finally:
        wanted.set()  # or it would wait for ever where nothing was bound
        forker.join()
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.parametrize("trap", ["memory-fault", "layered"])
def test_absent_memory_traps_although_a_child_was_forked_as_it_was_closed(trap, monkeypatch):
    require_trap(trap)  # or the child would be forked while that machine is made
    workload = plan("checksum", pages=PAGES)
    source = SyntheticSource(MIN_MEMORY, SEED)
    with (
        child_with_copies(monkeypatch),
        make_machine(trap, workload=workload, source=source) as machine,
    ):
        machine.run(TIMEOUT)
        assert machine.pager.counters.pages_fetched == PAGES
        wanted = workload.expected_checksums(lambda numbers: read_pages(source, numbers))
        assert [thread.parameters.checksum for thread in machine.threads] == wanted


def test_shut_off_memory_traps_although_a_child_was_forked_as_it_was_closed(monkeypatch):
    workload = plan("checksum", pages=PAGES)
    source = SyntheticSource(MIN_MEMORY, SEED)
    with make_machine("memory-fault", workload=workload, source=source) as machine:
        machine.pager.mark_present(0, PAGES)
        with child_with_copies(monkeypatch):
            assert machine.pager.mark_nonpresent(0, PAGES) == PAGES
            machine.run(TIMEOUT)
        assert machine.pager.counters.pages_backed == PAGES
        wanted = workload.expected_checksums(lambda numbers: read_pages(source, numbers))
        assert [thread.parameters.checksum for thread in machine.threads] == wanted


@pytest.mark.parametrize("trap", ["memory-fault", "layered"])
def test_where_descriptors_cannot_be_kept_from_children_the_trap_is_refused(trap, monkeypatch):
    require_trap(trap)

    def refuse(*_arguments, what):
        raise OSError(errno.EPERM, f"{what}: {os.strerror(errno.EPERM)}")

    monkeypatch.setattr(secluded, "syscall", refuse)
    with pytest.raises(
        UnsupportedError, match=f"the trap {trap} needs .*seccomp profile allow close_range, or use"
    ):
        make_machine(trap)
