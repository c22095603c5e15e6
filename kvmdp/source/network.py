"""A source at the far end of a simulated network: each fetch takes a latency, and all share a bandwidth.

Units: seconds, bytes a second.
"""

from __future__ import annotations

import ctypes
import re
import threading
import time

from kvmdp.abi.libc import libc
from kvmdp.source.base import PageSource, SourceError
from kvmdp.source.request import FetchRequest
from kvmdp.source.wrapper import SourceWrapper

_PR_SET_TIMERSLACK = 29  # linux/prctl.h
_PIECE = 64 << 10  # bytes of a long run that are told of as they arrive
_CONCURRENCY = 64  # fetches in flight: 256 KiB, what 1 Gbit at 2 ms holds
_NOTICED_SECONDS = 0.05  # a shorter sleep ends before its thread notices that it was called off
_SHORTEST_SLACK = 1  # nanoseconds; the default of 50,000 would add that to each delay

_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_BITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class NetworkSource(SourceWrapper):
    """Delivers what `inner` delivers, as late as a network would.

    A fetch sends a request, which takes `latency` seconds there and back, and then occupies the link for its bytes
    at `bandwidth` bytes a second (0: no limit), after those asked for before it. Fetches of several threads overlap
    but for that. The delay is a sleep without the GIL.

    `in_flight` is the mean number of fetches under way while there was at least one.
    """

    def __init__(self, inner: PageSource, latency: float, bandwidth: float = 0.0) -> None:
        if latency < 0 or bandwidth < 0:
            raise ValueError("latency and bandwidth of a network cannot be negative")
        super().__init__(inner)
        self._latency = latency
        self._seconds_a_byte = 1 / bandwidth if bandwidth else 0.0
        self._slack = threading.local()
        self._mutex = threading.Lock()  # guards all below
        self._link_free = 0.0
        self._flying = 0
        self._changed = 0.0  # when _flying last changed
        self._busy = 0.0  # seconds with a fetch under way
        self._area = 0.0  # fetches under way, summed over these seconds

    @property
    def concurrency(self) -> int:
        """As many fetches as hide the latency of a link, or more if the inner source gains by them."""
        return max(_CONCURRENCY, self.inner.concurrency)

    def fetch(self, request: FetchRequest, destination: memoryview) -> None:
        """Fetch from the inner source, then wait until the network would have delivered; a long run piece by piece.

        Raises SourceError if the fetch is called off meanwhile.
        """
        self._sharpen_sleep()
        now = time.monotonic()
        with self._mutex:
            arrival = max(now + self._latency, self._link_free) + len(destination) * self._seconds_a_byte
            self._link_free = arrival
            self._count(now, +1)
        try:
            self.inner.fetch(request.part(request.offset), destination)
            if request.on_landed is not None:
                for done in range(_PIECE, len(destination), _PIECE):
                    if request.cancel.is_set:  # the waits for pieces may be too short to notice it
                        raise self._called_off(request, destination)
                    self._await(
                        arrival - (len(destination) - done) * self._seconds_a_byte, request, destination
                    )
                    request.landed(done)
            self._await(arrival, request, destination)
        finally:
            with self._mutex:
                self._count(time.monotonic(), -1)

    def _await(self, arrival: float, request: FetchRequest, destination: memoryview) -> None:
        """Sleep until `arrival` (time.monotonic). Raises SourceError if the fetch is called off."""
        delay = arrival - time.monotonic()
        if delay <= 0:
            return
        if delay < _NOTICED_SECONDS:
            time.sleep(delay)
        elif not request.cancel.sleep(delay):
            raise self._called_off(request, destination)

    def _called_off(self, request: FetchRequest, destination: memoryview) -> SourceError:
        return SourceError(self.name, request.offset, len(destination), "the fetch was called off")

    def _count(self, now: float, change: int) -> None:
        if self._flying:
            self._busy += now - self._changed
            self._area += self._flying * (now - self._changed)
        self._flying += change
        self._changed = now

    @property
    def in_flight(self) -> float:
        """Mean number of fetches under way, over the time in which there were any."""
        with self._mutex:
            return self._area / self._busy if self._busy else 0.0

    def _sharpen_sleep(self) -> None:
        """Let the calling thread's sleeps end when they should, once a thread."""
        if not getattr(self._slack, "set", False):
            libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SHORTEST_SLACK), 0, 0, 0)
            self._slack.set = True


def parse_latency(text: str) -> float:
    """Return the seconds that `text` names: "30us", "0.5ms", "0". Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ns|us|ms|s)", text.strip())
    if match:
        return float(match[1]) * _SECONDS[match[2]]
    if text.strip() == "0":
        return 0.0
    raise ValueError(f"{text!r} is not a latency: give a number with ns, us, ms or s, such as 30us")


def parse_bandwidth(text: str) -> float:
    """Return the bytes a second that `text` names in bits: "10Gbit", "0" for no limit. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)bit", text.strip(), re.IGNORECASE)
    if match:
        return float(match[1]) * _BITS[match[2].upper()] / 8
    if text.strip() == "0":
        return 0.0
    raise ValueError(
        f"{text!r} is not a bandwidth: give a number with Kbit, Mbit, Gbit or Tbit, such as 10Gbit"
    )
