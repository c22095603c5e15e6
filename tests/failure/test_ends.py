"""Ends of commands: by SIGHUP, by signals that come again, by a kill; what has a name is gone then, or announced."""

import contextlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from command import Running, kvmdp
from commands import OFTEN, RUN, SLOW
from effort import by_effort

HAMMERINGS = by_effort(1, 3, 50)
LONG = (*RUN, "--latency", "100ms")
IGNORING = "import signal; signal.signal(signal.{}, signal.SIG_IGN)"
# A further signal is another one from the first moment on.
HASTY = """
from kvmdp.cli import ending
ending.SAME_SECONDS = 0
"""

needs_kvm = pytest.mark.kvm


@pytest.fixture
def disk(tmp_path):
    """The file of a disk."""
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 2 << 20)
    return path


def interrupted(command, number=signal.SIGHUP):
    """Send a signal and return how the command ended."""
    command.process.send_signal(number)
    done = command.finish()
    assert done.status == 130
    return done


# SIGHUP


@needs_kvm
@pytest.mark.parametrize("leaks", [(), ("--detect-leaks",)], ids=["plain", "supervised"])
def test_a_run_ends_at_sighup(leaks):
    with Running(*LONG, *leaks, prelude=OFTEN) as command:
        command.wait_for_progress()
        assert interrupted(command).error == "interrupted"


def test_a_handler_ends_at_sighup(socket_path):
    with Running("handler", "--listen", socket_path, "--synthetic", "2M") as command:
        command.wait_for_progress("serving")
        assert interrupted(command).error == "interrupted"
    assert not socket_path.exists()


@needs_kvm
def test_a_device_and_its_machine_end_at_sighup(socket_path, disk):
    run = (*LONG, "--workload", "disk", "--device-socket", socket_path)
    with Running(*run) as machine:
        machine.wait_until(socket_path.exists)
        with Running("device", "--connect", socket_path, "--file", disk) as device:
            machine.wait_for_progress("serves the disk")
            assert interrupted(device).error == "interrupted"
        assert interrupted(machine).error == "interrupted"
    assert not socket_path.exists()


@needs_kvm
@pytest.mark.parametrize(
    ("arguments", "progress"),
    [
        (("bench", "-b", "2M", "--rounds", "10000", "present", "mmio"), "round 2"),
        (("bench", "--memory-cost", "-b", "256M", "present", "mmio", "marker"), "measured present"),
        (("compare", "-b", "2M", "-v", "1", "--rounds", "10000", "present", "mmio"), "round 2 of 10000"),
    ],
    ids=["bench", "memory-cost", "compare"],
)
def test_what_was_measured_before_sighup_is_printed(arguments, progress):
    with Running(*arguments) as command:
        command.wait_for_progress(progress)
        done = interrupted(command)
    assert "interrupted; what follows is partial" in done.err
    assert "present" in done.out


@needs_kvm
@pytest.mark.parametrize(
    ("number", "leaks"), [("SIGTERM", ()), ("SIGTERM", ("--detect-leaks",)), ("SIGHUP", ("--detect-leaks",))]
)
def test_a_signal_that_is_ignored_stays_ignored(number, leaks):
    with Running(*SLOW, *leaks, prelude=IGNORING.format(number)) as command:
        command.wait_for_progress("RAM from")
        os.killpg(command.process.pid, getattr(signal, number))
        done = command.finish()
    assert done.status == 0


@needs_kvm
def test_a_run_under_nohup_outlives_its_terminal():
    with Running(*SLOW, wrapper=("nohup",)) as command:
        command.wait_for_progress("RAM from")
        command.process.send_signal(signal.SIGHUP)
        assert command.finish().status == 0


# Signals that end a process by themselves


