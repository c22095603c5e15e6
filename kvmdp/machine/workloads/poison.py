"""poison: every word of every page is read once, as by checksum, but pages that give a machine check are left out."""

from __future__ import annotations

import numpy as np

from kvmdp.machine.workloads.arithmetic import Pages, Words, random_words
from kvmdp.machine.workloads.base import PageReader, Workload, WorkloadOptions, checksum_of


class Poison(Workload):
    """Reads its pages in RAM order and survives `options.poison` bad ones among them."""

    name = "poison"
    number = 11

    def __init__(self, options: WorkloadOptions) -> None:
        super().__init__(options)
        self.poisoned = choose_pages(options, self.touched)

    def expected_checksums(self, image: PageReader) -> list[int]:
        """Return the checksum of each vCPU's sequence of pages that are not poisoned."""
        return [
            checksum_of(np.setdiff1d(share.pages, self.poisoned, assume_unique=True), image)
            for share in self.shares
        ]

    def expected_pages(self, image: PageReader, pages: Pages) -> Words:
        """Return the image."""
        return image(pages)


def choose_pages(options: WorkloadOptions, pages: Pages) -> Pages:
    """Choose `options.poison` of the distinct `pages`, ascending; the same for the same seed."""
    if not options.poison:
        return pages[:0]
    order = np.argsort(random_words(options.seed, pages), kind="stable")
    return np.sort(pages[order[: options.poison]])
