"""clock: kvmclock and steal time, which KVM writes to guest memory by itself.

Each vCPU has kvmclock in its first page and steal time in its second. What KVM writes there is no business of this
module: `kvmdp.machine.pv_msrs` knows where it does. The structures are zero before, as an operating system leaves them.
"""

from __future__ import annotations

import numpy as np

from kvmdp.abi.kvm_para import STEAL_TIME_BYTES, TIME_INFO_BYTES
from kvmdp.machine import guest_abi as guest
from kvmdp.machine.workloads.arithmetic import Pages, Words
from kvmdp.machine.workloads.base import PageReader, Share, Workload, WorkloadOptions
from kvmdp.page import PAGE_SIZE


class Clock(Workload):
    """Switches on what `options.pv` offers, and reads it; the other pages are not used."""

    name = "clock"
    number = 9

    def __init__(self, options: WorkloadOptions) -> None:
        super().__init__(options)
        pages: list[int] = []
        for share, block in zip(self.shares, self.blocks, strict=True):
            block.pv = options.pv
            if options.pv & guest.PvFlag.CLOCK:
                pages.append(share.first)
                self._clear(share.first, guest.CLOCK_OFFSET, TIME_INFO_BYTES)
            if options.pv & guest.PvFlag.STEAL_TIME:
                pages.append(share.first + 1)
                self._clear(share.first + 1, guest.CLOCK_STEAL_OFFSET, STEAL_TIME_BYTES)
        self.touched = np.array(pages, dtype=np.int64)

    def _clear(self, page: int, offset: int, length: int) -> None:
        self.patches.append((page * PAGE_SIZE + offset, bytes(length)))

    def expected_checksums(self, image: PageReader) -> list[int]:
        """Return the bits of all that must hold; `image` is not read."""
        pv, bits = self.options.pv, 0
        if pv & guest.PvFlag.CLOCK:
            bits |= guest.CLOCK_MOVES | guest.CLOCK_SET_AGAIN
        if pv & guest.PvFlag.STEAL_TIME:
            bits |= guest.CLOCK_STEAL
        return [bits] * len(self.shares)

    def expected_pages(self, image: PageReader, pages: Pages) -> Words:
        """Return the image: the guest writes nothing."""
        return image(pages)

    def _make_shares(self, least: int = 2) -> list[Share]:
        return super()._make_shares(least)
