"""The terminal's table, and the lines of demand_paging_test."""

import re

import pytest
from report_documents import bench, comparison

from kvmdp.bench.claims import claims
from kvmdp.bench.report.table import claim_lines, lines, table

LONG = "userfaultfd-r4:vcpus=4,bytes=16M,fault-around=16"


def cells(text):
    return re.split(r"\s{2,}", text.strip())


@pytest.mark.parametrize(
    ("vcpus", "names"),
    [
        ((1, 2, 4), ("present", "marker", "userfaultfd-sharded", "userfaultfd")),
        ((1, 2, 4, 8, 16, 32), ("present", "memory-fault", LONG, "userfaultfd")),
        ((1,), ("marker",)),
    ],
)
def test_no_line_is_wider_than_100_columns(vcpus, names):
    document = comparison(vcpus, (0.0, 500e-6), names)
    printed = table(document) + claim_lines(document | {"claims": claims(document)})
    assert max(map(len, printed)) <= 100
    for count in vcpus:
        assert any(f"{count} vCPU" in line for line in printed)


def test_a_row_has_rate_ratio_and_own_cost_of_the_document():
    document = comparison((1, 2), (0.0,), ("present", "marker", "userfaultfd"))
    first, second = document["benches"]
    row = next(line for line in table(document) if line.startswith("marker"))

    def figures(each):
        ratio = next(r for r in each["ratios"] if r["a"] == "marker" and r["metric"] == "pages_per_second")
        return each["contenders"][1], f"{ratio['median']:.2f}"

    (one, ratio), (two, other) = figures(first), figures(second)
    assert cells(row) == [
        "marker",
        f"{one['pages_per_second']['median']:,.0f}",
        ratio,
        f"{one['own_cost_us']['median']:.1f}",
        f"{two['pages_per_second']['median']:,.0f}",
        other,
    ]
    assert cells(next(line for line in table(document) if line.startswith("floor of marker"))) == [
        "floor of marker",
        "100.0 us",
        "100.0 us",
    ]


def test_partial_and_missing_are_marked():
    document = comparison((1,), (0.0,), ("marker", "mmio", "userfaultfd"))
    measured = document["benches"][0]
    measured["complete"] = False
    measured["contenders"][0]["rounds"].pop()
    measured["skipped"] = {"layered": "needs another kernel"}
    document["benches"].append(bench(2, 0.0, ("marker", "userfaultfd")))
    printed = table(document)
    assert re.search(r"^marker +[\d,]+\* ", "\n".join(printed), re.MULTILINE)
    assert cells(next(line for line in printed if line.startswith("mmio")))[-2:] == ["-", "-"]
    assert "layered was skipped: needs another kernel" in printed
    assert "marker, 1 vCPU, no network latency: 4 of 5 rounds." in printed
    assert "Nothing was measured of mmio at 2 vCPUs, no network latency." in printed


def test_nothing_measured_gives_no_table():
    assert table(comparison((), (), ()) | {"memory": []}) == []


def test_the_lines_of_demand_paging_test_are_those_of_the_median_round():
    (entry,) = bench(2, 0.0, ("marker",))["contenders"]
    for seconds, each in zip((3.0, 1.0, 2.0, 5.0, 4.0), entry["rounds"], strict=True):
        each["seconds"], each["pages"] = seconds, 32768
    assert lines(entry) == [
        "marker",
        "Total guest execution time:\t3.000000000s",
        "Per-vcpu demand paging rate:\t5461.333333 pgs/sec/vcpu",
        "Overall demand paging rate:\t10922.666667 pgs/sec",
    ]


def test_of_two_rounds_in_the_middle_the_slower_one_is_printed():
    (entry,) = bench(1, 0.0, ("marker",), rounds=4)["contenders"]
    for seconds, each in zip((3.0, 1.0, 2.0, 5.0), entry["rounds"], strict=True):
        each["seconds"], each["pages"] = seconds, 3000
    assert lines(entry)[1:] == [
        "Total guest execution time:\t3.000000000s",
        "Per-vcpu demand paging rate:\t1000.000000 pgs/sec/vcpu",
        "Overall demand paging rate:\t1000.000000 pgs/sec",
    ]
