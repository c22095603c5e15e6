"""`kvmdp run` on the backings: what it says of them, what it refuses, what it leaves behind."""

import re
import signal
import time
from pathlib import Path

import pytest
from command import Running, kvmdp
from commands import OFTEN
from programs import SLOW_WALK

pytestmark = pytest.mark.kvm

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
PATIENCE = 20


def number(name):
    return int((POOL / name).read_text())


def require_no_free_pages():
    if number("free_hugepages") > number("resv_hugepages"):
        pytest.skip("2 MiB huge pages are free already: the run would use them; echo 0 into nr_hugepages")


@pytest.mark.parametrize("backing", ["guest-memfd", "file"])
def test_any_memory_is_proven(backing):
    done = kvmdp("run", "--memory", "2M", "--backing", backing, "--json", "-")
    if done.status == 4:
        pytest.skip(done.error)
    document = done.document
    assert (done.status, document["ok"], document["backing"]) == (0, True, backing)
    assert (document["host_page_size"], document["thp"]) == (4096, False)
    assert document["pages_fetched"] == 512


WITHOUT_MAPPED_GUEST_MEMFD = """
from kvmdp.kvm import Cap, Vm
ask = Vm.check_extension
Vm.check_extension = lambda vm, capability: 0 if capability == Cap.GUEST_MEMFD_FLAGS else ask(vm, capability)
"""


def test_guest_memfd_on_a_kernel_that_cannot_map_it_is_one_sentence():
    done = kvmdp(
        *("run", "--memory", "2M", "--backing", "guest-memfd", "--trap", "mmio"),
        prelude=WITHOUT_MAPPED_GUEST_MEMFD,
    )
    assert (done.status, done.out) == (4, "")
    assert done.error == (
        "the backing guest-memfd needs a guest_memfd that can be mapped (KVM_CAP_GUEST_MEMFD_FLAGS), which this "
        "kernel's KVM lacks: use Linux 6.18 or later, or the backing memfd"
    )


WITHOUT_VCPUS = """
from kvmdp.kvm import KvmError, Vm
def create_vcpu(vm, index):
    raise KvmError(12, "KVM_CREATE_VCPU")
Vm.create_vcpu = create_vcpu
"""


def test_a_machine_that_cannot_be_made_leaves_no_file(tmp_path):
    path = tmp_path / "ram"
    options = ("--backing", "file", "--backing-file", path)
    done = kvmdp("run", "--trap", "memory-fault", *options, prelude=WITHOUT_VCPUS)
    assert "KVM_CREATE_VCPU failed: Cannot allocate memory" in done.error
    assert not path.exists()


def test_a_file_of_ones_own_has_what_ram_had(tmp_path):
    path = tmp_path / "ram"
    arguments = ("run", "--memory", "2M", "--workload", "fill", "--backing", "file", "--backing-file", path)
    assert kvmdp(*arguments, "--trap", "mmio").status == 0
    content = path.read_bytes()
    assert len(content) == 2 << 20
    assert any(content)
    again = kvmdp(*arguments, "--trap", "mmio")
    assert again.status == 2
    assert "there is something in it, which RAM would overwrite" in again.error
    assert path.read_bytes() == content


@pytest.mark.parametrize("backing", ["memfd", "anonymous", "file"])
def test_transparent_huge_pages_change_nothing_of_the_result(backing):
    arguments = ("--memory", "4M", "--pages", 600, "--trap", "mmio", "--thp", "on", "--detect-leaks")
    done = kvmdp("run", *arguments, "--backing", backing, "--json", "-")
    if done.status == 4:
        pytest.skip(done.error)
    assert (done.status, done.document["thp"], done.document["leaks"]) == (0, True, [])
    assert done.document["pages_fetched"] == 600


@pytest.mark.root
@pytest.mark.hugepages
@pytest.mark.parametrize("backing", ["hugetlb-2m", "private-hugetlb-2m"])
def test_on_huge_pages_the_trap_with_small_faults_is_chosen(backing):
    arguments = ("--memory", "4M", "--pages", 100, "--reserve-hugepages", "--detect-leaks")
    done = kvmdp("run", "--backing", backing, *arguments, "--json", "-")
    document = done.document
    assert (done.status, document["ok"], document["host_page_size"]) == (0, True, 2 << 20)
    assert document["trap"] in ("memory-fault", "mmio")
    assert (document["granule"], document["pages_fetched"]) == (4096, 100)
    assert document["leaks"] == []


