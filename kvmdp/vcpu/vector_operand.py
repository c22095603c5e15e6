"""Where an instruction touches memory by what is in its vector registers: gathers and masked moves of AVX and AVX2.

Sources: Intel SDM volume 1, chapter 13 (standard format of the XSAVE area); volume 2, VGATHER and VPGATHER, VMASKMOV
and VPMASKMOV. Units: bytes.
"""

from __future__ import annotations

_XMM, _XSTATE_BV, _YMM_HIGH = 160, 512, 576
_HAS_SSE, _HAS_AVX = 1 << 1, 1 << 2
_HALF = 16


class VectorRegisters:
    """The vector registers in what `Registers.xsave` has read."""

    def __init__(self, state: bytes) -> None:
        self._area = state
        self._components = self._area[_XSTATE_BV]  # what is not in it is in its initial state: zeros

    def ymm(self, number: int) -> bytes:
        """Return the 32 bytes of YMM register `number`, from 0 to 15; XMM is the lower half."""
        halves = ((_XMM, _HAS_SSE), (_YMM_HIGH, _HAS_AVX))
        return b"".join(
            self._area[start + _HALF * number : start + _HALF * (number + 1)]
            if self._components & component
            else bytes(_HALF)
            for start, component in halves
        )


def gathered(index: bytes, mask: bytes, length: int, *, index_size: int, size: int) -> list[int]:
    """Return the indices (signed) of the elements that a gather has still to load.

    `index` and `mask` are registers, `length` is that of the vector; the indices have `index_size` bytes, the elements
    `size`. An element is loaded if the highest bit of its mask is set; the CPU clears that with each element it has.
    """
    count = length // max(index_size, size)
    return [
        int.from_bytes(index[number * index_size : (number + 1) * index_size], "little", signed=True)
        for number in range(count)
        if mask[(number + 1) * size - 1] & 0x80
    ]


def masked(mask: bytes, size: int) -> list[tuple[int, int]]:
    """Return where a masked move touches its operand: (offset, bytes), from the first element to the last, or nothing.

    `mask` is as long as the operand, in elements of `size` bytes.
    """
    lanes = [number for number in range(len(mask) // size) if mask[(number + 1) * size - 1] & 0x80]
    if not lanes:
        return []
    return [(lanes[0] * size, (lanes[-1] - lanes[0] + 1) * size)]
