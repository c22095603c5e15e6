"""The options of `kvmdp run` that concern the machine: its pages, its memory, its trap."""

from kvmdp.memory.backings import BACKINGS
from kvmdp.size import parse_size
from kvmdp.trap.fits import Together, check
from kvmdp.trap.registry import DEVICE_VIEW, TRAPS
from random_options import files
from random_options.options import NO_NUMBER, NO_SIZE, Option, choices_of, flag, has, is_one_of

HUGE = "hugetlb-2m", "private-hugetlb-2m"
_MEMORY = "2M", "2100K", "3M", "4m", "4M", "6M", "8M", "8388608"
_LARGE = "72M", "1G", "5G"
_IMAGES = 1, 4096, 70_001, 1 << 20, 2 << 20, (2 << 20) + 12288, 3_333_333, 4 << 20, 8 << 20


def has_peers(draw):
    """Whether others, in processes of their own, are to have RAM."""
    return "--handler" in draw.given or "--device-socket" in draw.given


_SPECS = (*TRAPS, *(f"{name}:{DEVICE_VIEW}" for name, kind in TRAPS.items() if kind.by_memslot))


def trap_of(draw):
    """Return what is asked for as --trap."""
    return draw.given.get("--trap", "auto")


def _name_of(trap):
    return trap.partition(":")[0]


def _backing(draw):
    if has_peers(draw) and draw.often(0.9):
        return "memfd"
    return draw.rng.choice([name for name in BACKINGS if "hugetlb" not in name and goes(trap_of(draw), name)])


def goes(trap, backing):
    """Whether a trap works on a backing, so that a host may have both."""
    kind = TRAPS.get(_name_of(trap))
    return _is_allowed(Together(BACKINGS[backing], kind, device_view=trap.endswith(DEVICE_VIEW)))


def _is_allowed(together):
    try:
        check(together)
    except ValueError:
        return False
    return True


# Pages


def image(draw):
    """Draw a memory image; the guest has as many pages, and 512 at the least."""
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


def is_large(draw):
    """Whether the guest has more pages than a test has time for."""
    return draw.pages > 2048


def _is_near(draw):
    """Whether the machine has its pages from no other process."""
    return "--handler" not in draw.given


PAGE_OPTIONS = {
    "--image": Option(
        image,
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
    "--image-format": Option(lambda _draw: "raw", ("qcow2", ""), when=has("--image")),
    "--image-layout": Option(
        lambda draw: draw.of("packed", "physical", "packed:hole=pc", "physical:hole=q35", "packed:hole=2G"),
        ("flat", "packed:", "packed:hole", "packed:hole=1K", "physical:hole=x", "hole=pc", ""),
        when=has("--image"),
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
    "--trap": Option(
        lambda draw: draw.of("auto", *_SPECS), ("none", "MARKER", "hybrid-mmio", "mmio:", ""), 0.9
    ),
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
        is_one_of("--backing", "file"),
    ),
    "--thp": Option(
        lambda draw: draw.of("on", "off"),
        ("yes", ""),
        when=is_one_of("--backing", None, "memfd", "anonymous", "file"),
    ),
    "--reserve-hugepages": flag(0.9, is_one_of("--backing", *HUGE)),
    "--resident-limit": Option(
        _limit,
        (*NO_SIZE, "0", "3K", "1"),
        when=lambda draw: draw.given.get("--backing") not in HUGE and not is_large(draw),
    ),
    "--fault-around": Option(
        lambda draw: str(1 << draw.rng.randint(0, 9)), (*NO_NUMBER, "0", "3", "1024", "-1")
    ),
    "--collapse": Option(lambda draw: draw.of(*choices_of("run", "--collapse")), ("on", "")),
}


def _by_slot(draw):
    name = _name_of(trap_of(draw))
    return name in TRAPS and TRAPS[name].by_memslot


def _reads(draw):
    return trap_of(draw) == "userfaultfd" or trap_of(draw).endswith(DEVICE_VIEW)


def _mode(draw):
    backing = BACKINGS[draw.given.get("--backing", "memfd")]
    modes = [mode for mode in ("missing", "minor") if _is_allowed(Together(backing, mode=mode))]
    mode = "minor" if has_peers(draw) else draw.rng.choice(modes)
    return draw.of(mode, mode.title(), mode.upper())


TRAP_OPTIONS = {
    "--granule": Option(
        lambda draw: draw.of("4K", "8K", "64k", "1M", "2M", "4096"),
        (*NO_SIZE, "0", "1K", "12K", "5000"),
        0.4,
        _by_slot,
    ),
    "--slot-memory": Option(lambda draw: draw.of("26M", "64M", "1G"), (*NO_SIZE, "0", "1M"), 0.3, _by_slot),
    "--readers": Option(
        lambda draw: draw.of("1", "2", "4", "8", "99" if draw.often(0.1) else "3"),
        (*NO_NUMBER, "0", "-1", "100"),
        0.4,
        _reads,
    ),
    "--uffd-per-vcpu": flag(0.3, _reads),
    "--uffd-mode": Option(_mode, ("", "both", "missing,minor"), 0.4, is_one_of("--trap", "userfaultfd")),
}
