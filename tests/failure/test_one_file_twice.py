"""A file that is written is no other's: told before anything is opened, by what the file is and not by its name."""

import argparse
import importlib
import os
import socket
import subprocess
from pathlib import Path

import pytest
from command import kvmdp

from kvmdp.cli.main import build_parser
from kvmdp.cli.output import UsageError
from kvmdp.cli.paths import check_distinct, fills, reads, writes

CONTENT = b"not to be lost"


def refused(*named):
    with pytest.raises(UsageError) as caught:
        check_distinct(*named)
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def links_to(path):
    """Other ways to name a file, by what they are."""
    folder = path.parent / "folder"
    folder.mkdir()
    (path.parent / "symbolic").symlink_to(path.name)
    (path.parent / "to its folder").symlink_to(".")
    names = {
        "its name": path,
        "another spelling": folder / ".." / path.name,
        "a path relative to here": os.path.relpath(path),
        "a symbolic link": path.parent / "symbolic",
        "a link to its folder": path.parent / "to its folder" / path.name,
    }
    if path.exists():
        (path.parent / "hard").hardlink_to(path)
        names["a hard link"] = path.parent / "hard"
    return names


def test_a_file_that_is_there_is_known_by_whatever_name(file):
    for kind, other in links_to(file).items():
        sentence = refused(reads("--image", str(file)), writes("--json", str(other)))
        assert sentence == (
            f"--image {file} and --json {other} are one file, and --json is written: give another file"
        ), kind


def test_a_file_that_is_not_there_yet_is_known_by_whatever_name(tmp_path):
    path = tmp_path / "new"
    for kind, other in links_to(path).items():
        assert "are one file" in refused(writes("--json", str(other)), writes("--trace", str(path))), kind


def test_what_differs_is_let_through(file, tmp_path):
    check_distinct(reads("--image", str(file)), writes("--json", str(tmp_path / "other")))
    check_distinct(writes("--json", str(tmp_path / "one")), writes("--trace", str(tmp_path / "two")))
    check_distinct(reads("--image", str(file)), reads("--guest", str(file)))  # neither is written
    check_distinct(writes("--json", "-"), writes("--trace", None), reads("--image", None))
    check_distinct(
        writes("--json", str(tmp_path / "no folder" / "x")), writes("--trace", str(tmp_path / "x"))
    )


def test_streams_may_be_named_twice(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for stream in ("/dev/null", str(pipe)):
        check_distinct(writes("--json", stream), writes("--trace", stream))


def test_a_socket_is_a_file_as_any_other(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert "are one file" in refused(reads("--handler", str(path)), writes("--device-socket", str(path)))


@pytest.mark.root
def test_a_device_is_known_by_its_number(tmp_path):
    path, other = tmp_path / "one", tmp_path / "other"
    for each in (path, other):
        try:
            os.mknod(each, 0o600 | 0o060000, os.makedev(7, 255))
        except PermissionError:
            pytest.skip("no permission to make device nodes: run outside a container")
    assert "are one file" in refused(reads("--image", str(path)), writes("--disk", str(other)))


def test_a_folder_that_is_replaced_holds_nothing_that_is_read_or_written(tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    (tmp_path / "link").symlink_to("report")
    for path in (folder / "trace", tmp_path / "link" / "trace"):
        sentence = refused(fills("--report", str(folder)), writes("--trace", str(path)))
        assert sentence == (
            f"--trace {path} lies in the folder --report {folder}, which is replaced as a whole: give a place elsewhere"
        )
    assert "lies in the folder" in refused(
        reads("FILE", str(folder / "bench.json")), fills("--report", str(folder))
    )
    again = str(folder / "compare.json")
    check_distinct(reads("FILE", again), fills("--report", str(folder), "compare.json"))
    assert "lies in the folder" in refused(
        writes("--json", again), fills("--report", str(folder), "compare.json")
    )
    assert "are one file" in refused(fills("--report", str(folder)), writes("--json", str(tmp_path / "link")))
    check_distinct(fills("--report", str(folder)), writes("--json", str(folder.with_suffix(".json"))))


# Every command, before it opens anything


class Seen(Exception):  # noqa: N818 - it is no error
    """What a command has checked."""


def see(*named):
    raise Seen({each.option for each in named})


PARSERS = build_parser()._subparsers._group_actions[0].choices


@pytest.mark.parametrize("command", PARSERS)
def test_every_option_that_names_a_file_is_looked_at(monkeypatch, command):
    parser = PARSERS[command]
    paths = {
        action.option_strings[-1] if action.option_strings else action.metavar
        for action in parser._actions
        if action.metavar in ("FILE", "PATH", "DIR", "DISK")
    }
    monkeypatch.setattr(importlib.import_module(f"kvmdp.cli.{command}"), "check_distinct", see)
    options = argparse.Namespace(**{action.dest: None for action in parser._actions})
    with pytest.raises(Seen) as seen:
        parser.get_default("run")(options)
    assert seen.value.args[0] == paths


PAIRS = [
    *(
        ("run", *(part for option in pair for part in (option, "FILE")))
        for pair in [
            *(
                (read, written)
                for read in ("--image", "--guest")
                for written in ("--json", "--trace", "--disk")
            ),
            ("--json", "--trace"),
            ("--image", "--backing-file"),
            ("--disk", "--backing-file"),
            ("--image", "--device-socket"),
            ("--handler", "--device-socket"),
        ]
    ),
    ("handler", "--image", "FILE", "--listen", "FILE"),
    ("device", "--connect", "FILE", "--file", "FILE"),
    ("bench", "--check", "FILE", "--json", "FILE"),
    ("bench", "--trace", "FILE", "--json", "FILE"),
    ("compare", "--trace", "FILE", "--json", "FILE"),
    ("compare", "--report", "FILE", "--json", "FILE"),
    ("report", "FILE", "--report", "FILE"),
]


@pytest.mark.parametrize("arguments", PAIRS, ids=" ".join)
def test_no_command_takes_one_file_for_two(file, arguments):
    names = [str(file), f"{file.parent}/./{file.name}"]
    done = kvmdp(*(names.pop() if each == "FILE" else each for each in arguments))
    assert done.status == 2
    assert "are one file, and" in done.error
    assert done.out == ""
    assert file.read_bytes() == CONTENT
    assert [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_result_does_not_replace_the_file_that_standard_output_goes_to(tmp_path, stream):
    path = tmp_path / "log"
    path.touch()
    with open(path, "w") as file:
        done = kvmdp("probe", "--json", path, **{stream: file})
    assert done.status == 2
    said = done.error if stream == "stdout" else path.read_text()
    name = "standard output" if stream == "stdout" else "standard error"
    assert f"{name} and --json {path} are one file, and --json is written" in said


def test_both_streams_may_go_to_one_file(tmp_path):
    with open(tmp_path / "log", "w") as file:
        done = kvmdp("report", tmp_path / "absent", stdout=file, stderr=subprocess.STDOUT)
    assert done.status == 2
    assert "No such file or directory" in (tmp_path / "log").read_text()


def test_the_image_is_not_destroyed_under_a_watched_run_either(file):
    done = kvmdp("run", "--detect-leaks", "--image", file, "--json", Path(file.parent, ".", file.name))
    assert done.status == 2
    assert file.read_bytes() == CONTENT
