"""Sizes as people write them: a number with K, M, G or T for the powers of 1024.

Units: bytes.
"""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# Eighteen digits are more than any size needs, and keep int() clear of its own limit on digits.
_SIZE = re.compile(r"([0-9]{1,18})([KMGT]?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that `text` names: "4096", "64M", "1g". Raises ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is not a size: give a whole number of bytes, or of K, M, G or T, such as 64M"
        )
    return int(match[1]) * _UNITS[match[2].upper()]


def format_size(size: int) -> str:
    """Return `size` bytes exactly, in the largest unit that leaves a whole number: "64M", "1536M", "4097"."""
    unit = max((name for name in _UNITS if size % _UNITS[name] == 0), key=_UNITS.__getitem__) if size else ""
    return f"{size // _UNITS[unit]}{unit}"
