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
    lacking = {lack["what"]: lack["remedy"] for lack in document["missing"]}
    for trap, backings in document["traps"].items():
        for backing in backings:
            if _statuses(document, trap, backing) == {"not run"}:
                assert backing in HUGETLB
                assert "/nr_hugepages" in lacking[f"a proof on {backing}"]


@pytest.mark.kvm
def test_what_is_missing_has_a_reason_and_huge_pages_a_command(document):
    for lack in document["missing"]:
        assert lack.keys() == {"what", "why", "remedy"}
        assert lack["what"]
        assert lack["why"]
    empty = [pool["size_bytes"] >> 10 for pool in document["hugepages"] if not pool["total"]]
    commands = [lack["remedy"] for lack in document["missing"] if "huge pages" in lack["what"]]
    assert len(commands) == len(empty)
    for kib, command in zip(empty, commands, strict=True):
        assert command.endswith(f"tee /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages")


@pytest.mark.kvm
def test_people_get_a_table_and_a_file_of_the_same(tmp_path):
    target = tmp_path / "probe.json"
    done = kvmdp("probe", "--json", target)
    assert (done.status, done.err) == (0, "")
    document = json.loads(target.read_text())
    table = [line.split() for line in done.out.splitlines()]
    assert ["trap", "backing", "read", "write", "fetch", "atomic", "vector", "exits", "seen"] in table
    for trap in document["working"]:
        assert [trap, "memfd", *["exact"] * 5] in [line[:7] for line in table]
    assert [*tmp_path.iterdir()] == [target]


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
    assert "/dev/kvm" in told.out

    probe = kvmdp("probe", "--json", "-", wrapper=wrapper)
    assert probe.status == 4
    assert probe.document["ok"] is False
    assert probe.document["host"]["cpus"] >= 1
    assert reason in probe.document["error"]
    [lack] = probe.document["missing"]
    assert lack["what"] == "/dev/kvm"
    assert lack["remedy"] in probe.document["error"]


@pytest.mark.root
@pytest.mark.kvm
@pytest.mark.usefixtures("own_namespace")
def test_a_device_that_is_not_kvm_has_a_remedy():
    assert kvmdp("probe", "--json", "-", wrapper=NOT_KVM).document["missing"][0]["remedy"]
