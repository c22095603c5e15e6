"""`kvmdp bench --device`: what memory costs a device."""

import json

import pytest
from command import kvmdp

pytestmark = pytest.mark.kvm

CALLS = ("slice_4k", "read_4k", "write_4k", "view_4k", "slice_8", "read_8", "load64", "store64")


def test_the_document_has_calls_faults_and_a_disk_and_bounds_are_held_against_them(tmp_path):
    file, bounds = tmp_path / "bench.json", tmp_path / "bounds.toml"
    bounds.write_text(
        '[[bound]]\nmetric = "device.read_4k_ratio"\nmin = 0\n'
        '[[bound]]\nmetric = "device.disk.bytes_per_second.in_process.present"\nmax = 1\n'
    )
    done = kvmdp(
        *("bench", "-b", "2M", "--rounds", "1", "--warm-up", "0", "--fault-around", "4", "--device"),
        *("--json", str(file), "--check", str(bounds), "present", "mmio", "marker:fault-around=1"),
    )
    assert done.status == 1
    assert "ok: device.read_4k_ratio: at least 0; measured " in done.err
    assert "FELL SHORT: device.disk.bytes_per_second.in_process.present: at most 1; measured " in done.err
    device = json.loads(file.read_text())["device"]
    for kind in CALLS:
        assert device[f"{kind}_us"]["median"] > 0
        assert f"\n{kind} " in done.out
    assert device["read_4k_ratio"]["median"] > 0
    faults = {each["name"]: each for each in device["faults"]}
    assert {name: each["faults"] for name, each in faults.items()} == {
        "mmio": 128,
        "marker:fault-around=1": 512,
    }
    for each in faults.values():
        assert sum(each["latency_us"]["buckets"]) == each["faults"]
    assert device["disk"]["trap"] == "mmio"
    for place in ("in_process", "out_of_process"):
        for state in ("present", "absent"):
            assert device["disk"]["bytes_per_second"][place][state]["median"] > 0
            assert f"\n{place.replace('_', ' ')}, {state} " in done.out


def test_without_the_option_nothing_of_it_is_measured(tmp_path):
    file = tmp_path / "bench.json"
    done = kvmdp(
        "bench", "-b", "2M", "--rounds", "1", "--warm-up", "0", "--json", str(file), "mmio", "present"
    )
    assert done.status == 0
    assert json.loads(file.read_text())["device"] is None
    assert "page absent" not in done.out
