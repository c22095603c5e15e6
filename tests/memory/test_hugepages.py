"""Huge pages are reserved for who asks, and given back whatever becomes of it.

Other processes may reserve some at the same time: what is looked at here is what this test's own did.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvmdp.errors import UnsupportedError
from kvmdp.memory.hugepages import Reservation, check_pages, free_pages, give_back_what_is_left
from kvmdp.memory.hugetlb import Hugetlb1gBacking, Hugetlb2mBacking, PrivateHugetlb2mBacking

pytestmark = [pytest.mark.root, pytest.mark.hugepages]

HUGE, GIGANTIC = 2 << 20, 1 << 30
POOLS = Path("/sys/kernel/mm/hugepages")
OVERCOMMIT = POOLS / "hugepages-2048kB/nr_overcommit_hugepages"
SURPLUS = POOLS / "hugepages-2048kB/surplus_hugepages"
TOTAL_1G = POOLS / "hugepages-1048576kB/nr_hugepages"
RECORDS = Path("/run/kvmdp")
PAGES = 8
PATIENCE = 20


def number(path):
    return int(path.read_text())


def records(pid):
    return [*RECORDS.glob(f"{pid}-*")]


def becomes(path, expected):
    """Whether the kernel's number is as expected before long: others may be changing it for a moment."""
    deadline = time.monotonic() + PATIENCE
    while number(path) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return number(path) == expected


def require_gigantic():
    """Skip where not even one page of 1 GiB can be had."""
    try:
        with Hugetlb1gBacking(GIGANTIC, reserve=True):
            pass
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def no_pages_are_free():
    if free_pages(HUGE) > 0:
        pytest.skip(
            "2 MiB huge pages are free already: nothing would have to be reserved; echo 0 into nr_hugepages"
        )


@pytest.mark.parametrize("kind", [Hugetlb2mBacking, PrivateHugetlb2mBacking])
def test_what_is_reserved_is_there_and_is_given_back(kind):
    before = number(OVERCOMMIT)
    with kind(PAGES * HUGE, reserve=True) as backing:
        assert number(OVERCOMMIT) >= before + PAGES
        assert len(records(os.getpid())) == 1
        backing.vmm.view[:: 1 << 12] = bytes(PAGES * HUGE >> 12)  # each page is there
    assert not records(os.getpid())
    assert becomes(OVERCOMMIT, before)


def test_those_who_reserve_at_the_same_time_have_their_own():
    before = number(OVERCOMMIT)
    together = threading.Barrier(4)

    def use():
        for _ in range(5):
            with Hugetlb2mBacking(PAGES * HUGE, reserve=True) as backing:
                backing.vmm.view[:: 1 << 12] = b"\1" * (PAGES * HUGE >> 12)
                together.wait(PATIENCE)  # all four have theirs at this moment
                assert backing.guest.view[HUGE] == 1
            together.wait(PATIENCE)

    errors = []

    def run():
        try:
            use()
        except BaseException as error:
            together.abort()
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not records(os.getpid())
    assert becomes(OVERCOMMIT, before)


def test_more_than_there_is_memory_for_is_one_sentence_and_leaves_nothing():
    before = number(OVERCOMMIT)
    with pytest.raises(UnsupportedError) as caught:
        Hugetlb2mBacking(1 << 45, reserve=True)
    assert re.fullmatch(
        r"RAM takes 16777216 huge pages of 2M, \d+ are free, and memory is too full or too fragmented to make the "
        r"rest: free some, or reserve them after boot \(echo \d+ \| tee /sys/.+/nr_hugepages\)",
        str(caught.value),
    )
    assert not records(os.getpid())
    assert becomes(OVERCOMMIT, before)


def test_without_a_reservation_too_few_are_an_error_at_once():
    with pytest.raises(UnsupportedError) as caught:
        check_pages(HUGE, 1 << 24)
    assert re.fullmatch(
        r"RAM takes 16777216 huge pages of 2M, \d+ are free: reserve them "
        r"\(echo \d+ \| tee /sys/.+hugepages-2048kB/nr_hugepages\), or give --reserve-hugepages",
        str(caught.value),
    )


def test_a_size_that_the_kernel_has_not():
    with pytest.raises(UnsupportedError, match="this host has no huge pages of 8M: use a kernel with"):
        Reservation(8 << 20, 1)


HOLD = """
import sys
from kvmdp.memory.hugetlb import {kind}
backing = {kind}({size}, reserve=True)
backing.vmm.view[0] = 1
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def killed_holder(kind, size):
    """Yield the pid of a process that has reserved pages and was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD.format(kind=kind.__name__, size=size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert len(records(holder.pid)) == 1
        holder.send_signal(signal.SIGKILL)
    yield holder.pid


def test_after_a_kill_no_page_of_2_mib_stays_and_the_next_lowers_the_limit():
    before, surplus = number(OVERCOMMIT), number(SURPLUS)
    with killed_holder(Hugetlb2mBacking, PAGES * HUGE) as pid:
        assert becomes(SURPLUS, surplus)  # the pages went with the process
        give_back_what_is_left()
        assert not records(pid)
        assert becomes(OVERCOMMIT, before)


def test_a_page_of_1_gib_that_a_killed_run_left_is_given_back_by_the_next():
    require_gigantic()
    before = number(TOTAL_1G)
    with killed_holder(Hugetlb1gBacking, GIGANTIC) as pid:
        assert number(TOTAL_1G) == before + 1
        give_back_what_is_left()
        assert not records(pid)
        assert number(TOTAL_1G) == before


def test_a_page_that_somebody_else_took_is_theirs_until_they_are_done():
    require_gigantic()
    before = number(TOTAL_1G)
    with contextlib.ExitStack() as others:
        with Reservation(GIGANTIC, 1) as reservation:
            reservation.settle()
            theirs = others.enter_context(Hugetlb1gBacking(GIGANTIC))
        theirs.vmm.view[0] = 1
        with Hugetlb1gBacking(GIGANTIC, reserve=True) as ours:
            ours.vmm.view[0] = 1
        assert number(TOTAL_1G) == before + 1
    assert number(TOTAL_1G) == before


def test_who_was_killed_before_anything_was_raised_takes_nothing_from_others():
    before = number(OVERCOMMIT)
    RECORDS.mkdir(mode=0o700, exist_ok=True)
    record = RECORDS / "1-1-0.json"  # process 1 has not begun at tick 1
    draft = record.with_suffix(".new")
    draft.write_text("{")  # and it died in the middle of a second one
    record.write_text(
        f'{{"page_size": {HUGE}, "number": "nr_overcommit_hugepages", "before": {before}, "added": 5, '
        '"settled": false}'
    )
    give_back_what_is_left()
    assert not record.exists()
    assert not draft.exists()
    assert becomes(OVERCOMMIT, before)


def test_a_folder_that_another_run_takes_away_meanwhile_has_nothing_to_give_back(monkeypatch):
    def gone(folder, _pattern):
        raise FileNotFoundError(2, "No such file or directory", str(folder))

    monkeypatch.setattr(Path, "glob", gone)
    give_back_what_is_left()
