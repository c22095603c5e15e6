"""What may be chosen of userfaultfd: readers, descriptors, and how RAM is registered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

UffdMode = Literal["missing", "minor"]
_MODES: dict[str, UffdMode] = {"missing": "missing", "minor": "minor"}


@dataclass(frozen=True, slots=True)
class UffdOptions:
    """How many descriptors share RAM out evenly (`shards`), and how many reader threads each has.

    `mode`: "missing" registers for missing faults alone and fills with UFFDIO_COPY, "minor" registers for both kinds
    and maps with UFFDIO_CONTINUE; None takes minor where memory is shared. Private memory has no minor faults.
    """

    readers: int = 1
    shards: int = 1
    mode: UffdMode | None = None

    @property
    def has_readers(self) -> bool:
        """Whether more than the one thread that there always is is asked for."""
        return self.readers > 1 or self.shards > 1


def parse_mode(text: str) -> UffdMode:
    """Return the mode that `text` names, in either case. Raises ValueError."""
    try:
        return _MODES[text.lower()]
    except KeyError:
        raise ValueError(f"there is no userfaultfd mode {text!r}: choose from {', '.join(_MODES)}") from None