@needs_kvm
@pytest.mark.parametrize("leaks", [(), ("--detect-leaks",)], ids=["plain", "supervised"])
@pytest.mark.parametrize("number", ["SIGQUIT", "SIGALRM", "SIGUSR1", "SIGIO"])
@pytest.mark.parametrize("what", ["ram", "socket"])
def test_what_has_a_name_is_gone_or_announced_after_a_deadly_signal(tmp_path, what, number, leaks):
    named = {
        "ram": ("--backing", "file", "--backing-file", tmp_path / "ram"),
        "socket": ("--workload", "disk", "--device-socket", tmp_path / "socket"),
    }
    with Running(*LONG, *leaks, *named[what], prelude=OFTEN) as command:
        command.wait_for_progress()
        assert (tmp_path / what).exists()
        command.process.send_signal(getattr(signal, number))
        done = command.finish()
    assert done.status == -getattr(signal, number)
    assert (tmp_path / what).exists() == (f"{tmp_path / what} has the guest's RAM, 2M" in done.err)
    assert not (tmp_path / "socket").exists()


@needs_kvm
@pytest.mark.parametrize("leaks", [(), ("--detect-leaks",)], ids=["plain", "supervised"])
def test_a_limit_of_cpu_time_is_a_sentence(tmp_path, leaks):
    ram = tmp_path / "ram"
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 60))"
    options = ("--memory", "4G", "--trap", "mmio", "--backing", "file", "--backing-file", ram)
    done = kvmdp("run", *options, *leaks, prelude=prelude, fresh=True)
    assert done.status == 1
    assert done.error == "this process may use 1 s of CPU time (ulimit -t), and needs more: raise the limit"
    assert f"{ram} has the guest's RAM" in done.err


# Signals that come again


@contextlib.contextmanager
def storm(command, number):
    """Send a signal again and again, to the whole group as a terminal does, from now on until the command has ended."""
    over = threading.Event()

    def send():
        while not over.wait(0.002):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.process.pid, number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@needs_kvm
@pytest.mark.parametrize(
    ("number", "prelude"), [(signal.SIGINT, ""), (signal.SIGHUP, HASTY)], ids=["at once", "later"]
)
@pytest.mark.parametrize("leaks", [(), ("--detect-leaks",)], ids=["plain", "supervised"])
def test_a_storm_of_signals(socket_path, number, prelude, leaks):
    """From the first to the process's end: in cleaning up, in printing, in Python's own end."""
    run = (*LONG, "--workload", "disk", "--device-socket", socket_path, *leaks)
    if leaks and prelude:
        prelude += "from kvmdp.cli import supervise; supervise.SAME_SECONDS = 0"
    for _ in range(HAMMERINGS):
        with Running(*run, prelude=prelude) as command:
            command.wait_for_progress("waiting for a device")
            with storm(command, number):
                done = command.finish()
        assert done.status == 130
        assert done.err.endswith("kvmdp: interrupted\n")
        assert not socket_path.exists()


def test_a_storm_of_signals_on_a_handler(socket_path):
    for _ in range(HAMMERINGS):
        with Running("handler", "--listen", socket_path, "--synthetic", "2M") as command:
            command.wait_for_progress("serving")
            with storm(command, signal.SIGTERM):
                assert command.finish().status == 130
        assert not socket_path.exists()


@needs_kvm
def test_what_was_measured_is_printed_although_the_signal_comes_twice(tmp_path):
    """As from timeout(1), which sends one to its child and one to its group."""
    prelude = """
import sys, time
from kvmdp.bench.survey import Survey
document = Survey.document
def slow(survey):
    print("ending\\n", end="", file=sys.stderr)
    time.sleep(0.5)
    return document(survey)
Survey.document = slow
"""
    target = tmp_path / "result.json"
    arguments = ("-b", "2M", "-v", "1", "--rounds", "10000", "--json", target, "present", "mmio")
    with Running("compare", *arguments, prelude=prelude) as command:
        command.wait_for_progress("round 2 of 10000")
        command.process.send_signal(signal.SIGTERM)
        command.wait_for_progress("ending")
        done = interrupted(command, signal.SIGTERM)
    assert done.out.startswith("PARTIAL")
    assert json.loads(target.read_text())["complete"] is False


