"""fill: every word of every page is written with a value made of the seed and the word's position."""

from __future__ import annotations

import numpy as np

from kvmdp.machine.workloads.arithmetic import GAMMA, Pages, Words, random_words
from kvmdp.machine.workloads.base import PageReader, Workload, checksum_of
from kvmdp.source.base import WORDS_PER_PAGE

_STEPS = np.arange(WORDS_PER_PAGE, dtype=np.uint64) * np.uint64(GAMMA)


class Fill(Workload):
    """Writes its pages in RAM order; what they then hold does not depend on the number of vCPUs."""

    name = "fill"
    number = 3

    def expected_checksums(self, image: PageReader) -> list[int]:
        """Return the checksums over the words written; `image` is not read."""
        return [checksum_of(share.pages, self._pattern) for share in self.shares]

    def expected_pages(self, image: PageReader, pages: Pages) -> Words:
        """Return the pattern, and the image beyond the pages used."""
        content = image(pages).copy()
        for share in self.shares:
            rows = np.flatnonzero(share.holds(pages))
            content[rows] = self._pattern(pages[rows])
        return content

    def _pattern(self, pages: Pages) -> Words:
        return random_words(self.options.seed, pages)[:, np.newaxis] + _STEPS
