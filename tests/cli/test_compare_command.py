"""`kvmdp compare`: what it measures, writes and says, and how it ends."""

import json
import re
import signal

import pytest
from command import Running, kvmdp

needs_kvm = pytest.mark.kvm
TINY = ("-b", "2M", "--rounds", "1", "--warm-up", "0", "--memory-sizes", "2M")


@needs_kvm
@pytest.mark.userfaultfd
def test_a_comparison_is_one_document_a_page_and_a_table(tmp_path):
    report, target, trace = tmp_path / "report", tmp_path / "result.json", tmp_path / "trace"
    done = kvmdp(
        "compare", *TINY, "-v", "1,2", "--latencies", "0,200us", "--report", report, "--json", target,
        "--trace", trace, "present", "marker", "userfaultfd",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 100
    assert "PARTIAL" not in done.out
    document = json.loads(target.read_text())
    assert document["schema"] == "kvmdp.compare/1"
    assert document["complete"] is True
    places = [
        (each["options"]["vcpus"], round(1e6 * each["options"]["latency"])) for each in document["benches"]
    ]
    assert places == [(1, 0), (2, 0), (1, 200), (2, 200)]
    assert [sorted(each["faults"] for one in bench["contenders"] for each in one["rounds"]) for bench in
            document["benches"]] == [[0, 512, 512], [0, 1024, 1024]] * 2  # fmt: skip
    assert list(document["traces"]) == ["marker", "userfaultfd"]
    assert [row["contender"] for row in document["memory"]] == ["present", "marker", "userfaultfd"]
    assert all(each["verdict"] in done.out for each in document["claims"])
    headers = [json.loads(line) for line in trace.read_text().splitlines() if line.startswith("{")]
    assert {header["contender"] for header in headers} == {"present", "marker", "userfaultfd"}
    page = (report / "index.html").read_text()
    assert json.loads((report / "compare.json").read_text()) == document
    assert not re.search(r"http|<script|<link|src=", page)


@needs_kvm
def test_an_interruption_leaves_what_was_measured_marked_partial(tmp_path):
    report, target = tmp_path / "report", tmp_path / "result.json"
    arguments = ("-b", "2M", "--rounds", "10000", "-v", "1", "--report", report, "--json", target)
    with Running("compare", *arguments, "present", "marker") as command:
        command.wait_for_progress("round 2 of 10000")
        command.process.send_signal(signal.SIGINT)
        done = command.finish()
    assert done.status == 130
    assert "kvmdp: interrupted; what follows is partial" in done.err
    assert done.out.startswith("PARTIAL")
    document = json.loads(target.read_text())
    assert document["complete"] is False
    assert document["benches"][0]["contenders"][0]["rounds"]
    assert "<strong>Partial.</strong>" in (report / "index.html").read_text()


@needs_kvm
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-v", "0"], "--vcpus 0: the guest runs with 1 to 16 vCPUs"),
        (["-b", "3K"], "3K of guest memory is too little"),
        (["-b", "64G"], "of guest memory would be filled, and this host has"),
        (["-q"], "unrecognized arguments: -q"),
        (["-v", "1,,2"], "--vcpus 1,,2: '' is not a whole number"),
        (["--latencies", "fast"], "'fast' is not a latency"),
        (["--rounds", "0"], "--rounds 0: give at least 1"),
        (["marker"], "marker alone is no comparison"),
        (["marker", "marker"], "marker is named twice"),
        (["marker", "mmio:vcpus=2"], "the comparison sets vcpus and latency"),
        (["marker", "mmio:granule=3K"], "a granule of 3K: give a power of two"),
        (["--report", ""], "that folder is not empty and holds no report of kvmdp"),
        (["--report", "/"], "that folder is not empty and holds no report of kvmdp"),
        (["--json", "/nonexistent/file"], "--json /nonexistent/file: there is no directory"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(arguments, sentence):
    done = kvmdp("compare", *arguments)
    assert done.status == 2
    assert sentence in done.error
    assert done.err.count("\n") == 1
