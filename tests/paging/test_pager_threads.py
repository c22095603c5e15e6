"""The pager with many threads at it: one fetch a page, no wake-up lost, nothing taken from under a pin."""

import random
import threading
import time

import pytest
from fakes import PAGES, content, fill, in_threads, page_of, pager_of, source_error, started

from kvmdp.errors import PagingError
from kvmdp.page import Origin, Outcome, PageFault
from kvmdp.paging.claim import Claim, Waiter

SOON = 5  # seconds: long past any of this; a thread that still waits then has lost its wake-up


def test_many_threads_on_the_same_pages_fetch_each_once():
    with pager_of(fault_around=4) as pager:

        def touch_all(number):
            pages = list(range(PAGES))
            random.Random(number).shuffle(pages)
            for page in pages:
                assert pager.resolve(PageFault(page, number=number)) in (Outcome.ADMITTED, Outcome.PRESENT)
                assert pager.trap.entered[page]

        in_threads(*(lambda number=number: touch_all(number) for number in range(8)))
        fetched = [page for first, count in pager.source.fills for page in range(first, first + count)]
        assert sorted(fetched) == list(range(PAGES))
        assert pager.counters.pages_fetched == pager.counters.pages_admitted == PAGES


def test_all_who_wait_for_a_page_are_woken_by_its_commit():
    with pager_of() as pager:
        claim = pager.begin(PageFault(1))
        outcomes = []
        threads = [started(lambda: outcomes.append(pager.resolve(PageFault(1)))) for _ in range(8)]
        while pager.counters.waits < 8:
            time.sleep(0.001)
        fill(pager, claim)
        pager.commit(claim)
        for thread in threads:
            thread.join(SOON)
        assert outcomes == [Outcome.PRESENT] * 8


def test_all_who_wait_for_a_page_are_told_when_its_source_fails():
    with pager_of() as pager:
        go_on = threading.Event()

        def fail(first, count):
            go_on.wait()
            raise source_error(first, count)

        pager.source.before = fail
        outcomes = []
        threads = [started(lambda: outcomes.append(pager.resolve(PageFault(1)))) for _ in range(4)]
        while pager.counters.waits < 3:
            time.sleep(0.001)
        go_on.set()
        for thread in threads:
            thread.join(SOON)
        assert outcomes == [Outcome.FAILED] * 4
        assert pager.bitmap.count() == 0


def test_cancel_wakes_everybody_and_lets_a_fill_under_way_end():
    with pager_of() as pager:
        pager.resolve(PageFault(9))
        claim = pager.begin(PageFault(1))
        results = []
        threads = [
            started(lambda: results.append(pager.resolve(PageFault(1)))),
            started(lambda: results.append(pager.mark_present(0, 4))),
        ]
        while pager.counters.waits < 2:
            time.sleep(0.001)
        pager.cancel()
        for thread in threads:
            thread.join(SOON)
        assert results == [Outcome.CANCELLED] * 2
        fill(pager, claim)
        pager.commit(claim)
        assert page_of(pager, 1) == content(1)
        assert pager.begin(PageFault(20)) is Outcome.CANCELLED
        assert pager.mark_nonpresent(0, PAGES) == 0


def test_a_held_page_is_taken_away_only_when_the_last_holder_lets_go():
    with pager_of() as pager:
        pager.mark_present(0, 8)
        assert pager.hold(3)
        assert pager.hold(3)
        marker = started(lambda: pager.mark_nonpresent(0, 8))
        while pager.bitmap.test(3):
            time.sleep(0.001)
        assert not pager.hold(3)  # nobody new
        assert not pager.hold(4)
        pager.release(3)
        marker.join(0.05)
        assert marker.is_alive()
        assert ("revoke", 0, 8) not in pager.trap.calls
        pager.release(3)
        marker.join(SOON)
        assert pager.trap.calls[-1] == ("revoke", 0, 8)


def test_who_wants_a_page_that_is_being_taken_away_gets_it_back_afterwards():
    with pager_of() as pager:
        pager.resolve(PageFault(3))
        in_revoke, go_on = threading.Event(), threading.Event()

        def pause(*_):
            in_revoke.set()
            go_on.wait()

        pager.trap.on_revoke = pause
        outcomes = []
        marker = started(lambda: pager.mark_nonpresent(3, 1))
        in_revoke.wait()
        access = started(lambda: outcomes.append(pager.resolve(PageFault(3))))
        access.join(0.05)
        assert outcomes == []
        go_on.set()
        marker.join(SOON)
        access.join(SOON)
        assert outcomes == [Outcome.ADMITTED]
        assert pager.counters.pages_fetched == pager.counters.pages_backed == 1


