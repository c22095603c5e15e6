"""Memory content made from a seed: needs no file, and tells where each page belongs.

Word i of page p is template[i] + key(p) modulo 2**64. Keys of different pages differ, so a page in the wrong
place differs from the right one in every word. Template and keys are outputs of SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).

Units: bytes for offsets and sizes; words are 64-bit little-endian.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvmdp.page import PAGE_SIZE
from kvmdp.source.base import WORDS_PER_PAGE, check_range
from kvmdp.source.request import FetchRequest

_MASK = (1 << 64) - 1
# The increment and the two multipliers of SplitMix64.
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class SyntheticSource:
    """`size` bytes of RAM that depend on nothing but `seed`; a `PageSource` without holes that never fails.

    Attributes: `name`, `size`. Raises ValueError unless `size` is a positive multiple of 4096 and `seed` is
    from 0 to 2**64 - 1.
    """

    concurrency = 1  # it waits for nothing

    def __init__(self, size: int, seed: int = 0) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise ValueError(f"a synthetic image of {size} bytes: give a positive multiple of {PAGE_SIZE}")
        if not 0 <= seed <= _MASK:
            raise ValueError(f"seed {seed} is out of range: give one from 0 to {_MASK}")
        self.name = f"the synthetic image with seed {seed}"
        self.size = size
        # One sequence: the template is its first outputs, and the keys of pages 0, 1, ... follow.
        self._template = _outputs(seed, np.arange(WORDS_PER_PAGE, dtype=np.uint64))
        self._key_state = seed + WORDS_PER_PAGE * _GAMMA

    def fetch(self, request: FetchRequest, destination: memoryview) -> None:
        """Compute the pages into `destination`."""
        offset = request.offset
        check_range(self, offset, destination.nbytes)
        words = np.frombuffer(destination, dtype=np.uint64)
        page = offset // PAGE_SIZE
        if len(words) == WORDS_PER_PAGE:
            # The usual fault. Python integers make one key in less time than a numpy array of one element.
            key = _mix((self._key_state + (page + 1) * _GAMMA) & _MASK)
            np.add(self._template, np.uint64(key), out=words)
            return
        rows = words.reshape(-1, WORDS_PER_PAGE)
        numbers = np.arange(page, page + len(rows), dtype=np.uint64)
        np.add(self._template, _outputs(self._key_state, numbers)[:, np.newaxis], out=rows)

    def pages(self, numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
        """Return the content of the RAM pages `numbers`, one row each: uint64[n, 512]."""
        return self._template + _outputs(self._key_state, numbers.astype(np.uint64))[:, np.newaxis]

    def extents(self) -> list[tuple[int, int]]:
        """Return the one extent there is."""
        return [(0, self.size)]

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""


def _outputs(state: int, index: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the outputs of SplitMix64 at each `index` (0 is the first) from `state` on."""
    value = (index + np.uint64(1)) * np.uint64(_GAMMA) + np.uint64(state & _MASK)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX_1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX_2)
    return value ^ (value >> np.uint64(31))


def _mix(value: int) -> int:
    """Return what `_outputs` computes, for one state that has had its increment."""
    value = (value ^ (value >> 30)) * _MIX_1 & _MASK
    value = (value ^ (value >> 27)) * _MIX_2 & _MASK
    return value ^ (value >> 31)
