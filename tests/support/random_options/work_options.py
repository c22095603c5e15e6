"""The options of `kvmdp run` that concern what the guest does, its disk, and what becomes of the result."""

from programs import (
    HALT,
    IN_FROM_NOWHERE,
    LOOP,
    OUT_TO_NOWHERE,
    RETURN,
    STORE_TABLE,
    TRIPLE_FAULT,
    load,
    store,
)

from kvmdp.machine.workloads import WORKLOADS
from random_options import files
from random_options.machine_options import has_peers, is_large
from random_options.options import NO_NUMBER, NO_SECONDS, Option, choices_of, flag, has, is_one_of

_FEW = 64  # pages of much RAM
_MOST_TOUCHES = 3000

# Work

_PROGRAMS = {
    "return": (RETURN, False),
    "load": (load(0x100000) + store(0x101FFC) + RETURN, False),
    "table": (STORE_TABLE, False),
    "halt": (HALT, True),
    "triple": (TRIPLE_FAULT, True),
    "ports": (OUT_TO_NOWHERE + IN_FROM_NOWHERE + RETURN, True),
    "undefined": (b"\x0f\x0b", True),
    "nowhere": (load(0x7FFFF000) + RETURN, True),
    "loop": (LOOP, True),
}


def _pages(draw):
    least = 8 * int(draw.given.get("--vcpus", 1))  # enough for each vCPU, whatever the workload
    most = _FEW if is_large(draw) else draw.pages - 16  # room for page tables that lie in RAM
    draw.pages = draw.rng.choice([least, most, draw.rng.randint(min(least, most), most)])
    return str(draw.pages)


def _guest(draw):
    name = draw.of(*_PROGRAMS)
    code, fails = _PROGRAMS[name]
    draw.may_fail |= fails
    if name == "loop":
        draw.given["--timeout"] = "0.3"
    return draw.file(f"{name}.bin", files.holds(code))


def _workload(draw):
    return draw.of(*WORKLOADS)


def _seconds(draw):
    if draw.given.get("--timeout"):  # of a program that has no end
        return draw.given["--timeout"]
    if draw.often(0.2):
        draw.may_fail = True
        return draw.of("0.001", "0.05", "1e-9", "0.3")
    return draw.of("60", "1e3", "1000000000000")


def _poison(draw):
    if "--guest" in draw.given:
        draw.may_fail = True  # a program that touches one of them
    return str(draw.rng.randint(0, 8))


def _touches(draw):
    return draw.given.get("--workload") == "touch"


WORK_OPTIONS = {
    "--guest": Option(
        _guest,
        (
            "absent.bin",
            ".",
            "",
            lambda draw: draw.file("empty.bin", files.holds(b"")),
            lambda draw: draw.file("large.bin", files.holds(bytes((1 << 20) + 1))),
        ),
        0.12,
    ),
    "--workload": Option(_workload, ("sleep", "TOUCH", ""), 0.9, lambda draw: "--guest" not in draw.given),
    "--seed": Option(
        lambda draw: draw.of("0", "1", str((1 << 64) - 1), str(draw.rng.getrandbits(40))),
        (*NO_NUMBER, "-1", str(1 << 64)),
    ),
    "--pages": Option(
        _pages,
        (*NO_NUMBER, "0", "-1", str(1 << 40)),
        1,
        lambda draw: (is_large(draw) and not _touches(draw)) or draw.often(0.5),
    ),
    "--order": Option(lambda draw: draw.of(*choices_of("run", "--order")), ("backwards", ""), 0.7, _touches),
    "--stride": Option(
        lambda draw: str(draw.rng.randint(1, draw.pages // int(draw.given.get("--vcpus", 1)))),
        (*NO_NUMBER, "0", "-1", str(1 << 40)),
        0.7,
        is_one_of("--order", "strided"),
    ),
    "--write": flag(0.5, _touches),
    "--overlap": flag(0.4, _touches),
    "--touches": Option(
        lambda draw: str(draw.rng.randint(1, min(3 * draw.pages, _MOST_TOUCHES))),
        (*NO_NUMBER, "0", "-1"),
        1,
        lambda draw: _touches(draw) and (is_large(draw) or draw.often(0.4)),
    ),
    "--poison": Option(
        _poison,
        (*NO_NUMBER, "-1", str(1 << 40)),
        0.7,
        lambda draw: draw.given.get("--workload") == "poison" or "--guest" in draw.given,
    ),
    "--iterations": Option(
        lambda draw: draw.of("1", "2", "3"), (*NO_NUMBER, "0", "-1"), 0.5, is_one_of("--workload", "atomic")
    ),
    "--operation": Option(
        lambda draw: draw.of(*choices_of("run", "--operation")),
        ("sub", ""),
        0.7,
        is_one_of("--workload", "atomic"),
    ),
}


# Disk, results


def disk(draw):
    """Draw a file for a disk that is large enough."""
    return draw.file("disk", files.image(draw.of(8 << 20, 32 << 20), draw.rng.random(), 0))


def output(name, draw):
    """Draw where a result is written. /dev/full takes none."""
    where = draw.rng.choices((name, "/dev/null", "/dev/full", "there"), (0.85, 0.05, 0.05, 0.05))[0]
    if where == "there":
        return draw.file(name, files.holds(b"what was here before\n"))
    return where


def document(draw):
    """Draw where the JSON document goes."""
    where = "-" if draw.often(0.5) else output("result.json", draw)
    draw.may_fail |= where == "/dev/full"
    return where


NO_DISK = (
    "absent.disk",
    ".",
    "",
    lambda draw: draw.file("short.disk", files.holds(b"")),
    lambda draw: draw.file("disk.qcow2", files.holds(b"QFI\xfb\0\0\0\x03" + bytes(9 << 20))),
)
NO_OUTPUT = (".", "absent/file", "", lambda draw: draw.file("folder", files.folder()), "x" * 300)

RESULT_OPTIONS = {
    "--disk": Option(
        disk,
        NO_DISK,
        0.5,
        lambda draw: draw.given.get("--workload") == "disk" and not (has_peers(draw) or is_large(draw)),
    ),
    "--disk-format": Option(lambda _draw: "raw", ("qcow2", ""), 0.3, has("--disk")),
    "--trace": Option(lambda draw: output("trace.jsonl", draw), ("-", *NO_OUTPUT), 0.15),
    "--detect-leaks": flag(0.05),
    "--timeout": Option(_seconds, NO_SECONDS, 0.3),
    "--json": Option(document, NO_OUTPUT, 0.85),
}
