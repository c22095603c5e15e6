"""`kvmdp device` and the disk's options of `kvmdp run`: what is wrong is said in one sentence, and nothing is left."""

import socket

import pytest
from command import kvmdp

RUN = ("run", "--memory", "2M", "--trap", "mmio", "--workload", "disk")


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(2 << 20)
    return path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "there is no socket"),
        ("plain", "is not a socket"),
        ("x" * 108, "a socket path has 1 to 107 bytes"),
    ],
)
def test_a_path_where_no_machine_is(tmp_path, disk, path, message):
    (tmp_path / "plain").touch()
    path = path if len(path) > 107 else tmp_path / path
    done = kvmdp("device", "--connect", path, "--file", disk)
    assert done.status == 2
    assert message in done.error


def test_a_socket_at_which_nobody_listens(tmp_path, disk):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(tmp_path / "stale"))
    done = kvmdp("device", "--connect", tmp_path / "stale", "--file", disk)
    assert (done.status, "no process listens there any more" in done.error) == (2, True)


@pytest.mark.parametrize("name", ["none", "short", "folder"])
def test_a_file_that_cannot_be_a_disk(tmp_path, name):
    (tmp_path / "short").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    done = kvmdp("device", "--connect", tmp_path / "socket", "--file", tmp_path / name)
    assert done.status == 2
    assert done.error.startswith("--file: ")


def test_a_machine_that_hangs_up_is_a_failure(tmp_path, disk):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(30)
        import threading

        def hang_up():
            listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        done = kvmdp("device", "--connect", path, "--file", disk)
        thread.join()
    assert done.status == 1
    assert "the connection was closed before the hand-over" in done.error


@pytest.mark.kvm
def test_a_disk_of_ones_own_is_used_and_kept(disk):
    done = kvmdp(*RUN, "--disk", disk)
    assert done.status == 0
    assert any(disk.read_bytes())


@pytest.mark.kvm
def test_no_device_comes(tmp_path):
    done = kvmdp(*RUN, "--device-socket", tmp_path / "socket", "--device-timeout", "0.3")
    assert done.status == 1
    assert "no device came to" in done.error
    assert not [*tmp_path.iterdir()]


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--disk", "/nonexistent"), "cannot open the disk"),
        (("--disk", "/dev/null"), "/dev/null is not a regular file: give a regular file that may be read"),
        (("--device-socket", "x" * 108), "a socket path has 1 to 107 bytes"),
        (("--device-socket", "README.md"), "is there already and is not a socket"),
        (("--device-socket", "s", "--backing", "anonymous"), "cannot be handed to another process"),
        (("--device-socket", "s", "--disk", "d"), "--disk is for a disk served here"),
        (
            ("--device-socket", "s", "--trap", "userfaultfd", "--uffd-mode", "missing"),
            "fills pages where no other process finds them",
        ),
        (("--device-timeout", "0"), "give more than 0 seconds"),
    ],
)
def test_options_that_make_no_sense(options, message):
    done = kvmdp(*RUN, *options)
    assert done.status == 2
    assert message in done.error


@pytest.mark.kvm
def test_a_disk_that_is_too_small(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(4096))
    done = kvmdp(*RUN, "--disk", tmp_path / "disk")
    assert done.status == 2
    assert "has 4K, the workload needs 2M" in done.error


@pytest.mark.kvm
def test_a_workload_without_a_disk(disk):
    done = kvmdp("run", "--memory", "2M", "--workload", "fill", "--disk", disk)
    assert done.status == 2
    assert "the workload fill uses no disk" in done.error
