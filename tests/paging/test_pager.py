"""What the pager claims, fetches and admits, one fault at a time; no kernel involved."""

import threading
import time

import numpy as np
import pytest
from fakes import PAGES, content, fill, page_of, pager_of, source_error

from kvmdp.errors import PagingError
from kvmdp.page import Outcome, PageFault
from kvmdp.paging.claim import Claim, Wait
from kvmdp.paging.policy import FaultAround

LOW_PAGES = (3 << 30) // 4096


def bitmap_of(pages, total=PAGES):
    words = np.zeros(-(-total // 64), dtype=np.uint64)
    for page in pages:
        words[page // 64] |= np.uint64(1 << page % 64)
    return words


def test_a_page_is_fetched_once_and_then_present():
    with pager_of() as pager:
        assert pager.resolve(PageFault(7)) is Outcome.ADMITTED
        assert pager.resolve(PageFault(7)) is Outcome.PRESENT
        assert page_of(pager, 7) == content(7)
        assert pager.source.fills == [(7, 1)]
        assert pager.trap.calls == [("admit", 7, 1)]
        assert pager.bitmap.count() == 1
        assert (pager.counters.claims, pager.counters.pages_fetched, pager.counters.pages_admitted) == (
            1,
            1,
            1,
        )


def test_bytes_come_before_the_bit_the_bit_before_the_trap_and_the_trap_before_waiters():
    with pager_of() as pager:
        claim = pager.begin(PageFault(3))
        waiter = pager.begin(PageFault(3))
        seen = []
        pager.source.before = lambda *_: seen.append(("fill", pager.bitmap.test(3)))
        pager.trap.on_admit = lambda *_: seen.append(
            ("admit", pager.bitmap.test(3), page_of(pager, 3) == content(3), waiter.wait(0))
        )
        assert isinstance(claim, Claim)
        assert isinstance(waiter, Wait)
        fill(pager, claim)
        assert not waiter.wait(0)
        pager.commit(claim)
        assert seen == [("fill", False), ("admit", True, True, False)]
        assert waiter.wait(0)
        assert pager.counters.waits == 1


def test_a_page_that_is_being_admitted_cannot_be_held_or_entered_yet():
    with pager_of() as pager:
        found = []

        def look(first, _count):
            found.append((pager.hold(first), type(pager.begin(PageFault(first)))))

        pager.trap.on_admit = look
        pager.resolve(PageFault(3))
        assert found == [(False, Wait)]
        assert pager.hold(3)
        pager.release(3)


@pytest.mark.parametrize("around", [2, 16, 512])
def test_fault_around_takes_the_aligned_block(around):
    with pager_of(fault_around=around) as pager:
        pager.resolve(PageFault(301))
        assert pager.source.fills == [(301 // around * around, around)]


def test_fault_around_is_cut_to_what_is_absent_and_can_be_had_in_one_piece():
    with pager_of(fault_around=16) as pager:
        pager.mark_present(3, 1)
        pager.mark_present(9, 2)
        pager.resolve(PageFault(5))
        assert pager.source.fills[2:] == [(4, 5)]
        claim = pager.begin(PageFault(12))
        assert (claim.first, claim.count) == (11, 5)
        pager.fail(claim, PagingError("test"))


@pytest.mark.parametrize(
    ("page", "run"), [(LOW_PAGES - 1, (LOW_PAGES - 16, 16)), (LOW_PAGES, (LOW_PAGES, 16))]
)
def test_fault_around_stops_at_the_hole_of_the_map(page, run):
    with pager_of(LOW_PAGES + 1024, fault_around=16) as pager:
        pager.resolve(PageFault(page))
        assert pager.source.fills == [run]


def test_ranges_are_cut_at_the_hole_of_the_map():
    with pager_of(LOW_PAGES + 1024) as pager:
        pager.mark_present(LOW_PAGES - 3, 6)
        assert pager.source.fills == [(LOW_PAGES - 3, 3), (LOW_PAGES, 3)]
        assert pager.mark_nonpresent(LOW_PAGES - 3, 6) == 6
        assert pager.trap.calls[2:] == [("revoke", LOW_PAGES - 3, 3), ("revoke", LOW_PAGES, 3)]


def test_the_last_block_ends_with_memory():
    with pager_of(PAGES + 3, fault_around=16) as pager:
        pager.resolve(PageFault(PAGES + 1))
        assert pager.source.fills == [(PAGES, 3)]


@pytest.mark.parametrize("around", [1, 4, 64])
def test_units_of_many_pages_come_and_go_as_one(around):
    with pager_of(granule=64 << 10, fault_around=around) as pager:
        pager.resolve(PageFault(37))
        first, count = max(16, around) * (37 // max(16, around)), max(16, around)
        assert pager.source.fills == [(first, count)]
        assert pager.mark_nonpresent(40, 1) == 16
        assert pager.trap.calls[-1] == ("revoke", 32, 16)
        assert pager.resolve(PageFault(47)) is Outcome.ADMITTED
        assert pager.counters.pages_fetched == count
        assert pager.counters.pages_backed == 16


def test_units_larger_than_a_batch_are_revoked_whole():
    with pager_of(4096, granule=8 << 20) as pager:
        pager.mark_present(0, 4096)
        assert pager.mark_nonpresent(2047, 2) == 4096
        assert pager.trap.calls[2:] == [("revoke", 0, 2048), ("revoke", 2048, 2048)]


def test_a_page_marked_non_present_keeps_its_bytes_and_costs_no_fetch():
    with pager_of() as pager:
        pager.resolve(PageFault(9))
        pager.trap.fill_view[9 * 4096] = 0xEE  # the guest's own write
        assert pager.mark_nonpresent(9, 1) == 1
        assert not pager.bitmap.test(9)
        assert not pager.trap.entered[9]
        assert pager.resolve(PageFault(9)) is Outcome.ADMITTED
        assert page_of(pager, 9)[0] == 0xEE
        assert pager.source.fills == [(9, 1)]
        assert (pager.counters.pages_fetched, pager.counters.pages_backed, pager.counters.pages_revoked) == (
            1,
            1,
            1,
        )


def test_a_run_of_pages_from_everywhere_fetches_only_those_at_the_source():
    with pager_of(fault_around=8, extents=[(0, 4), (6, 506)]) as pager:
        pager.mark_present(2, 1)
        pager.trap.fill_view[2 * 4096] = 0xEE
        pager.trap.fill_view[5 * 4096] = 0xDD  # what lay there before
        pager.mark_nonpresent(2, 1)
        del pager.source.fills[:]
        pager.resolve(PageFault(0))
        assert pager.source.fills == [(0, 2), (3, 1), (6, 2)]
        assert page_of(pager, 2)[0] == 0xEE
        assert page_of(pager, 4) == page_of(pager, 5) == bytes(4096)
        counters = pager.counters
        assert (counters.pages_fetched, counters.pages_zeroed, counters.pages_backed) == (6, 2, 1)
        assert pager.trap.calls[-1] == ("admit", 0, 8)


def test_transient_errors_are_tried_again_and_counted():
    with pager_of() as pager:
        failures = iter([True, True, False])

        def fail_twice(first, count):
            if next(failures):
                raise source_error(first, count, transient=True)

        pager.source.before = fail_twice
        assert pager.resolve(PageFault(5)) is Outcome.ADMITTED
        assert pager.counters.retries == 2
        assert pager.counters.pages_fetched == 1
        assert pager.error is None


@pytest.mark.parametrize("transient", [False, True])
def test_a_source_that_fails_for_good_pauses_the_pager_and_says_where(transient):
    with pager_of(LOW_PAGES + 1024) as pager:
        page = LOW_PAGES + 5

        def fail(first, count):
            raise source_error(first, count, transient=transient)

        pager.resolve(PageFault(1))
        pager.source.before = fail
        assert pager.resolve(PageFault(page)) is Outcome.FAILED
        assert str(pager.error) == (
            "paused: the page at gpa 0x100005000 cannot be fetched: cannot read 4096 bytes at offset 0xc0005000 of "
            "the fake source: the wire is cut"
        )
        pager.source.before = lambda *_: None
        assert pager.resolve(PageFault(page)) is Outcome.FAILED
        assert pager.resolve(PageFault(2)) is Outcome.FAILED
        assert pager.resolve(PageFault(1)) is Outcome.PRESENT
        assert pager.mark_present(0, 8) is Outcome.FAILED
        assert pager.bitmap.count() == pager.counters.pages_admitted == 1
        assert pager.trap.calls == [("admit", 1, 1)]
        assert pager.counters.retries == (5 if transient else 0)


def test_a_source_that_breaks_otherwise_pauses_too_and_the_error_comes_out():
    with pager_of() as pager:

        def fail(*_):
            raise RuntimeError("a bug")

        pager.source.before = fail
        with pytest.raises(RuntimeError, match="a bug"):
            pager.resolve(PageFault(5))
        assert "filling page 5 broke: internal error: RuntimeError('a bug')" in str(pager.error)
        assert pager.bitmap.count() == 0


def test_a_trap_that_breaks_while_it_admits_leaves_the_page_absent_and_paused():
    with pager_of() as pager:

        def fail(*_):
            raise OSError(12, "no memory for a memslot")

        pager.trap.on_admit = fail
        with pytest.raises(OSError, match="no memory for a memslot"):
            pager.resolve(PageFault(5))
        assert "pages could not be admitted" in str(pager.error)
        assert not pager.bitmap.test(5)
        assert not pager.hold(5)


def test_marking_by_bitmap_does_what_marking_each_page_would():
    wanted = [0, 1, 2, 63, 64, 65, 200, 511]
    with pager_of() as pager:
        assert pager.mark_bitmap_present(bitmap_of(wanted)) is Outcome.PRESENT
        assert [page for page in range(PAGES) if pager.trap.entered[page]] == wanted
        assert pager.mark_bitmap_nonpresent(bitmap_of([1, 2, 3, 64, 511])) == 4
        assert [page for page in range(PAGES) if pager.bitmap.test(page)] == [0, 63, 65, 200]
        assert pager.counters.pages_fetched == 8
        pager.mark_bitmap_present(bitmap_of(wanted))
        assert pager.counters.pages_backed == 4
        with pytest.raises(ValueError, match=r"a bitmap of 512 pages is uint64\[8\], not uint64\[7\]"):
            pager.mark_bitmap_present(np.zeros(7, dtype=np.uint64))
        with pytest.raises(ValueError, match="not int64"):
            pager.mark_bitmap_nonpresent(np.zeros(8, dtype=np.int64))


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 0), (511, 2), (512, 1)])
def test_ranges_that_are_not_ram_are_refused(first, count):
    with pager_of() as pager:
        with pytest.raises(ValueError, match=r"not all in the 512 of RAM|the least is 1"):
            pager.mark_present(first, count)
        with pytest.raises(ValueError, match=r"not all in the 512 of RAM|the least is 1"):
            pager.mark_nonpresent(first, count)


def test_a_present_page_that_traps_is_reasserted_and_an_absent_one_is_not():
    with pager_of(granule=16 << 10) as pager:
        pager.resolve(PageFault(5))
        pager.reassert(5)
        pager.reassert(100)
        assert pager.trap.calls == [("admit", 4, 4), ("reassert", 4, 4)]
        assert pager.hold(5)


def test_off_is_refused_while_pages_are_absent_and_marking_while_it_is_off():
    with pager_of() as pager:
        pager.mark_present(0, PAGES - 1)
        with pytest.raises(PagingError, match="while 1 pages are absent"):
            pager.disable()
        assert pager.trap.armed
        pager.mark_present(PAGES - 1, 1)
        pager.disable()
        assert not pager.trap.armed
        with pytest.raises(PagingError, match="enable it first"):
            pager.mark_nonpresent(0, 1)
        pager.enable()
        assert pager.mark_nonpresent(0, 1) == 1


@pytest.mark.parametrize("pages", [0, 3, 1024, -1])
def test_fault_around_takes_powers_of_two(pages):
    with pytest.raises(ValueError, match="give a power of two from 1 to 512"):
        FaultAround(pages)


def test_retained_pages_are_passed_over_whatever_is_marked_around_them():
    with pager_of() as pager:
        pager.mark_present(0, PAGES)
        pager.retain(10, 3)
        pager.retain(20, 1)
        assert pager.mark_nonpresent(11, 1) == 0
        assert pager.mark_nonpresent(8, 5) == 2
        assert pager.mark_nonpresent(12, 10) == 10 - 2
        assert pager.mark_nonpresent(0, PAGES) == PAGES - 4 - 2 - 8
        assert pager.bitmap.present_runs().tolist() == [[10, 3], [20, 1]]
        assert pager.mark_bitmap_nonpresent(bitmap_of([10, 12, 20])) == 0


def test_retained_pages_that_are_absent_become_present_as_others_do_and_stay():
    with pager_of() as pager:
        pager.retain(5, 1)
        assert pager.mark_nonpresent(5, 1) == 0
        assert pager.resolve(PageFault(5)) is Outcome.ADMITTED
        assert pager.mark_nonpresent(4, 3) == 0
        assert pager.bitmap.test(5)


def test_a_retained_page_keeps_its_whole_unit():
    with pager_of(granule=4 * 4096) as pager:
        pager.mark_present(0, PAGES)
        pager.retain(9, 1)
        assert pager.mark_nonpresent(0, 16) == 12
        assert pager.bitmap.next_present_run(0, 16) == (8, 4)


def test_a_range_that_is_not_ram_cannot_be_retained():
    with pager_of() as pager, pytest.raises(ValueError, match="of RAM"):
        pager.retain(PAGES - 1, 2)


def test_a_stop_ends_the_wait_for_pages_in_use():
    with pager_of() as pager:
        pager.mark_present(3, 1)
        assert pager.hold(3)
        ends = []

        def revoke():
            ends.append((pager.mark_nonpresent(3, 1), pager.bitmap.test(3)))

        thread = threading.Thread(target=revoke, daemon=True)
        thread.start()
        while pager.bitmap.test(3):  # until the page is being taken away
            time.sleep(0.001)
        pager.cancel()
        thread.join(20)
        assert ends == [(0, True)]
        pager.release(3)


def test_counters_say_what_they_count():
    with pager_of() as pager:
        pager.mark_present(0, 2)
        assert "pages_fetched=2" in repr(pager.counters)
