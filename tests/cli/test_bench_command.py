"""`kvmdp bench`: what a user sees of a measurement, and of a command line that makes no sense."""

import json
import re

import pytest
from command import kvmdp

needs_kvm = pytest.mark.kvm


@needs_kvm
@pytest.mark.userfaultfd
def test_contenders_take_turns_and_the_result_is_one_document(tmp_path):
    trace = tmp_path / "trace"
    done = kvmdp(
        "bench", "-b", "2M", "--rounds", "2", "--json", "-", "--trace", str(trace),
        "present", "marker", "userfaultfd", "userfaultfd-r2:vcpus=2",
    )  # fmt: skip
    assert done.status == 0
    document = json.loads(done.out)
    assert document["schema"] == "kvmdp.bench/1"
    assert document["complete"] is True
    assert [each["name"] for each in document["contenders"]] == [
        "present", "marker", "userfaultfd", "userfaultfd-r2:vcpus=2",
    ]  # fmt: skip
    present, marker, _, two = document["contenders"]
    assert [one["faults"] for one in present["rounds"]] == [0, 0]
    assert [one["faults"] for one in marker["rounds"]] == [512, 512]
    assert [one["pages"] for one in two["rounds"]] == [1024, 1024]
    assert sum(marker["latency_us"]["buckets"]) == 1024
    assert len(marker["latency_us"]["buckets"]) == 24
    assert document["floor_us"]["marker"]["median"] > 0
    assert document["floor_us"]["userfaultfd"] is None
    ratios = {(row["a"], row["b"]) for row in document["ratios"] if row["metric"] == "pages_per_second"}
    assert len(ratios) == 4 * 3
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    headers = [line for line in lines if isinstance(line, dict)]
    assert headers[1] == {
        "schema": "kvmdp.trace/1",
        "version": document["version"],
        "contender": "marker",
        "trap": "marker",
        "vcpus": 1,
        "memory_bytes": 2 << 20,
    }
    assert headers[3]["vcpus"] == 2
    assert sum(isinstance(line, list) for line in lines) == 512 + 512 + 1024


@needs_kvm
@pytest.mark.userfaultfd
def test_device_views_take_part_and_a_device_thread_is_told_apart(tmp_path):
    trace = tmp_path / "trace"
    done = kvmdp(
        "bench", "-b", "2M", "--rounds", "2", "--json", "-", "--trace", str(trace),
        "mmio:device-view", "memory-fault:device-view,device=512", "mmio:device=64",
    )  # fmt: skip
    assert done.status == 0
    with_view, with_device, mmio = json.loads(done.out)["contenders"]
    assert [each["trap"] for each in (with_view, with_device, mmio)] == ["mmio", "memory-fault", "mmio"]
    assert with_view["device"] is None
    assert 0 < with_device["device"]["pages"] <= 2 * 512
    assert sum(with_device["device"]["latency_us"]["buckets"]) == with_device["device"]["pages"]
    assert 0 < mmio["device"]["pages"] <= 2 * 64
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    origins = {line[3] for line in lines if isinstance(line, list)}
    assert {"vcpu 0", "device"} <= origins


@needs_kvm
@pytest.mark.userfaultfd
@pytest.mark.parametrize(("kind", "backing"), [("shmem", "memfd"), ("anonymous", "anonymous")])
def test_missing_faults_alone_are_measured_on_either_memory(kind, backing):
    done = kvmdp("bench", "-b", "2M", "--rounds", "1", "-u", "MISSING", "-s", kind, "--json", "-")
    assert done.status == 0
    document = json.loads(done.out)
    assert (document["options"]["backing"], document["options"]["uffd_mode"]) == (backing, "missing")
    assert document["contenders"][0]["rounds"][0]["faults"] == 512


@needs_kvm
@pytest.mark.userfaultfd
def test_missing_and_minor_faults_take_turns_on_shared_memory():
    done = kvmdp("bench", "-b", "2M", "--rounds", "1", "--json", "-", "userfaultfd-missing", "userfaultfd")
    assert done.status == 0
    assert [each["rounds"][0]["faults"] for each in json.loads(done.out)["contenders"]] == [512, 512]


def test_each_contender_has_the_lines_of_demand_paging_test():
    done = kvmdp("bench", "-b", "2M", "--rounds", "1", "--warm-up", "0", "present", "mmio")
    assert done.status == 0
    found = re.findall(
        r"^(\S+)\nTotal guest execution time:\t[0-9.]+s\nPer-vcpu demand paging rate:\t[0-9.]+ pgs/sec/vcpu\n"
        r"Overall demand paging rate:\t[0-9.]+ pgs/sec$",
        done.out,
        re.MULTILINE,
    )
    assert found == ["present", "mmio"]


