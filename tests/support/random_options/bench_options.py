"""The options of the commands that measure or report, and what is drawn for each: little work of each kind."""

import os
from dataclasses import replace

from kvmdp.bench.contender import MISSING, OFF, PRESENT, SHARDED
from kvmdp.machine.workloads import WORKLOADS
from kvmdp.trap.registry import TRAPS
from random_options import files
from random_options.machine_options import HUGE, PAGE_OPTIONS
from random_options.options import NO_NUMBER, NO_SIZE, Option, choices_of, flag
from random_options.work_options import NO_OUTPUT, document, output

_CONTENDERS = (
    *TRAPS,
    PRESENT,
    SHARDED,
    MISSING,
    *(OFF + trap for trap in TRAPS),
    "userfaultfd-r2",
    "marker:vcpus=2",
    "mmio:fault-around=16",
    "mmio:device-view,device=10",
    "memory-fault:granule=64K,order=random",
)
_NO_CONTENDERS = ("nothing", "marker marker", "marker:x=1", "marker:vcpus=two", "mmio:device=-1", "off-none")
_BOUND = '[[bound]]\nmetric = "pages_per_second"\ncontender = "marker"\nmin = 1\n'


def _plain(draw):
    return "--memory-cost" not in draw.given and "--huge" not in draw.given


def _contenders(draw):
    return " ".join(draw.rng.sample(_CONTENDERS, draw.of(1, 2, 2, 3)))


def _cpus(draw):
    cpus = sorted(os.sched_getaffinity(0))
    return ",".join(str(draw.rng.choice(cpus)) for _ in range(int(draw.given.get("--vcpus", 1))))


def _check(draw):
    draw.may_fail = True  # what is not measured falls short of any bound
    return draw.file("bounds", files.holds(_BOUND.encode()))


def _reads(draw):
    return "--uffd" in draw.given


def _report(draw):
    return draw.file("report", files.folder()) if draw.often(0.2) else "report"


_RESULTS = {
    "--trace": Option(lambda draw: output("trace.jsonl", draw), ("-", *NO_OUTPUT), 0.2),
    "--json": Option(document, NO_OUTPUT, 0.8),
}

BENCH_OPTIONS = {
    "--vcpus": Option(lambda draw: draw.of("1", "2", "3"), (*NO_NUMBER, "0", "-1", "17"), 0.5),
    "--bytes": Option(lambda draw: draw.of("2M", "3m", "2101248"), (*NO_SIZE, "0", "4K", "512G"), 1),
    "--memory-cost": flag(0.1),
    "--huge": flag(0),
    "--uffd": Option(lambda draw: draw.of(*choices_of("bench", "--uffd")), ("minor", ""), 0.2, _plain),
    "contenders": Option(_contenders, _NO_CONTENDERS, 1, lambda draw: "--uffd" not in draw.given),
    "--one-uffd": flag(0.3, _reads),
    "--readers": Option(lambda draw: draw.of("1", "2", "5"), (*NO_NUMBER, "0", "100"), 0.5, _reads),
    "--overlap": flag(0.2),
    "--delay": Option(lambda draw: draw.of("0", "3", "100"), (*NO_NUMBER, "-1"), when=_plain),
    "--backing": Option(
        lambda draw: draw.of("shmem", "memfd", "anonymous", "file"), ("paper", "", "hugetlb"), 0.3
    ),
    "--pin": Option(_cpus, ("", "x", "0,", "-1", "4096", "0,0,0,0"), 0.2),
    "--ring": Option(lambda draw: draw.of("0", "3"), (*NO_NUMBER, "1", "2"), 0.3),
    "--workload": Option(lambda draw: draw.of("touch", "touch", *WORKLOADS), ("sleep", ""), 0.4, _plain),
    "--order": Option(lambda draw: draw.of(*choices_of("bench", "--order")), ("backwards", ""), 0.4, _plain),
    "--read": flag(0.3),
    "--touches": Option(lambda draw: draw.of("1", "100", "2000"), (*NO_NUMBER, "0", "-1"), 0.2, _plain),
    "--fault-around": Option(
        lambda draw: draw.of("1", "4", "512"), (*NO_NUMBER, "0", "3", "1024"), 0.2, _plain
    ),
    "--granule": Option(lambda draw: draw.of("4K", "64K", "2M"), (*NO_SIZE, "12K", "1K"), 0.2),
    "--latency": replace(PAGE_OPTIONS["--latency"], when=_plain),
    "--bandwidth": replace(PAGE_OPTIONS["--bandwidth"], when=_plain),
    "--rounds": Option(lambda draw: draw.of("1", "1", "2"), (*NO_NUMBER, "0", "-1"), 1),
    "--warm-up": Option(lambda draw: draw.of("0", "0", "1"), (*NO_NUMBER, "-1"), 1),
    "--seed": Option(lambda draw: draw.of("0", "7", str((1 << 64) - 1)), (*NO_NUMBER, "-1", str(1 << 64))),
    "--device": flag(0.05, _plain),
    "--reserve-hugepages": flag(0.9, lambda draw: draw.given.get("--backing") in HUGE),
    "--check": Option(
        _check, ("absent.toml", ".", "", lambda draw: draw.file("no.toml", files.holds(b"[[bound]]\n"))), 0.1
    ),
    **_RESULTS,
    "--trace": replace(_RESULTS["--trace"], when=_plain),
}

