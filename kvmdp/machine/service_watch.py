"""How long a device has made nothing of its work, while it was its turn.

Units: seconds.
"""

from __future__ import annotations

from kvmdp.own_clock import OwnClock


class ServiceWatch:
    """Tells when a device has had work and done none of it for `timeout` seconds, by the time between looks.

    Time counts only while it is the device's turn, and while this process runs. It is not its turn while it waits for
    something that it had been waiting for at the look before. A device that waits each time for something else is
    answered, and makes nothing of the answers.
    """

    def __init__(self, timeout: float, clock: OwnClock) -> None:
        self._timeout = timeout
        self._clock = clock
        self._last = clock.now()
        self._idle = 0.0
        self._progress: object = None
        self._waits_for: object = None

    def look(self, has_work: bool, waits_for: object, progress: object) -> bool:
        """Return whether its time is over.

        `has_work` is whether there is anything to do; `waits_for`, what the device has asked for and not got, None if
        it has all; `progress` is another value whenever something was done.
        """
        last, self._last = self._last, self._clock.now()
        its_turn = waits_for is None or waits_for != self._waits_for
        self._waits_for = waits_for
        if not has_work or progress != self._progress:
            self._progress = progress
            self._idle = 0.0
        elif its_turn:
            self._idle += self._last - last
        return self._idle >= self._timeout
