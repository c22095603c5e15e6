"""One cell of a table that fails, one contender's run, is one cell: the rest is measured, printed and written."""

import json
import subprocess

import pytest
from command import kvmdp
from report_documents import bench

from kvmdp.bench.comparison import Comparison
from kvmdp.bench.contender import contender
from kvmdp.bench.losses import Losses
from kvmdp.bench.report.results import from_bench
from kvmdp.bench.report.table import table
from kvmdp.bench.work import Work
from kvmdp.errors import PagingError, UnsupportedError
from kvmdp.lab import coverage, probe
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.shortage import ShortageError
from kvmdp.source.base import SourceError

needs_kvm = pytest.mark.kvm
BENCH = ("-b", "2M", "--warm-up", "0", "present", "mmio", "marker")

ERRORS = [
    (PagingError("no page"), "no page"),
    (GuestError("no guest"), "no guest"),
    (
        SourceError("the image", 0, 4096, "no source"),
        "cannot read 4096 bytes at offset 0x0 of the image: no source",
    ),
    (OSError(28, "No space left on device"), "No space left on device"),
    (ZeroDivisionError("by zero"), "internal error: ZeroDivisionError('by zero')"),
    (ShortageError("no memory"), "no memory"),
]


def raising(error):
    def attempt(*_arguments, **_options):
        raise error

    return attempt


@needs_kvm
@pytest.mark.parametrize(("error", "reason"), ERRORS)
def test_a_cell_of_the_coverage(monkeypatch, error, reason):
    monkeypatch.setattr(coverage, "run_workload", raising(error))
    found = coverage.run_cell("read", "mmio")
    assert (found.seen, found.exact, found.ok, found.note) == (coverage.Seen.MISSED, False, False, reason)


def test_a_host_that_is_too_busy_for_the_process_that_touches_memory(monkeypatch):
    monkeypatch.setattr(coverage, "_TOUCH", "import time; time.sleep(1000)")
    monkeypatch.setattr(coverage, "_CHILD_TIMEOUT", 0.1)
    found = coverage.run_cell("user touch", "mmio")
    assert (found.ok, found.note) == (False, "the process that was to touch it had not ended within 0.1 s")


@pytest.mark.parametrize(
    ("status", "stderr", "reason"),
    [
        (1, b"", "the touch failed: exit status 1"),
        (1, b"Traceback\n\xff: no", "the touch failed: \N{REPLACEMENT CHARACTER}: no"),
        (0, b"", "internal error: JSONDecodeError"),
    ],
)
def test_a_process_that_touches_memory_and_says_nothing_of_use(monkeypatch, status, stderr, reason):
    monkeypatch.setattr(coverage, "_TOUCH", f"import os; os.write(2, {stderr!r}); os._exit({status})")
    assert coverage.run_cell("user touch", "mmio").note.startswith(reason)


@needs_kvm
def test_the_coverage_of_all_other_cells():
    prelude = """
from kvmdp.lab import coverage
for access in {*coverage.ACCESSES} - {"read", "user touch"}:
    del coverage.ACCESSES[access]
coverage._TOUCH = "import time; time.sleep(1000)"
coverage._CHILD_TIMEOUT = 0.1
"""
    done = kvmdp("compare", "--coverage", prelude=prelude)
    assert done.status == 1
    assert "user touch: the process that was to touch it had not ended within 0.1 s" in done.out
    document = kvmdp("compare", "--coverage", "--json", "-", prelude=prelude).document
    seen = {(cell["access"], cell["trap"]): cell["exact"] for cell in document["cells"]}
    assert seen["read", "mmio"] is True
    assert seen["user touch", "mmio"] is False


@needs_kvm
@pytest.mark.parametrize(("error", "reason"), ERRORS)
def test_a_cell_of_the_probe(monkeypatch, error, reason):
    monkeypatch.setattr(probe, "run_workload", raising(error))
    found = probe.prove("mmio", "memfd", "read")
    assert (found.status, found.error) == ("failed", reason)


@pytest.mark.parametrize(("error", "reason"), ERRORS)
def test_a_loss_is_noted_with_its_reason(error, reason):
    losses = Losses()
    assert losses.spare("mmio", raising(error)) is None
    assert losses.spare("marker", lambda: 5) == 5
    assert (losses.skipped, losses.failed) == ({}, {"mmio": reason})


