import errno
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from kvmdp.source.base import SourceError, read_pages
from kvmdp.source.image import ImageError, ImageSource
from kvmdp.source.request import FetchRequest

PAGE = 4096


def page_bytes(number):
    return bytes([number % 251 + 1]) * PAGE


def make_image(path, layout, size=None):
    """Write a file in which page n has data for each n in `layout`, and holes elsewhere."""
    with open(path, "wb") as file:
        for number in layout:
            file.seek(number * PAGE)
            file.write(page_bytes(number))
        file.truncate(size if size is not None else file.tell())
    return path


def fill(source, offset, length):
    destination = bytearray(b"\xee" * length)
    source.fetch(FetchRequest(offset), memoryview(destination))
    return bytes(destination)


@pytest.fixture
def open_image():
    opened = []

    def open_image(path):
        opened.append(ImageSource(path))
        return opened[-1]

    yield open_image
    for source in opened:
        source.close()


def test_pages_arrive_as_they_are_in_the_file(tmp_path, open_image):
    content = os.urandom(16 * PAGE)
    (tmp_path / "image").write_bytes(content)
    source = open_image(tmp_path / "image")
    assert source.size == len(content)
    assert source.tail_bytes == 0
    assert source.extents() == [(0, len(content))]
    assert fill(source, 0, 16 * PAGE) == content
    assert fill(source, 5 * PAGE, 3 * PAGE) == content[5 * PAGE : 8 * PAGE]


@pytest.mark.parametrize("cut", [0, 100, PAGE - 1])
@pytest.mark.parametrize("pages", [1, 63, 64, 65, 200])
def test_a_long_run_lands_piece_by_piece(tmp_path, open_image, pages, cut):
    content = os.urandom(pages * PAGE - cut)
    (tmp_path / "image").write_bytes(content)
    content += bytes(cut)
    destination, told = bytearray(b"\xee" * (pages * PAGE)), []

    def landed(length):
        assert destination[:length] == content[:length]
        told.append(length // PAGE)

    source = open_image(tmp_path / "image")
    source.fetch(FetchRequest(0, on_landed=landed), memoryview(destination))
    assert destination == content
    assert told == sorted(set(told))
    assert told[:-1] == list(range(64, pages, 64))[: len(told[:-1])]
    assert pages <= 64 or told[0] == 64
    assert all(each <= pages for each in told)


def test_a_file_that_ends_early_has_landed_as_far_as_it_goes(tmp_path, open_image):
    content = os.urandom(150 * PAGE)
    (tmp_path / "image").write_bytes(content)
    source = open_image(tmp_path / "image")
    os.truncate(tmp_path / "image", 100 * PAGE + 50)
    destination, told = bytearray(150 * PAGE), []
    request = FetchRequest(0, on_landed=told.append)
    with pytest.raises(SourceError, match="it changed while running"):
        source.fetch(request, memoryview(destination))
    assert told == [64 * PAGE]
    assert destination[: 64 * PAGE] == content[: 64 * PAGE]
    assert request.rest().offset == 64 * PAGE


def test_holes_are_not_data(tmp_path, open_image):
    path = make_image(tmp_path / "image", [16, 17, 64], size=128 * PAGE)
    source = open_image(path)
    covered = {
        page
        for offset, length in source.extents()
        for page in range(offset // PAGE, (offset + length) // PAGE)
    }
    # A file system may keep more than was written, in larger blocks, but never less.
    assert covered >= {16, 17, 64}
    if path.stat().st_blocks * 512 < 64 * PAGE:
        assert len(covered) < 64
    assert source.size == 128 * PAGE


def test_extents_are_whole_pages_for_data_that_is_not(tmp_path, open_image, monkeypatch):
    path = tmp_path / "image"
    path.write_bytes(bytes(10 * PAGE))
    data = [(512, 1024), (PAGE + 512, PAGE + 1024), (3 * PAGE - 1, 3 * PAGE + 1), (9 * PAGE, 10 * PAGE)]
    real = os.lseek

    def lseek(fd, position, whence):
        if whence == os.SEEK_DATA:
            return max(position, next(start for start, end in data if end > position))
        if whence == os.SEEK_HOLE:
            return next(end for start, end in data if end > position)
        return real(fd, position, whence)

    monkeypatch.setattr(os, "lseek", lseek)
    assert open_image(path).extents() == [(0, 4 * PAGE), (9 * PAGE, PAGE)]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_without_seek_data_the_whole_file_is_data(tmp_path, open_image, monkeypatch, code):
    path = make_image(tmp_path / "image", [5], size=8 * PAGE + 3)
    real = os.lseek

    def lseek(fd, position, whence):
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(code, os.strerror(code))
        return real(fd, position, whence)

    monkeypatch.setattr(os, "lseek", lseek)
    assert open_image(path).extents() == [(0, 9 * PAGE)]


def test_a_file_of_holes_alone_has_no_extents(tmp_path, open_image):
    source = open_image(make_image(tmp_path / "image", [], size=16 * PAGE))
    assert source.extents() == []
    assert not read_pages(source, np.arange(16)).any()


def test_read_pages_gives_zeros_for_holes_and_beyond_the_end(tmp_path, open_image):
    source = open_image(make_image(tmp_path / "image", [16, 17, 64], size=128 * PAGE))
    numbers = np.array([64, 200, 17, 0, 16, 17, 65, 128])
    expected = [page_bytes(n) if n in (16, 17, 64) else bytes(PAGE) for n in numbers]
    assert read_pages(source, numbers).tobytes() == b"".join(expected)


@pytest.mark.parametrize("tail", [1, 4095])
def test_a_partial_last_page_is_filled_up_with_zeros(tmp_path, open_image, tail):
    content = os.urandom(2 * PAGE + tail)
    (tmp_path / "image").write_bytes(content)
    source = open_image(tmp_path / "image")
    assert source.tail_bytes == tail
    assert source.size == 3 * PAGE
    assert source.extents() == [(0, 3 * PAGE)]
    assert fill(source, PAGE, 2 * PAGE) == content[PAGE:] + bytes(PAGE - tail)
    assert fill(source, 2 * PAGE, PAGE) == content[2 * PAGE :] + bytes(PAGE - tail)


def test_what_is_appended_later_is_not_read(tmp_path, open_image):
    path = tmp_path / "image"
    path.write_bytes(b"a" * 100)
    source = open_image(path)
    with open(path, "ab") as file:
        file.write(b"b" * PAGE)
    assert fill(source, 0, PAGE) == b"a" * 100 + bytes(PAGE - 100)
    with pytest.raises(ValueError, match="not whole 4096-byte pages"):
        fill(source, PAGE, PAGE)


@pytest.mark.parametrize("left", [0, PAGE, 2 * PAGE + 100])
def test_a_truncated_file_is_a_permanent_error(tmp_path, open_image, left):
    path = make_image(tmp_path / "image", range(4))
    source = open_image(path)
    os.truncate(path, left)
    with pytest.raises(SourceError) as caught:
        fill(source, 0, 4 * PAGE)
    assert not caught.value.transient
    assert (caught.value.source, caught.value.offset, caught.value.length) == (str(path), 0, 4 * PAGE)
    assert str(caught.value) == (
        f"cannot read 16384 bytes at offset 0x0 of {path}: the file ends at {left:#x} and had 16384 bytes "
        "when it was opened: it changed while running; restore it and start again"
    )


def test_short_reads_are_continued(tmp_path, open_image, monkeypatch):
    content = os.urandom(4 * PAGE)
    (tmp_path / "image").write_bytes(content)
    source = open_image(tmp_path / "image")
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:1000]], offset))
    assert fill(source, PAGE, 3 * PAGE) == content[PAGE:]


