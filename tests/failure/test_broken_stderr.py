"""stderr that is broken, full or stuck, before a command or in the middle of it: the command ends as it would have."""

import contextlib
import json
import os
import subprocess

import deaf
import pytest
from command import Running, kvmdp
from commands import EXACT, FEW_CELLS, MEASURING, RUN, SLOW
from handlers import MEMORY, SEED, HandlerProcess
from report_documents import comparison

from kvmdp.cli.streams import Diagnostics

STDERR = pytest.mark.parametrize("stderr", deaf.KINDS)
TWO_KINDS = pytest.mark.parametrize("stderr", ["full", "stuck"])
IMPATIENT = """
import kvmdp.cli.streams
kvmdp.cli.streams._PATIENCE_SECONDS = 0.1
"""

needs_kvm = pytest.mark.kvm


def end_of(*arguments, stderr, prelude=""):
    """Return how a command ends whose stderr is a file of that kind."""
    with deaf.KINDS[stderr]() as descriptor:
        return kvmdp(*arguments, stderr=descriptor, prelude=IMPATIENT + prelude)


@needs_kvm
@STDERR
def test_a_run_with_progress(stderr):
    done = end_of(*SLOW, stderr=stderr)
    assert done.status == 0
    assert done.out.endswith(EXACT)


@needs_kvm
@TWO_KINDS
def test_a_supervised_run(stderr):
    done = end_of(*RUN, "--detect-leaks", stderr=stderr)
    assert done.status == 0
    assert done.out.endswith("leaks      none found\n")


@needs_kvm
def test_a_document_on_stdout_is_whole():
    assert end_of(*RUN, "--json", "-", stderr="full").document["ok"] is True


@TWO_KINDS
def test_a_command_line_that_makes_no_sense(stderr):
    assert end_of(*RUN, "--vcpus", 99, stderr=stderr).status == 2


@needs_kvm
@pytest.mark.parametrize("leaks", [(), ("--detect-leaks",)], ids=["plain", "supervised"])
def test_a_run_that_fails_leaves_its_document(tmp_path, leaks):
    target = tmp_path / "result.json"
    options = ("--timeout", "0.2", "--json", target, *leaks)
    done = end_of(*SLOW, *options, stderr="full")
    assert done.status == 1
    assert "not done within 0.2 seconds" in json.loads(target.read_text())["error"]


@needs_kvm
@pytest.mark.parametrize("name", MEASURING)
def test_a_command_that_measures(name):
    arguments, expected = MEASURING[name]
    done = end_of(*arguments, stderr="full", prelude=FEW_CELLS)
    assert done.status == 0
    assert expected in done.out


def test_a_report(tmp_path):
    file = tmp_path / "result.json"
    file.write_text(json.dumps(comparison((1,), (0.0,), ("present", "mmio", "userfaultfd"))))
    folder = tmp_path / "report"
    done = end_of("report", file, "--report", folder, stderr="full")
    assert done.status == 0
    assert (folder / "index.html").exists()


@needs_kvm
@pytest.mark.parametrize("leaks", [(), ("--detect-leaks",)], ids=["plain", "supervised"])
def test_a_reader_that_goes_in_the_middle_of_a_run(leaks):
    pipe = deaf.Pipe()
    with contextlib.closing(pipe), Running(*SLOW, *leaks, stderr=pipe.writer) as command:
        command.wait_until(lambda: "RAM from" in pipe.drain())
        pipe.close_reader()
        done = command.finish()
    assert done.status == 0


@pytest.mark.root
def test_a_disk_that_is_full_and_has_room_again(small_disk):
    log, filler = small_disk / "log", small_disk / "filler"
    with log.open("ab", buffering=0) as file:
        stderr = Diagnostics(file.fileno(), "utf-8")
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as rest:
            while True:
                rest.write(bytes(4096))
        stderr.write("lost\nlost\n")
        filler.unlink()
        stderr.write("got through\n")
    assert log.read_text() == ("2 lines could not be written here: No space left on device\ngot through\n")


@needs_kvm
@TWO_KINDS
def test_a_handler_serves_machines_one_after_the_other(socket_path, stderr):
    arguments = ("run", "--handler", socket_path, "--trap", "mmio")
    with deaf.KINDS[stderr]() as descriptor:
        start = ("handler", "--listen", socket_path, "--synthetic", f"{MEMORY},{SEED}")
        with Running(*start, stderr=descriptor, prelude=IMPATIENT) as handler:
            handler.wait_until(socket_path.exists)
            for _ in range(2):
                assert kvmdp(*arguments).status == 0
            handler.process.terminate()
            assert handler.finish().status == 130
    assert not socket_path.exists()


@needs_kvm
@TWO_KINDS
def test_a_run_whose_handler_dies_and_is_replaced(socket_path, stderr):
    """The thread that looks after the handler says so, and lives on."""
    slow = ("--synthetic", f"{MEMORY},{SEED}", "--latency", "4ms")
    start = ("run", "--handler", socket_path, "--trap", "mmio")
    with (
        deaf.KINDS[stderr]() as descriptor,
        HandlerProcess(socket_path, *slow) as first,
        Running(*start, stderr=descriptor, prelude=IMPATIENT) as run,
    ):
        assert first.says("has come")
        first.end()
        with HandlerProcess(socket_path):
            done = run.finish()
    assert done.status == 0


@needs_kvm
@TWO_KINDS
def test_a_device_and_the_machine_it_serves(tmp_path, stderr):
    disk, path = tmp_path / "disk", tmp_path / "socket"
    disk.touch()
    os.truncate(disk, 2 << 20)
    run = (*RUN, "--workload", "disk", "--device-socket", path)
    with (
        deaf.KINDS[stderr]() as descriptor,
        Running(*run, stderr=descriptor, prelude=IMPATIENT) as machine,
    ):
        machine.wait_until(path.exists)
        device = end_of("device", "--connect", path, "--file", disk, stderr=stderr)
        assert machine.finish().status == 0
    assert device.status == 0
    assert device.out.startswith("disk ")


@needs_kvm
def test_a_terminal_that_is_hung_up_on_a_run_that_ignores_it():
    main, terminal = os.openpty()
    prelude = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with Running(*SLOW, prelude=prelude, stderr=terminal, stdout=subprocess.PIPE) as command:
        os.close(terminal)
        seen = b""
        while b"pages present" not in seen:
            seen += os.read(main, 65536)
        os.close(main)
        done = command.finish()
    assert done.status == 0
    assert done.out.endswith(EXACT)
