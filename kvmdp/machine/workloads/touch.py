"""touch: one access to a page at a time, in sequential, strided or random order; reads or writes."""

from __future__ import annotations

import numpy as np

from kvmdp.machine.guest_abi import Order
from kvmdp.machine.workloads.arithmetic import (
    Pages,
    SequenceChecksum,
    Words,
    place_in_page,
    random_word,
    random_words,
)
from kvmdp.machine.workloads.base import PageReader, Share, Workload, WorkloadOptions, in_chunks

_ORDERS = ("sequential", "strided", "random")
_OWN_BITS = 5  # 32 words of every page belong to each vCPU: 16 of them share the 512
_CHUNK_TOUCHES = 1 << 18


class Touch(Workload):
    """Reads the word that the page's number picks, or writes one of the vCPU's own words in the page."""

    name = "touch"
    number = 2

    def __init__(self, options: WorkloadOptions) -> None:
        if options.order not in _ORDERS:
            raise ValueError(f"unknown order {options.order!r}: give one of {', '.join(_ORDERS)}")
        # Of a larger number the parameter block would keep the lowest 64 bits, and the guest would do other work.
        if options.touches is not None and not 1 <= options.touches < 1 << 64:
            raise ValueError(f"{options.touches} touches: give 1 to {(1 << 64) - 1}")
        super().__init__(options)
        stride = options.stride if options.order == "strided" else 1
        smallest = min(share.count for share in self.shares)
        if not 1 <= stride <= smallest:
            raise ValueError(f"a stride of {stride} pages: give 1 to {smallest}, the pages of a vCPU")
        for vcpu, block in enumerate(self.blocks):
            block.order = Order.RANDOM if options.order == "random" else Order.STRIDED
            block.stride = stride
            block.touches = options.touches or block.page_count
            block.write = options.write
            block.seed = random_word(options.seed, vcpu)  # a sequence of its own for each vCPU
        self._touched_by = [self._distinct_pages(vcpu) for vcpu in range(options.vcpus)]
        self.touched = np.unique(np.concatenate(self._touched_by))

    def expected_checksums(self, image: PageReader) -> list[int]:
        """Return the checksums over the words read or written, in the order of the accesses."""
        return [self._expected_checksum(vcpu, image) for vcpu in range(self.options.vcpus)]

    def expected_pages(self, image: PageReader, pages: Pages) -> Words:
        """Return the image with the vCPUs' words in the pages that they wrote."""
        content = image(pages)
        if not self.options.write:
            return content
        content = content.copy()
        for vcpu, touched in enumerate(self._touched_by):
            rows = np.flatnonzero(np.isin(pages, touched))
            content[rows, self._words(vcpu, pages[rows])] = self._values(vcpu, pages[rows])
        return content

    def _make_shares(self, least: int = 1) -> list[Share]:
        if self.options.overlap:
            return [Share(0, self._pages())] * self.options.vcpus
        return super()._make_shares(least)

    def _expected_checksum(self, vcpu: int, image: PageReader) -> int:
        checksum = SequenceChecksum()
        for start in range(0, self.blocks[vcpu].touches, _CHUNK_TOUCHES):
            order = self._order(vcpu, start, min(start + _CHUNK_TOUCHES, self.blocks[vcpu].touches))
            if self.options.write:
                checksum.add(self._values(vcpu, order))
                continue
            for pages in in_chunks(order):
                rows = np.arange(len(pages))
                checksum.add(image(pages)[rows, self._words(vcpu, pages)])
        return checksum.value()

    def _order(self, vcpu: int, start: int, stop: int) -> Pages:
        """Return the pages of accesses `start` to `stop` - 1 of one vCPU."""
        block = self.blocks[vcpu]
        accesses = np.arange(start, stop)
        if block.order == Order.RANDOM:
            high = random_words(block.seed, accesses) >> np.uint64(32)
            chosen: Pages = ((high * np.uint64(block.page_count)) >> np.uint64(32)).astype(np.int64)
            return chosen + int(block.first_page)
        position = accesses % block.page_count
        # The first `longer` laps have one page more than the others.
        short, longer = divmod(int(block.page_count), int(block.stride))
        split = longer * (short + 1)
        rest = position - split
        lap = np.where(rest < 0, position // (short + 1), longer + rest // short)
        step = np.where(rest < 0, position % (short + 1), rest % short)
        pages: Pages = lap + step * int(block.stride) + int(block.first_page)
        return pages

    def _distinct_pages(self, vcpu: int) -> Pages:
        share, block = self.shares[vcpu], self.blocks[vcpu]
        if block.order == Order.STRIDED and block.touches >= share.count:
            return share.pages
        seen = np.zeros(share.count, dtype=np.bool_)
        for start in range(0, block.touches, _CHUNK_TOUCHES):
            stop = min(start + _CHUNK_TOUCHES, block.touches)
            seen[self._order(vcpu, start, stop) - share.first] = True
        return np.flatnonzero(seen) + share.first

    def _words(self, vcpu: int, pages: Pages) -> Pages:
        """Return the number of the word that `vcpu` accesses in each page."""
        if self.options.write:
            return place_in_page(pages, _OWN_BITS) + (vcpu << _OWN_BITS)
        return place_in_page(pages, 9)

    def _values(self, vcpu: int, pages: Pages) -> Words:
        return random_words(self.blocks[vcpu].seed, pages)