@pytest.mark.parametrize(
    ("code", "transient"),
    [(errno.EAGAIN, True), (errno.EINTR, True), (errno.EIO, False), (errno.EFAULT, False)],
)
def test_read_errors(tmp_path, open_image, monkeypatch, code, transient):
    path = make_image(tmp_path / "image", range(4))
    source = open_image(path)
    with monkeypatch.context() as patched:

        def preadv(fd, buffers, offset):
            raise OSError(code, os.strerror(code))

        patched.setattr(os, "preadv", preadv)
        with pytest.raises(SourceError) as caught:
            fill(source, 2 * PAGE, PAGE)
    assert caught.value.transient is transient
    for part in (str(path), "0x2000", os.strerror(code)):
        assert part in str(caught.value)
    assert fill(source, 2 * PAGE, PAGE) == page_bytes(2)


@pytest.mark.parametrize(
    ("offset", "length"), [(100, PAGE), (0, 100), (0, 0), (-PAGE, PAGE), (3 * PAGE, 2 * PAGE)]
)
def test_a_range_that_is_not_pages_of_the_image_is_refused(tmp_path, open_image, offset, length):
    source = open_image(make_image(tmp_path / "image", range(4)))
    with pytest.raises(ValueError, match="are not whole 4096-byte pages inside the 16384 bytes of"):
        fill(source, offset, length)


def descriptors():
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def refusal(path):
    """The sentence that says why `path` is no image; opening it must leave no descriptor."""
    before = descriptors()
    with pytest.raises(ImageError) as caught:
        ImageSource(path)
    assert descriptors() == before
    return str(caught.value).removeprefix(f"image '{path}' ")


def test_what_is_no_image_is_refused_in_one_sentence(tmp_path):
    wanted = "give a regular file or a block device that holds raw memory"
    assert refusal(tmp_path / "absent") == "does not exist: check the path"
    assert refusal(tmp_path) == f"is a directory: {wanted}"
    (tmp_path / "empty").touch()
    assert refusal(tmp_path / "empty") == "is empty: there is nothing to page in"
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo") == f"is a FIFO: {wanted}"
    assert refusal("/dev/zero") == f"is a character device: {wanted}"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refusal(tmp_path / "loop").startswith("cannot be opened (Too many levels of symbolic links): give")


def test_a_socket_is_refused(tmp_path, monkeypatch):
    # The directory may be too long for the address of a socket.
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        assert refusal("socket").startswith("is a socket, or its device is absent: give a regular file")


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = make_image(tmp_path / "image", range(4))
    real = os.open

    def refuse(name, *arguments):
        # Permission bits do not stop root, as whom the tests may run.
        if str(name) == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return real(name, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    assert refusal(path) == "is not readable for this user: change its mode"


def test_close_gives_the_descriptor_back_once(tmp_path):
    path = make_image(tmp_path / "image", range(4))
    before = descriptors()
    source = ImageSource(path)
    ours = [fd for fd in Path("/proc/self/fd").iterdir() if fd.exists() and fd.samefile(path)]
    assert [os.get_inheritable(int(fd.name)) for fd in ours] == [False]
    source.close()
    source.close()
    assert descriptors() == before


def test_a_file_that_has_less_than_its_size_says_is_refused():
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    if not Path(path).exists():
        pytest.skip("this kernel has no transparent huge pages, and so not this file of sysfs")
    with pytest.raises(ImageError, match=f"image '{path}' is said to have 4096 bytes and has less: give a"):
        ImageSource(path)
