"""`kvmdp probe`, and what both commands say where KVM is not to be had."""

import json
import subprocess
from pathlib import Path

import pytest
from command import NOBODY, WITHOUT_OVERRIDE, kvmdp

pytestmark = pytest.mark.hugepage_pool  # which a probe tries

ACCESSES = {"read", "write", "fetch", "atomic", "vector"}
HUGETLB = {"hugetlb-2m", "hugetlb-1g", "private-hugetlb-2m", "private-hugetlb-1g"}
BACKINGS = {"memfd", "anonymous", "guest-memfd", "file", *HUGETLB}


def _in_namespace(preparation):
    """Return a wrapper: the command sees a /dev of its own, which nobody else does."""
    return ("unshare", "--mount", "sh", "-c", f'{preparation} && exec "$@"', "sh")


NO_DEVICE = _in_namespace("mount -t tmpfs none /dev")
NOT_KVM = _in_namespace("mount --bind /dev/null /dev/kvm")
FORBIDDEN = (
    *_in_namespace(
        f"mount -t tmpfs none /dev && touch /dev/kvm && chmod 0 /dev/kvm && chown {NOBODY} /dev/kvm"
    ),
    *WITHOUT_OVERRIDE,
)
BROKEN_HOSTS = {
    "absent": (
        NO_DEVICE,
        "No such file or directory; this kernel offers no KVM: load kvm_intel",
    ),
    "not KVM": (NOT_KVM, "Inappropriate ioctl for device"),
    "forbidden": (
        FORBIDDEN,
        "Permission denied; no permission: add yourself to group kvm (sudo usermod -aG kvm $USER)",
    ),
}


@pytest.fixture
def own_namespace():
    """Skip where even root may not have a mount namespace, as in most containers."""
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no mount namespace ({tried.stderr.strip()}): run the tests outside a container")


@pytest.fixture(scope="module")
def document():
    done = kvmdp("probe", "--json", "-")
    assert done.status == 0
    assert done.err == ""
    return done.document


@pytest.mark.kvm
def test_the_document_says_what_the_host_is_and_can(document):
    assert document["schema"] == "kvmdp.probe/1"
    assert document["ok"] is True
    host = {name: type(value) for name, value in document["host"].items()}
    assert host == {
        "cpu": str,
        "cpus": int,
        "memory_bytes": int,
        "kernel": str,
        "kvm": str,
        "nested_paging": bool,
        "thp": str,
        "thp_shmem": str,
        "python": str,
    }
    assert document["host"]["cpus"] >= 1
    assert all(type(value) is int for value in document["capabilities"].values())
    assert document["capabilities"]["NR_MEMSLOTS"] >= 32
    assert {"available", "kernel_faults", "features", "error", "remedy"} == document["userfaultfd"].keys()
    assert all(
        pool.keys() == {"size_bytes", "total", "free"} and pool["total"] >= pool["free"] >= 0
        for pool in document["hugepages"]
    )


@pytest.mark.kvm
def test_a_trap_works_if_all_accesses_are_exact_on_some_backing(document):
    assert document["traps"].keys() == {"marker", "memory-fault", "mmio", "layered", "userfaultfd"}
    proven = []
    for trap, backings in document["traps"].items():
        assert backings.keys() == BACKINGS
        for accesses in backings.values():
            assert accesses.keys() == ACCESSES
            for proof in accesses.values():
                assert proof.keys() == {"ok", "status", "exits", "error"}
                assert proof["status"] in {"exact", "failed", "not run", "refused"}
                assert proof["ok"] is (proof["error"] == "") is (proof["status"] == "exact")
                slept = trap == "userfaultfd"
                assert not proof["ok"] or slept or sum(proof["exits"].values()) >= 1
        if trap != "userfaultfd" and any(
            {"exact"} <= {proof["status"] for proof in accesses.values()} <= {"exact", "not run"}
            for accesses in backings.values()
        ):
            proven.append(trap)
    assert document["working"] == proven
    assert "mmio" in proven, "any kernel can do it"


@pytest.mark.kvm
def test_each_trap_exits_in_its_own_way(document):
    own_exit = {"marker": "sigbus", "memory-fault": "memory_fault", "mmio": "mmio", "layered": "memory_fault"}
    for trap in document["working"]:
        for accesses in document["traps"][trap].values():
            assert not accesses["read"]["ok"] or accesses["read"]["exits"].get(own_exit[trap], 0) >= 1


def _statuses(document, trap, backing):
    return {proof["status"] for proof in document["traps"][trap][backing].values()}


@pytest.mark.kvm
@pytest.mark.parametrize("trap", ["marker", "userfaultfd"])
@pytest.mark.parametrize("backing", ["guest-memfd", "file"])
def test_what_userfaultfd_does_not_take_is_refused_and_is_nothing_missing(document, trap, backing):
    assert _statuses(document, trap, backing) == {"refused"}
    assert not any(f"{trap} on {backing}" in lack["what"] for lack in document["missing"])


@pytest.mark.kvm
@pytest.mark.root
@pytest.mark.hugepages
@pytest.mark.parametrize("backing", ["hugetlb-2m", "private-hugetlb-2m"])
def test_huge_pages_are_reserved_for_the_moment_by_who_may(document, backing):
    for trap in {*document["working"], "userfaultfd"} - {"layered"}:
        assert _statuses(document, trap, backing) == {"exact"}
    assert not [*Path("/run").glob("kvmdp/*")], "a record of a reservation that was not given back"


@pytest.mark.kvm
def test_a_proof_that_was_not_run_says_how_to_have_it_run(document):
    for trap, backings in document["traps"].items():
        for backing in backings:
            if _statuses(document, trap, backing) == {"not run"}:
                assert backing in HUGETLB
                (lack,) = (each for each in document["missing"] if f"proof on {backing}" in _all_proofs(each))
                assert "/nr_hugepages" in lack["remedy"]


