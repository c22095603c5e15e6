"""Where the bytes of pages are: at the source, in the sink, in RAM; how they get from one place to another.

Units: RAM pages, unless a name says bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from kvmdp.page import PAGE_SIZE, PageFault
from kvmdp.paging.claim import Claim, State, runs_of_states
from kvmdp.paging.ports import Trap
from kvmdp.source.base import PageSource, SourceError, WritableSource, fetch, fetch_again, ram_source
from kvmdp.source.request import FetchCancel, FetchRequest

Landed: TypeAlias = Callable[[Claim, PageFault, int], None]

_SOURCE_BYTE = int(State.SOURCE)
_BACKED = bytes((State.BACKED,))
_ONE_AT_SOURCE = bytes((State.SOURCE,))


def _ignore(_claim: Claim, _fault: PageFault, _page: int) -> None:
    """Take no note of pieces: the claim stays whole."""


class Contents:
    """The bytes of all pages.

    Arguments: the source; the trap, which says where the bytes of absent and of present pages are in RAM;
    `may_retry`, asked before each further attempt to fetch.

    `sink` takes evicted pages and gives them back. `cancel` is what fetches under way are called off with.
    """

    def __init__(self, source: PageSource, trap: Trap, may_retry: Callable[[], bool]) -> None:
        self.source = source
        self.sink: WritableSource | None = None
        self.cancel = FetchCancel()
        self._trap = trap
        self._fill_view = trap.fill_view
        self._populate = trap.populate
        self._may_retry = may_retry
        self._fills_ram = ram_source(source) is not None

    def fill(self, claim: Claim, fault: PageFault, landed: Landed) -> None:
        """Put the bytes of a claim's pages where the trap wants them. Raises SourceError, ShortageError.

        Pages whose bytes are in RAM already (BACKED) are left alone. `landed(claim, fault, page)` is called when the
        bytes of all pages of the claim before `page` are in place, as a long fetch tells of its pieces; the claim may
        be shorter at its beginning from then on.
        """
        first, before = claim.first, claim.before
        if self._populate is not None and before.strip(_BACKED):
            self._populate(first * PAGE_SIZE, claim.count * PAGE_SIZE)
        if before == _ONE_AT_SOURCE:  # the usual fault
            offset = first * PAGE_SIZE
            request = FetchRequest(offset, fault, self.cancel)
            destination = self._fill_view[offset : offset + PAGE_SIZE]
            try:  # what `fetch` does, without its frame
                self.source.fetch(request, destination)
            except SourceError as error:
                fetch_again(self.source, request, destination, error, self._may_retry)
            return
        for state, start, end in runs_of_states(before, 0, claim.count):
            self._fill_run(state, first + start, first + end, fault, lambda page: landed(claim, fault, page))

    def _fill_run(
        self, state: int, first: int, end: int, fault: PageFault, landed: Callable[[int], None]
    ) -> None:
        """Fill a run of pages that are in one state."""
        offset = first * PAGE_SIZE
        destination = self._fill_view[offset : end * PAGE_SIZE]
        if state == _SOURCE_BYTE or state == State.SINK:
            source = self.source if state == _SOURCE_BYTE else self.sink
            assert source is not None
            request = FetchRequest(
                offset, fault, self.cancel, on_landed=lambda length: landed(first + length // PAGE_SIZE)
            )
            fetch(source, request, destination, self._may_retry)
        elif state == State.ZERO:
            destination[:] = bytes(len(destination))

    def zero(self, runs: Sequence[tuple[int, int]], claim: Claim) -> None:
        """Write zeros over runs of pages of a claim that were discarded, and count them as dealt with."""
        for first, count in runs:
            length = count * PAGE_SIZE
            self._fill_view[first * PAGE_SIZE : first * PAGE_SIZE + length] = bytes(length)
            claim.zeroed += 1

    def put(self, first: int, content: bytes) -> None:
        """Write whole pages from `first` on that are absent and claimed. Raises ShortageError."""
        offset, length = first * PAGE_SIZE, len(content)
        if self._populate is not None:
            self._populate(offset, length)
        self._fill_view[offset : offset + length] = content

    def store(self, sink: WritableSource, first: int, count: int) -> None:
        """Save pages that the guest is shut out of. Raises OSError, ShortageError, SourceError."""
        sink.store(first * PAGE_SIZE, self._fill_view[first * PAGE_SIZE : (first + count) * PAGE_SIZE])

    def copy(self, claim: Claim, first: int, destination: memoryview) -> None:
        """Copy the bytes of a claim's pages from `first` on to `destination`, whole pages, wherever they are.

        A source that another process fills RAM from delivers nowhere else: its pages are BACKED afterwards. Raises
        SourceError, ShortageError.
        """
        start = first - claim.first
        for state, low, high in runs_of_states(claim.before, start, start + len(destination) // PAGE_SIZE):
            part = destination[(low - start) * PAGE_SIZE : (high - start) * PAGE_SIZE]
            self._copy_run(claim, state, claim.first + low, part)

    def _copy_run(self, claim: Claim, state: int, first: int, destination: memoryview) -> None:
        offset, length = first * PAGE_SIZE, len(destination)
        if state == _SOURCE_BYTE and self._fills_ram:
            low, high = first - claim.first, first - claim.first + length // PAGE_SIZE
            run = Claim(first, high - low, claim.before[low:high])
            self.fill(run, PageFault(first), _ignore)
            destination[:] = self._fill_view[offset : offset + length]
            after = claim.before if claim.after is None else claim.after
            claim.after = after[:low] + _BACKED * (high - low) + after[high:]
        elif state == _SOURCE_BYTE or state == State.SINK:
            source = self.source if state == _SOURCE_BYTE else self.sink
            assert source is not None
            fetch(
                source, FetchRequest(offset), destination
            )  # also after the stop that calls faults' fetches off
        elif state == State.ZERO:
            destination[:] = bytes(length)
        else:
            view = self._trap.ram_view if state == State.PRESENT else self._fill_view
            destination[:] = view[offset : offset + length]

    def close(self) -> None:
        """Close the sink."""
        if self.sink is not None:
            self.sink.close()
