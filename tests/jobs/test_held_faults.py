"""Faults that a job holds back: they go on when the job says so, and at every end of the machine."""

import threading
import time

import pytest
from device_process import SOON, bench
from fakes import started
from harness import MEMORY, make_machine

from kvmdp.errors import PagingError
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.jobs import Job

LIMIT = MEMORY // 4
LIMIT_PAGES = LIMIT // PAGE_SIZE
FOR_EVER = 3600  # seconds for which a fault is held back unless its thread is told
READ_ONE = "say(len(memory.read(5 * 4096, 8))); memory.close()"
READ_TWO = """
import threading
def read(page):
    try:
        say([page, memory.read(page * 4096, 8).hex()])
    except Exception as error:
        say([page, str(error)])
threads = [threading.Thread(target=read, args=(page,)) for page in (5, 9)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
memory.close()
"""


class Holding(Job):
    """Holds every fault back while `seconds` is not 0; `asked` says that one has come."""

    def __init__(self, seconds=FOR_EVER):
        self.seconds = seconds
        self.asked = threading.Semaphore(0)

    def seconds_held(self, since):
        self.asked.release()
        return self.seconds

    def let_go(self, jobs):
        self.seconds = 0
        jobs.ask_again()


class OverOnce(Job):
    """Holds every fault back, until this has been asked some times."""

    def __init__(self, times):
        self.left = times

    def seconds_held(self, since):
        self.left -= 1
        return 0.001 if self.left > 0 else 0


def holding(pager):
    job = Holding()
    pager.jobs.add(job)
    return job


def reading(view, *pages):
    """Have a thread read each of the pages; `heard` gets what it has read."""
    heard = {}
    threads = [
        started(lambda page=page: heard.__setitem__(page, view.read(page * PAGE_SIZE, 8))) for page in pages
    ]
    return threads, heard


def wait_for(happened):
    """Whether something happens soon."""
    end = time.monotonic() + SOON
    while not happened() and time.monotonic() < end:
        time.sleep(0.001)
    return happened()


def join(threads):
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()


@pytest.mark.kvm
@pytest.mark.userfaultfd
def test_a_reader_serves_what_it_has_held_back_as_soon_as_it_is_told():
    with make_machine("mmio:device-view") as machine:
        job = holding(machine.pager)
        for pages in ((5, 9), (20, 30, 400)):  # the second time too
            job.seconds = FOR_EVER
            threads, heard = reading(machine.device_view, *pages)
            assert job.asked.acquire(timeout=SOON)
            assert heard == {}
            job.let_go(machine.pager.jobs)
            join(threads)
            assert heard == {page: machine.memory.read(page * PAGE_SIZE, 8) for page in pages}
        assert machine.pager.jobs.told == ()


@pytest.mark.kvm
@pytest.mark.userfaultfd
def test_a_reader_asks_again_by_itself_when_the_time_is_over():
    with make_machine("mmio:device-view") as machine:
        machine.pager.jobs.add(OverOnce(5))
        assert machine.device_view.read(5 * PAGE_SIZE, 8) == machine.memory.read(5 * PAGE_SIZE, 8)


@pytest.mark.kvm
@pytest.mark.userfaultfd
def test_a_reader_that_holds_a_fault_back_ends_with_the_machine():
    with make_machine("mmio:device-view") as machine:
        job = holding(machine.pager)
        failed = []

        def read():
            try:
                machine.device_view.read(5 * PAGE_SIZE, 8)
            except PagingError as error:
                failed.append(error)

        thread = started(read)
        assert job.asked.acquire(timeout=SOON)
        machine.stop()
        join([thread])
        assert len(failed) == 1


def test_a_device_process_is_served_as_soon_as_its_fault_is_held_back_no_more():
    with bench() as here:
        job = holding(here.pager)
        child = here.child(READ_TWO)
        assert job.asked.acquire(timeout=SOON)
        job.let_go(here.pager.jobs)
        assert sorted(child.hear()[0] for _ in range(2)) == [5, 9]
        child.done()
        assert here.pager.jobs.told == ()


def test_a_device_process_is_served_when_the_time_is_over():
    with bench() as here:
        here.pager.jobs.add(OverOnce(5))
        child = here.child(READ_ONE)
        assert child.hear() == 8
        child.done()


def test_a_session_ends_although_its_faults_are_held_back():
    with bench() as here:
        job = holding(here.pager)
        child = here.child("memory.read(5 * 4096, 8)")
        assert job.asked.acquire(timeout=SOON)
        child.close()
        assert child.session.wait_ended(SOON)
        here.server.close()
        assert here.pager.jobs.told == ()
        assert here.balanced()


def test_a_job_that_is_removed_holds_no_fault_back():
    with bench() as here:
        job = holding(here.pager)
        child = here.child(READ_ONE)
        assert job.asked.acquire(timeout=SOON)
        here.pager.jobs.remove(job)
        here.pager.jobs.ask_again()
        assert child.hear() == 8
        child.done()


@pytest.fixture
def limited(monkeypatch):
    """A machine with a resident limit that holds faults back for as long as there is no room."""
    monkeypatch.setattr("kvmdp.jobs.resident_limit._HOLD_NS", FOR_EVER * 10**9)
    monkeypatch.setattr("kvmdp.jobs.resident_limit._HOLD_CLOSED_NS", FOR_EVER * 10**9)
    with make_machine("mmio:device-view", resident_limit=LIMIT) as machine:
        yield machine


@pytest.mark.kvm
@pytest.mark.userfaultfd
def test_faults_that_the_limit_holds_back_go_on_as_pages_are_taken_out(limited):
    pages = range(LIMIT_PAGES, 3 * LIMIT_PAGES)
    with limited.memory.view(0, LIMIT // 2):
        threads, heard = reading(limited.device_view, *pages)
        join(threads)
    assert len(heard) == len(pages)


@pytest.mark.kvm
@pytest.mark.userfaultfd
def test_a_fault_goes_on_when_a_view_that_kept_all_pages_is_closed(limited):
    with limited.memory.view(0, LIMIT // 2), limited.memory.view(LIMIT // 2, LIMIT // 2):
        threads, heard = reading(limited.device_view, 2 * LIMIT_PAGES, 3 * LIMIT_PAGES - 1)
        assert wait_for(lambda: limited.pager.jobs.told)
    join(threads)
    assert len(heard) == 2


@pytest.mark.kvm
@pytest.mark.userfaultfd
def test_faults_that_the_limit_holds_back_go_on_when_it_is_closed(limited):
    with limited.memory.view(0, LIMIT // 2), limited.memory.view(LIMIT // 2, LIMIT // 2):
        threads, heard = reading(limited.device_view, 2 * LIMIT_PAGES, 3 * LIMIT_PAGES - 1)
        assert wait_for(lambda: limited.pager.jobs.told)
        limited.limit.close()
        join(threads)
    assert len(heard) == 2
