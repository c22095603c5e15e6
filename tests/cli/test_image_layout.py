"""Images with RAM's hole in them, and of machines whose hole begins elsewhere: each byte lands where it was."""

import os

import pytest
from command import Running, kvmdp

MiB, GiB = 1 << 20, 1 << 30
FIRMWARE = 4 * GiB - 16  # where a PC's CPU begins
RESET = bytes.fromhex("ea5be000f0")  # jmp far f000:e05b


def sparse(path, size, words):
    """Make a file with holes: words, by offset, and nothing else."""
    with open(path, "wb") as file:
        for offset, word in words.items():
            file.seek(offset)
            file.write(word.to_bytes(8, "little"))
        file.truncate(size)
    return path


def reading(gpas):
    """A guest program whose checksum is the sum of the words at these addresses."""
    code = bytes.fromhex("31d2")  # xor edx, edx
    for gpa in gpas:
        code += b"\x48\xb9" + gpa.to_bytes(8, "little")  # mov rcx, gpa
        code += bytes.fromhex("480311")  # add rdx, [rcx]
    return code + bytes.fromhex("4889d0 c3")  # mov rax, rdx; ret


def refused(*arguments):
    done = kvmdp(*arguments)
    assert (done.status, done.out) == (2, "")
    return done.error


# A dump of a machine with 5 GiB from address 0 on: 6 GiB long
WORDS = {0: 1 << 8, 3 * GiB - 8: 1 << 16, 4 * GiB: 1 << 24, 6 * GiB - 8: 1 << 32}
IN_HOLE = {3 * GiB: 3 << 40, FIRMWARE: int.from_bytes(RESET, "little")}


@pytest.fixture
def dump(tmp_path):
    return sparse(tmp_path / "pmemsave", 6 * GiB, WORDS | IN_HOLE)


@pytest.mark.kvm
@pytest.mark.parametrize("trap", ["marker", "mmio"])
def test_a_dump_from_address_0_lands_where_it_was(dump, program, trap):
    guest = program(reading(WORDS))
    arguments = ("--image", dump, "--image-layout", "physical", "--guest", guest, "--trap", trap)
    document = kvmdp("run", *arguments, "--json", "-").document
    assert int(document["guest_checksum"], 16) == sum(WORDS.values())
    assert document["memory_bytes"] == 5 * GiB
    assert (document["image_layout"], document["low_ram_end"]) == ("physical", 3 * GiB)
    assert document["pages_fetched"] == 4


@pytest.mark.kvm
def test_the_summary_says_what_was_assumed(dump, program):
    guest = program(reading([0]))
    done = kvmdp("run", "--image", dump, "--image-layout", "physical:hole=pc", "--guest", guest)
    assert done.status == 0
    assert "image      physical; RAM at 0x0 to 0xc0000000, 0x100000000 to 0x180000000\n" in done.out
    done = kvmdp("run", "--image", dump, "--image-layout", "packed:hole=q35", "--guest", guest)
    assert "image      packed; RAM at 0x0 to 0x80000000, 0x100000000 to 0x200000000\n" in done.out


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("hole", "start"), [("pc", 3 * GiB), ("q35", 2 * GiB), ("3328M", 3328 * MiB), ("32M", 32 * MiB)]
)
@pytest.mark.parametrize("kind", ["packed", "physical"])
def test_each_hole_is_where_it_is_said_to_be(tmp_path, program, kind, hole, start):
    behind = 4 * GiB if kind == "physical" else start
    words = {0: 5, start - 8: 7 << 8, behind: 11 << 16, behind + GiB - 8: 13 << 24}
    image = sparse(tmp_path / "image", behind + GiB, words)
    guest = program(reading([0, start - 8, 4 * GiB, 5 * GiB - 8]))
    arguments = ("--image", image, "--image-layout", f"{kind}:hole={hole}", "--guest", guest)
    document = kvmdp("run", *arguments, "--json", "-").document
    assert int(document["guest_checksum"], 16) == sum(words.values())
    assert (document["memory_bytes"], document["low_ram_end"]) == (start + GiB, start)


@pytest.mark.kvm
def test_a_whole_image_with_its_hole_is_compared_exactly(tmp_path):
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.write(os.urandom(2 * MiB))
        file.seek(4 * GiB)
        file.write(os.urandom(2 * MiB))
    arguments = ("--image", image, "--image-layout", "physical:hole=2M", "--vcpus", 2, "--workload", "copy")
    done = kvmdp("run", *arguments, "--json", "-")
    assert done.status == 0
    assert done.document["ok"] is True
    assert done.document["pages_checked"] == done.document["pages_fetched"] == 1024


@pytest.mark.kvm
def test_how_much_ram_there_was_tells_a_dump_that_ends_in_the_hole(tmp_path, program):
    # Of a machine with 16 MiB: the firmware is all that lies behind.
    image = sparse(tmp_path / "image", 4 * GiB, {16 * MiB - 8: 77, FIRMWARE: 0xEA})
    sentence = refused("run", "--image", image, "--image-layout", "physical")
    assert sentence == (
        f"image '{image}' has 4G and ends in RAM's hole, from 3G to 4G: say with --memory how much RAM lies below "
        "that, or give another --image-layout"
    )
    arguments = ("--image", image, "--image-layout", "physical", "--memory", "16M")
    document = kvmdp("run", *arguments, "--guest", program(reading([16 * MiB - 8])), "--json", "-").document
    assert int(document["guest_checksum"], 16) == 77
    assert document["memory_bytes"] == 16 * MiB


