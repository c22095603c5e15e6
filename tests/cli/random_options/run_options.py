"""The options of `kvmdp run`, and what is drawn for each."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `programs`, where this is no test

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

from kvmdp.machine.hostinfo import emulates_ring_0
from kvmdp.machine.workloads import WORKLOADS
from kvmdp.memory.backings import BACKINGS
from kvmdp.memory.size import parse_size
from kvmdp.paging.trap.registry import ALL_TRAPS, HYBRID_TRAPS, SLOT_TRAPS, TRAPS, check_backing, exit_trap_of
from kvmdp.paging.trap.userfaultfd import check_mode
from random_options import files
from random_options.options import NO_NUMBER, NO_SECONDS, NO_SIZE, Option, choices_of, flag

HUGE = "hugetlb-2m", "private-hugetlb-2m"
_MEMORY = "2M", "2100K", "3M", "4m", "4M", "6M", "8M", "8388608"
_LARGE = "72M", "1G", "5G"
_IMAGES = 1, 4096, 70_001, 1 << 20, 2 << 20, (2 << 20) + 12288, 3_333_333, 4 << 20, 8 << 20
_FEW = 64  # pages of much RAM
_MOST_TOUCHES = 3000


def _is(name, *values):
    return lambda draw: draw.given.get(name) in values


def _has(name):
    return lambda draw: name in draw.given


def has_peers(draw):
    """Whether others, in processes of their own, are to have RAM."""
    return "--handler" in draw.given or "--device-socket" in draw.given


def trap_of(draw):
    return draw.given.get("--trap", "auto")


def _backing(draw):
    if has_peers(draw) and draw.often(0.9):
        return "memfd"
    return draw.rng.choice(
        [name for name in BACKINGS if "hugetlb" not in name and _goes(trap_of(draw), name)]
    )


def _goes(trap, backing):
    return trap == "auto" or _is_allowed(check_backing, trap, BACKINGS[backing])


def _is_allowed(check, *arguments):
    try:
        check(*arguments)
    except ValueError:
        return False
    return True


# Pages


def _image(draw):
    size = draw.rng.choice(_IMAGES)
    draw.pages = max(size, 2 << 20) // files.PAGE
    filled = draw.of(0, 0.1, 0.6, 1)
    name = draw.file("memory.img", files.image(size, draw.rng.random(), filled))
    return draw.file("link.img", files.link(name)) if draw.often(0.1) else name


def _memory(draw):
    if draw.pages is not None:
        size = max(draw.pages * files.PAGE, parse_size(draw.rng.choice(_MEMORY)))
        size = -(-size // files.PAGE) * files.PAGE
        text = str(size)
    else:
        text = draw.rng.choice(_LARGE if draw.often(0.05) else _MEMORY)
    draw.pages = parse_size(text) // files.PAGE
    return text


def _huge_memory(draw):
    text = draw.of("2M", "4M", "6M", "8M")
    draw.pages = parse_size(text) // files.PAGE
    return text


def _is_large(draw):
    return draw.pages > 2048


def _pages(draw):
    least = 8 * int(draw.given.get("--vcpus", 1))  # enough for each vCPU, whatever the workload
    most = _FEW if _is_large(draw) else draw.pages - 16  # room for page tables that lie in RAM
    draw.pages = draw.rng.choice([least, most, draw.rng.randint(min(least, most), most)])
    return str(draw.pages)


def _is_near(draw):
    """Whether the machine has its pages from no other process."""
    return "--handler" not in draw.given


PAGE_OPTIONS = {
    "--image": Option(
        _image,
        (
            "absent.img",
            ".",
            lambda draw: draw.file("empty.img", files.holds(b"")),
            lambda draw: draw.file("pages.gz", files.holds(b"\x1f\x8b\x08" + bytes(4093))),
            lambda draw: draw.file("disk.qcow2", files.holds(b"QFI\xfb\0\0\0\x03" + bytes(4088))),
            lambda draw: draw.file("fifo.img", files.fifo()),
            "/dev/null",
        ),
        when=_is_near,
    ),
    "--image-format": Option(lambda _draw: "raw", ("qcow2", ""), when=_has("--image")),
    "--image-layout": Option(
        lambda draw: draw.of("packed", "physical", "packed:hole=pc", "physical:hole=q35", "packed:hole=2G"),
        ("flat", "packed:", "packed:hole", "packed:hole=1K", "physical:hole=x", "hole=pc", ""),
        when=_has("--image"),
    ),
    "--memory": Option(
        _memory,
        (*NO_SIZE, "0", "1M", "2097153", "512G", "9" * 30),
        1,
        lambda draw: draw.pages is None or draw.often(0.3),
    ),
    "--latency": Option(
        lambda draw: draw.of("0", "0us", "700ns", "20us", "0.1ms"),
        ("", "-1us", "30", "x", "1 us", "1m"),
        when=_is_near,
    ),
    "--bandwidth": Option(
        lambda draw: draw.of("0", "0bit", "100Mbit", "1.5gbit", "10Gbit"),
        ("", "-1Gbit", "10", "10GB", "x"),
        when=_is_near,
    ),
}

# Machine and memory


def _limit(draw):
    return f"{draw.rng.randint(1, 2 * draw.pages) * 4}K"


MACHINE_OPTIONS = {
    "--trap": Option(lambda draw: draw.of("auto", *ALL_TRAPS), ("none", "MARKER", "hybrid-marker", ""), 0.9),
    "--vcpus": Option(
        lambda draw: draw.of("1", "2", "3", "4", "16" if draw.often(0.1) else "2"),
        (*NO_NUMBER, "0", "-1", "17"),
        0.6,
    ),
    "--ring": Option(lambda draw: draw.of("0", "3"), (*NO_NUMBER, "1", "2", "-3"), 0.5),
    "--page-tables": Option(lambda draw: draw.of(*choices_of("run", "--page-tables")), ("ram", "")),
}

MEMORY_OPTIONS = {
    "--backing": Option(_backing, ("paper", "MEMFD", "", "hugetlb-1g"), 0.5),
    "--backing-file": Option(
        lambda _draw: "ram",
        (
            ".",
            "absent/ram",
            "",
            lambda draw: draw.file("there.ram", files.holds(b"mine")),
            lambda draw: draw.file("folder.ram", files.folder()),
            "/dev/null",
        ),
        0.5,
        _is("--backing", "file"),
    ),
    "--thp": Option(
        lambda draw: draw.of("on", "off"),
        ("yes", ""),
        when=_is("--backing", None, "memfd", "anonymous", "file"),
    ),
    "--reserve-hugepages": flag(0.9, _is("--backing", *HUGE)),
    "--resident-limit": Option(
        _limit,
        (*NO_SIZE, "0", "3K", "1"),
        when=lambda draw: draw.given.get("--backing") not in HUGE and not _is_large(draw),
    ),
    "--fault-around": Option(
        lambda draw: str(1 << draw.rng.randint(0, 9)), (*NO_NUMBER, "0", "3", "1024", "-1")
    ),
    "--collapse": Option(lambda draw: draw.of(*choices_of("run", "--collapse")), ("on", "")),
}


def _by_slot(draw):
    return trap_of(draw) in SLOT_TRAPS


def _reads(draw):
    return trap_of(draw) in ("userfaultfd", *HYBRID_TRAPS)


def _mode(draw):
    backing = BACKINGS[draw.given.get("--backing", "memfd")]
    modes = [mode for mode in ("missing", "minor") if _is_allowed(check_mode, mode, backing)]
    mode = "minor" if has_peers(draw) else draw.rng.choice(modes)
    return draw.of(mode, mode.title(), mode.upper())


TRAP_OPTIONS = {
    "--granule": Option(
        lambda draw: draw.of("4K", "8K", "64k", "1M", "2M", "4096"),
        (*NO_SIZE, "0", "1K", "12K", "5000"),
        0.4,
        _by_slot,
    ),
    "--split": Option(
        lambda draw: draw.of(*choices_of("run", "--split")),
        ("page", ""),
        0.3,
        lambda draw: exit_trap_of(trap_of(draw)) == "memory-fault",
    ),
    "--slot-memory": Option(lambda draw: draw.of("26M", "64M", "1G"), (*NO_SIZE, "0", "1M"), 0.3, _by_slot),
    "--readers": Option(
        lambda draw: draw.of("1", "2", "4", "8", "99" if draw.often(0.1) else "3"),
        (*NO_NUMBER, "0", "-1", "100"),
        0.4,
        _reads,
    ),
    "--uffd-per-vcpu": flag(0.3, _reads),
    "--uffd-mode": Option(_mode, ("", "both", "missing,minor"), 0.4, _is("--trap", "userfaultfd")),
}

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


def _guest(draw):
    name = draw.of(*_PROGRAMS)
    code, fails = _PROGRAMS[name]
    draw.may_fail |= fails
    if name == "loop":
        draw.given["--timeout"] = "0.3"
    return draw.file(f"{name}.bin", files.holds(code))


def _workload(draw):
    name = draw.of(*WORKLOADS)
    # What emulates ring 0 does not know vector instructions.
    draw.may_fail |= name == "vector" and draw.given.get("--ring") == "0" and emulates_ring_0()
    return name


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
        lambda draw: (_is_large(draw) and not _touches(draw)) or draw.often(0.5),
    ),
    "--order": Option(lambda draw: draw.of(*choices_of("run", "--order")), ("backwards", ""), 0.7, _touches),
    "--stride": Option(
        lambda draw: str(draw.rng.randint(1, draw.pages // int(draw.given.get("--vcpus", 1)))),
        (*NO_NUMBER, "0", "-1", str(1 << 40)),
        0.7,
        _is("--order", "strided"),
    ),
    "--write": flag(0.5, _touches),
    "--overlap": flag(0.4, _touches),
    "--touches": Option(
        lambda draw: str(draw.rng.randint(1, min(3 * draw.pages, _MOST_TOUCHES))),
        (*NO_NUMBER, "0", "-1"),
        1,
        lambda draw: _touches(draw) and (_is_large(draw) or draw.often(0.4)),
    ),
    "--poison": Option(
        _poison,
        (*NO_NUMBER, "-1", str(1 << 40)),
        0.7,
        lambda draw: draw.given.get("--workload") == "poison" or "--guest" in draw.given,
    ),
    "--iterations": Option(
        lambda draw: draw.of("1", "2", "3"), (*NO_NUMBER, "0", "-1"), 0.5, _is("--workload", "atomic")
    ),
    "--operation": Option(
        lambda draw: draw.of(*choices_of("run", "--operation")), ("sub", ""), 0.7, _is("--workload", "atomic")
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


def _json(draw):
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
        lambda draw: draw.given.get("--workload") == "disk" and not (has_peers(draw) or _is_large(draw)),
    ),
    "--disk-format": Option(lambda _draw: "raw", ("qcow2", ""), 0.3, _has("--disk")),
    "--trace": Option(lambda draw: output("trace.jsonl", draw), ("-", *NO_OUTPUT), 0.15),
    "--detect-leaks": flag(0.05),
    "--timeout": Option(_seconds, NO_SECONDS, 0.3),
    "--json": Option(_json, NO_OUTPUT, 0.85),
}

# A machine alone has none of these: those of machines that have peers are given them.
PEER_OPTIONS = {
    "--handler": Option(
        lambda _draw: "handler.sock",
        ("absent.sock", ".", "", "x" * 200, lambda draw: draw.file("no.sock", files.holds(b""))),
        0,
        _has("--handler"),
    ),
    "--handler-timeout": Option(lambda draw: draw.of("5", "1e3"), NO_SECONDS, 0.3, _has("--handler")),
    "--device-socket": Option(
        lambda _draw: "device.sock",
        ("", ".", "absent/sock", "x" * 200, lambda draw: draw.file("no.sock", files.holds(b""))),
        0,
        _has("--device-socket"),
    ),
    "--device-timeout": Option(lambda draw: draw.of("5", "8.5"), NO_SECONDS, 1, _has("--device-socket")),
}

_ORDER = (
    MACHINE_OPTIONS,
    PAGE_OPTIONS,
    MEMORY_OPTIONS,
    WORK_OPTIONS,
    TRAP_OPTIONS,
    RESULT_OPTIONS,
    PEER_OPTIONS,
)
RUN_OPTIONS = {name: option for table in _ORDER for name, option in table.items()}
# Of a machine whose RAM is huge pages.
HUGE_RUN_OPTIONS = RUN_OPTIONS | {
    "--trap": Option(
        lambda draw: draw.rng.choice(["auto", *(trap for trap in TRAPS if _goes(trap, HUGE[0]))]), share=0.9
    ),
    "--backing": Option(lambda draw: draw.of(*HUGE), ("hugetlb", "private-hugetlb-1g"), 1),
    "--image": Option(_image, share=0),
    "--memory": Option(_huge_memory, ("0", "3M"), 1),
}