@needs_kvm
def test_temporary_files_go_also_at_a_hasty_end(tmp_path):
    prelude = f"""
{HASTY}
import sys, time
from pathlib import Path
def chmod(path, mode):
    try:
        print("writing\\n", end="", file=sys.stderr)
        while True:  # not one long sleep: a signal just before it would not end that
            time.sleep(0.05)
    except KeyboardInterrupt:
        print("once\\n", end="", file=sys.stderr)
        while True:  # not one long sleep: a signal just before it would not end that
            time.sleep(0.05)
Path.chmod = chmod
"""
    with Running(*RUN, "--json", tmp_path / "result.json", prelude=prelude) as command:
        command.wait_for_progress("writing")
        command.process.send_signal(signal.SIGTERM)
        command.wait_for_progress("once")
        interrupted(command)
    assert not [*tmp_path.iterdir()]


@needs_kvm
def test_a_second_signal_ends_a_run_that_does_not_come_to_its_end():
    prelude = f"""
{HASTY}{OFTEN}
import time
from kvmdp.machine.machine import Machine
def stop(machine):
    print("stopping\\n", end="", file=__import__("sys").stderr)
    while True:  # not one long sleep: a signal just before it would not end that
        time.sleep(0.05)
Machine.stop = stop
"""
    with Running(*LONG, prelude=prelude) as command:
        command.wait_for_progress()
        command.process.send_signal(signal.SIGTERM)
        command.wait_for_progress("stopping")
        assert interrupted(command).error == "interrupted"


def test_a_second_signal_while_python_waits_for_a_thread_keeps_the_first_ones_status(socket_path):
    prelude = """
import threading, time
import kvmdp.cli.entry, kvmdp.cli.ending
from kvmdp.peers.handler.server import PageServer
def run(server):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    server._report("started")
    while True:  # not one long sleep: a signal just before it would not end that
        time.sleep(0.05)
PageServer.run = run
"""
    with Running("handler", "--listen", socket_path, "--synthetic", "2M", prelude=prelude) as command:
        command.wait_for_progress("started")
        command.process.send_signal(signal.SIGTERM)
        command.wait_for_progress("interrupted")
        assert interrupted(command).error == "interrupted"


def test_a_signal_while_the_last_word_is_said_ends_the_process_once_it_is():
    prelude = """
import os, signal, threading, time
import kvmdp.cli.main
threading.Thread(target=time.sleep, args=(1000,)).start()
def say(text, said=kvmdp.cli.main.say):
    os.kill(os.getpid(), signal.SIGTERM)
    said(text)
kvmdp.cli.main.say = say
"""
    done = kvmdp("run", "--image", "/none", prelude=prelude)
    assert done.status == 2
    assert "does not exist" in done.error


# What has a name


@needs_kvm
@pytest.mark.parametrize(
    ("end", "leaks"),
    [
        ("normal", ()),
        ("error", ()),
        ("SIGTERM", ()),
        ("normal", ("--detect-leaks",)),
        ("SIGHUP", ("--detect-leaks",)),
    ],
)
def test_the_file_that_ram_is_in_is_announced(tmp_path, end, leaks):
    path = tmp_path / "ram"
    file = ("--backing", "file", "--backing-file", path)
    arguments = {"normal": RUN, "error": (*SLOW, "--timeout", "0.2")}.get(end, LONG)
    with Running(*arguments, *file, *leaks, prelude=OFTEN) as command:
        if end.startswith("SIG"):
            command.wait_for_progress()
            command.process.send_signal(getattr(signal, end))
        done = command.finish()
    assert done.status == {"normal": 0, "error": 1}.get(end, 130)
    assert done.err.count(f"{path} has the guest's RAM, 2M: remove it if that is not wanted\n") == 1
    assert path.stat().st_size == 2 << 20


