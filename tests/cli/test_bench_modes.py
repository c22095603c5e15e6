"""`kvmdp bench --huge` and `--memory-cost`: what a user sees of them."""

import json

import pytest
from command import kvmdp

HUGE = ("--huge", "-b", "2M", "--rounds", "1", "--warm-up", "0")


@pytest.mark.kvm
@pytest.mark.userfaultfd
@pytest.mark.hugepages
def test_exits_fetch_4k_on_huge_pages_and_userfaultfd_whole_ones(tmp_path):
    file, bounds = tmp_path / "huge.json", tmp_path / "bounds.toml"
    bounds.write_text(
        '[[bound]]\nmetric = "sparse.30us.first_bytes"\ncontender = "memory-fault"\nmax = 4096\n'
        '[[bound]]\nmetric = "sparse.none.fetched_bytes"\na = "mmio"\nb = "userfaultfd"\nmax = 0.001\n'
    )
    arguments = ("--reserve-hugepages", "--json", str(file), "--check", str(bounds))
    done = kvmdp("bench", *HUGE, *arguments)
    assert done.status == 1
    assert "ok: sparse.30us.first_bytes of memory-fault: at most 4096; measured 4096" in done.err
    assert "FELL SHORT: sparse.none.fetched_bytes of mmio / userfaultfd" in done.err
    assert max(map(len, done.out.splitlines())) <= 100
    document = json.loads(file.read_text())
    assert (document["schema"], document["complete"]) == ("kvmdp.bench-huge/1", True)
    assert document["touches"] == {"sparse": 4, "full": 512}
    found = {
        each["name"]: [
            tuple(
                each[workload]["30us-10Gbit"][figure]["median"]
                for figure in ("first_bytes", "fetched_bytes", "faults")
            )
            for workload in ("sparse", "full")
        ]
        for each in document["contenders"]
    }
    by_pages, whole = [(4096, 4 * 4096, 4), (4096, 2 << 20, 512)], [(2 << 20, 2 << 20, 1)] * 2
    assert found == {"memory-fault": by_pages, "mmio": by_pages, "marker": whole, "userfaultfd": whole}


@pytest.mark.kvm
@pytest.mark.userfaultfd
def test_page_tables_of_the_views_and_memslots_are_told_apart(tmp_path):
    file = tmp_path / "memory.json"
    done = kvmdp("bench", "--memory-cost", "-b", "16M", "--json", str(file), "marker", "mmio", "userfaultfd")
    assert done.status == 0
    assert max(map(len, done.out.splitlines())) <= 100
    document = json.loads(file.read_text())
    assert (document["schema"], document["complete"]) == ("kvmdp.bench-memory/1", True)
    rows = {row["name"]: row for row in document["contenders"]}
    assert [row["bitmap_bytes"] for row in rows.values()] == [512] * 3
    # A table of 4 KiB maps 2 MiB; one at either end may be shared with what lies next to the view.
    for name, least in (("marker", 24), ("mmio", 0), ("userfaultfd", 0)):
        armed, full = rows[name]["armed"], rows[name]["full"]
        assert least <= armed["guest_view_kib"] <= (40 if least else 8)
        assert armed["vmm_view_kib"] <= 8
        assert 24 <= full["guest_view_kib"] <= 44
        assert 24 <= full["vmm_view_kib"] <= 44


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--huge", "-s", "memfd"], "--huge is about huge pages, which memfd memory has none of"),
        (["--huge", "--reserve-hugepages", "present"], "present has no faults"),
        (["--huge", "--reserve-hugepages", "marker:vcpus=2"], "with --huge all contenders do the same work"),
        (["--huge", "--latency", "30us"], "--latency with --huge"),
        (["--huge", "-b", "3M"], "not whole huge pages"),
        (["--memory-cost", "--touches", "3"], "--touches with --memory-cost"),
        (["--huge", "--memory-cost"], "not allowed with"),
        (["--backing", "paper"], "-s paper: there is shmem"),
        (["--reserve-hugepages"], "memfd memory needs no reservation"),
    ],
)
def test_what_a_mode_cannot_do_is_refused_in_one_sentence(arguments, sentence):
    done = kvmdp("bench", *arguments)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert sentence in done.err


@pytest.mark.kvm
def test_too_few_huge_pages_are_said_to_be_missing():
    done = kvmdp("bench", "--huge", "-b", "256G", "memory-fault")
    assert done.status == 4
    assert "reserve them (echo " in done.err


@pytest.mark.kvm
def test_an_ordinary_comparison_says_what_arming_and_memory_took(tmp_path):
    file = tmp_path / "bench.json"
    done = kvmdp(
        "bench", "-b", "2M", "--rounds", "1", "--warm-up", "0", "--json", str(file), "present", "mmio"
    )
    assert done.status == 0
    present, mmio = json.loads(file.read_text())["contenders"]
    assert present["latency_us"]["p99_over_p50"] is None
    assert mmio["latency_us"]["p99_over_p50"] >= 1
    assert mmio["arm_ms"]["median"] > 0
    assert mmio["memory"]["beyond_touched_kib"] >= mmio["memory"]["resident_beyond_kib"] >= 0
    assert "beyond MiB" in done.out