def test_what_this_host_lacks_is_no_failure():
    losses = Losses()
    assert losses.spare("mmio", raising(UnsupportedError("lacking"))) is None
    assert (losses.skipped, losses.failed) == ({"mmio": "lacking"}, {})


def test_an_interruption_is_no_loss():
    with pytest.raises(KeyboardInterrupt):
        Losses().spare("mmio", raising(KeyboardInterrupt()))


# A contender whose second run fails.
SECOND_RUN = """
from kvmdp.bench import comparison
from kvmdp.errors import PagingError
runs, measure = [], comparison.measure
def failing(contender, **options):
    runs.append(contender.name)
    if runs.count("mmio") == 2:
        runs.append("mmio")
        raise PagingError("the page went away")
    return measure(contender, **options)
comparison.measure = failing
"""


@needs_kvm
def test_a_contender_of_a_bench(tmp_path):
    target = tmp_path / "result.json"
    done = kvmdp("bench", "--rounds", 3, *BENCH, "--json", target, prelude=SECOND_RUN)
    assert done.status == 1
    assert "FAILED mmio: the page went away" in done.err
    document = json.loads(target.read_text())
    assert {each["name"]: len(each["rounds"]) for each in document["contenders"]} == {
        "present": 3,
        "marker": 3,
    }
    assert (document["complete"], document["failed"]) == (False, {"mmio": "the page went away"})
    report = kvmdp("report", target)
    assert report.status == 0
    assert "mmio failed, 1 vCPU, no network latency: the page went away" in report.out


@needs_kvm
def test_a_contender_at_one_place_of_a_comparison(tmp_path):
    target = tmp_path / "result.json"
    options = ("-v", "1", "--latencies", "0,200us", "--rounds", "2", "--memory-sizes", "none")
    done = kvmdp("compare", *options, *BENCH, "--json", target, prelude=SECOND_RUN)
    assert done.status == 1
    assert "FAILED mmio, 1 vCPU, no network latency: the page went away" in done.err
    assert "mmio failed, 1 vCPU, no network latency: the page went away" in done.out
    document = json.loads(target.read_text())
    ran = [[each["name"] for each in one["contenders"]] for one in document["benches"]]
    assert ran == [["present", "marker"], ["present", "mmio", "marker"]]
    assert [each["contender"] for each in document["failed"]] == ["mmio"]


@needs_kvm
def test_the_memory_of_one_contender():
    prelude = """
from kvmdp.bench import memorycost
from kvmdp.errors import PagingError
memory_cost = memorycost.memory_cost
def failing(contender):
    if contender.name == "mmio":
        raise PagingError("the page went away")
    return memory_cost(contender)
memorycost.memory_cost = failing
"""
    done = kvmdp("bench", "--memory-cost", "-b", "2M", "present", "mmio", "marker", prelude=prelude)
    assert done.status == 1
    assert "FAILED mmio: the page went away" in done.err
    assert "PARTIAL" in done.out
    assert "marker" in done.out


@needs_kvm
def test_the_floor_and_the_device_of_a_comparison(monkeypatch):
    from kvmdp.bench import comparison
    from kvmdp.bench.access import AccessCosts

    monkeypatch.setattr(comparison, "floor", raising(PagingError("no floor")))
    monkeypatch.setattr(AccessCosts, "take_turn", raising(subprocess.TimeoutExpired("device", 60)))
    work = Work(bytes_per_vcpu=2 << 20)
    measured = Comparison(
        work, [contender(name, work) for name in ("present", "marker")], 1, device=AccessCosts()
    )
    measured.run(0, lambda *_: None)
    document = measured.document()
    assert [each["name"] for each in document["contenders"]] == ["present", "marker"]
    assert document["failed"].keys() == {"floor of marker", "device"}
    assert document["complete"] is False


def test_the_report_of_a_bench_names_what_failed():
    document = from_bench(
        bench(1, 0.0, ("marker", "userfaultfd")) | {"failed": {"mmio": "the page went away"}}
    )
    assert "mmio failed, 1 vCPU, no network latency: the page went away" in table(document)
