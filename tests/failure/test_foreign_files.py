"""Files that are no raw memory, no raw disk, no flat binary: told as what they are, with the command that converts."""

import pytest
from command import kvmdp
from foreign import FOREIGN

from kvmdp.cli.images import ImageLayout, open_image
from kvmdp.source.formats import FORMATS
from kvmdp.source.image import ImageError

MEMORY = 2 << 20
INSIST = "or have its bytes taken as they are with --image-format raw"


@pytest.fixture
def foreign(tmp_path):
    """Return a function that writes a file of a format, filled up to the least size of RAM, and returns its path."""

    def write(name):
        path = tmp_path / name
        path.write_bytes(FOREIGN[name].ljust(MEMORY, b"\x5a"))
        return path

    return write


def refused(*arguments):
    done = kvmdp(*arguments)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    return done.error


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_every_format_is_refused_as_an_image_unless_the_user_insists(foreign, known):
    path = str(foreign(known.name))
    with pytest.raises(ImageError) as caught:
        open_image(path, ImageLayout(), None, None)
    assert str(caught.value) == (
        f"image {path!r} is {known.title}, not raw memory: {known.remedy(path)}; {INSIST}"
    )
    image = open_image(path, ImageLayout(), "raw", None)
    image.file.close()
    assert image.source.size == MEMORY


def test_the_commands_say_it(foreign, tmp_path):
    path = foreign("gzip")
    command = f"gzip -dc {path} > {path}.raw"
    sentence = f"image '{path}' is compressed with gzip, not raw memory: convert it with {command}; {INSIST}"
    assert refused("run", "--image", path) == sentence
    assert refused("handler", "--listen", tmp_path / "socket", "--image", path) == sentence
    assert not (tmp_path / "socket").exists()


@pytest.mark.kvm
def test_who_insists_has_the_bytes_as_they_are(foreign):
    done = kvmdp("run", "--image", foreign("elf-core"), "--image-format", "raw", "--json", "-")
    assert done.status == 0
    assert done.document["ok"] is True
    assert done.document["pages_checked"] == MEMORY // 4096


def test_what_is_said_of_an_image_needs_one(tmp_path):
    assert refused("run", "--image-format", "raw").startswith("--image-format is for --image: name an image")
    listen = ("handler", "--listen", tmp_path / "socket", "--synthetic", "2M")
    sentence = "--image-layout and --image-format are for --image: leave them out"
    assert (
        refused(*listen, "--image-format", "raw") == refused(*listen, "--image-layout", "packed") == sentence
    )


# Disks: what is written into a compressed file, or into another's format, destroys it


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["qcow2", "gzip"])
def test_a_disk_in_a_format_is_refused_and_stays_as_it_is(foreign, name):
    path = foreign(name)
    before = path.read_bytes()
    known = next(each for each in FORMATS if each.name == name)
    sentence = (
        f"the disk {path} is {known.title}, not raw sectors: {known.remedy(str(path))}; or have it taken as it is with "
        "--disk-format raw"
    )
    assert refused_late("run", "--workload", "disk", "--memory", "2M", "--disk", path) == sentence
    assert path.read_bytes() == before


def refused_late(*arguments):
    """Run a command that is refused after it has said what it is about to do; return its sentence."""
    done = kvmdp(*arguments)
    assert (done.status, done.out) == (2, "")
    return done.error


def test_a_device_refuses_it_too(foreign, tmp_path):
    path = foreign("vmdk")
    sentence = refused("device", "--connect", tmp_path / "absent", "--file", path)
    assert sentence.startswith(
        f"--file: the disk {path} is a disk image of VMware, not raw sectors: convert it with "
    )


@pytest.mark.kvm
def test_who_insists_has_the_disk_as_it_is(foreign):
    path = foreign("gzip")
    disk = ("--disk", path, "--disk-format", "raw")
    done = kvmdp("run", "--workload", "disk", "--memory", "2M", "--pages", 64, *disk, "--json", "-")
    assert done.status == 0
    assert done.document["ok"] is True
    assert path.read_bytes()[:2] != b"\x1f\x8b"
    sentence = refused_late("run", "--workload", "disk", "--memory", "2M", "--disk-format", "raw")
    assert sentence == "--disk-format is for --disk: name a file, or leave it out"


# Programs


@pytest.mark.kvm
def test_an_elf_is_no_flat_binary(tmp_path):
    path = tmp_path / "program"
    path.write_bytes(FOREIGN["elf"])
    assert refused("run", "--guest", path) == (
        f"the guest program {path} is an ELF program or object, not a flat binary: objcopy -O binary {path} {path}.bin "
        "makes one"
    )
    path.write_bytes(FOREIGN["xz"])
    assert refused("run", "--guest", path).endswith(
        f"is compressed with xz, not a flat binary: convert it with xz -dc {path} > {path}.raw"
    )


# What a report is made from is told by what it says, not by its name


@pytest.mark.parametrize(
    "content", [FOREIGN["gzip"], b"\xff\xfe", b"{}", b"[1]", b"{", b'{"schema": "kvmdp.run/1"}']
)
def test_a_report_of_something_else(tmp_path, content):
    path = tmp_path / "trace"
    path.write_bytes(content)
    assert refused("report", path).endswith("; give the JSON of kvmdp compare or bench, or a trace")


@pytest.mark.parametrize("content", [FOREIGN["gzip"], b"\0" * 100, b"kvmdp"])
def test_bounds_that_are_something_else(tmp_path, content):
    path = tmp_path / "bounds"
    path.write_bytes(content)
    done = kvmdp("bench", "--check", path)
    assert (done.status, done.out) == (2, "")
    assert str(path) in done.error
