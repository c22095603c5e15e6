"""Results that cannot be written: the command says which and why, and loses nothing else of what it has found.

A `--json` or `--report` that is missing is a failure, a `--trace` that is missing is none; what failed first is the
cause that is told, and gives the status.
"""

import contextlib
import json
import shutil
import signal
from pathlib import Path

import deaf
import pytest
from command import Running, kvmdp
from commands import EXACT, FEW_CELLS, MEASURING, RUN, SLOW
from report_documents import comparison

NO_SPACE = "No space left on device"
needs_kvm = pytest.mark.kvm


@pytest.fixture
def document(tmp_path):
    """The file of a comparison."""
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(comparison((1,), (0.0,), ("present", "mmio", "userfaultfd"))))
    return path


@pytest.fixture
def full_disk(small_disk):
    """A folder on a disk that is full, and which has the file `older` with "older" in it."""
    (small_disk / "older").write_text("older")
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return small_disk


@needs_kvm
def test_json_to_a_device_that_is_full():
    done = kvmdp(*RUN, "--json", "/dev/full")
    assert done.status == 1
    assert done.out.endswith(EXACT)
    assert done.error == f"--json /dev/full could not be written: {NO_SPACE}; name another place for it"


@needs_kvm
def test_a_trace_to_a_device_that_is_full():
    done = kvmdp(*RUN, "--trace", "/dev/full")
    assert done.status == 0
    assert done.out.endswith(EXACT)
    assert done.err.count(f"--trace /dev/full could not be written: {NO_SPACE}; nothing else is lost\n") == 1


@needs_kvm
@pytest.mark.root
def test_json_and_trace_to_a_disk_that_is_full(full_disk):
    target = full_disk / "older"
    done = kvmdp(*RUN, "--json", target, "--trace", full_disk / "trace")
    assert done.status == 1
    assert done.out.endswith(EXACT)
    assert done.error.startswith(f"--json {target} could not be written: {NO_SPACE}")
    assert f"--trace {full_disk / 'trace'} could not be written: {NO_SPACE}" in done.err
    assert target.read_text() == "older"
    assert {path.name for path in full_disk.iterdir()} == {"older", "filler"}


@pytest.mark.root
def test_a_report_to_a_disk_that_is_full(full_disk, document):
    folder = full_disk / "report"
    done = kvmdp("report", document, "--report", folder)
    assert done.status == 1
    assert "x uffd" in done.out
    assert done.error == f"--report {folder} could not be written: {NO_SPACE}; name another place for it"
    assert {path.name for path in full_disk.iterdir()} == {"older", "filler"}


def limited(size):
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


def test_a_report_larger_than_a_file_may_be(document, tmp_path):
    folder = tmp_path / "report"
    done = kvmdp("report", document, "--report", folder, prelude=limited(4096))
    assert done.status == 1
    assert "x uffd" in done.out
    assert done.error == f"--report {folder} could not be written: File too large; name another place for it"
    assert [*tmp_path.iterdir()] == [document]


@needs_kvm
def test_a_trace_larger_than_a_file_may_be(tmp_path):
    target = tmp_path / "trace"
    done = kvmdp(*RUN, "--backing", "anonymous", "--trace", target, prelude=limited(4096))
    assert done.status == 0
    assert f"--trace {target} could not be written: File too large" in done.err
    assert not [*tmp_path.iterdir()]


@needs_kvm
@pytest.mark.parametrize(("option", "status"), [("--json", 1), ("--trace", 0)])
def test_a_folder_that_is_deleted_during_the_run(tmp_path, option, status):
    folder = tmp_path / "folder"
    folder.mkdir()
    with Running(*SLOW, option, folder / "file") as command:
        command.wait_for_progress("RAM from")
        shutil.rmtree(folder)
        done = command.finish()
    assert done.status == status
    assert done.out.endswith(EXACT)
    assert f"{option} {folder / 'file'} could not be written: No such file or directory" in done.err


@pytest.mark.parametrize("option", ["--json", "--trace"])
def test_a_working_directory_that_has_been_deleted(tmp_path, option):
    prelude = f"import os; os.mkdir({str(tmp_path / 'gone')!r}); os.chdir({str(tmp_path / 'gone')!r})"
    prelude += "\nimport kvmdp.cli.entry, kvmdp.cli.main; os.rmdir(os.getcwd())"
    done = kvmdp(*RUN, option, "file", prelude=prelude)
    assert done.status == 2
    assert done.error.startswith(f"{option} file: No such file or directory; give a file name")


def test_a_report_whose_name_is_as_long_as_a_name_can_be(document):
    folder = document.with_name("x" * 255)
    assert kvmdp("report", document, "--report", folder).status == 0
    assert kvmdp("report", document, "--report", folder).status == 0
    assert {path.name for path in document.parent.iterdir()} == {document.name, folder.name}


