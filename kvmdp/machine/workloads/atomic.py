"""atomic: all vCPUs add to the same words of the same pages with a locked instruction."""

from __future__ import annotations

from math import gcd

import numpy as np

from kvmdp.machine.guest_abi import Operation
from kvmdp.machine.workloads.arithmetic import MASK, Pages, Words, place_in_page, random_word
from kvmdp.machine.workloads.base import PageReader, Share, Workload, WorkloadOptions

_OPERATIONS = {operation.name.lower(): operation for operation in Operation}

# Counts in both halves of the word: a lost addition shows as a count, a torn one as halves that differ.
_AMOUNT = 1 << 32 | 1


class Atomic(Workload):
    """Each vCPU goes `iterations` times over all pages, in an order of its own that takes every page once."""

    name = "atomic"
    number = 4

    def __init__(self, options: WorkloadOptions) -> None:
        if not 1 <= options.iterations < 1 << 32:
            raise ValueError(f"{options.iterations} iterations: give 1 to {(1 << 32) - 1}")
        if options.operation not in _OPERATIONS:
            known = ", ".join(_OPERATIONS)
            raise ValueError(f"unknown operation {options.operation!r}: give one of {known}")
        super().__init__(options)
        self.touched = self.shares[0].pages
        pages = self.shares[0].count
        for vcpu, block in enumerate(self.blocks):
            block.iterations = options.iterations
            block.operation = _OPERATIONS[options.operation]
            block.amount = 1 if options.operation == "inc" else _AMOUNT
            block.start = random_word(options.seed, 2 * vcpu) % pages
            block.stride = _coprime(random_word(options.seed, 2 * vcpu + 1) % pages + 1, pages)

    def expected_checksums(self, image: PageReader) -> list[int]:
        """Return the sum of all amounts that each vCPU adds; `image` is not read."""
        additions = self.options.iterations * self.shares[0].count
        return [(additions * block.amount) & MASK for block in self.blocks]

    def expected_pages(self, image: PageReader, pages: Pages) -> Words:
        """Return the image with the additions of all vCPUs."""
        content = image(pages).copy()
        total = sum(block.amount for block in self.blocks) * self.options.iterations
        rows = np.flatnonzero(self.shares[0].holds(pages))
        content[rows, place_in_page(pages[rows], 9)] += np.uint64(total & MASK)
        return content

    def _make_shares(self, least: int = 1) -> list[Share]:
        return [Share(0, self._pages())] * self.options.vcpus


def _coprime(step: int, pages: int) -> int:
    """Return the first number from `step` on, at most `pages`, whose multiples modulo `pages` are all pages."""
    while gcd(step, pages) != 1:
        step = step % pages + 1
    return step
