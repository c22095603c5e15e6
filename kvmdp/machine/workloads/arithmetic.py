"""The arithmetic that guest and host share: SplitMix64, places within a page, the checksum of a sequence of words.

The counterpart of guest/workload.inc. All of it is modulo 2**64 on numpy arrays, which wrap around silently.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Pages = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

MASK = (1 << 64) - 1
# The increment and the two multipliers of SplitMix64.
GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def random_words(seed: int, index: Pages | Words) -> Words:
    """Return the outputs number `index` (0 is the first) of SplitMix64 started with `seed`."""
    value = (index.astype(np.uint64) + np.uint64(1)) * np.uint64(GAMMA) + np.uint64(seed & MASK)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX_1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX_2)
    return value ^ (value >> np.uint64(31))


def random_word(seed: int, index: int) -> int:
    """Return output number `index` of SplitMix64 started with `seed`."""
    return int(random_words(seed, np.array([index]))[0])


def place_in_page(pages: Pages, bits: int) -> Pages:
    """Return a number of `bits` bits for each RAM page number, the same at every access to that page."""
    spread = pages.astype(np.uint64) * np.uint64(GAMMA)
    return (spread >> np.uint64(64 - bits)).astype(np.int64)


class SequenceChecksum:
    """The checksum of a sequence of words: the k-th from the end (1 is the last) counts 2k - 1 times.

    Kept as the guest keeps it: for each word, a += word and b += a; the checksum is 2b - a.
    """

    def __init__(self) -> None:
        self._a = 0
        self._b = 0

    def add(self, words: Words) -> None:
        """Append `words`, of any shape, in memory order."""
        words = words.reshape(-1)
        count = len(words)
        weights = np.arange(count, 0, -1, dtype=np.uint64)
        self._b = (self._b + count * self._a + int(np.dot(words, weights))) & MASK
        self._a = (self._a + int(words.sum(dtype=np.uint64))) & MASK

    def value(self, tail_words: int = 0) -> int:
        """Return the share of these words in the checksum of a sequence that has `tail_words` more."""
        return (2 * (self._b + tail_words * self._a) - self._a) & MASK


def combined_checksum(checksums: Iterable[int]) -> int:
    """Return one number for the checksums of all vCPUs: their sum modulo 2**64."""
    return sum(checksums) & MASK
