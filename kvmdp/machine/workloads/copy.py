"""copy: rep movsb from the first half of a vCPU's pages to the second, in chunks that cross pages.

The source's first byte lands `COPY_SHIFT` bytes into the second half; that many bytes at its end stay behind.
"""

from __future__ import annotations

import numpy as np

from kvmdp.machine.guest_abi import COPY_SHIFT
from kvmdp.machine.workloads.arithmetic import Pages, SequenceChecksum, Words
from kvmdp.machine.workloads.base import PageReader, Share, Workload, WorkloadOptions, in_chunks
from kvmdp.page import PAGE_SIZE


class Copy(Workload):
    """Copies, then reads the copy back for the checksum. The odd page of an odd share is not used."""

    name = "copy"
    number = 5

    def __init__(self, options: WorkloadOptions) -> None:
        super().__init__(options)
        self.touched = np.concatenate([share.pages[: share.count & ~1] for share in self.shares])

    def expected_checksums(self, image: PageReader) -> list[int]:
        """Return the checksums over the second halves after the copy."""
        result = []
        for share in self.shares:
            checksum = SequenceChecksum()
            half = share.count // 2
            for pages in in_chunks(share.pages[half : 2 * half]):
                checksum.add(_copied(image, share, pages))
            result.append(checksum.value())
        return result

    def expected_pages(self, image: PageReader, pages: Pages) -> Words:
        """Return the image with the copies."""
        content = image(pages).copy()
        for share in self.shares:
            half = share.count // 2
            rows = np.flatnonzero(Share(share.first + half, half).holds(pages))
            if len(rows):
                content[rows] = _copied(image, share, pages[rows])
        return content

    def _make_shares(self, least: int = 2) -> list[Share]:
        return super()._make_shares(least)


def _copied(image: PageReader, share: Share, pages: Pages) -> Words:
    """Return what `pages`, all in the second half of `share`, hold after the copy."""
    half = share.count // 2
    source = image(pages - half).view(np.uint8)
    # The page before: of the source, but for the first page, whose first bytes the copy leaves alone.
    before = image(np.maximum(pages - half - 1, share.first)).view(np.uint8)
    content = np.empty_like(source)
    content[:, COPY_SHIFT:] = source[:, : PAGE_SIZE - COPY_SHIFT]
    content[:, :COPY_SHIFT] = before[:, PAGE_SIZE - COPY_SHIFT :]
    for row in np.flatnonzero(pages == share.first + half):
        content[row, :COPY_SHIFT] = image(pages[row : row + 1]).view(np.uint8)[0, :COPY_SHIFT]
    return content.view(np.uint64)
