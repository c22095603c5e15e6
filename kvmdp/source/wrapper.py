"""A source that wraps another, `inner`, and is it in everything but what a derived class does otherwise."""

from __future__ import annotations

from kvmdp.source.base import PageSource
from kvmdp.source.request import FetchRequest


class SourceWrapper:
    """A `PageSource` that is `inner` under its name; closing it closes that.

    `kvmdp.source.base.ram_source` finds what is wrapped in `inner`.
    """

    def __init__(self, inner: PageSource) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        """The inner source's name."""
        return self.inner.name

    @property
    def size(self) -> int:
        """The inner source's size."""
        return self.inner.size

    def extents(self) -> list[tuple[int, int]]:
        """Return the inner source's extents: which pages are holes is known in advance."""
        return self.inner.extents()

    @property
    def concurrency(self) -> int:
        """The inner source's."""
        return self.inner.concurrency

    def fetch(self, request: FetchRequest, destination: memoryview) -> None:
        """Fetch from the inner source. Raises what that does."""
        self.inner.fetch(request, destination)

    def close(self) -> None:
        """Close the inner source."""
        self.inner.close()
