"""Command lines and files that make no sense: one clear sentence, the right status, nothing left behind."""

import os
import re

import pytest
from command import NOBODY, WITHOUT_OVERRIDE, kvmdp


def refused(*arguments, **options):
    """Run a command that must be refused as a usage error; return its sentence."""
    done = kvmdp(*arguments, **options)
    assert done.status == 2
    assert done.out == ""
    assert done.err.count("\n") == 1
    return done.error


# What needs no KVM to be refused


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ("0", "0 of guest memory is too little: the least is 2M"),
        ("1M", "1M of guest memory is too little: the least is 2M"),
        ("100T", "100T of guest memory is too much: the most is 256G"),
        ("2097153", "2097153 of guest memory is not whole pages: give a multiple of 4096 bytes"),
    ],
)
def test_memory_of_no_use(size, sentence):
    assert refused("run", "--memory", size) == sentence


@pytest.mark.parametrize("text", ["abc", "", "-1", "64MB"])
def test_sizes_that_are_none(text):
    sentence = refused("run", f"--memory={text}")
    assert (
        sentence == f"{text!r} is not a size: give a whole number of bytes, or of K, M, G or T, such as 64M"
    )


def test_an_absent_image(tmp_path):
    path = tmp_path / "absent.img"
    assert refused("run", "--image", path) == f"image '{path}' does not exist: check the path"


def test_an_empty_image(image):
    path = image(0)
    assert refused("run", "--image", path) == f"image '{path}' is empty: there is nothing to page in"


def test_a_directory_as_image(tmp_path):
    assert refused("run", "--image", tmp_path).startswith(
        f"image '{tmp_path}' is a directory: give a regular"
    )


def test_an_image_that_may_not_be_read(image):
    path = image(4096)
    path.chmod(0)
    wrapper = ()
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
        wrapper = WITHOUT_OVERRIDE
    sentence = refused("run", "--image", path, wrapper=wrapper)
    assert sentence == f"image '{path}' is not readable for this user: change its mode"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--seed", "-1"), f"seed -1 is out of range: give one from 0 to {(1 << 64) - 1}"),
        (("--order", "backwards"), "argument --order: invalid choice: 'backwards'"),
        (("--page-tables", "absent"), "argument --page-tables: invalid choice: 'absent'"),
        (
            ("--memory", "2M", "--page-tables", "paged", "--pages", "510"),
            "510 pages: the guest has 1 to 509",
        ),
        (("--vcpus", "two"), "argument --vcpus: invalid int value: 'two'; see kvmdp run --help"),
        (("--memroy", "2M"), "unrecognized arguments: --memroy 2M; see kvmdp --help"),
        (("--timeout", "0"), "--timeout 0: give more than 0 seconds"),
        (("--timeout", "nan"), "--timeout nan: give more than 0 seconds"),
    ],
)
def test_options_of_no_use(arguments, sentence):
    assert refused("run", *arguments).startswith(sentence)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "the following arguments are required: COMMAND; see kvmdp --help"),
        (("walk",), "argument COMMAND: invalid choice: 'walk'"),
        (("probe", "--trap", "mmio"), "unrecognized arguments: --trap mmio; see kvmdp --help"),
    ],
)
def test_commands_that_are_none(arguments, sentence):
    assert refused(*arguments).startswith(sentence)


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("--version",)])
def test_help_is_no_error(arguments):
    done = kvmdp(*arguments)
    assert (done.status, done.err) == (0, "")
    assert "kvmdp" in done.out