@needs_kvm
def test_the_file_that_ram_is_in_is_announced_at_a_hasty_end(tmp_path):
    path = tmp_path / "ram"
    with Running(*LONG, "--backing", "file", "--backing-file", path, prelude=HASTY + OFTEN) as command:
        command.wait_for_progress()
        with storm(command, signal.SIGTERM):
            done = command.finish()
    assert done.status == 130
    assert f"{path} has the guest's RAM" in done.err


@needs_kvm
def test_nothing_with_a_name_is_left_unsaid_whenever_a_run_is_interrupted(tmp_path, socket_path):
    ram = tmp_path / "ram"
    names = (
        ("--backing", "memfd", "--device-socket", socket_path),
        ("--backing", "file", "--backing-file", ram),
    )
    chance = random.Random(11)
    for turn in range(2 * HAMMERINGS):
        workload = ("--workload", "disk") if turn % 2 == 0 else ()
        with Running(*LONG, *workload, *names[turn % 2], prelude=STARTED) as command:
            command.wait_for_progress("started")
            time.sleep(chance.uniform(0, 0.3))
            done = interrupted(command, chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]))
        assert not socket_path.exists()
        assert ram.exists() == (f"{ram} has the guest's RAM" in done.err)
        ram.unlink(missing_ok=True)


# Says when the work begins.
STARTED = """
import sys
import kvmdp.cli.main as main
parse = main.build_parser
def build_parser(command):
    parser = parse(command)
    print("started\\n", end="", file=sys.stderr)
    return parser
main.build_parser = build_parser
"""


def child_of(command):
    """Return the process that does the work of a supervised run."""
    pid = command.process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@needs_kvm
def test_the_supervisor_clears_up_after_a_run_that_was_killed(tmp_path, socket_path):
    ram = tmp_path / "ram"
    disk = ("--workload", "disk", "--device-socket", socket_path)
    with Running(*LONG, *disk, "--detect-leaks") as command:
        command.wait_for_progress("waiting for a device")
        os.kill(child_of(command), signal.SIGKILL)
        done = command.finish()
    assert (done.status, done.error) == (1, "the run was ended by SIGKILL")
    assert not socket_path.exists()
    with Running(*LONG, "--backing", "file", "--backing-file", ram, "--detect-leaks") as command:
        command.wait_for_progress()
        os.kill(child_of(command), signal.SIGKILL)
        done = command.finish()
    assert done.status == 1
    assert f"{ram} has the guest's RAM" in done.err


@needs_kvm
def test_the_next_run_copes_with_what_a_killed_one_has_left(tmp_path, socket_path, disk):
    ram = tmp_path / "ram"
    for names in (
        ("--workload", "disk", "--device-socket", socket_path),
        ("--backing", "file", "--backing-file", ram),
    ):
        with Running(*LONG, *names, prelude=OFTEN) as command:
            command.wait_for_progress("waiting for a device" if "--device-socket" in names else "present")
            command.process.kill()
            command.process.wait()
    assert socket_path.exists()
    with Running(*RUN, "--workload", "disk", "--device-socket", socket_path) as machine:
        machine.wait_for_progress("waiting for a device")
        assert kvmdp("device", "--connect", socket_path, "--file", disk).status == 0
        assert machine.finish().status == 0
    assert not socket_path.exists()
    again = kvmdp(*RUN, "--backing", "file", "--backing-file", ram)
    assert again.status == 2
    assert again.error.startswith(
        f"--backing-file {ram}: there is something in it, which RAM would overwrite"
    )


@pytest.mark.parametrize("tenths", range(4))
def test_there_is_no_traceback_when_modules_are_loaded(tenths):
    with Running("bench", "--help", prelude=LOADING, fresh=True) as command:
        command.wait_for_progress("loading")
        time.sleep(tenths / 10)
        command.process.send_signal(signal.SIGHUP)
        done = command.finish()
    assert done.out.startswith("usage") or done.error == "interrupted"


LOADING = """
import sys
import kvmdp.cli.entry as entry
entry.on_interruption(entry.leave)
print("loading\\n", end="", file=sys.stderr)
"""
