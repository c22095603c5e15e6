"""Where guest-physical addresses lie in RAM, by the table of regions alone: (gpa, size, offset) each.

Units: bytes; offsets are into RAM, in the order of the RAM file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class RamMap:
    """RAM's `regions`, each (gpa, size, offset in the RAM file)."""

    def __init__(self, regions: Iterable[tuple[int, int, int]]) -> None:
        self._regions = tuple(regions)

    def pieces(self, gpa: int, length: int) -> Iterator[tuple[int, int]]:
        """Cut a range at the borders of regions: (offset, bytes) each. Raises ValueError outside RAM."""
        if length < 0:
            raise ValueError(f"{length} bytes at gpa {gpa:#x}")
        while length:
            for base, size, offset in self._regions:
                if base <= gpa < base + size:
                    count = min(length, base + size - gpa)
                    yield offset + gpa - base, count
                    gpa, length = gpa + count, length - count
                    break
            else:
                raise ValueError(f"gpa {gpa:#x} is not guest RAM")

    def offset_of(self, gpa: int, length: int) -> int:
        """Return where a range begins. Raises ValueError unless all of it is RAM, one byte or more, contiguous."""
        pieces = list(self.pieces(gpa, length))
        if len(pieces) != 1:
            raise ValueError(f"{length} bytes at gpa {gpa:#x} are not contiguous in RAM")
        return pieces[0][0]

    def batches(self, segments: Sequence[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
        """Cut segments, (gpa, bytes) each, into lists of pieces of at most `most` bytes together.

        All segments are checked first; raises ValueError outside RAM.
        """
        pieces = [piece for gpa, length in segments for piece in self.pieces(gpa, length)]
        batch: list[tuple[int, int]] = []
        room = most
        for offset, length in pieces:
            while length:
                count = min(length, room)
                batch.append((offset, count))
                offset, length, room = offset + count, length - count, room - count
                if not room:
                    yield batch
                    batch, room = [], most
        if batch:
            yield batch

    def gpa_at(self, offset: int) -> int:
        """Return the guest-physical address of the byte at `offset`."""
        return next(
            gpa + offset - start for gpa, size, start in self._regions if start <= offset < start + size
        )
