"""An image whose file changes while a guest runs on it: said as such, never taken for a page that kvmdp got wrong."""

import os
import re

import pytest
from command import Running, kvmdp
from commands import OFTEN

from kvmdp.source.image import ImageSource

SIZE = 2 << 20
# Long enough to change the file in, and with each page fetched once.
SLOW = ("--latency", "1ms", "--trap", "mmio")

pytestmark = pytest.mark.kvm


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "memory.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def run_while(image, change, *arguments):
    """Run on an image that `change(image)` changes once some of its pages have been fetched."""
    with Running("run", "--image", image, *SLOW, *arguments, prelude=OFTEN) as command:
        command.wait_for_progress()
        change(image)
        return command.finish()


def write_first_page(image):
    with open(image, "r+b") as file:
        file.write(os.urandom(4096))


def touch(image):
    os.utime(image)


def append(image):
    with open(image, "ab") as file:
        file.write(b"more")


def replace(image):
    other = image.with_suffix(".new")
    other.write_bytes(os.urandom(SIZE))
    other.rename(image)


CHANGES = {
    write_first_page: "it was written to",
    touch: "it was written to",
    append: f"it had {SIZE} bytes and has {SIZE + 4}",
    replace: "another file has taken its place",
}


@pytest.mark.parametrize(("change", "how"), CHANGES.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_a_file_that_changes_is_said_to_have_changed(image, change, how):
    done = run_while(image, change)
    assert done.status == 1
    changed = f"image '{image}' changed while running: {how}"
    assert done.out.endswith(f"\nCHANGED    {changed}: it may hold other bytes than the guest was given\n")
    assert ("WRONG at gpa 0x0\n" in done.out) == (change is write_first_page)


def test_the_document_says_it_too(image):
    document = run_while(image, write_first_page, "--json", "-").document
    assert document["ok"] is False
    assert document["image_changed"] == f"image '{image}' changed while running: it was written to"
    assert document["wrong_pages"] == ["0x0"]


@pytest.mark.parametrize("size", [0, SIZE - 4096])
def test_a_file_that_is_cut_is_the_cause_that_is_named(image, size):
    done = run_while(image, lambda path: os.truncate(path, size), "--json", "-")
    assert done.status == 1
    assert re.search(
        rf"of {image}: the file ends at 0x[0-9a-f]+ and had {SIZE} bytes when it was opened: it changed",
        done.error,
    )
    changed = f"image '{image}' changed while running: it had {SIZE} bytes and has {size}"
    assert f"{changed}\n" in done.err
    assert done.document["image_changed"] == changed


@pytest.mark.parametrize(
    "action", [lambda path: path.read_bytes(), lambda path: path.chmod(0o400), os.unlink]
)
def test_a_file_that_is_read_or_renamed_or_gone_has_not_changed(image, action):
    done = run_while(image, action, "--json", "-")
    assert done.status == 0
    assert (done.document["ok"], done.document["image_changed"]) == (True, None)


def test_there_is_no_change_without_an_image():
    assert kvmdp("run", "--memory", "2M", "--json", "-").document["image_changed"] is None


def test_the_copy_that_a_handler_is_compared_with_is_watched(image, tmp_path):
    socket = tmp_path / "socket"
    with Running("handler", "--listen", socket, "--image", image, "--latency", "1ms") as handler:
        handler.wait_for_progress("serving")
        with Running("run", "--handler", socket, "--image", image, prelude=OFTEN) as command:
            command.wait_for_progress()
            write_first_page(image)
            done = command.finish()
        assert done.status == 1
        assert f"CHANGED    image '{image}' changed while running: it was written to" in done.out
        handler.process.terminate()
        served = handler.finish()
    assert served.status == 130
    assert f"image '{image}' changed while running: it was written to\n" in served.err


def test_two_writes_within_a_tick_of_the_clock_show_by_size_at_least(tmp_path):
    path = tmp_path / "memory.img"
    path.write_bytes(bytes(8192))
    source = ImageSource(path)
    try:
        before = path.stat()
        os.truncate(path, 4096)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert source.change() == "it had 8192 bytes and has 4096"
    finally:
        source.close()