_ON_HUGE_PAGES = ("marker", "memory-fault", "mmio", "userfaultfd")
# Of a comparison on huge pages, which measures a dozen times.
HUGE_BENCH_OPTIONS = BENCH_OPTIONS | {
    "--huge": flag(1),
    "--bytes": Option(lambda draw: draw.of("2M", "4M"), ("3M", "0"), 1),
    "--memory-cost": flag(0),
    "contenders": Option(lambda draw: draw.of(*_ON_HUGE_PAGES), ("present", "marker:vcpus=2", "nothing"), 1),
    "--backing": Option(lambda draw: draw.of(*HUGE), ("shmem", "anonymous", "paper"), 1),
    "--rounds": Option(lambda _draw: "1", ("0",), 1),
    "--warm-up": Option(lambda _draw: "0", ("-1",), 1),
}

COMPARE_OPTIONS = {
    "--coverage": flag(0),
    "contenders": Option(_contenders, _NO_CONTENDERS, 1),
    "--quick": flag(0.3),
    "--vcpus": Option(lambda draw: draw.of("1", "2", "1,2"), ("", "x", "0", "17", "1,1", "1,"), 1),
    "--latencies": Option(lambda draw: draw.of("0", "5us", "0,5us"), ("", "x", "-1us", "0,0", "5"), 1),
    "--bandwidth": PAGE_OPTIONS["--bandwidth"],
    "--bytes": Option(lambda draw: draw.of("2M", "3M"), (*NO_SIZE, "0", "4K", "512G"), 1),
    "--backing": Option(lambda draw: draw.of("shmem", "anonymous"), ("paper", ""), 0.3),
    "--rounds": Option(lambda draw: draw.of("1", "2"), (*NO_NUMBER, "0", "-1"), 1),
    "--warm-up": Option(lambda draw: draw.of("0", "1"), (*NO_NUMBER, "-1"), 1),
    "--memory-sizes": Option(
        lambda draw: draw.of("none", "2M", "2M,4M"), ("", "x", "1M", "2M,2M", "512G"), 1
    ),
    "--report": Option(
        _report, (".", "absent/report", "", lambda draw: draw.file("mine", files.holds(b"mine"))), 0.4
    ),
    **_RESULTS,
}

REPORT_OPTIONS = {
    "file": Option(
        lambda draw: draw.file("other.json", files.holds(b'{"schema": "other/1"}')),
        (
            "absent.json",
            ".",
            lambda draw: draw.file("empty.json", files.holds(b"")),
            lambda draw: draw.file("half.json", files.holds(b'{"schema": "kvmdp.bench/1", "contenders": [')),
            lambda draw: draw.file("list.json", files.holds(b"[1, 2]\n")),
            lambda draw: draw.file("bytes.json", files.holds(bytes(range(256)))),
        ),
        1,
    ),
    "--report": COMPARE_OPTIONS["--report"],
}

PROBE_OPTIONS = {"--json": Option(document, NO_OUTPUT, 0.7)}