# What is refused once KVM has been asked


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--vcpus", 17), "17 vCPUs: the guest runs with 1 to 16"),
        (("--vcpus", 0), "0 vCPUs: the guest runs with 1 to 16"),
        (("--ring", 1), "ring 1: the guest runs in ring 3 or 0"),
        (("--pages", 0), "0 pages: the guest has 1 to 16384"),
        (("--pages", 16385), "16385 pages: the guest has 1 to 16384"),
        (("--fault-around", 3), "fault-around of 3 pages: give a power of two from 1 to 512"),
        (("--fault-around", 1024), "fault-around of 1024 pages: give a power of two from 1 to 512"),
        (
            ("--backing", "paper"),
            (
                "there is no backing 'paper': choose from memfd, anonymous, hugetlb-2m, hugetlb-1g, "
                "private-hugetlb-2m, private-hugetlb-1g, guest-memfd, file"
            ),
        ),
        (
            ("--backing", "hugetlb-2m", "--memory", "3M"),
            "3M of hugetlb-2m memory is not whole huge pages: give a multiple of 2M",
        ),
        (
            ("--backing", "private-hugetlb-1g", "--memory", "1536M"),
            "1536M of private-hugetlb-1g memory is not whole huge pages: give a multiple of 1G",
        ),
        (
            ("--backing", "guest-memfd", "--thp", "on"),
            "guest-memfd memory has no transparent huge pages: leave --thp out, or use memfd, anonymous, file",
        ),
        (
            ("--backing-file", "ram"),
            "--backing-file is for the backing file: give --backing file with it",
        ),
        (
            ("--backing", "file", "--backing-file", "/nonexistent/ram"),
            "--backing-file /nonexistent/ram: there is no directory /nonexistent",
        ),
        (
            ("--backing", "file", "--backing-file", "/dev/null"),
            "--backing-file /dev/null: that is no regular file; give a new file's name",
        ),
        (
            ("--reserve-hugepages",),
            "memfd memory needs no reservation: leave --reserve-hugepages out, or use hugetlb-2m",
        ),
        (
            ("--trap", "marker", "--backing", "guest-memfd"),
            (
                "the trap marker registers RAM with userfaultfd, which cannot be done with guest-memfd memory: use the "
                "trap memory-fault or mmio"
            ),
        ),
        (
            ("--trap", "userfaultfd", "--backing", "file"),
            (
                "the trap userfaultfd registers RAM with userfaultfd, which cannot be done with file memory: use the "
                "trap memory-fault or mmio"
            ),
        ),
        (
            ("--trap", "memory-fault:device-view", "--backing", "hugetlb-2m"),
            (
                "a device view maps RAM once more, page by page, which cannot be done with hugetlb-2m memory: use the "
                "backing memfd"
            ),
        ),
        (
            ("--workload", "sleep"),
            (
                "there is no workload 'sleep': choose from checksum, touch, fill, atomic, copy, execute, vector, "
                "string, clock, disk, poison"
            ),
        ),
        (
            ("--poison", 3),
            (
                "--poison is for the workload poison and for programs of your own: checksum does not survive a machine "
                "check; give --workload poison, or leave it out"
            ),
        ),
        (
            ("--workload", "poison", "--poison", -1),
            "-1 pages to poison: give 0 to 192, what the guest has and can tell of",
        ),
        (
            ("--workload", "poison", "--poison", 193),
            "193 pages to poison: give 0 to 192, what the guest has and can tell of",
        ),
        (
            ("--workload", "poison", "--pages", 20, "--poison", 21),
            "21 pages to poison: give 0 to 20, what the guest has and can tell of",
        ),
        (
            ("--workload", "poison", "--poison", 4, "--trap", "mmio", "--granule", "256K"),
            (
                "with 4 x 256K poisoned the guest touches 256 poisoned pages, and it can tell of 192: poison fewer, "
                "let it touch fewer, or take another trap or granule"
            ),
        ),
        (
            ("--trap", "mmio", "--granule", "0"),
            "a granule of 0: give a power of two from 4K to 1G",
        ),
        (
            ("--trap", "mmio", "--granule", "5000"),
            "a granule of 5000: give a power of two from 4K to 1G",
        ),
        (
            ("--trap", "hybrid-mmio"),
            "the trap hybrid-mmio is a device view beside another trap: give mmio:device-view",
        ),
        (
            ("--trap", "marker:device-view"),
            (
                "the trap marker has no device view, for it works by page tables and not by memslots: use the trap "
                "memory-fault or mmio, or leave the device view out"
            ),
        ),
        (
            ("--trap", "mmio:readers"),
            "'mmio:readers': a trap has no 'readers'; there is device-view, as in mmio:device-view",
        ),
        (
            ("--trap", "marker", "--slot-memory", "256M"),
            (
                "--slot-memory is for memory-fault and mmio: the trap marker has no memslots for parts of a region; "
                "leave it out"
            ),
        ),
        (
            ("--trap", "mmio", "--slot-memory", "1M"),
            "1M of kernel memory for memslots: give at least 26M",
        ),
        (
            ("--trap", "marker", "--granule", "64K"),
            "a granule is for memory-fault and mmio: the trap marker works by the host's pages; leave it out",
        ),
        (
            ("--trap", "mmio:device-view", "--backing", "anonymous"),
            (
                "a device view maps RAM once more, page by page, which cannot be done with anonymous memory: use the "
                "backing memfd"
            ),
        ),
        (
            ("--trap", "userfaultfd", "--backing", "anonymous", "--uffd-mode", "minor"),
            "anonymous memory has no minor faults: use the mode missing, or the backing memfd",
        ),
        (
            ("--trap", "userfaultfd", "--uffd-mode", "both"),
            "there is no userfaultfd mode 'both': choose from missing, minor",
        ),
        (
            ("--trap", "mmio", "--uffd-mode", "missing"),
            "the trap mmio has no userfaultfd mode: use the trap userfaultfd, or leave the mode out",
        ),
        (
            ("--trap", "mmio", "--readers", "1"),
            (
                "the trap mmio has no userfaultfd readers: use the trap userfaultfd, or a device view, or leave "
                "--readers and --uffd-per-vcpu out"
            ),
        ),
        (
            ("--trap", "marker", "--uffd-per-vcpu"),
            (
                "the trap marker has no userfaultfd readers: use the trap userfaultfd, or a device view, or leave "
                "--readers and --uffd-per-vcpu out"
            ),
        ),
        (
            ("--readers", "2"),
            (
                "--readers or --uffd-per-vcpu with --trap auto, which takes no trap that has readers: name the trap, "
                "or leave them out"
            ),
        ),
        (
            ("--resident-limit", "64K"),
            "a resident limit of 64K is less than this guest can run in: give 300K or more",
        ),
        (
            ("--resident-limit", "32M", "--backing", "hugetlb-2m"),
            (
                "hugetlb-2m memory is held to the end, and evicting pages frees none of it: leave --resident-limit "
                "out, or use the backing memfd"
            ),
        ),
        (
            ("--resident-limit", "much"),
            "'much' is not a size: give a whole number of bytes, or of K, M, G or T, such as 64M",
        ),
        (("--latency", "fast"), "'fast' is not a latency: give a number with ns, us, ms or s, such as 30us"),
        (
            ("--bandwidth", "10G"),
            "'10G' is not a bandwidth: give a number with Kbit, Mbit, Gbit or Tbit, such as 10Gbit",
        ),
        (("--trace", "-"), "--trace -: stdout has the result; give a file name"),
        (("--trace", "/"), "--trace /: that is a directory; give a file name"),
        (("--trace", "/nonexistent/trace"), "--trace /nonexistent/trace: there is no directory /nonexistent"),
    ],
)
def test_machines_that_cannot_be(arguments, sentence):
    assert refused("run", *arguments) == sentence


