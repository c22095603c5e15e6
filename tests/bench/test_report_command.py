"""`kvmdp report`: what it reads, what it says, its exit status."""

import argparse
import json

import pytest
from report_documents import bench, comparison, host, trace

from kvmdp.cli.output import UsageError
from kvmdp.cli.report import add_parser

NAMES = ("present", "marker", "userfaultfd")


def report(*arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    options = parser.parse_args(["report", *map(str, arguments)])
    return options.run(options)


def trace_text(*names):
    text = []
    for name in names:
        made = trace(name)
        header = {
            "schema": "kvmdp.trace/1",
            "contender": name,
            "vcpus": 2,
            "memory_bytes": made["memory_bytes"],
        }
        text += [json.dumps(each) for each in [header, *made["records"]]]
    return "\n".join(text) + "\n"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "input"


def test_a_comparison(file, tmp_path, capsys):
    file.write_text(json.dumps(comparison((1, 2), (0.0,), NAMES)))
    assert report(file, "--report", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert "no network latency" in out
    assert "undecided  Matlack: Under userfaultfd a HugeTLB page" in out
    assert err == f"report written: {tmp_path}/out/index.html\n"
    assert "The claims of the RFC" in (tmp_path / "out" / "index.html").read_text()


def test_claims_in_the_file_are_kept(file, capsys):
    claim = {"who": "Xu", "claim": "A claim.", "verdict": "weakened", "why": "A reason."}
    file.write_text(json.dumps(comparison((1,), (0.0,), NAMES) | {"claims": [claim]}))
    assert report(file) == 0
    assert capsys.readouterr().out.endswith("weakened   Xu: A claim.\n             A reason.\n")


def test_a_report_made_of_a_reports_own_document_is_the_same(file, tmp_path):
    file.write_text(json.dumps(comparison((1,), (0.0,), NAMES)))
    assert report(file, "--report", tmp_path / "one") == 0
    assert report(tmp_path / "one" / "compare.json", "--report", tmp_path / "two") == 0
    assert (tmp_path / "one" / "index.html").read_bytes() == (tmp_path / "two" / "index.html").read_bytes()


def test_a_bench(file, tmp_path, capsys):
    file.write_text(json.dumps(bench(2, 30e-6, NAMES), indent=2))
    assert report(file, "--report", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "30 us network latency" in out
    assert "No traced run" not in out
    assert "Matlack" not in out
    assert (tmp_path / "out" / "cpu.csv").exists()


def test_a_trace_of_two_runs(file, tmp_path, capsys):
    file.write_text(trace_text("marker", "mmio"))
    assert report(file, "--report", tmp_path / "out") == 0
    out = capsys.readouterr().out
    faults = len(trace("marker")["records"])
    assert f"marker, 2 vCPUs: {faults} faults, " in out
    assert "mmio, 2 vCPUs: " in out
    assert "vcpu 0 " in out
    assert (tmp_path / "out" / "fault-map-2.svg").exists()
    assert not (tmp_path / "out" / "cpu.csv").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "its JSON is no object"),
        ("{}", "its schema is None"),
        ('{"schema": "kvmdp.run/1"}', r"its schema is 'kvmdp\.run/1', not kvmdp\.compare/1"),
        ('{"schema": "kvmdp.bench/1"}', "there is no 'version'"),
        ('{"schema": "kvmdp.compare/1"}', "there is no 'benches'"),
        ('{"schema": "kvmdp.trace/1"}', "there is no 'trap'"),
        ('{"schema": "kvmdp.trace/1"}\n[1, 2', "line 2 of the trace is not JSON"),
        ('{"schema": "kvmdp.trace/1"}\n[1, 2]', "line 2 of the trace is neither"),
        (json.dumps(comparison((1,), (0.0,), NAMES) | {"host": 5}), "not as a report needs it"),
        (json.dumps(comparison((1,), (0.0,), NAMES) | {"memory": [{}]}), "there is no"),
        ("[" * 100_000, "not as a report needs it"),
    ],
)
def test_what_no_report_can_be_made_of_is_refused_in_a_sentence(file, tmp_path, text, reason):
    file.write_text(text)
    with pytest.raises(UsageError, match=reason) as caught:
        report(file, "--report", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bytes_that_are_no_text(file):
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a text file"):
        report(file)


def test_an_absent_file(file):
    with pytest.raises(UsageError, match="No such file"):
        report(file)


def test_a_folder_that_is_not_ours(file, tmp_path):
    file.write_text(json.dumps(bench(1, 0.0, NAMES)))
    other = tmp_path / "other"
    other.mkdir()
    (other / "somebody's").touch()
    with pytest.raises(UsageError, match="holds no report of kvmdp"):
        report(file, "--report", other)
    with pytest.raises(UsageError, match="lies in the folder --report"):
        report(file, "--report", tmp_path)


def test_host_facts_and_vcpus_of_a_trace_are_optional(file, tmp_path, capsys):
    header = {"schema": "kvmdp.trace/1", "trap": "marker", "memory_bytes": 4096}
    record = '[10.5,0,4096,"vcpu",3.25,1]'
    file.write_text(f"{json.dumps(header)}\n{record}\n")
    assert report(file, "--report", tmp_path / "one") == 0
    assert capsys.readouterr().out.startswith("marker: 1 faults, 1 pages present\n")
    file.write_text(f"{json.dumps(header | {'vcpus': 4, 'host': host(), 'version': '1.2'})}\n{record}\n")
    assert report(file, "--report", tmp_path / "two") == 0
    assert capsys.readouterr().out.startswith("marker, 4 vCPUs: 1 faults")
    page = (tmp_path / "two" / "index.html").read_text()
    assert "Made-up CPU" in page
    assert "kvmdp 1.2." in page
