"""What happens to the commands when nobody listens: closed streams, full disks."""

import os
import subprocess

import pytest
from command import Running, kvmdp

SHELL = ("sh", "-c")
COMMANDS = [("--version",), ("run", "--help")]
GUEST_COMMANDS = [("run", "--memory", "2M"), ("run", "--memory", "2M", "--json", "-"), ("probe",)]


def _guest(commands):
    return [pytest.param(command, marks=pytest.mark.kvm) for command in commands]


@pytest.mark.parametrize("arguments", [*COMMANDS, *_guest(GUEST_COMMANDS)])
def test_a_reader_that_has_gone_is_no_reason_for_a_traceback(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with Running(*arguments, stdout=writer) as command:
            done = command.finish()
    finally:
        os.close(writer)
    assert done.status == 1
    assert "kvmdp: " not in done.err


@pytest.mark.parametrize("arguments", [*COMMANDS, *_guest(GUEST_COMMANDS)])
def test_a_result_that_cannot_be_written_is_a_failure(arguments):
    with open("/dev/full", "wb") as full, Running(*arguments, stdout=full) as command:
        done = command.finish()
    assert done.status == 1
    assert done.error == "standard output: No space left on device"


@pytest.mark.kvm
@pytest.mark.parametrize("arguments", GUEST_COMMANDS)
def test_closed_streams_do_not_matter(arguments):
    for closed in ('exec "$@" >&-', 'exec "$@" 2>&-'):
        done = kvmdp(*arguments, wrapper=(*SHELL, closed, "sh"))
        if "--json" in arguments and closed.endswith(" >&-"):
            assert done.status == 1
            sentence = "--json - could not be written: standard output is closed; name a file for it"
            assert done.error == sentence
        else:
            assert done.status == 0


@pytest.mark.kvm
def test_json_on_stdout_is_alone_there_when_stderr_is_closed():
    arguments = ("run", "--memory", "2M", "--json", "-")
    assert kvmdp(*arguments, wrapper=(*SHELL, 'exec "$@" 2>&-', "sh")).document["ok"] is True


@pytest.mark.kvm
def test_stderr_may_go_where_stdout_goes():
    done = kvmdp("run", "--memory", "2M", stderr=subprocess.STDOUT)
    assert done.status == 0
    assert done.out.startswith("2M of memfd RAM")
