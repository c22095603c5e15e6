"""A view of RAM registered with userfaultfd, and the threads that read its faults.

`UffdView` is what the guest view of the traps `marker` and `userfaultfd` (`kvmdp.trap.uffd.guest_view`) and the device
view (`kvmdp.trap.uffd.device_view`) have in common.

A page can go from the memory file while it is present, or between its fill and UFFDIO_CONTINUE: a peer in another
process may punch holes (fallocate), which no seal that leaves RAM writable forbids. It reads as zeros then, and the
machine goes on (`_fill_hole`).

Units: RAM pages, unless a name says bytes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import select
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

from kvmdp.abi import userfaultfd as abi
from kvmdp.abi.libc import named_call
from kvmdp.memory.hugepages import populate
from kvmdp.memory.mapping import Mapping
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.broken import broken
from kvmdp.paging.ports import ForReaders
from kvmdp.thread import JoinableThread
from kvmdp.trap.uffd.descriptor import Uffd

_BATCH = 32  # events taken with one read
_BROKEN_SECONDS = 0.001  # from an error of a reader to its next turn


class UffdView(ABC):
    """A mapping of all of RAM whose faults on absent pages go to userfaultfd.

    `vmm` is the VMM view, `page_size` the bytes that can be mapped at the least: what is admitted, dropped or woken is
    whole units of that. `shards` descriptors share RAM out evenly; each has `readers` threads. A class derived
    from it says what an event means. `features` are of `UFFD_FEATURE_*`, `mode` is of `UFFDIO_REGISTER_MODE_*`.
    """

    def __init__(
        self,
        view: Mapping,
        vmm: Mapping,
        features: int,
        mode: int,
        *,
        kernel_faults: bool,
        page_size: int = PAGE_SIZE,
        readers: int = 1,
        shards: int = 1,
    ) -> None:
        self._view = view
        self._vmm = vmm
        self._mode = mode
        self._pages = view.length // PAGE_SIZE
        self._unit = page_size // PAGE_SIZE  # pages
        self._unit_bytes = page_size
        self._shard = -(-self._pages // (shards * self._unit)) * self._unit  # pages a descriptor has
        self._readers_each = readers
        self._readers: list[
            tuple[JoinableThread, select.epoll, int]
        ] = []  # with the eventfd that is its bell
        # Readers that are between an event and the next wait, by thread identifier.
        self._at_work: set[int] = set()
        # One for each `settle` that waits: it gets a word for each reader that ends its work. Not a condition: an
        # interruption of the main thread in one can leave its lock as no `with` expects it.
        self._settling: list[queue.SimpleQueue[None]] = []
        self._wakeup = -1
        self._pager: ForReaders | None = None
        self._this_thread = threading.local()
        self._uffds: list[Uffd] = []
        try:
            for _ in range(-(-self._pages // self._shard)):
                self._uffds.append(Uffd(features, kernel_faults=kernel_faults, page_size=page_size))
                self._uffds[-1].on_again = self._make_way
                self._uffds[-1].on_hole = self._fill_hole
        except BaseException:
            self._close_descriptors()
            raise

    def arm(self, pager: ForReaders) -> None:
        """Register the view and start the readers."""
        self._pager = pager
        self.register()
        with named_call("eventfd"):
            self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        for shard, uffd in enumerate(self._uffds):
            for number in range(self._readers_each):
                with named_call("epoll_create1"):
                    poll = select.epoll(flags=select.EPOLL_CLOEXEC)
                with named_call("eventfd"):
                    bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                work = functools.partial(self._read, uffd, poll, bell)
                name = f"uffd-reader-{shard}.{number}"
                reader = JoinableThread(work, name, self._reader_broke)
                self._readers.append((reader, poll, bell))
                # Of several readers of one descriptor the kernel wakes one.
                poll.register(uffd.fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
                poll.register(self._wakeup, select.EPOLLIN)
                poll.register(bell, select.EPOLLIN)
                reader.start()

    def disarm(self) -> None:
        """Stop the readers and unregister the view."""
        self._stop_readers()
        self.unregister()

    def register(self) -> None:
        """Have faults on the view go to userfaultfd."""
        for first, count, uffd in self._pieces(0, self._pages):
            uffd.register(self._hva(first), count * PAGE_SIZE, self._mode)

    def unregister(self) -> None:
        """Make the view plain memory, which wakes the threads that sleep on it."""
        for first, count, uffd in self._pieces(0, self._pages):
            uffd.unregister(self._hva(first), count * PAGE_SIZE)

    def _hva(self, page: int) -> int:
        return self._view.hva + page * PAGE_SIZE

    def _page_of(self, hva: int) -> int:
        """Return the first page of the unit that an address is in."""
        page = (hva - self._view.hva) // PAGE_SIZE
        return page - page % self._unit

    def _fill_hole(self, hva: int) -> None:
        """Put a page of zeros where the memory file has none, though the page at `hva` is present.

        A peer that was handed the file can punch holes into it at any time, as it can write zeros. It must not be able
        to stop the machine with that. A load through the VMM view, which never traps, is enough; a store could undo
        another thread's. A huge page that went back to its pool may not be there any more: that is a ShortageError.
        """
        offset = hva - self._view.hva
        if self._unit_bytes > PAGE_SIZE:
            populate(self._vmm, offset, PAGE_SIZE, self._unit_bytes)
        else:
            self._vmm.view[offset]

    def _uffd_of(self, page: int) -> Uffd:
        return self._uffds[page // self._shard]

    def _pieces(self, first: int, count: int) -> list[tuple[int, int, Uffd]]:
        """Split a run of pages by the descriptors that have them: (first, count, descriptor)."""
        shard = self._shard
        if first // shard == (first + count - 1) // shard:  # always so with one descriptor
            return [(first, count, self._uffds[first // shard])]
        pieces = []
        end = first + count
        while first < end:
            border = min((first // shard + 1) * shard, end)
            pieces.append((first, border - first, self._uffds[first // shard]))
            first = border
        return pieces

    # The readers

    @abstractmethod
    def _reader(self) -> Callable[[int, int], None]:
        """Return what serves a fault at an address (hva) that was read at a time (ns), one a reader thread."""

    def _removed(self, start: int, end: int) -> None:  # noqa: B027 - most ask for no such event
        """Take note that the range (hva) is being discarded; only where that event was asked for."""

    def _reader_broke(self, error: BaseException) -> None:
        assert self._pager is not None
        self._pager.abort(broken("a userfaultfd reader broke", error))

    def _read(self, uffd: Uffd, poll: select.epoll, bell: int) -> None:
        """Serve until stopped, whatever a source, an observer or the trap raises on the way: that ends the run.

        A reader lives on because others depend on it. A thread that discards pages sleeps in the kernel until the event
        has been read, with a claim on them, and meanwhile the kernel tells every call that maps or marks to try again.

        While a job holds a fault back, events are read all the same: a thread that makes room may wait until its
        discard has been read. Then the reader is listed with the jobs, which ring `bell` (`kvmdp.paging.jobs` argues
        that no word is lost). It empties the bell before it asks, so a word that comes after that ends its next wait;
        and once more when it is listed no longer, or a late word would end all its waits.
        """
        messages = (abi.uffd_msg * _BATCH)()
        assert self._pager is not None
        pager, serve, reader = self._pager, self._reader(), threading.get_ident()
        jobs, ring = self._pager.jobs, functools.partial(os.eventfd_write, bell, 1)
        is_listed = False
        is_present = pager.bitmap.test  # such a fault brings nothing in
        faults: deque[tuple[int, int]] = deque()  # address, when it was read

        def take() -> None:
            """Take what waits: note discards at once, keep faults for later."""
            count = uffd.read(messages)
            now = time.perf_counter_ns()
            for index in range(count):
                message = messages[index]
                if message.event == abi.UFFD_EVENT_PAGEFAULT:
                    faults.append((message.arg.pagefault.address, now))
                elif message.event == abi.UFFD_EVENT_REMOVE:
                    self._removed(message.arg.remove.start, message.arg.remove.end)

        def serve_all() -> None:
            """Serve the faults in the order in which they came, up to one that a job holds back."""
            while faults and (
                not jobs.on_seconds_held  # no job holds faults back: nothing more to pay
                or is_present(self._page_of(faults[0][0]))
                or jobs.may_admit(faults[0][1])
            ):
                serve(*faults.popleft())

        self._this_thread.take = take
        left: float | None = None  # seconds until it asks again at the latest
        stopped = (self._wakeup, select.EPOLLIN)
        while stopped not in poll.poll(left):
            self._at_work.add(reader)
            try:
                if is_listed:
                    _silence(bell)
                take()
                serve_all()
                if faults and not is_listed:
                    jobs.tell(ring)
                    is_listed = True
                    serve_all()
                if is_listed and not faults:
                    jobs.tell_no_more(ring)
                    is_listed = False
                    _silence(bell)
                left = jobs.seconds_held(faults[0][1]) if faults else None
            except BaseException as error:
                self._reader_broke(error)
                time.sleep(_BROKEN_SECONDS)  # what cannot even be read would be tried without a pause
                left = 0 if faults else None
            finally:
                self._at_work.discard(reader)
                # After that: a `settle` that has seen the reader at work is in the list by now.
                if self._settling:
                    for words in tuple(self._settling):
                        words.put(None)
        if is_listed:
            jobs.tell_no_more(ring)

    def _make_way(self) -> None:
        """Let a discard go on that the kernel wants finished before it maps anything (EAGAIN).

        A thread that discards sleeps until its event has been read. If the thread that is told to try again is the
        reader that has to read it, trying again is not enough.
        """
        take = getattr(self._this_thread, "take", None)
        if take is None:
            time.sleep(0)  # no reader: they will see to it
        else:
            take()

    def settle(self, timeout: float) -> bool:
        """Wait until no reader is at a fault whose sleeper it has woken; False after `timeout` seconds.

        A sleeper goes on before its reader has counted the fault, and can be done with everything by then.
        """
        deadline = time.monotonic() + timeout
        words: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._settling.append(words)
        try:
            while self._at_work:
                try:
                    words.get(timeout=max(deadline - time.monotonic(), 0))
                except queue.Empty:
                    return not self._at_work
            return True
        finally:
            self._settling.remove(words)

    def _stop_readers(self) -> None:
        if self._wakeup < 0:
            return
        os.eventfd_write(self._wakeup, 1)
        for reader, poll, bell in self._readers:
            reader.join()
            poll.close()
            os.close(bell)
        self._readers.clear()
        os.close(self._wakeup)
        self._wakeup = -1

    def _close_descriptors(self) -> None:
        for uffd in self._uffds:
            uffd.close()

    def close(self) -> None:
        """Stop the readers and close the descriptors; the mapping stays its maker's."""
        self._stop_readers()
        self._close_descriptors()


def _silence(bell: int) -> None:
    """Take the words out of an eventfd, if it has any."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(bell)
