"""vector: 16-byte and 32-byte loads and stores, inside pages and across their boundaries, never aligned."""

from __future__ import annotations

from functools import partial

import numpy as np

from kvmdp.machine import guest_abi as guest
from kvmdp.machine.workloads.arithmetic import Bytes, Pages, Words, place_in_page
from kvmdp.machine.workloads.base import PageReader, Share, Workload, checksum_of
from kvmdp.page import PAGE_SIZE

_ADDEND = np.array(
    [guest.VECTOR_ADDEND_0, guest.VECTOR_ADDEND_1, guest.VECTOR_ADDEND_2, guest.VECTOR_ADDEND_3],
    dtype=np.uint64,
)
_SSE_WORDS = 2
_AVX_WORDS = 4
# How much of the following page a boundary's access can reach.
_REACH = 8 * _AVX_WORDS


class Vector(Workload):
    """SSE2, and AVX2 or else AVX where the options allow them; every place is changed once."""

    name = "vector"
    number = 7
    needs_cpu = True

    def expected_checksums(self, image: PageReader) -> list[int]:
        """Return the checksums over the words stored."""
        return [checksum_of(share.pages, partial(self._stored, image, share)) for share in self.shares]

    def expected_pages(self, image: PageReader, pages: Pages) -> Words:
        """Return the image with the changes."""
        content = image(pages).copy()
        for share in self.shares:
            rows = np.flatnonzero(share.holds(pages))
            if len(rows):
                window, _ = self._run(image, share, pages[rows])
                content[rows] = window[:, :PAGE_SIZE].copy().view(np.uint64)
            # The beginning of a page is changed from the page below it, and from nowhere else.
            rows = rows[pages[rows] > share.first]
            if len(rows):
                window, _ = self._run(image, share, pages[rows] - 1)
                content.view(np.uint8)[rows, :_REACH] = window[:, PAGE_SIZE:]
        return content

    def _stored(self, image: PageReader, share: Share, pages: Pages) -> Words:
        return self._run(image, share, pages)[1]

    def _run(self, image: PageReader, share: Share, pages: Pages) -> tuple[Bytes, Words]:
        """Do the accesses that begin in `pages`.

        Returns the pages, each followed by the first `_REACH` bytes of the next, as they are afterwards:
        uint8[n, 4096 + _REACH]; and the words stored, in the guest's order.
        """
        following = image(np.minimum(pages + 1, share.first + share.count - 1)).view(np.uint8)
        window = np.concatenate([image(pages).view(np.uint8), following[:, :_REACH]], axis=1)
        stored = np.zeros((len(pages), _SSE_WORDS + 2 * _AVX_WORDS), dtype=np.uint64)
        is_stored = np.zeros(stored.shape, dtype=np.bool_)
        for rows, offsets, words, column in self._accesses(share, pages):
            columns = offsets[:, np.newaxis] + np.arange(8 * words)
            changed = self._change(window[rows[:, np.newaxis], columns].view(np.uint64))
            window[rows[:, np.newaxis], columns] = changed.view(np.uint8)
            stored[rows, column : column + words] = changed
            is_stored[rows, column : column + words] = True
        return window, stored[is_stored]

    def _accesses(self, share: Share, pages: Pages) -> list[tuple[Pages, Pages, int, int]]:
        """Return (rows of `pages`, offset in each, words, column of the first word among a page's words stored)."""
        everywhere = np.arange(len(pages))
        spread = 4 * place_in_page(pages, 8)
        has_boundary = (pages + 1 < share.first + share.count) & ~self.options.ends_at_hole(pages)
        wide = (pages % 2 == 1) & bool(self.options.vector)
        sse = np.flatnonzero(has_boundary & ~wide)
        avx = np.flatnonzero(has_boundary & wide)
        boundary_column = _SSE_WORDS + _AVX_WORDS
        accesses = [
            (everywhere, spread + guest.VECTOR_SSE_OFFSET, _SSE_WORDS, 0),
            (sse, np.full(len(sse), guest.VECTOR_SSE_CROSSING), _SSE_WORDS, boundary_column),
        ]
        if self.options.vector:
            accesses += [
                (everywhere, spread + guest.VECTOR_AVX_OFFSET, _AVX_WORDS, _SSE_WORDS),
                (avx, np.full(len(avx), guest.VECTOR_AVX_CROSSING), _AVX_WORDS, boundary_column),
            ]
        return accesses

    def _change(self, words: Words) -> Words:
        """Return what the guest makes of the words of each row."""
        count = words.shape[1]
        if count == _AVX_WORDS and guest.VectorFlag.AVX2 not in self.options.vector:
            return words ^ _ADDEND
        return words + _ADDEND[:count]
