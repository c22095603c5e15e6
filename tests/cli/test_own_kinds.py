"""Kinds that a program has registered before it calls the command line: named and refused as the built-in ones are."""

import pytest
from command import kvmdp

pytestmark = pytest.mark.kvm

OWN = """
from kvmdp.machine.workloads import WORKLOADS, register as register_workload
from kvmdp.memory.backing import MemfdBacking
from kvmdp.memory.backings import register as register_backing
from kvmdp.source.registry import register as register_source
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.registry import register as register_trap
from kvmdp.trap.slots.mmio import MmioTrap

class OwnTrap(MmioTrap):
    name = "own-trap"

class OwnBacking(MemfdBacking):
    name = "own-backing"

class Nothing(WORKLOADS["checksum"]):
    name = "nothing"
    number = 0
    program = bytes.fromhex("31c0 31d2 c3")  # xor eax, eax; xor edx, edx; ret

    def expected_checksums(self, image):
        return [0] * self.options.vcpus

register_trap(OwnTrap)
register_backing(OwnBacking)
register_workload(Nothing)
register_source("own", lambda rest: SyntheticSource(int(rest) << 20, 5))
"""
RUN = ("run", "--trap", "own-trap", "--backing", "own-backing", "--image", "own:2", "--json", "-")


def test_they_run_together():
    done = kvmdp(*RUN, "--vcpus", "2", prelude=OWN)
    assert done.status == 0, done.err
    document = done.document
    assert (document["trap"], document["backing"], document["image"]) == ("own-trap", "own-backing", "own:2")
    assert document["ok"]
    assert document["memory_bytes"] == 2 << 20


def test_a_workload_brings_its_own_code():
    done = kvmdp(
        "run", "--workload", "nothing", "--memory", "2M", "--trap", "mmio", "--json", "-", prelude=OWN
    )
    assert done.status == 0, done.err
    assert done.document["workload"] == "nothing"
    assert done.document["pages_present"] == 0


def test_they_are_measured():
    own = ("bench", "-b", "2M", "--rounds", "1", "--warm-up", "0", "--workload", "nothing", "own-trap")
    done = kvmdp(*own, prelude=OWN)
    assert done.status == 0, done.err
    assert "own-trap" in done.out


def test_help_and_refusals_name_them():
    assert "own-trap" in kvmdp("run", "--help", prelude=OWN).out
    for option, name in (("--trap", "own-trap"), ("--workload", "nothing"), ("--backing", "own-backing")):
        done = kvmdp("run", option, "smoke", prelude=OWN)
        assert done.status == 2
        assert name in done.error
    done = kvmdp("run", "--image", "smoke:2", prelude=OWN)
    assert done.status == 2
    assert done.error.endswith("check the path, or choose from synthetic, own")


def test_what_is_said_of_files_does_not_go_with_them():
    done = kvmdp(*RUN, "--image-format", "raw", prelude=OWN)
    assert done.status == 2
    assert done.error == "--image-format is for files, and own:2 is none: leave it out"


def test_a_handler_serves_a_source_by_its_scheme_or_says_why_not():
    done = kvmdp("handler", "--listen", "/nowhere/socket", "--image", "own:x", prelude=OWN)
    assert done.status == 2
    assert "invalid literal" in done.error
