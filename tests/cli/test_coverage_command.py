"""`kvmdp compare --coverage`: a table that fits the terminal, the same as JSON, and a status to rely upon."""

import json

import pytest
from command import kvmdp

pytestmark = pytest.mark.kvm

ACCESSES = [
    "read",
    "write",
    "fetch",
    "atomic",
    "vector",
    "string",
    "page walk",
    "emulator",
    "sgdt",
    "far call",
    "cs, flags",
    "event frame",
    "kvmclock page",
    "steal time",
    "device thread",
    "system call",
    "user touch",
]
SEEN = {"caught by exit", "taken back, run again", "caught by sleep", "completed by emulation", "missed"}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    target = tmp_path_factory.mktemp("coverage") / "coverage.json"
    finished = kvmdp("compare", "--coverage", "--json", target)
    return finished, json.loads(target.read_text())


def test_the_document_has_a_cell_for_each_access_and_trap(done):
    finished, document = done
    assert finished.status == 0
    assert document.keys() == {"schema", "ok", "host", "accesses", "traps", "skipped", "cells"}
    assert (document["schema"], document["ok"]) == ("kvmdp.coverage/1", True)
    assert document["accesses"] == ACCESSES
    assert document["traps"][:4] == ["marker", "memory-fault", "mmio", "userfaultfd"]
    run = [trap for trap in document["traps"] if trap not in document["skipped"]]
    assert "mmio" in run
    assert [(cell["access"], cell["trap"]) for cell in document["cells"]] == [
        (access, trap) for access in ACCESSES for trap in run
    ]
    for cell in document["cells"]:
        assert cell.keys() == {"access", "trap", "seen", "exits", "exact", "note"}
        assert cell["seen"] in SEEN
        # What KVM's emulator completes wrongly has a row and a note.
        is_known = cell["access"] in ("far call", "cs, flags") and cell["seen"] == "completed by emulation"
        assert cell["exact"] or cell["seen"] == "missed" or is_known
        assert cell["note"] or (cell["exact"] and cell["seen"] != "missed")
        assert cell["exits"] or cell["seen"] == "missed"


def test_the_table_says_the_same_in_100_columns(done):
    finished, document = done
    lines = finished.out.splitlines()
    assert max(map(len, lines)) <= 100
    seen = {(cell["access"], cell["trap"]): cell["seen"] for cell in document["cells"]}
    assert lines[2].split() == ["access", *document["traps"]]
    for line, access in zip(lines[3:], ACCESSES, strict=False):
        row = [seen.get((access, trap), "-") for trap in document["traps"]]
        assert line.split() == " ".join([access, *row]).split()
    text = " ".join(finished.out.split())
    for cell in document["cells"]:
        assert cell["note"] in text
    for trap, reason in document["skipped"].items():
        assert f"{trap} was skipped: {reason}" in text
    for trap in document["traps"]:
        cells = [cell for cell in document["cells"] if cell["trap"] == trap]
        caught = sum(cell["seen"] != "missed" for cell in cells)
        assert not cells or f"{trap} {caught} of {len(cells)}" in text


def test_progress_goes_to_stderr(done):
    finished, _ = done
    assert "device thread under mmio\n" in finished.err
    assert "device thread under mmio" not in finished.out


def test_json_alone_on_stdout():
    finished = kvmdp("compare", "--coverage", "--json", "-", prelude=_ONLY_READ)
    assert finished.status == 0
    assert [cell["access"] for cell in finished.document["cells"]][:1] == ["read"]


def test_an_access_that_was_to_be_caught_and_was_not_is_status_1():
    finished = kvmdp("compare", "--coverage", prelude=_ONLY_READ + _NEVER_TRAPS)
    assert finished.status == 1
    assert "FAILED: an access that must be caught was not" in finished.out


def test_a_file_that_cannot_be_written_is_said_before_anything_runs(tmp_path):
    finished = kvmdp("compare", "--coverage", "--json", tmp_path / "no" / "where.json")
    assert finished.status == 2
    assert "there is no directory" in finished.error
    assert finished.err.count("\n") == 1


_ONLY_READ = """
from kvmdp.lab import coverage
for access in list(coverage.ACCESSES):
    if access != "read":
        del coverage.ACCESSES[access]
"""
_NEVER_TRAPS = """
from kvmdp.trap.slots.mmio import MmioTrap
MmioTrap.arm = lambda trap, presence: trap._slots.map_plain()
"""
