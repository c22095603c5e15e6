"""What workloads share that make the second half of a vCPU's pages from the first: `copy` and `string`."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import numpy as np

from kvmdp.machine.workloads.arithmetic import Pages, Words
from kvmdp.machine.workloads.base import PageReader, Share, Workload, WorkloadOptions, checksum_of


class Halves(Workload):
    """Writes the second half of each share, and takes the checksum over it. An odd share's last page is not used."""

    def __init__(self, options: WorkloadOptions) -> None:
        super().__init__(options)
        self.touched = np.concatenate([share.pages[: share.count & ~1] for share in self.shares])

    def expected_checksums(self, image: PageReader) -> list[int]:
        """Return the checksums over the second halves afterwards."""
        return [
            checksum_of(second_half(share).pages, partial(self._written, image, share))
            for share in self.shares
        ]

    def expected_pages(self, image: PageReader, pages: Pages) -> Words:
        """Return the image with what the second halves hold afterwards."""
        content = image(pages).copy()
        for share in self.shares:
            rows = np.flatnonzero(second_half(share).holds(pages))
            if len(rows):
                content[rows] = self._written(image, share, pages[rows])
        return content

    @abstractmethod
    def _written(self, image: PageReader, share: Share, pages: Pages) -> Words:
        """Return what `pages`, all in the second half of `share`, hold afterwards."""

    def _make_shares(self, least: int = 2) -> list[Share]:
        return super()._make_shares(least)


def second_half(share: Share) -> Share:
    """Return the pages that are written: as many as those before them."""
    half = share.count // 2
    return Share(share.first + half, half)
