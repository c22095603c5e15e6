"""kvmdp as an ordinary user: /dev/kvm is all that a run needs, and what else is missing is named."""

import functools
import re
import sys
from pathlib import Path

import pytest
from command import kvmdp

pytestmark = [pytest.mark.kvm, pytest.mark.root, pytest.mark.usefixtures("own_mounts")]

CHECKOUT = Path(__file__).resolve().parents[2]


def as_nobody(*arguments, kvm=0o666):
    """Run a command as an ordinary user, with the mode `kvm` on /dev/kvm and without /dev/userfaultfd.

    Temporary files, of which none has a name, go where any user may make some.
    """
    readable = [Path(place).resolve() for place in (sys.base_prefix, sys.prefix, CHECKOUT)]
    prelude = f"""
import os, sys
os.environ["TMPDIR"] = "/tmp"
sys.path.insert(0, "tests/support")
from pathlib import PosixPath
import hosts
hosts.have_own_mounts()
hosts.open_to_all(*{readable})
hosts.replace_dev(kvm={kvm})
hosts.become_nobody()
"""
    return kvmdp(*arguments, prelude=prelude, fresh=True)


@functools.cache
def working():
    """The traps that root has here."""
    return kvmdp("probe", "--json", "-").document["working"]


@pytest.mark.parametrize("trap", ["memory-fault", "marker", "mmio", "layered"])
def test_a_run_needs_nothing_but_dev_kvm(trap):
    if trap not in working():
        pytest.skip(f"not even root has the trap {trap} on this kernel: use a newer one")
    done = as_nobody("run", "--trap", trap, "--memory", "4M", "--json", "-")
    assert done.status == 0, done.err
    assert done.document["ok"] is True
    assert done.document["wrong_pages"] == []
    assert done.document["pages_fetched"] == 1024


@pytest.mark.parametrize("trap", ["marker", "layered"])
def test_nor_does_one_with_less_memory_than_its_guest_whose_pages_are_put_together(trap):
    if trap not in working():
        pytest.skip(f"not even root has the trap {trap} on this kernel: use a newer one")
    size = ("--memory", "8M", "--resident-limit", "6M", "--collapse", "background")
    work = ("--workload", "atomic", "--vcpus", "2", "--iterations", "1")
    done = as_nobody("run", "--trap", trap, *size, *work, "--json", "-")
    assert done.status == 0, done.err
    assert done.document["ok"] is True
    assert "efault" not in done.document["exits"]


def test_probe_names_what_mends_userfaultfd():
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("every user has userfaultfd here: sudo sysctl vm.unprivileged_userfaultfd=0")
    done = as_nobody("probe", "--json", "-")
    assert done.status == 0, done.err
    userfaultfd = done.document["userfaultfd"]
    assert userfaultfd["available"] is True
    assert userfaultfd["kernel_faults"] is False
    assert userfaultfd["remedy"] == (
        "run as root, or give yourself /dev/userfaultfd (sudo setfacl -m u:$USER:rw /dev/userfaultfd), "
        "or allow it for all (sudo sysctl vm.unprivileged_userfaultfd=1)"
    )
    assert userfaultfd["remedy"] in [lack["remedy"] for lack in done.document["missing"]]


@pytest.mark.parametrize("command", ["run", "probe"])
def test_without_permission_it_says_which_group_to_join(command):
    done = as_nobody(command, kvm=0o600)
    assert done.status == 4
    assert "no permission: add yourself to group kvm (sudo usermod -aG kvm $USER)" in done.out + done.err


@pytest.mark.hugepages
def test_huge_pages_that_may_not_be_reserved_are_named_with_the_command():
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    if int((pool / "free_hugepages").read_text()):
        pytest.skip("2 MiB huge pages are free already: nothing would have to be reserved")
    done = as_nobody("run", "--backing", "hugetlb-2m", "--reserve-hugepages", "--trap", "mmio")
    assert (done.status, done.out) == (4, "")
    assert re.fullmatch(
        rf"2M huge pages cannot be reserved: no permission; as root, echo 32 \| sudo tee {pool}/nr_hugepages",
        done.error,
    )