@needs_kvm
def test_a_name_as_long_as_a_name_can_be(tmp_path):
    target = tmp_path / ("x" * 255)
    done = kvmdp(*RUN, "--json", target)
    assert done.status == 0
    assert json.loads(target.read_text())["ok"] is True
    assert [*tmp_path.iterdir()] == [target]


@pytest.mark.parametrize("option", ["--json", "--trace"])
def test_a_name_longer_than_a_name_can_be(tmp_path, option):
    target = tmp_path / ("x" * 256)
    done = kvmdp(*RUN, option, target)
    assert done.status == 2
    assert done.error.startswith(f"{option} {target}: File name too long; give a file name")


def test_a_report_in_a_working_directory_that_has_been_deleted(document):
    prelude = f"import os; os.mkdir({str(gone := document.with_name('gone'))!r}); os.chdir({str(gone)!r})"
    prelude += "\nimport kvmdp.cli.report, kvmdp.cli.main; os.rmdir(os.getcwd())"
    done = kvmdp("report", document, "--report", "folder", prelude=prelude)
    assert done.status == 2
    assert done.error.startswith("folder: No such file or directory; name another folder")


@needs_kvm
@pytest.mark.parametrize("leaks", [(), ("--detect-leaks",)], ids=["plain", "supervised"])
def test_why_a_run_failed_comes_before_that_its_document_was_not_written(leaks):
    done = kvmdp(*SLOW, "--timeout", "0.2", "--json", "/dev/full", "--trace", "/dev/full", *leaks)
    assert done.status == 1
    assert done.error.startswith("the guest was not done within 0.2 seconds")
    for option in ("--json", "--trace"):
        assert done.err.count(f"{option} /dev/full could not be written: {NO_SPACE}") == 1


@needs_kvm
def test_a_host_that_lacks_something_is_told_before_a_document_that_was_not_written():
    prelude = """
from kvmdp.cli import run
from kvmdp.errors import UnsupportedError
def run_workload(*arguments, **options):
    raise UnsupportedError("this host has no such thing: get one")
run.run_workload = run_workload
"""
    done = kvmdp(*RUN, "--json", "/dev/full", prelude=prelude)
    assert (done.status, done.error) == (4, "this host has no such thing: get one")
    assert f"--json /dev/full could not be written: {NO_SPACE}" in done.err


@needs_kvm
@pytest.mark.parametrize("stdout", [deaf.full, deaf.broken])
def test_a_document_in_a_file_is_not_lost_to_stdout(tmp_path, stdout):
    target = tmp_path / "result.json"
    with stdout() as descriptor:
        done = kvmdp(*RUN, "--json", target, "--trace", tmp_path / "trace", stdout=descriptor)
    assert done.status == 1
    assert json.loads(target.read_text())["ok"] is True
    assert len((tmp_path / "trace").read_text().splitlines()) == 513


@needs_kvm
@pytest.mark.parametrize("stdout", [deaf.full, deaf.broken])
def test_why_a_command_failed_comes_before_that_stdout_takes_nothing(stdout):
    with stdout() as descriptor:
        done = kvmdp(*SLOW, "--timeout", "0.2", "--json", "-", stdout=descriptor)
    assert done.status == 1
    assert done.error.startswith("the guest was not done within 0.2 seconds")


@needs_kvm
def test_an_interruption_comes_before_results_that_cannot_be_written():
    arguments = ("-b", "2M", "--rounds", "10000", "-v", "1", "--json", "/dev/full", "present", "mmio")
    with deaf.full() as descriptor, Running("compare", *arguments, stdout=descriptor) as command:
        command.wait_for_progress("round 2 of 10000")
        command.process.send_signal(signal.SIGTERM)
        done = command.finish()
    assert done.status == 130
    assert f"--json /dev/full could not be written: {NO_SPACE}" in done.err
    assert f"standard output: {NO_SPACE}" in done.err


@needs_kvm
def test_an_interruption_while_results_wait_for_their_reader():
    with deaf.stuck() as descriptor, Running(*RUN, stdout=descriptor) as command:
        syscall = Path(f"/proc/{command.process.pid}/syscall")
        command.wait_until(lambda: syscall.read_text().startswith("1 0x1 "))  # write(2) to stdout
        command.process.send_signal(signal.SIGINT)
        done = command.finish()
    assert (done.status, done.error) == (130, "interrupted")


@needs_kvm
@pytest.mark.parametrize("name", MEASURING)
def test_every_command_keeps_its_result(name):
    arguments, expected = MEASURING[name]
    done = kvmdp(*arguments, "--json", "/dev/full", prelude=FEW_CELLS)
    assert done.status == 1
    assert expected in done.out
    assert done.error == f"--json /dev/full could not be written: {NO_SPACE}; name another place for it"
