"""copy: rep movsb from the first half of a vCPU's pages to the second, in chunks that cross pages.

The source's first byte lands `COPY_SHIFT` bytes into the second half; that many bytes at its end stay behind.
"""

from __future__ import annotations

import numpy as np

from kvmdp.machine.guest_abi import COPY_SHIFT
from kvmdp.machine.workloads.arithmetic import Pages, Words
from kvmdp.machine.workloads.base import PageReader, Share
from kvmdp.machine.workloads.halves import Halves, second_half
from kvmdp.page import PAGE_SIZE


class Copy(Halves):
    """Copies, then reads the copy back for the checksum."""

    name = "copy"
    number = 5

    def _written(self, image: PageReader, share: Share, pages: Pages) -> Words:
        target = second_half(share)
        source = image(pages - target.count).view(np.uint8)
        # The page before: of the source, but for the first page, whose first bytes the copy leaves alone.
        before = image(np.maximum(pages - target.count - 1, share.first)).view(np.uint8)
        content = np.empty_like(source)
        content[:, COPY_SHIFT:] = source[:, : PAGE_SIZE - COPY_SHIFT]
        content[:, :COPY_SHIFT] = before[:, PAGE_SIZE - COPY_SHIFT :]
        for row in np.flatnonzero(pages == target.first):
            content[row, :COPY_SHIFT] = image(pages[row : row + 1]).view(np.uint8)[0, :COPY_SHIFT]
        return content.view(np.uint64)
