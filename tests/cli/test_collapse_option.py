"""`kvmdp run --collapse`: what it says of what KVM has mapped, before and after."""

import re

import pytest
from command import kvmdp, require_trap

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]


def run(*options):
    return kvmdp("run", "--memory", "8M", "--vcpus", "2", "--json", "-", *options)


@pytest.mark.parametrize("backing", ["memfd", "anonymous"])
@pytest.mark.parametrize("trap", ["marker", "userfaultfd"])
def test_at_the_end_all_is_mapped_huge_and_exact(trap, backing):
    done = run("--trap", trap, "--backing", backing, "--collapse", "end")
    collapse = done.document["collapse"]
    if not collapse["supported"]:
        pytest.skip("this kernel has no MADV_COLLAPSE: use Linux 6.1 or later")
    assert done.status == 0
    assert done.document["pages_checked"] == collapse["pages_collapsed"] == 2048
    assert collapse["policy"] == "end"
    assert collapse["before"]["pages_4k"] >= 2048
    assert collapse["before"]["pages_2m"] == 0
    assert collapse["after"]["pages_4k"] < 512
    assert collapse["after"]["pages_2m"] == 4
    assert collapse["retouch_ratio"] > 0
    assert collapse["seconds"] > 0


@pytest.mark.parametrize("policy", ["full", "background"])
def test_what_is_collapsed_while_the_guest_runs_has_no_before(policy):
    done = run("--collapse", policy, "--trap", "marker")
    collapse = done.document["collapse"]
    assert done.status == 0
    assert collapse["policy"] == policy
    assert collapse["before"] is collapse["retouch_ratio"] is None
    assert collapse["after"]["pages_4k"] is not None


def test_stops_are_told_of_once():
    require_trap("memory-fault")
    arguments = ("--memory", "8M", "--trap", "memory-fault", "--granule", "4K", "--collapse", "full")
    shown = kvmdp("run", *arguments)
    assert shown.status == 0
    assert shown.out.count("stop") == 1
    assert re.search(r"^stops +\d+ of the vCPUs, the longest [0-9.]+ us$", shown.out, re.MULTILINE)


def test_the_summary_says_it_in_words_and_nothing_without_the_option():
    shown = kvmdp("run", "--memory", "8M", "--trap", "marker", "--collapse", "end")
    assert shown.status == 0
    assert "\ncollapse   " in shown.out
    assert "the guest touches them" in shown.out
    silent = run("--trap", "marker")
    assert silent.document["collapse"] is None


def test_memory_that_is_mostly_absent_is_not_fetched_for_the_measurement():
    done = run("--workload", "touch", "--pages", "600", "--collapse", "end", "--trap", "marker")
    assert done.status == 0
    assert done.document["pages_present"] == done.document["pages_fetched"] == 600
    assert done.document["collapse"]["pages_collapsed"] in (0, 512)


def test_a_policy_that_there_is_none_of_is_a_usage_error():
    done = run("--collapse", "always")
    assert done.status == 2
    assert "always" in done.err