def test_a_page_that_is_being_admitted_is_taken_away_only_afterwards():
    with pager_of() as pager:
        in_admit, go_on = threading.Event(), threading.Event()

        def pause(*_):
            in_admit.set()
            go_on.wait()

        pager.trap.on_admit = pause
        access = started(lambda: pager.resolve(PageFault(3)))
        in_admit.wait()
        marker = started(lambda: pager.mark_nonpresent(3, 1))
        marker.join(0.05)
        assert pager.bitmap.test(3)
        go_on.set()
        access.join(SOON)
        marker.join(SOON)
        assert pager.trap.calls == [("admit", 3, 1), ("revoke", 3, 1)]


def test_held_makes_a_page_present_and_keeps_it():
    with pager_of() as pager:
        with pager.held(PageFault(5)) as outcome:
            assert outcome is Outcome.PRESENT
            marker = started(lambda: pager.mark_nonpresent(5, 1))
            marker.join(0.05)
            assert marker.is_alive()
        marker.join(SOON)
        pager.abort(PagingError("the reader broke"))
        with pager.held(PageFault(6)) as outcome:
            assert outcome is Outcome.FAILED
        assert str(pager.error) == "the reader broke"


def test_a_page_that_is_held_poisoned_is_healed_afterwards_and_is_poisoned_till_then_to_a_vcpu_that_sleeps():
    parked_until = threading.Event()
    with pager_of() as pager:
        pager.poison(5)
        with pager.held(PageFault(5)) as outcome:
            assert outcome is Outcome.POISONED
            heal = started(lambda: pager.unpoison(5, b"\1" * 4096))
            heal.join(0.05)
            assert heal.is_alive()
            vcpu, device = PageFault(5, Origin.VCPU), PageFault(5, Origin.DEVICE)
            assert pager.resolve_or_park(vcpu, Waiter(lambda: None)) is Outcome.POISONED
            assert pager.resolve_or_park(device, Waiter(parked_until.set)) is None
            access = started(lambda: pager.resolve(PageFault(5)))
            pager.cancel()
            heal.join(0.05)
            assert heal.is_alive()
        heal.join(SOON)
        access.join(SOON)
        assert parked_until.is_set()
        assert page_of(pager, 5) == b"\1" * 4096
        with pager.held(PageFault(5)) as outcome:
            assert outcome is Outcome.PRESENT


@pytest.mark.parametrize(("granule", "around"), [(4096, 1), (4096, 8), (32 << 10, 1), (32 << 10, 16)])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_threads_do_at_random_no_byte_is_lost_and_the_counts_are_exact(granule, around, seed):
    holes = [(0, 100), (110, PAGES - 110)]
    writes = [0] * PAGES  # how often each page's first byte was counted up; guarded by the page's pin
    guards = [threading.Lock() for _ in range(PAGES)]
    with pager_of(granule=granule, fault_around=around, extents=holes, needs_quiesce=seed % 2 == 1) as pager:
        view = pager.trap.fill_view

        def act(number):
            chance = random.Random(100 * seed + number)
            for _ in range(400):
                page, what = chance.randrange(PAGES), chance.random()
                if what < 0.15:
                    pager.mark_nonpresent(page, min(chance.randint(1, 40), PAGES - page))
                elif what < 0.25:
                    assert (
                        pager.mark_present(page, min(chance.randint(1, 40), PAGES - page)) is Outcome.PRESENT
                    )
                else:
                    with pager.held(PageFault(page, number=number)) as outcome, guards[page]:
                        assert outcome is Outcome.PRESENT
                        # The bit says nothing here: a revocation clears it first, and then waits for our pin.
                        assert pager.trap.entered[page]
                        writes[page] += 1
                        view[page * 4096] = (view[page * 4096] + 1) % 256

        in_threads(*(lambda number=number: act(number) for number in range(6)))
        assert pager.error is None
        touched = [page for page in range(PAGES) if writes[page]]
        for page in touched:
            before = bytes(4096) if 100 <= page < 110 else content(page)
            assert page_of(pager, page) == bytes([(before[0] + writes[page]) % 256]) + before[1:]
        assert [pager.bitmap.test(page) for page in range(PAGES)] == [
            value == 1 for value in pager.trap.entered
        ]
        check_counts(pager)


def check_counts(pager):
    fetched = [page for first, count in pager.source.fills for page in range(first, first + count)]
    assert len(fetched) == len(set(fetched)) == pager.counters.pages_fetched
    calls = {
        name: sum(count for call, _, count in pager.trap.calls if call == name)
        for name in ("admit", "revoke")
    }
    counters = pager.counters
    assert counters.pages_admitted == calls["admit"]
    assert counters.pages_admitted == counters.pages_fetched + counters.pages_zeroed + counters.pages_backed
    assert counters.pages_revoked == calls["revoke"]
    assert pager.bitmap.count() == counters.pages_admitted - counters.pages_revoked
    claim = pager.begin(PageFault(0))
    assert claim is Outcome.PRESENT or isinstance(claim, Claim)  # nothing is left claimed
