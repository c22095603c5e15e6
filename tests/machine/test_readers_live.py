"""A userfaultfd reader outlives what a fault raises in it: the run ends with a sentence, and no thread sleeps on."""

import contextlib
import errno
import os
import select
import threading
import time

import pytest
from harness import MEMORY, SEED, TIMEOUT, make_machine, meanwhile, plan, program_machine, require_trap

from kvmdp.errors import PagingError
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.jobs import Observer
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.uffd import marker
from kvmdp.trap.uffd.descriptor import Uffd

pytestmark = [pytest.mark.kvm, pytest.mark.userfaultfd]

PAGES = MEMORY // PAGE_SIZE


class BreakingSource(SyntheticSource):
    """Raises `error` at its hundredth fetch, a moment after a thread that sees `waits` has set `may_break`.

    Or after half a second: that thread may be asleep already, until the reader that is here has read an event.
    """

    def __init__(self, error):
        super().__init__(MEMORY, SEED)
        self._error, self._left = error, 100
        self.waits, self.may_break = threading.Event(), threading.Event()

    def fetch(self, request, destination):
        self._left -= 1
        if not self._left:
            self.waits.set()
            self.may_break.wait(0.5)
            time.sleep(0.05)
            raise self._error
        super().fetch(request, destination)


def endless(trap, source):
    """A machine whose guest writes to all pages again and again."""
    workload = plan("atomic", pages=PAGES, iterations=1 << 20)
    return make_machine(trap, workload=workload, source=source)


@pytest.mark.parametrize("error", [ValueError("a bug in a source"), SystemExit(3)])
def test_a_source_that_breaks_while_pages_are_taken_away_ends_the_run_and_no_thread_sleeps_on(error):
    # A revocation is in the kernel by then, and sleeps until a reader has read of it.
    source = BreakingSource(error)
    with endless("userfaultfd", source) as machine:
        drop = machine.backing.guest.drop

        def drop_as_it_breaks(offset, length):
            if source.waits.is_set():
                source.may_break.set()
            drop(offset, length)

        machine.backing.guest.drop = drop_as_it_breaks

        def take(number):
            if machine.pager.error is not None:
                return False
            machine.pager.mark_nonpresent(37 * number % PAGES, 1)
            return None

        with meanwhile(take), pytest.raises(PagingError, match=f"broke: .*{type(error).__name__}"):
            machine.run(TIMEOUT)


@pytest.mark.parametrize("trap", ["userfaultfd", "marker", "mmio:device-view"])
def test_a_reader_that_breaks_ends_the_run(trap, monkeypatch):
    require_trap(trap)

    def broken(self, hva, length):
        raise RuntimeError("odd")

    with endless(trap, SyntheticSource(MEMORY, SEED)) as machine, contextlib.ExitStack() as stack:
        machine.pager.mark_present(0, PAGES if trap == "marker" else 1)
        monkeypatch.setattr(Uffd, "continue_", broken)
        if trap == "marker":  # whose reader sees what was taken out of the page table
            stack.enter_context(meanwhile(lambda _: machine.backing.guest.drop(0, MEMORY)))
        elif trap == "mmio:device-view":
            device = threading.Thread(target=read_once, args=(machine.device_view,))
            stack.callback(device.join)
            device.start()
        with pytest.raises((PagingError, GuestError), match="odd"):
            machine.run(TIMEOUT)
        machine.pager.trap.close()


def read_once(view):
    with pytest.raises(PagingError, match="the machine is stopping"):
        view.read(0, 8)


def test_an_observer_that_breaks_ends_the_run():
    def observe(fault, claim, began):
        raise RuntimeError("odd")

    with endless("userfaultfd", SyntheticSource(MEMORY, SEED)) as machine:
        machine.pager.jobs.add(Observer(observe))
        with pytest.raises(
            PagingError, match=r"a userfaultfd reader broke: internal error: RuntimeError\('odd'\)"
        ):
            machine.run(TIMEOUT)


def test_a_trap_that_cannot_let_go_of_sleepers_does_not_keep_the_others_from_their_end(monkeypatch):
    with program_machine("userfaultfd", b"\xeb\xfe", vcpus=2) as machine:
        monkeypatch.setattr(
            Uffd, "poison", lambda *_: (_ for _ in ()).throw(PagingError("told to try again"))
        )
        with pytest.raises(PagingError, match="told to try again"):
            machine.run(0.2)
        assert all(thread.join(0) for thread in machine.threads)
        monkeypatch.undo()


def test_a_page_that_comes_back_each_time_it_is_shut_out_is_said(monkeypatch):
    with make_machine("marker") as machine:
        machine.pager.mark_present(0, 1)
        monkeypatch.setattr(marker, "_MAX_RETURNS", 20)
        monkeypatch.setattr(Uffd, "poison", lambda self, hva, length: False)
        with pytest.raises(PagingError, match="page 0 of the guest view is mapped again 20 times in a row"):
            machine.pager.mark_nonpresent(0, 1)
        monkeypatch.undo()


def test_readers_that_lack_descriptors_are_said_before_the_guest_runs(monkeypatch):
    require_trap("userfaultfd")

    def refuse(**_options):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(select, "epoll", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        make_machine("userfaultfd")