ON_HUGE_PAGES = ("--backing", "hugetlb-2m", "--reserve-hugepages")


@pytest.mark.root
@pytest.mark.hugepages
@pytest.mark.parametrize("trap", ["marker", pytest.param("userfaultfd", marks=pytest.mark.userfaultfd)])
def test_a_huge_page_is_poisoned_as_far_as_the_guest_can_tell_of_it(trap):
    poison = ("--trap", trap, "--memory", "4M", "--workload", "poison", "--poison", 1)
    done = kvmdp("run", *ON_HUGE_PAGES, *poison, "--pages", 100, "--json", "-")
    assert done.status == 0
    assert len(done.document["poison"]["pages"]) == 512
    assert done.document["poison"]["machine_checks"] == 100
    done = kvmdp("run", *ON_HUGE_PAGES, *poison)
    assert (done.status, done.out) == (2, "")
    assert done.error == (
        "with 1 x 2M poisoned the guest touches 512 poisoned pages, and it can tell of 192: poison fewer, let it touch "
        "fewer, or take another trap or granule"
    )


@pytest.mark.root
@pytest.mark.hugepages
@pytest.mark.parametrize("trap", ["marker", pytest.param("userfaultfd", marks=pytest.mark.userfaultfd)])
def test_a_limit_below_what_an_instruction_can_need_in_huge_pages_is_one_sentence(trap):
    done = kvmdp("run", *ON_HUGE_PAGES, "--trap", trap, "--memory", "8M", "--resident-limit", "2M")
    assert (done.status, done.out) == (2, "")
    assert "Traceback" not in done.error
    assert "limit" in done.error


@pytest.mark.hugepages
def test_too_few_huge_pages_are_one_sentence_that_says_how_to_reserve():
    require_no_free_pages()
    done = kvmdp("run", "--backing", "hugetlb-2m", "--memory", "256G", "--granule", "1G", "--trap", "mmio")
    assert (done.status, done.out) == (4, "")
    assert re.fullmatch(
        r"RAM takes 131072 huge pages of 2M, \d+ are free: reserve them "
        r"\(echo \d+ \| (sudo )?tee /sys/.+-2048kB/nr_hugepages\), or give --reserve-hugepages",
        done.error,
    )


@pytest.mark.root
@pytest.mark.hugepages
def test_more_than_can_be_reserved_is_one_sentence_too_and_all_is_given_back():
    before = number("nr_overcommit_hugepages")
    arguments = ("--memory", "256G", "--granule", "1G", "--pages", 1, "--trap", "mmio", "--reserve-hugepages")
    done = kvmdp("run", "--backing", "hugetlb-2m", *arguments)
    assert done.status == 4
    assert "memory is too full or too fragmented to make the rest" in done.error
    assert settles("nr_overcommit_hugepages", before)


def settles(name, expected):
    """Whether a number is as expected before long: another process may reserve something for a moment."""
    deadline = time.monotonic() + PATIENCE
    while number(name) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return number(name) == expected


@pytest.mark.root
@pytest.mark.hugepages
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_huge_pages_are_given_back_however_the_run_ends(end, program):
    before = {name: number(name) for name in ("nr_overcommit_hugepages", "surplus_hugepages", "nr_hugepages")}
    arguments = ("--memory", "16M", "--trap", "mmio", "--reserve-hugepages", "--guest", program(SLOW_WALK))
    with Running("run", "--backing", "hugetlb-2m", *arguments, prelude=OFTEN) as running:
        running.wait_for_progress()
        assert number("surplus_hugepages") >= 8 or number("nr_hugepages") >= 8
        running.process.send_signal(end)
        running.process.wait(PATIENCE)
        for name in ("surplus_hugepages", "nr_hugepages"):
            assert settles(name, before[name])
        if end == signal.SIGKILL:
            assert kvmdp("run", "--memory", "2M", "--pages", 1).status == 0
        assert settles("nr_overcommit_hugepages", before["nr_overcommit_hugepages"])
        assert not [*Path("/run").glob(f"kvmdp/{running.process.pid}-*")]
