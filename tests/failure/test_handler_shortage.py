"""What a handler lacks, threads or descriptors or a stderr, costs one machine or nothing: the next is served."""

import contextlib
import os
import resource
import signal
import threading
from pathlib import Path

import deaf
import pytest
from command import Running
from handlers import MEMORY, SEED, HandlerProcess
from machines import Machine, answer, check_served, fault

from kvmdp.page import Outcome

# Root's processes are not limited: it becomes a user that has no other. SIGUSR1 allows it one thread more.
WITHOUT_THREADS = """
import os, resource, signal
from kvmdp.cli import handler
say = handler.say
def allow(more):
    threads = len(os.listdir("/proc/self/task")) + more
    resource.setrlimit(resource.RLIMIT_NPROC, (threads, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
def say_without_privilege(text):
    if not os.getuid():
        allow(0)
        signal.signal(signal.SIGUSR1, lambda *_: allow(1))
        os.setresuid({user}, {user}, {user})
    say(text)
handler.say = say_without_privilege
"""


@pytest.mark.root
def test_without_threads_a_machine_is_given_up_and_the_next_is_served(tmp_path):
    path = str(tmp_path / "s")
    with HandlerProcess(path, prelude=WITHOUT_THREADS.format(user=1_000_000 + os.getpid())) as handler:
        with contextlib.ExitStack() as stack:
            Machine(path, stack).hand_over()
            assert handler.says(f"was given up: user {1_000_000 + os.getpid()} may have ")
        handler.process.send_signal(signal.SIGUSR1)
        with contextlib.ExitStack() as stack:
            machine = Machine(path, stack)
            machine.hand_over()
            for number in range(20):  # one worker answers them all
                machine.ours.send(fault(number))
            assert sorted(answer(machine).token for _ in range(20)) == list(range(1, 21))


def test_without_descriptors_those_that_wait_make_room(tmp_path):
    path = str(tmp_path / "s")
    with HandlerProcess(path) as handler, contextlib.ExitStack() as stack:
        used = len([*Path(f"/proc/{handler.pid}/fd").iterdir()])
        resource.prlimit(handler.pid, resource.RLIMIT_NOFILE, (used + 3, 4096))
        first = Machine(path, stack)  # takes two
        second = Machine(path, stack)
        assert handler.says(
            f"machine {os.getpid()} was turned away after the longest wait: Too many open files"
        )
        assert first.connection.recv(1) == b""
        resource.prlimit(handler.pid, resource.RLIMIT_NOFILE, (1024, 4096))
        second.hand_over()
        second.ours.send(fault(0))
        assert answer(second).outcome is Outcome.PRESENT


def test_without_any_descriptor_a_machine_waits(tmp_path):
    path = str(tmp_path / "s")
    with HandlerProcess(path) as handler:
        used = len([*Path(f"/proc/{handler.pid}/fd").iterdir()])
        resource.prlimit(handler.pid, resource.RLIMIT_NOFILE, (used, 4096))
        waiting = threading.Thread(target=lambda: check_served(path))
        waiting.start()
        assert handler.says("no machine can be let in at the moment: Too many open files")
        resource.prlimit(handler.pid, resource.RLIMIT_NOFILE, (1024, 4096))
        waiting.join()


def test_without_descriptors_for_a_hand_over(tmp_path):
    path = str(tmp_path / "s")
    with HandlerProcess(path) as handler, contextlib.ExitStack() as stack:
        machine = Machine(path, stack)
        used = len([*Path(f"/proc/{handler.pid}/fd").iterdir()])
        resource.prlimit(handler.pid, resource.RLIMIT_NOFILE, (used + 2, 4096))
        machine.hand_over()
        assert handler.says("was given up: a hand-over with 2 descriptors, where 3 belong to it")
        resource.prlimit(handler.pid, resource.RLIMIT_NOFILE, (1024, 4096))
        check_served(path)


def test_a_reader_of_its_stderr_that_goes(socket_path):
    start = ("handler", "--listen", socket_path, "--synthetic", f"{MEMORY},{SEED}")
    pipe = deaf.Pipe()
    with contextlib.closing(pipe), Running(*start, stderr=pipe.writer) as handler:
        handler.wait_until(lambda: "serving" in pipe.drain())
        check_served(socket_path)
        pipe.close_reader()
        for _ in range(3):
            check_served(socket_path)
        assert handler.process.poll() is None
