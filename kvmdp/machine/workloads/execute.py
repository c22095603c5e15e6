"""execute: calls functions that lie in paged RAM, inside pages and across their boundaries.

The functions are patches: mov rax, imm64; ret. Nothing is written.
"""

from __future__ import annotations

import struct

import numpy as np

from kvmdp.machine.guest_abi import EXECUTE_CROSSING, EXECUTE_OFFSET
from kvmdp.machine.workloads.arithmetic import Pages, SequenceChecksum, Words, place_in_page, random_words
from kvmdp.machine.workloads.base import PageReader, Share, Workload, WorkloadOptions
from kvmdp.page import PAGE_SIZE


class Execute(Workload):
    """One function inside each page and one across each boundary within a share, in RAM order."""

    name = "execute"
    number = 6
    most_pages = 16384  # two patches a page: beyond this the list of them outweighs what it tests

    def __init__(self, options: WorkloadOptions) -> None:
        super().__init__(options)
        for share in self.shares:
            pages = share.pages
            inside = pages * PAGE_SIZE + EXECUTE_OFFSET + 8 * place_in_page(pages, 8)
            self._add_functions(inside, self._results(2 * pages))
            lower = pages[:-1][~options.ends_at_hole(pages[:-1])]
            self._add_functions(lower * PAGE_SIZE + EXECUTE_CROSSING, self._results(2 * lower + 1))

    def expected_checksums(self, image: PageReader) -> list[int]:
        """Return the checksums over what the functions return; `image` is not read."""
        return [self._expected_checksum(share) for share in self.shares]

    def expected_pages(self, image: PageReader, pages: Pages) -> Words:
        """Return the image, which has the patches."""
        return image(pages)

    def _expected_checksum(self, share: Share) -> int:
        pages = share.pages
        index = np.stack([2 * pages, 2 * pages + 1], axis=1)
        called = np.ones(index.shape, dtype=np.bool_)
        called[:, 1] = ~self.options.ends_at_hole(pages)
        called[-1, 1] = False
        checksum = SequenceChecksum()
        checksum.add(self._results(index[called]))
        return checksum.value()

    def _results(self, index: Pages) -> Words:
        return random_words(self.options.seed, index)

    def _add_functions(self, offsets: Pages, results: Words) -> None:
        code = [struct.pack("<2sQ1s", b"\x48\xb8", result, b"\xc3") for result in results.tolist()]
        self.patches += zip(offsets.tolist(), code, strict=True)
