"""string: rep movs, rep stos, and bytes that go out of one page to a port and come in to another.

Each page of the first half of a vCPU's pages is paired with one of the second half, which alone is written. The
bytes that go out through the loopback port are proven by those that come back.
"""

from __future__ import annotations

import numpy as np

from kvmdp.machine import guest_abi as guest
from kvmdp.machine.workloads.arithmetic import GAMMA, Bools, Pages, Words
from kvmdp.machine.workloads.base import PageReader, Share
from kvmdp.machine.workloads.halves import Halves
from kvmdp.page import PAGE_SIZE

_MOVED = 8 * guest.STRING_MOVE_WORDS
_IN_FIRST = PAGE_SIZE - guest.STRING_CROSSING  # of the bytes that cross, those in the lower page
_IN_SECOND = 2 * guest.STRING_CROSSING_WORDS - _IN_FIRST


class String(Halves):
    """String instructions on pages that nothing else has touched before."""

    name = "string"
    number = 8
    most_pages = 2048  # each byte that goes out is an exit: about twenty of them a pair of pages

    def _written(self, image: PageReader, share: Share, pages: Pages) -> Words:
        half = share.count // 2
        source = image(pages - half).view(np.uint8)
        content = image(pages).copy().view(np.uint8)

        def put(at: int, data: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> None:
            content[:, at : at + data.shape[1]] = data

        put(guest.STRING_IN_OFFSET, source[:, guest.STRING_OUT_OFFSET :][:, : guest.STRING_OUT_BYTES])
        put(guest.STRING_MOVE_TARGET, source[:, guest.STRING_MOVE_SOURCE :][:, :_MOVED])
        stored = pages.astype(np.uint64)[:, np.newaxis] * np.uint64(GAMMA)
        put(guest.STRING_STORE_OFFSET, np.repeat(stored, guest.STRING_STORE_WORDS, axis=1).view(np.uint8))
        rows = np.flatnonzero(self._crosses(share, pages))
        content[rows, guest.STRING_CROSSING :] = source[rows, guest.STRING_CROSSING :]
        # The beginning of a page comes from the crossing that began in the page below it.
        rows = np.flatnonzero((pages > share.first + half) & self._crosses(share, pages - 1))
        content[rows, :_IN_SECOND] = source[rows, :_IN_SECOND]
        return content.view(np.uint64)

    def _crosses(self, share: Share, pages: Pages) -> Bools:
        """Tell of pages of the second half whether bytes cross into the next one, and out of that of its partner."""
        half = share.count // 2
        pair = pages - half - share.first
        at_hole = self.options.ends_at_hole(pages) | self.options.ends_at_hole(pages - half)
        return np.asarray((pair % 2 == 0) & (pair != half - 1) & ~at_hole)