# What cannot be right


def test_firmware_below_4_gib_is_no_ram_unless_the_user_insists(dump):
    sentence = refused("run", "--image", dump)
    assert sentence == (
        f"image '{dump}' has a PC's firmware just below 4G, as a dump from address 0 does: give --image-layout "
        "physical, or --image-layout packed if RAM has it there"
    )
    assert "give --image-layout physical" in refused(
        "handler", "--listen", dump.parent / "s", "--image", dump
    )


@pytest.mark.kvm
def test_who_insists_has_it_packed(dump, program):
    guest = program(reading([0, 5 * GiB]))
    arguments = ("--image", dump, "--image-layout", "packed", "--guest", guest)
    document = kvmdp("run", *arguments, "--json", "-").document
    assert int(document["guest_checksum"], 16) == WORDS[0] + WORDS[4 * GiB]
    assert document["memory_bytes"] == 6 * GiB


@pytest.mark.parametrize(
    ("size", "arguments", "sentence"),
    [
        (3 * GiB + MiB, ("--image-layout", "physical"), "has 3073M and ends in RAM's hole, from 3G to 4G"),
        (4 * GiB, ("--image-layout", "physical:hole=q35"), "has 4G and ends in RAM's hole, from 2G to 4G"),
        (
            4608 * MiB,
            ("--image-layout", "physical:hole=q35"),
            "RAM up to 4608M is 2560M in all, and such a machine has RAM above 4G only if it has 2816M or more",
        ),
        (
            6 * GiB,
            ("--image-layout", "physical", "--memory", "4G"),
            "the image has 5G, more than --memory 4G: give at least as much",
        ),
        (
            6 * GiB,
            ("--memory", "5G"),
            (
                "the image has 6G, more than --memory 5G: give at least as much, or --image-layout physical if RAM's "
                "hole is in the file"
            ),
        ),
        (
            3400 * MiB,
            ("--image-layout", "packed:hole=pc"),
            "such a machine has all of its 3400M below 4G, and from 3328M on lies the guest's own code",
        ),
        (
            5 * GiB,
            ("--image-layout", "packed:hole=3328M", "--trap", "mmio", "--granule", "512M"),
            "a granule of 512M reaches over RAM's hole at 3328M: give at most 256M",
        ),
        (
            5 * GiB,
            ("--image-layout", "packed:hole=3328M", "--backing", "hugetlb-1g", "--reserve-hugepages"),
            "RAM's hole at 3328M is in the middle of a huge page of hugetlb-1g memory: use hugetlb-2m",
        ),
    ],
)
@pytest.mark.kvm
def test_what_cannot_be_right_is_refused(tmp_path, size, arguments, sentence):
    image = sparse(tmp_path / "image", size, {0: 1})
    assert sentence in refused("run", "--image", image, *arguments)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "flat",
            (
                "--image-layout flat: give packed or physical, and where RAM's hole begins if not at 3G, as "
                "packed:hole=q35"
            ),
        ),
        ("physical:q35", "--image-layout physical:q35: give packed or physical"),
        (
            "packed:hole=vax",
            "--image-layout packed:hole=vax: there is no hole 'vax': give pc, q35 or where it begins",
        ),
        (
            "packed:hole=1M",
            "--image-layout packed:hole=1M: RAM's hole cannot begin at 1M: give a multiple of 2M up to 3328M",
        ),
        ("physical", "--image-layout physical is for --image: name an image, or say packed"),
    ],
)
def test_layouts_that_are_none(text, sentence):
    assert refused("run", "--image-layout", text).startswith(sentence)


# A handler has the layout from the image that it serves; the machine has it from the handler


@pytest.mark.kvm
def test_a_machine_has_its_hole_where_the_handlers_image_has_it(tmp_path, program):
    words = {2 * MiB - 8: 3, 4 * GiB: 5 << 8}
    image = sparse(tmp_path / "image", 4 * GiB + 2 * MiB, words)
    layout = ("--image-layout", "physical:hole=2M")
    guest = program(reading(words))
    socket = tmp_path / "socket"
    with Running("handler", "--listen", socket, "--image", image, *layout) as handler:
        handler.wait_for_progress(f"serving 4M from {image} (physical) at {socket}")
        document = kvmdp("run", "--handler", socket, "--guest", guest, "--json", "-").document
        assert int(document["guest_checksum"], 16) == sum(words.values())
        assert (document["memory_bytes"], document["low_ram_end"]) == (4 * MiB, 2 * MiB)
        done = kvmdp("run", "--handler", socket, "--guest", guest)
        assert "image      of the handler; RAM at 0x0 to 0x200000, 0x100000000 to 0x100200000\n" in done.out
        done = kvmdp("run", "--handler", socket, "--image", image, *layout, "--json", "-")
        assert done.status == 0
        assert (done.document["ok"], done.document["pages_checked"]) == (True, 1024)
        assert refused("run", "--handler", socket, "--image-layout", "packed:hole=q35") == (
            "the handler serves memory whose hole begins at 2M, and here it is to begin at 2G: give the --image-layout "
            "that the handler was given"
        )
