"""The ACKs that a device owes the machine: each waits until no view is open in the pages that it is about.

Units: RAM pages.
"""

from __future__ import annotations

from kvmdp.peers.wire.records import RecordError


class OwedAcks:
    """At most `credits` at the same time. The owner's mutex guards it.

    `views` are the (first, end) of the views that are open.
    """

    def __init__(self, credits: int) -> None:
        self.views: list[tuple[int, int]] = []
        self._credits = credits
        self._owed: list[tuple[int, int, int]] = []  # (token, first, end)

    def owe(self, token: int, first: int, end: int) -> None:
        """Owe the ACK of `token` until no view is in the pages. Raises RecordError."""
        if len(self._owed) >= self._credits:
            raise RecordError(f"a question beyond its {self._credits} credits")
        self._owed.append((token, first, end))

    def close_view(self, view: tuple[int, int]) -> None:
        """Take a view off the list, if it is there: this one, and no other of the same pages."""
        self.views = [each for each in self.views if each is not view]

    def payable(self) -> list[int]:
        """Take out the tokens whose pages no view is in: nor is an access, then."""
        payable, owed = [], []
        for token, first, end in self._owed:
            if any(start < end and first < stop for start, stop in self.views):
                owed.append((token, first, end))
            else:
                payable.append(token)
        self._owed = owed
        return payable
