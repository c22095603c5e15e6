"""tools/kvmdp and tools/test with a stand-in for Python, so that nothing is downloaded."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAMS = "cat chmod cksum cut dirname env find flock mkdir readlink sed sh sha256sum sleep tail touch"

# Makes a "virtual environment" whose python is this script again and whose kvmdp says how it was called.
# $PIP names a file of shell commands that stand for what pip does.
STAND_IN = """#!/bin/sh
case "$*" in
*"print(sys.version)"*) echo "stand-in 3.14" ;;
"-c "*) exit 0 ;;
"-m venv "*) mkdir "$3/bin"; cat "$0" >"$3/bin/python"; chmod +x "$3/bin/python" ;;
"-m pip install "*) echo "$*" >>"$CALLS"; . "$PIP"; cat "$KVMDP" >"${0%/*}/kvmdp"; chmod +x "${0%/*}/kvmdp" ;;
"-m pytest"*) echo "$PWD: $*"; exit 5 ;;
esac
"""


class Sandbox:
    """A copy of the tools in a checkout of their own, and a PATH that holds only what they may use."""

    def __init__(self, path):
        self.checkout = path / "check out"
        self.calls = path / "calls"
        self.pip = path / "pip"
        self.home = path / "home"
        self._path = path / "bin"
        for directory in (self.home, self._path, self.checkout / "tools"):
            directory.mkdir(parents=True)
        for name in ("kvmdp", "test", "environment"):
            shutil.copy(CHECKOUT / "tools" / name, self.checkout / "tools")
        (self.checkout / "pyproject.toml").write_text("[project]\n")
        for name in PROGRAMS.split():
            (self._path / name).symlink_to(shutil.which(name))
        self.python = self._path / "python3.14"
        self._script(self.python, STAND_IN)
        self._script(path / "kvmdp", '#!/bin/sh\necho "$PWD: $*"\nexit 7\n')
        self.environment = {
            "PATH": str(self._path),
            "HOME": str(self.home),
            "CALLS": str(self.calls),
            "PIP": str(self.pip),
            "KVMDP": str(path / "kvmdp"),
        }
        self.let_pip(":")

    def _script(self, path, text):
        path.write_text(text)
        path.chmod(0o755)

    def let_pip(self, commands):
        self.pip.write_text(commands + "\n")

    def pip_calls(self):
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def start(self, tool="kvmdp", *arguments, **options):
        return subprocess.Popen(
            [str(self.checkout / "tools" / tool), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=self.home,
            **options,
        )

    def run(self, tool="kvmdp", *arguments):
        with self.start(tool, *arguments) as process:
            output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def test_the_first_run_makes_an_environment_and_the_second_uses_it(sandbox):
    place = sandbox.checkout / ".venv-run"
    assert sandbox.run("kvmdp", "run", "a b") == (
        7,
        f"{sandbox.home}: run a b\n",
        f"kvmdp: making {place} (once)\n",
    )
    assert sandbox.run("kvmdp", "--version") == (7, f"{sandbox.home}: --version\n", "")
    (call,) = sandbox.pip_calls()
    assert call.endswith(f"--editable {sandbox.checkout}")


def test_the_test_suite_has_an_environment_of_its_own(sandbox):
    status, output, _ = sandbox.run("test", "-k", "x y")
    assert (status, output) == (5, f"{sandbox.checkout}: -m pytest -k x y\n")
    assert sandbox.pip_calls()[0].endswith(f"--editable {sandbox.checkout}[test]")


def test_through_a_symbolic_link(sandbox):
    link = sandbox.home / "kvmdp"
    link.symlink_to(sandbox.checkout / "tools" / "kvmdp")
    done = subprocess.run([str(link)], env=sandbox.environment, cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "/: \n")


def test_without_a_network_it_says_why_and_the_next_run_starts_anew(sandbox):
    sandbox.let_pip(
        "echo 'WARNING: Retrying'; echo '  ERROR: No matching distribution found for numpy'; exit 1"
    )
    place = sandbox.checkout / ".venv-run"
    for _ in range(2):
        status, output, errors = sandbox.run()
        assert (status, output) == (4, "")
        assert errors == (
            f"kvmdp: making {place} (once)\n"
            f"kvmdp: cannot make {place}: No matching distribution found for numpy "
            f"(making it needs a network; all output is in {place}/log)\n"
        )
    assert "Retrying" in (place / "log").read_text()

    sandbox.let_pip(":")
    assert sandbox.run()[0] == 7
    assert len(sandbox.pip_calls()) == 3


def test_ctrl_c_leaves_nothing_that_is_taken_for_whole(sandbox):
    # In the shell's place: a signal is lost on a child that has been forked and has not come to its program.
    sandbox.let_pip('touch "${CALLS}.started"; exec sleep 60')
    with sandbox.start(start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not sandbox.calls.with_suffix(".started").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output == ""
    assert "kvmdp: interrupted; the next run makes the environment anew\n" in errors

    sandbox.let_pip(":")
    assert sandbox.run()[0] == 7
    assert len(sandbox.pip_calls()) == 2


def test_two_at_once_make_one_environment(sandbox):
    sandbox.let_pip("sleep 0.5")
    with sandbox.start() as first, sandbox.start() as second:
        for process in (first, second):
            assert process.communicate(timeout=60)[0] == f"{sandbox.home}: \n"
            assert process.returncode == 7
    assert len(sandbox.pip_calls()) == 1


@pytest.mark.parametrize("change", ["pyproject", "python", "moved"])
def test_an_environment_that_is_out_of_date_is_made_anew(sandbox, change):
    sandbox.run()
    if change == "pyproject":
        (sandbox.checkout / "pyproject.toml").write_text('[project]\ndependencies = ["numpy"]\n')
    elif change == "python":
        (sandbox.checkout / ".venv-run/bin/python").unlink()
    else:
        sandbox.checkout = sandbox.checkout.rename(sandbox.checkout.with_name("elsewhere"))
    assert sandbox.run()[0] == 7
    assert sandbox.run()[0] == 7
    assert len(sandbox.pip_calls()) == 2


def test_a_checkout_that_cannot_be_written_to_uses_the_cache(sandbox):
    (sandbox.checkout / ".venv-run").touch()  # a file in the way stops root too
    status, _, errors = sandbox.run()
    assert status == 7
    assert f"kvmdp: making {sandbox.home}/.cache/kvmdp/venv-run-" in errors
    assert sandbox.run() == (7, f"{sandbox.home}: \n", "")


def test_neither_checkout_nor_cache_can_be_written_to(sandbox):
    (sandbox.checkout / ".venv-run").touch()
    (sandbox.home / ".cache").touch()
    status, output, errors = sandbox.run()
    assert (status, output) == (4, "")
    assert errors.endswith("can be written to: set XDG_CACHE_HOME\n")


def test_without_python(sandbox):
    sandbox.python.unlink()
    message = "kvmdp: there is no Python 3.11 or later on PATH: sudo apt-get install python3 python3-venv\n"
    assert sandbox.run() == (4, "", message)


def test_a_python_that_is_too_old_is_passed_over(sandbox):
    sandbox.python.write_text("#!/bin/sh\nexit 1\n")
    assert sandbox.run()[0] == 4


def test_a_python_without_venv_names_the_package(sandbox):
    sandbox.python.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\n')
    message = "kvmdp: python3.14 has no venv module: sudo apt-get install python3-venv\n"
    assert sandbox.run() == (4, "", message)
