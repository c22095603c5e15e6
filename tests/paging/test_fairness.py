"""An access that needs several pages at once gets them, however fast other threads take pages away again."""

import contextlib
import threading
import time

import pytest
from fakes import content, pager_of, source_error, started
from test_access import LONG, SOON, memory_of

from kvmdp.errors import BusyError, PagingError
from kvmdp.page import PAGE_SIZE, Access, Origin, Outcome, PageFault
from kvmdp.paging.jobs import Observer
from kvmdp.paging.pins import Pin

THREE_PAGES = (PAGE_SIZE - 4, PAGE_SIZE + 8)  # gpa, length
IN_THREE_PAGES = (content(0) + content(1) + content(2))[PAGE_SIZE - 4 : 2 * PAGE_SIZE + 4]
NEEDED = (0, 1, 2, 5, 9)
MOST = 100  # faults of one access; with nobody in its way it is one a page


@pytest.fixture
def robbed():
    """A pager from which, each time that a page has come, others that accesses here need are taken, or that one."""
    with pager_of() as pager:
        faults = []

        def rob(fault, claim, began):
            faults.append(fault.page)
            assert len(faults) < MOST, "the access gets nowhere"
            for page in NEEDED:
                if page != fault.page or fault.origin is Origin.VCPU:
                    pager.shut_off(page, 1)

        pager.jobs.add(Observer(rob))
        yield pager


@pytest.mark.parametrize(
    "access",
    [
        lambda ram: ram.read(*THREE_PAGES),
        lambda ram: ram.write(THREE_PAGES[0], b"x" * THREE_PAGES[1]),
        lambda ram: ram.readv([(0, 8), (9 * PAGE_SIZE, 8), (5 * PAGE_SIZE, 8)]),
        lambda ram: ram.view(*THREE_PAGES).__enter__(),
    ],
)
def test_an_access_has_all_its_pages_although_each_is_taken_away_when_the_next_comes(robbed, access):
    access(memory_of(robbed))


def test_a_store_that_a_vcpu_has_left_finds_its_page_although_that_is_taken_away_at_once(robbed):
    with robbed.held(PageFault(5, Origin.VCPU, 0, Access.WRITE)) as outcome:
        assert outcome is Outcome.PRESENT


def test_who_takes_pages_away_gets_them_as_soon_as_the_access_is_over(robbed):
    ram = memory_of(robbed)
    for _ in range(3):
        assert ram.read(*THREE_PAGES) == IN_THREE_PAGES
        assert robbed.mark_nonpresent(0, 3, SOON) == 3


@contextlib.contextmanager
def insisting(pager):
    """For the time of the block an access has lost its first pages, has the first again, and waits for the second."""
    waits, go_on, found = threading.Event(), threading.Event(), []

    def wait(first, count):
        if first == 1:
            waits.set()
            assert go_on.wait(LONG)

    def rob(fault, claim, began):
        if fault.page == 2:
            pager.jobs.remove(robber)
            pager.shut_off(0, 2)
            pager.trap.on_admit = wait

    robber = Observer(rob)
    pager.jobs.add(robber)
    reader = started(lambda: found.append(memory_of(pager).read(*THREE_PAGES)))
    assert waits.wait(LONG)
    try:
        yield found
    finally:
        go_on.set()
        reader.join()
    assert found == [IN_THREE_PAGES]


def test_pages_that_an_access_has_lost_once_stay_until_it_has_them_all():
    taken = []
    with pager_of() as pager:
        pager.mark_present(7, 2)
        with insisting(pager) as found:
            for first, count in ((0, 1), (2, 1), (0, 9)):
                with pytest.raises(BusyError, match="is wanted by an access that had lost it before"):
                    pager.mark_nonpresent(first, count, SOON)
            assert pager.mark_nonpresent(7, 1, SOON) == 1
            assert pager.bitmap.test(0)
            revoker = started(lambda: taken.append((pager.mark_nonpresent(0, 9), list(found))))
        revoker.join()
        assert taken == [(4, [IN_THREE_PAGES])]


def test_pages_before_those_that_an_access_has_lost_are_taken_at_once():
    with pager_of(granule=4 * PAGE_SIZE) as pager:
        pager.mark_present(8, 8)
        pager.ledger.pins.insist(pin := Pin([(14, 1)]))
        with pytest.raises(BusyError, match="gpa 0xe000 is wanted"):
            pager.mark_nonpresent(8, 8, SOON)
        assert [pager.bitmap.test(page) for page in (8, 11, 12, 15)] == [False, False, True, True]
        pager.ledger.pins.remove(pin)
        assert pager.mark_nonpresent(8, 8, SOON) == 4


def test_an_access_that_fails_insists_on_nothing_any_more():
    with pager_of() as pager:

        def rob(fault, claim, began):
            if fault.page == 2:
                pager.jobs.remove(robber)
                pager.evict(0, 2)

        def fail(request, destination):
            if request.offset:
                raise source_error(1)

        pager.evict(9, 1)  # so that there is a sink
        pager.sink.fetch = fail
        robber = Observer(rob)
        pager.jobs.add(robber)
        with pytest.raises(PagingError, match="cannot be fetched"):
            memory_of(pager).read(*THREE_PAGES)
        assert pager.mark_nonpresent(0, 3, SOON) == 2


def test_a_machine_that_stops_lets_go_of_who_gives_way_to_an_access():
    taken = []
    with pager_of() as pager, insisting(pager):
        revoker = started(lambda: taken.append(pager.mark_nonpresent(0, 1)))
        time.sleep(SOON)
        pager.cancel()
        revoker.join()
        assert taken == [0]
