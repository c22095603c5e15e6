"""Proving traps: a trap that is broken in any way is told so, and never chosen."""

import errno
import os

import pytest
from harness import BACKINGS, MEMORY, TRAPS, require_trap

from kvmdp.errors import UnsupportedError
from kvmdp.lab import probe
from kvmdp.lab.probe import (
    ACCESSES,
    choose_trap,
    exit_traps,
    prove,
    userfaultfd_facts,
    working_traps,
    works,
)
from kvmdp.source.request import FetchRequest
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap import registry
from kvmdp.trap.slots.mmio import MmioTrap

pytestmark = [pytest.mark.kvm, pytest.mark.hugepage_pool]


class NeverTraps(MmioTrap):
    """All of RAM is plain memory, as if nothing had been armed."""

    def arm(self, presence):
        self._slots.map_plain()


def put_in_place_of_mmio(monkeypatch, trap):
    monkeypatch.setitem(registry.TRAPS, "mmio", trap)


class FilledBefore(NeverTraps):
    """The same on memory that happens to hold what the source has: right bytes, and no proof of anything."""

    def arm(self, presence):
        super().arm(presence)
        SyntheticSource(probe._MEMORY, probe._SEED).fetch(FetchRequest(0), self.fill_view)


@pytest.fixture(autouse=True)
def prove_afresh():
    """Proofs are kept for the life of the process: not those of a host that a test has broken."""
    probe.proofs.cache_clear()
    yield
    probe.proofs.cache_clear()


@pytest.fixture
def broken(monkeypatch):
    """Return a function that makes a trap unavailable on this host."""

    def break_trap(trap, error):
        def cannot_be_made(_made_of):
            raise error

        monkeypatch.setattr(registry.TRAPS[trap], "make", cannot_be_made)

    return break_trap


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_proven_for_each_kind_of_access(trap, backing, access):
    require_trap(trap)
    proof = prove(trap, backing, access)
    assert proof.error == ""
    assert proof.ok
    assert proof.access == access
    assert "io" not in proof.exits
    assert sum(proof.exits.values()) >= 1


@pytest.mark.parametrize("access", ACCESSES)
def test_a_trap_that_never_traps_is_found_out(access, monkeypatch):
    put_in_place_of_mmio(monkeypatch, NeverTraps)
    proof = prove("mmio", "memfd", access)
    assert not proof.ok
    assert proof.exits == {}
    assert proof.error


@pytest.mark.parametrize("access", ["read", "write", "atomic", "vector"])
def test_right_bytes_without_a_trap_are_no_proof(access, monkeypatch):
    put_in_place_of_mmio(monkeypatch, FilledBefore)
    proof = prove("mmio", "memfd", access)
    assert proof.exits == {}
    assert proof.error == "no access trapped: the guest ran on memory that was never filled"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnsupportedError("no such thing: get one"), "no such thing: get one"),
        (OSError(errno.EINVAL, os.strerror(errno.EINVAL)), "Invalid argument"),
    ],
)
def test_a_trap_that_cannot_be_made_is_a_finding_not_an_error(error, reason, broken):
    broken("mmio", error)
    proof = prove("mmio", "memfd", "read")
    assert (proof.ok, proof.error, proof.exits) == (False, reason, {})


def test_auto_takes_the_first_that_works(broken):
    working = [trap for trap in working_traps("memfd") if trap in exit_traps()]
    assert "mmio" in working
    for trap in working[:-1]:
        assert choose_trap("memfd", MEMORY) == trap
        broken(trap, UnsupportedError(f"no {trap} today"))
        probe.proofs.cache_clear()
        assert not works(trap, "memfd")
    assert choose_trap("memfd", MEMORY) == working[-1]


def test_auto_takes_layered_for_large_memory_that_is_shared(broken):
    if not works("layered", "memfd"):
        pytest.skip("layered does not work here: use Linux 6.18 or later")
    assert choose_trap("memfd", 8 << 30) == "layered"
    assert choose_trap("memfd", (8 << 30) - 4096) != "layered"
    assert choose_trap("anonymous", 8 << 30) != "layered"
    broken("layered", UnsupportedError("no layered today"))
    probe.proofs.cache_clear()
    assert choose_trap("memfd", 8 << 30) != "layered"


def test_where_no_trap_works_each_reason_is_told(broken):
    for trap in exit_traps():
        broken(trap, UnsupportedError(f"no {trap} today"))
    with pytest.raises(UnsupportedError) as caught:
        choose_trap("memfd", MEMORY)
    message = str(caught.value)
    assert message.startswith("no trap works on this host (")
    assert message.endswith("): kvmdp probe says what would help")
    for trap in exit_traps():
        assert f"{trap}: no {trap} today" in message


def test_the_reason_told_is_the_first_access_that_failed(monkeypatch):
    real = probe.prove

    def prove_all_but_atomic(trap, backing, access):
        if access == "atomic":
            return probe.Proof(access, {}, f"increments were lost under {trap}")
        return real("mmio", backing, access)

    monkeypatch.setattr(probe, "prove", prove_all_but_atomic)
    with pytest.raises(UnsupportedError, match="mmio: increments were lost under mmio"):
        choose_trap("memfd", MEMORY)


def test_an_unknown_backing_is_told_which_there_are():
    with pytest.raises(ValueError, match="there is no backing 'paper': choose from memfd, anonymous"):
        choose_trap("paper", MEMORY)


def test_facts_about_userfaultfd_agree_with_each_other():
    facts = userfaultfd_facts()
    assert facts["kernel_faults"] <= facts["available"]
    assert facts["available"] or not facts["features"]
    assert bool(facts["error"]) is not facts["kernel_faults"]
