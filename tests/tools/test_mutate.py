"""tools/mutate: whether the list fits this checkout, and what is said of a mutant and left of it."""

import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
TOOL = CHECKOUT / "tools" / "mutate"


def load():
    """Import the script, which has no .py, and leave no bytecode of it beside it."""
    loader = importlib.machinery.SourceFileLoader("mutate", str(TOOL))
    spec = importlib.util.spec_from_loader("mutate", loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module  # dataclasses look there
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
    return module


mutate = load()
MUTATIONS = mutate.read_list()


# The list


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_fits_this_checkout_and_leaves_python(name, tmp_path):
    mutation = MUTATIONS[name]
    for edit in mutation.edits:
        (tmp_path / edit.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / edit.file, tmp_path / edit.file)
    mutate.apply(mutation, tmp_path)
    for edit in mutation.edits:
        text = (tmp_path / edit.file).read_text()
        assert text != (CHECKOUT / edit.file).read_text()
        compile(text, edit.file, "exec")


def test_two_mutations_of_one_name_are_refused(tmp_path):
    row = '[[mutation]]\nname = "one"\nbug = "It did."\ncommit = "1234567"\nedit = []\n'
    (tmp_path / "list").write_text(row * 2)
    with pytest.raises(mutate.MutateError, match="two mutations called one"):
        mutate.read_list(tmp_path / "list")


# One edit


@pytest.mark.parametrize(
    ("file", "old", "reason"),
    [
        ("code.py", "x = 4\n", "code.py has its text 0 times, not once"),
        ("code.py", "x", "code.py has its text 2 times, not once"),
        ("gone.py", "x", "there is no gone.py: say where the code is"),
    ],
)
def test_a_text_that_is_not_there_once_is_refused_and_nothing_is_edited(tmp_path, file, old, reason):
    (tmp_path / "code.py").write_text("x = 1\nx = 2\n")
    good, bad = mutate.Edit("code.py", "x = 1", "x = 3"), mutate.Edit(file, old, "y")
    with pytest.raises(mutate.MutateError, match=f"^bad: {reason}$"):
        mutate.apply(mutate.Mutation("bad", "It did.", "1234567", (good, bad)), tmp_path)
    assert (tmp_path / "code.py").read_text() == "x = 1\nx = 2\n"


# A project with mutants


LIST = """
[[mutation]]
name = "wrong"
bug = "It returned another number."
commit = "1234567"
edit = [{ file = "code.py", old = "return 1", new = "return 2" }]

[[mutation]]
name = "equivalent"
bug = "None."
commit = "1234567"
edit = [{ file = "code.py", old = "return 1", new = "return 2 - 1" }]

[[mutation]]
name = "endless"
bug = "It never returned, and left a process behind."
commit = "1234567"
edit = [{ file = "code.py", old = "return 1", new = "import hang" }]

[[mutation]]
name = "deadly"
bug = "It ended the process."
commit = "1234567"
edit = [{ file = "code.py", old = "return 1", new = "os.abort()" }]

[[mutation]]
name = "unreadable"
bug = "It could not be imported."
commit = "1234567"
edit = [{ file = "code.py", old = "return 1", new = "return 1)" }]
"""
HANG = """
import pathlib, subprocess, time
process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
pathlib.Path({place!r}).write_text(str(process.pid))
time.sleep(1000)
"""
TESTS = """
import signal
import code_of_ours as code

def test_first(): assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL

def test_number(): assert code.one() == 1
"""


@pytest.fixture
def project(tmp_path):
    """A repository with a function, a test of it and this tool; and where the mutant that hangs names its process."""
    if not shutil.which("git"):
        pytest.skip("needs git: apt-get install git")
    root = tmp_path / "project"
    (root / "tools").mkdir(parents=True)
    shutil.copy(TOOL, root / "tools")
    for name, text in {
        "tools/test": f'#!/bin/sh\ncd "$(dirname "$0")/.." && exec {sys.executable} -m pytest "$@"\n',
        "tools/mutations.toml": LIST.replace("code.py", "code_of_ours.py"),
        "code_of_ours.py": "import os\n\ndef one():\n    return 1\n",
        "hang.py": HANG.format(place=str(tmp_path / "pid")),
        "test_code.py": TESTS,
        "conftest.py": "import code_of_ours\n",
        "pyproject.toml": "[tool.pytest.ini_options]\n",
    }.items():
        (root / name).write_text(text)
    (root / "tools/test").chmod(0o755)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "All of it")
    return root


def git(root, *arguments):
    identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=root, capture_output=True, text=True, check=True
    )
    return done.stdout


def run(project, *arguments):
    folder = project.parent / "temporary"
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["nohup", str(project / "tools/mutate"), *arguments],  # as for hours: SIGHUP is ignored
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert list(folder.iterdir()) == []
    assert len(git(project, "worktree", "list").splitlines()) == 1
    return done


def test_a_mutant_is_caught_by_the_first_test_that_fails_or_survives(project):
    target = project.parent / "outcomes.json"
    done = run(project, "run", "wrong", "equivalent", "deadly", "unreadable", "--json", str(target))
    found = [(each["name"], each["how"], each["test"]) for each in json.loads(target.read_text())]
    assert found == [
        ("wrong", "failed", "test_code.py::test_number"),
        ("equivalent", "survived", ""),
        ("deadly", "crashed", "test_code.py::test_number"),
        ("unreadable", "failed", "before the first test"),
    ]
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [list(each[:2]) for each in found]
    assert done.returncode == 1, "one has survived"


def test_a_mutant_that_hangs_is_caught_at_the_deadline_and_nothing_of_it_is_left(project):
    done = run(project, "run", "endless", "--deadline", "5")
    assert done.stdout.split()[1] == "hung"
    assert done.stdout.split()[-1] == "test_code.py::test_number"
    assert done.returncode == 0
    pid = (project.parent / "pid").read_text()
    assert not Path("/proc", pid).exists()


def test_what_is_behind_the_dashes_goes_to_pytest(project):
    done = run(project, "run", "wrong", "--", "test_code.py", "-k", "first")
    assert done.stdout.split()[1] == "survived"
    done = run(project, "run", "wrong", "--", "none.py")
    assert done.returncode == 2
    assert "mutate: pytest finds no tests:" in done.stderr


def test_apply_edits_the_checkout_but_not_one_with_changes(project):
    done = run(project, "apply", "wrong")
    assert done.returncode == 0
    assert "return 2" in (project / "code_of_ours.py").read_text()
    for command in ("apply", "run"):
        done = run(project, command, "equivalent")
        assert (done.returncode, done.stdout) == (2, "")
        assert "has changes that are not committed" in done.stderr


def test_a_place_that_takes_no_json_is_said_before_the_run(project):
    done = run(project, "run", "--json", "none/outcomes")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mutate: --json none/outcomes: No such file or directory\n"


def test_an_unknown_mutation_is_a_usage_error(project):
    done = run(project, "run", "none")
    assert (done.returncode, done.stderr) == (
        2,
        "mutate: there is no mutation none: tools/mutate list has them all\n",
    )