@needs_kvm
def test_a_bound_that_does_not_hold_is_named_and_fails(tmp_path):
    bounds = tmp_path / "bounds.toml"
    bounds.write_text(
        '[[bound]]\nmetric = "pages_per_second"\na = "marker"\nb = "present"\nmax = 1000\n'
        '[[bound]]\nmetric = "memory.memslots"\ncontender = "marker"\nmin = 100\n'
    )
    done = kvmdp("bench", "-b", "2M", "--rounds", "1", "--check", str(bounds), "present", "marker")
    assert done.status == 1
    assert "FELL SHORT: memory.memslots of marker: at least 100; measured 1" in done.err
    assert "ok: pages_per_second of marker / present" in done.err


@needs_kvm
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-v", "0"], "0 vCPUs: the guest runs with 1 to 16"),
        (["-b", "3K"], "3K of guest memory is too little"),
        (["-q"], "unrecognized arguments: -q"),
        (["nonsense"], "there is no contender 'nonsense'"),
        (["marker", "marker"], "marker is named twice"),
        (["marker:colour=red"], "a contender has no 'colour'"),
        (["mmio:device-view,backing=anonymous"], "which cannot be done with anonymous memory"),
        (["hybrid-mmio"], "the trap hybrid-mmio is a device view beside another trap: give mmio:device-view"),
        (["marker:device-view"], "the trap marker has no device view"),
        (["present:device-view"], "has no trap that a device view could stand beside"),
        (["mmio:device-view=1"], "device-view takes no value: leave =1 out"),
        (["marker:vcpus"], "'marker:vcpus': vcpus has no value: give it one, as vcpus=2"),
        (["marker:latency="], "'marker:latency=': latency has no value: give it one, as latency=30us"),
        (["marker:vcpus=two"], "'marker:vcpus=two': vcpus: 'two' is not a whole number: give one, such as 2"),
        (["marker:vcpus=" + "9" * 5000], "is not a whole number"),
        (
            ["marker:bytes=much"],
            "'marker:bytes=much': bytes: 'much' is not a size: give a whole number of bytes",
        ),
        (["marker:backing=paper"], "there is no backing 'paper'"),
        (["-b", "2M", "mmio:device-view,device=513"], "a device cannot read 513 of 512 pages"),
        (["-b", "2M", "mmio:device-view,device=-1"], "a device cannot read -1 of 512 pages"),
        (["userfaultfd:uffd-mode=both"], "there is no userfaultfd mode 'both'"),
        (["userfaultfd:backing=anonymous,uffd-mode=minor"], "anonymous memory has no minor faults"),
        (["--trace", "-"], "--trace -: stdout has the result; give a file name"),
        (["-u", "MINOR", "-s", "anonymous"], "anonymous memory has no minor faults"),
        (["-r", "3"], "-a and -r go with -u"),
        (["--latency", "fast"], "'fast' is not a latency"),
        (["--rounds", "0"], "--rounds 0: give at least 1"),
        (["--check", "/nonexistent"], "--check /nonexistent: No such file or directory"),
        (["--granule", "0", "mmio"], "a granule of 0: give a power of two from 4K"),
        (["--granule", "", "mmio"], "'' is not a size"),
        (["mmio:granule=0"], "a granule of 0: give a power of two from 4K"),
        (["-b", ""], "'' is not a size"),
        (["-s", ""], "-s : there is shmem"),
        (["--check", "."], "--check . is neither a file nor a pipe"),
        (["-b", "2M", "--workload", "clock"], "the workload clock touches no page here to be measured"),
        (
            ["-b", "2M", "-c", "0", "marker:vcpus=2"],
            "'marker:vcpus=2' has 2 vCPUs, and -c names 1 of the host's CPUs: leave out -c or vcpus=",
        ),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused_in_one_sentence(arguments, sentence):
    done = kvmdp("bench", *arguments)
    assert done.status == 2
    assert done.err.startswith("kvmdp: ")
    assert sentence in done.err
    assert done.err.count("\n") == 1


def test_a_trap_that_is_switched_off_beside_a_guest_that_never_had_one():
    arguments = ("bench", "-b", "2M", "--rounds", 1, "--warm-up", 0, "present", "off-marker", "off-mmio")
    done = kvmdp(*arguments)
    assert done.status == 0
    assert "p99  x present" in done.out
    document = kvmdp(*arguments, "--json", "-").document
    for each in document["contenders"]:
        assert (each["trap"], each["rounds"][0]["pages"], each["rounds"][0]["faults"]) == (None, 512, 0)
        assert each["memory"]["memslots"] == 1
    pairs = {(row["a"], row["b"]) for row in document["ratios"]}
    assert {("off-marker", "present"), ("off-mmio", "present")} <= pairs
    assert kvmdp("bench", "off-hybrid-mmio").status == 2


@needs_kvm
def test_a_workload_that_needs_a_disk_has_one():
    done = kvmdp(
        *("bench", "-b", "2M", "--rounds", 1, "--warm-up", 0, "--workload", "disk", "--json", "-", "mmio")
    )
    assert done.status == 0
    assert done.document["contenders"][0]["rounds"][0]["faults"] > 0
