"""disk: a vCPU's pages go out to the disk and come back into others of them, several requests in flight.

The first `DISK_RING_PAGES` pages of a share hold its ring, and are zeros in the end. The rest is halves: the first is
the source, whose first byte lands `DISK_SHIFT` bytes into the second; a sector's worth at its end stays behind.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from kvmdp.machine.guest_abi import DISK_RING_PAGES, DISK_SECTOR, DISK_SHIFT
from kvmdp.machine.workloads.arithmetic import Pages, Words
from kvmdp.machine.workloads.base import PageReader, Share, Workload, WorkloadOptions, checksum_of
from kvmdp.page import PAGE_SIZE


class Disk(Workload):
    """Writes, reads back, then sums what came back. The odd page of an odd rest is not used."""

    name = "disk"
    number = 10

    def __init__(self, options: WorkloadOptions) -> None:
        super().__init__(options)
        used = [share.pages[: DISK_RING_PAGES + 2 * _half(share)] for share in self.shares]
        self.touched = np.concatenate(used)
        # A share's sectors lie on the disk as its pages in RAM.
        self.disk_bytes = max(share.first + share.count for share in self.shares) * PAGE_SIZE

    def expected_checksums(self, image: PageReader) -> list[int]:
        """Return the checksums over what came back."""
        return [checksum_of(_target(share).pages, partial(_came_back, image, share)) for share in self.shares]

    def expected_pages(self, image: PageReader, pages: Pages) -> Words:
        """Return the image with what came back from the disk, and no ring."""
        content = image(pages).copy()
        for share in self.shares:
            content[Share(share.first, DISK_RING_PAGES).holds(pages)] = 0
            rows = np.flatnonzero(_target(share).holds(pages))
            if len(rows):
                content[rows] = _came_back(image, share, pages[rows])
        return content

    def _make_shares(self, least: int = DISK_RING_PAGES + 2) -> list[Share]:
        return super()._make_shares(least)


def _half(share: Share) -> int:
    return (share.count - DISK_RING_PAGES) // 2


def _target(share: Share) -> Share:
    half = _half(share)
    return Share(share.first + DISK_RING_PAGES + half, half)


def _came_back(image: PageReader, share: Share, pages: Pages) -> Words:
    """Return what `pages`, all in the target, hold in the end."""
    half, target = _half(share), _target(share)
    content = image(pages).copy().view(np.uint8)
    before = image(np.maximum(pages - half - 1, share.first)).view(np.uint8)
    source = image(pages - half).view(np.uint8)
    first, last = pages == target.first, pages == target.first + half - 1
    head = content[:, :DISK_SHIFT].copy()
    tail = content[:, DISK_SHIFT - DISK_SECTOR :].copy()
    content[:, DISK_SHIFT:] = source[:, : PAGE_SIZE - DISK_SHIFT]
    content[:, :DISK_SHIFT] = before[:, PAGE_SIZE - DISK_SHIFT :]
    content[first, :DISK_SHIFT] = head[first]
    content[last, DISK_SHIFT - DISK_SECTOR :] = tail[last]
    return content.view(np.uint64)
