"""checksum: every word of every page is read once; nothing is written.

The checksums of the vCPUs add up to the sum over words i of (2 * (N - i) - 1) * word[i] modulo 2**64, N words
in all.
"""

from __future__ import annotations

from kvmdp.machine.workloads.arithmetic import Pages, Words
from kvmdp.machine.workloads.base import PageReader, Workload, WorkloadOptions, checksum_of
from kvmdp.source.base import WORDS_PER_PAGE


class Checksum(Workload):
    """Reads its pages in RAM order."""

    name = "checksum"
    number = 1

    def __init__(self, options: WorkloadOptions) -> None:
        super().__init__(options)
        end = self._pages()
        for share, block in zip(self.shares, self.blocks, strict=True):
            block.tail_words = (end - share.first - share.count) * WORDS_PER_PAGE

    def expected_checksums(self, image: PageReader) -> list[int]:
        """Return each vCPU's part of the checksum of all pages."""
        return [
            checksum_of(share.pages, image, block.tail_words)
            for share, block in zip(self.shares, self.blocks, strict=True)
        ]

    def expected_pages(self, image: PageReader, pages: Pages) -> Words:
        """Return the image."""
        return image(pages)