@pytest.mark.kvm
def test_an_unknown_trap_is_told_which_there_are_and_which_are_proven():
    sentence = refused("run", "--trap", "uffd")
    match = re.fullmatch(
        r"there is no trap 'uffd': there are auto, marker, memory-fault, mmio, layered, userfaultfd; "
        r"this host proves (.+)",
        sentence,
    )
    assert match
    proven = set(match[1].split(", ")) - {"userfaultfd"}
    assert proven == set(kvmdp("probe", "--json", "-").document["working"])


@pytest.mark.kvm
def test_an_image_larger_than_memory(image):
    sentence = refused("run", "--image", image(3 << 20), "--memory", "2M")
    assert sentence == "the image has 3M, more than --memory 2M: give at least as much"


@pytest.mark.kvm
def test_a_guest_program_of_no_use(tmp_path, program):
    empty = program(b"")
    assert refused("run", "--guest", empty) == (
        f"the guest program {empty} is empty: give a flat binary for 0xd0100000"
    )
    large = program(bytes((1 << 20) + 1))
    assert refused("run", "--guest", large) == (
        f"the guest program {large} is too large: the program area takes 1M"
    )
    assert refused("run", "--guest", "").startswith("cannot read the guest program ")
    absent = tmp_path / "absent.bin"
    sentence = f"cannot read the guest program {absent}: No such file or directory"
    assert refused("run", "--guest", absent) == sentence
    sentence = f"cannot read the guest program {tmp_path}: Is a directory"
    assert refused("run", "--guest", tmp_path) == sentence


# What is odd, and accepted


@pytest.mark.kvm
@pytest.mark.parametrize("trap", ["marker", "memory-fault", "mmio"])
def test_an_image_that_ends_inside_a_page_is_filled_up_with_zeros(image, trap):
    done = kvmdp("run", "--image", image((2 << 20) + 100), "--trap", trap, "--json", "-")
    assert done.status == 0
    assert done.err.startswith("the image's last page has 100 of 4096 bytes: the rest of it reads as zeros\n")
    assert done.document["ok"] is True
    assert done.document["memory_bytes"] == (2 << 20) + 4096
    assert done.document["pages_present"] == done.document["pages_checked"] == 513


@pytest.mark.kvm
@pytest.mark.parametrize("trap", ["marker", "memory-fault", "mmio"])
def test_memory_beyond_the_image_reads_as_zeros_and_is_not_fetched(image, trap):
    done = kvmdp("run", "--image", image(100), "--memory", "3M", "--trap", trap, "--json", "-")
    assert done.status == 0
    assert done.document["ok"] is True
    assert (done.document["pages_fetched"], done.document["pages_zeroed"]) == (1, 767)


@pytest.mark.kvm
def test_a_small_image_gets_the_least_memory_there_is(image):
    assert kvmdp("run", "--image", image(4096), "--json", "-").document["memory_bytes"] == 2 << 20
