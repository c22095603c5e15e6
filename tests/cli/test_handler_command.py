"""`kvmdp handler` and `kvmdp run --handler` where they cannot work: statuses and sentences."""

import os
import socket

import pytest
from command import NOBODY, kvmdp


def refused(*arguments):
    done = kvmdp(*arguments)
    assert done.status == 2
    assert done.out == ""
    return done.error


def test_nobody_listens(tmp_path):
    path = tmp_path / "absent.sock"
    assert (
        refused("run", "--handler", path)
        == f"there is no socket {path}: start the process that listens there first"
    )


def test_a_path_that_is_no_socket(image):
    assert "is not a socket" in refused("run", "--handler", image(4096))


def test_a_path_that_is_taken(image):
    assert "is not a socket" in refused("handler", "--synthetic", "2M", "--listen", image(4096))


def test_a_listener_that_has_died(tmp_path):
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    assert "no process listens there any more" in refused("run", "--handler", path)


@pytest.mark.root
def test_another_users_socket(tmp_path):
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(path))
        other.listen()
        os.chown(path, NOBODY, NOBODY)
        assert f"belongs to user {NOBODY}" in refused("run", "--handler", path)


@pytest.mark.parametrize("command", [("run", "--handler"), ("handler", "--synthetic", "2M", "--listen")])
def test_a_path_that_is_too_long(command):
    assert "a socket path has 1 to 107 bytes, this one has 200" in refused(*command, "x" * 200)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "one of the arguments --image --synthetic is required"),
        (("--image", "/absent.img"), "image '/absent.img' does not exist: check the path"),
        (("--synthetic", "5000"), "a synthetic image of 5000 bytes: give a positive multiple of 4096"),
        (("--synthetic", "2M,x"), "the seed is a number"),
        (("--synthetic", "2M", "--latency", "fast"), "'fast' is not a latency"),
    ],
)
def test_nothing_to_serve(arguments, sentence):
    assert sentence in refused("handler", "--listen", "unused.sock", *arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--latency", "1ms"), "give them to kvmdp handler"),
        (("--bandwidth", "1Gbit"), "give them to kvmdp handler"),
        (("--bandwidth", "x"), "'x' is not a bandwidth"),
    ],
)
def test_a_network_is_on_the_handlers_side(arguments, sentence):
    assert sentence in refused("run", "--handler", "x", *arguments)


@pytest.mark.parametrize("backing", ["anonymous", "private-hugetlb-2m", "guest-memfd", "file"])
def test_memory_that_is_no_sealed_file_cannot_be_handed_over(backing):
    assert refused("run", "--handler", "x", "--backing", backing) == (
        f"--handler: RAM is {backing} memory, which cannot be handed to another process: use the backing memfd"
    )


def test_a_mode_that_has_no_absent_page_in_the_file_is_refused():
    arguments = ("--trap", "userfaultfd", "--uffd-mode", "Missing")
    assert "fills pages where no other process finds them" in refused("run", "--handler", "x", *arguments)