def _all_proofs(lack):
    """What is lacking, with "proof on" before each backing."""
    return lack["what"].replace(" and ", " proof on ")


@pytest.mark.kvm
def test_what_is_missing_has_a_reason_and_huge_pages_a_command(document):
    for lack in document["missing"]:
        assert lack.keys() == {"what", "why", "remedy"}
        assert lack["what"]
        assert lack["why"]
    commands = {
        lack["what"].split()[0]: lack["remedy"]
        for lack in document["missing"]
        if "huge pages" in lack["what"]
    }
    for size, kib, enough in (("2M", 2048, 32), ("1G", 1048576, 1)):
        pools = [pool for pool in document["hugepages"] if pool["size_bytes"] == kib << 10]
        if pools and not pools[0]["total"]:
            words = commands[size].split()
            assert int(words[1]) >= enough
            assert words[-1] == f"/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages"
    for lack in document["missing"]:
        assert "nr_hugepages" not in lack["remedy"] or "needs root" in lack["why"]


@pytest.mark.kvm
def test_no_remedy_is_given_twice(document):
    remedies = [lack["remedy"] for lack in document["missing"] if lack["remedy"]]
    assert len(set(remedies)) == len(remedies)


@pytest.mark.kvm
def test_people_get_a_verdict_then_a_table_and_a_file_of_the_same(tmp_path):
    target = tmp_path / "probe.json"
    done = kvmdp("probe", "--json", target)
    assert (done.status, done.err) == (0, "")
    document = json.loads(target.read_text())
    verdict, _, heading, *rest = done.out.splitlines()
    assert verdict == document["verdict"]
    traps = list(document["traps"])
    assert heading.split() == ["backing", *traps]
    rows = {
        line.split()[0]: line.split()[1:]
        for line in rest[: rest.index(next(r for r in rest if "exact: " in r))]
    }
    assert rows["memfd"] == [
        "exact" if _statuses(document, trap, "memfd") == {"exact"} else "NO" for trap in traps
    ]
    assert not [name for name, cells in rows.items() if set(cells) <= {"-", "untested"}], "an empty row"
    assert sum(line.startswith("`-` marks an unsupported combination; ") for line in rest) == 1
    assert [*tmp_path.iterdir()] == [target]


@pytest.mark.kvm
def test_the_verdict_names_the_trap_that_a_run_takes(document):
    run = kvmdp("run", "--memory", "2M", "--json", "-")
    proven = {*document["working"]}
    if {"exact"} in [_statuses(document, "userfaultfd", backing) for backing in BACKINGS]:
        proven.add("userfaultfd")
    assert document["verdict"] == f"use {run.document['trap']}: {len(proven)} of 5 traps work here"


BROKEN_TRAP = """
from kvmdp.cli import probe
from kvmdp.lab import probe as lab
probe.BACKINGS = {name: probe.BACKINGS[name] for name in ("memfd", "anonymous")}
real = lab.prove
def prove(trap, backing, access):
    if trap == "mmio" and access in BAD and backing == "memfd":
        return lab.Proof(access, {}, "increments were lost")
    return real(trap, backing, access)
lab.prove = prove
"""


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("bad", "named"), [(("atomic", "vector"), " (atomic, vector)"), (tuple(sorted(ACCESSES)), "")]
)
def test_a_trap_that_fails_is_a_no_and_its_accesses_are_named(bad, named):
    done = kvmdp("probe", prelude=f"BAD = {bad}\n{BROKEN_TRAP}")
    assert done.status == 0
    assert f"  trap mmio on memfd{named}: increments were lost\n" in done.out
    (row,) = (line for line in done.out.splitlines() if line.startswith("memfd "))
    heading = next(line for line in done.out.splitlines() if line.startswith("backing "))
    assert row.split()[heading.split().index("mmio")] == "NO"
    assert "5 of 5" in done.out or "mmio" not in done.out.splitlines()[0], "it works on anonymous memory"


@pytest.mark.root
@pytest.mark.kvm  # "not KVM" needs a /dev/kvm to put something else over
@pytest.mark.usefixtures("own_namespace")
@pytest.mark.parametrize("host", BROKEN_HOSTS)
def test_without_kvm_the_commands_say_what_is_lacking(host):
    wrapper, reason = BROKEN_HOSTS[host]
    run = kvmdp("run", wrapper=wrapper)
    assert run.status == 4
    assert run.out == ""
    assert run.err.count("\n") == 1
    assert "/dev/kvm failed: " in run.error
    assert reason in run.error

    coverage = kvmdp("compare", "--coverage", wrapper=wrapper)
    assert (coverage.status, coverage.out, coverage.err) == (4, "", run.err)

    told = kvmdp("probe", wrapper=wrapper)
    assert told.status == 4
    assert reason in told.out
    assert told.out.startswith("no trap works here: ")
    assert told.out.count(reason) == 1

    probe = kvmdp("probe", "--json", "-", wrapper=wrapper)
    assert probe.status == 4
    assert probe.document["ok"] is False
    assert probe.document["host"]["cpus"] >= 1
    assert reason in probe.document["error"]
    assert probe.document["verdict"] == f"no trap works here: {probe.document['error']}"
    [lack] = probe.document["missing"]
    assert lack["what"] == "/dev/kvm"
    assert lack["remedy"] in probe.document["error"]


@pytest.mark.root
@pytest.mark.kvm
@pytest.mark.usefixtures("own_namespace")
def test_a_device_that_is_not_kvm_has_a_remedy():
    assert kvmdp("probe", "--json", "-", wrapper=NOT_KVM).document["missing"][0]["remedy"]
