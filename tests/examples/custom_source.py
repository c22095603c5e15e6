"""A source of one's own: pages that are computed when the guest touches them, word n of RAM being n squared.

A source says how large RAM is, where it has data, and puts pages where it is told to. This one delivers a long run in
pieces: once it calls `landed`, the guest goes on with the pages that are in place, while the rest is still computed.

It is registered for the scheme `squares`, so that `--image squares:SIZE` names it on kvmdp's command line. The command
boots a guest that reads all of its memory, and compares what the guest saw with the source.

Run it on a machine with /dev/kvm:  python tests/examples/custom_source.py [options of kvmdp run]
"""

from __future__ import annotations

import sys

import numpy as np

from kvmdp.cli.main import main
from kvmdp.page import PAGE_SIZE
from kvmdp.size import parse_size
from kvmdp.source.base import check_range
from kvmdp.source.registry import register
from kvmdp.source.request import FetchRequest

PIECE = 16 * PAGE_SIZE  # bytes that land at once


class Squares:
    """Any object with these members is a source (`kvmdp.source.base.PageSource`). It has no state: no lock either."""

    concurrency = 1  # it waits for nothing, so several fetches at a time are no faster

    def __init__(self, size: str) -> None:
        self.name = f"the squares of all words in {size}"
        self.size = parse_size(size)  # ValueError if it is none, which the command reports
        if self.size % PAGE_SIZE:
            raise ValueError(f"squares:{size} is not whole pages: give a multiple of {PAGE_SIZE} bytes")

    def extents(self) -> list[tuple[int, int]]:
        """Return where the data lies: (offset, length). Anything else would read as zeros, and not be asked for."""
        return [(0, self.size)]

    def fetch(self, request: FetchRequest, destination: memoryview) -> None:
        """Write the pages from `request.offset` on into `destination`, a whole number of pages."""
        check_range(self, request.offset, destination.nbytes)
        words = np.frombuffer(destination, dtype=np.uint64)
        for start in range(0, len(words), PIECE // 8):
            piece = words[start : start + PIECE // 8]
            first = request.offset // 8 + start
            numbers = np.arange(first, first + len(piece), dtype=np.uint64)
            np.multiply(numbers, numbers, out=piece)
            request.landed((start + len(piece)) * 8)  # these bytes are final: the pager lets the guest in

    def close(self) -> None:
        """Give back what the source holds: nothing."""


if __name__ == "__main__":
    register("squares", Squares)
    sys.exit(main(["run", "--image", "squares:16M", "--trap", "mmio", "--fault-around", "64", *sys.argv[1:]]))
