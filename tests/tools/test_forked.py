"""Programs are forked (tests/support/forked.py) as `python -c` starts them, and are like a Popen to the test."""

import os
import signal
import subprocess

import forked
import pytest

BOTH = pytest.mark.parametrize("fresh", [False, True], ids=["forked", "fresh"])
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def ended(code, *arguments, **options):
    """Return how a program ended: its status, output and errors."""
    process = forked.start(code, *arguments, **PIPES, text=True, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@BOTH
def test_it_has_its_arguments_environment_folder_and_umask(tmp_path, fresh):
    code = """
import os, sys
print(sys.argv[1:], sorted(os.environ), os.getcwd(), oct(os.umask(0)), os.getsid(0) == os.getpid())
"""
    mask = os.umask(0o027)
    try:
        found = ended(code, 1, "two", env={"LC_CTYPE": "C.UTF-8"}, cwd=tmp_path, fresh=fresh)
    finally:
        os.umask(mask)
    assert found == (0, f"['1', 'two'] ['LC_CTYPE'] {tmp_path} 0o27 True\n", "")


@BOTH
def test_it_has_no_other_descriptors(fresh):
    code = "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])"
    assert ended(code, fresh=fresh) == (0, "[0, 1, 2]\n", "")


@BOTH
@pytest.mark.parametrize(
    ("code", "status", "last"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit, os; atexit.register(os.write, 2, b'the end\\n')", 0, "the end\n"),
    ],
)
def test_it_ends_as_python_ends(fresh, code, status, last):
    found, out, err = ended(code, fresh=fresh)
    assert (found, out) == (status, "")
    assert err.endswith(last)


@BOTH
def test_it_is_talked_to_and_ended(fresh):
    code = "import sys; [print(line, end='', flush=True) for line in sys.stdin]"
    process = forked.start(code, **PIPES, text=True, fresh=fresh)
    for line in ("a line\n", "another\n"):
        process.stdin.write(line)
        process.stdin.flush()
        assert process.stdout.readline() == line
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
    assert process.communicate() == ("", "")
    process.kill()  # nothing to be killed is no error


def test_several_run_at_the_same_time():
    code = "import sys; print(sys.stdin.read(), end='')"
    processes = [forked.start(code, **PIPES, text=True) for _ in range(5)]
    for number, process in enumerate(processes):
        process.stdin.write(str(number))
    assert [each.communicate(timeout=60)[0] for each in processes] == ["0", "1", "2", "3", "4"]


def test_errors_may_go_where_output_goes():
    code = "import os; os.write(2, b'error'); os.write(1, b' and output')"
    process = forked.start(code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.communicate(timeout=60) == (b"error and output", None)


def test_modules_of_kvmdp_have_been_loaded():
    code = "import sys; print('numpy' in sys.modules, 'kvmdp.bench.trace' in sys.modules)"
    assert ended(code)[1] == "True True\n"
    assert ended(code, fresh=True)[1] == "False False\n"
