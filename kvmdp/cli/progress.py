"""Progress of a run on stderr: a map of RAM that fills in on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from kvmdp.cli.output import say
from kvmdp.cli.streams import terminal_columns
from kvmdp.machine.machine import Machine
from kvmdp.size import format_size

_SHADES = " ░▒▓█"
_MAP_ROWS = 8
_MAP_WIDTH = 64
_LINE_SECONDS = 1.0
_FRAME_SECONDS = 0.2


class Progress:
    """Shows how far a machine has got; call it about ten times a second."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._terminal = self._stream.isatty()
        self._last = time.monotonic()
        self._last_claims = 0
        self._drawn = 0  # lines of the picture now on the terminal

    def __call__(self, machine: Machine) -> None:
        """Show the machine's state if it is time to."""
        now = time.monotonic()
        elapsed = now - self._last
        if elapsed < (_FRAME_SECONDS if self._terminal else _LINE_SECONDS):
            return
        claims = machine.pager.counters.claims
        rate = (claims - self._last_claims) / elapsed
        self._last, self._last_claims = now, claims
        pages, present = machine.layout.pages, machine.pager.bitmap.count()
        line = f"{present} of {pages} pages present ({present / pages:.0%}), {rate:.0f} faults/s"
        if self._terminal:
            self._draw([*self._map(machine), line])
        else:
            say(line)

    def close(self) -> None:
        """Take the picture off the terminal."""
        if self._drawn:
            self._draw([])
            self._drawn = 0

    def _map(self, machine: Machine) -> list[str]:
        """Return lines of cells, each a stretch of RAM, the fuller the darker."""
        pages = machine.layout.pages
        width = min(_MAP_WIDTH, max(16, terminal_columns() - 12))
        rows = min(_MAP_ROWS, -(-pages // width))
        cell = -(-pages // (width * rows))
        lines = []
        for start in range(0, pages, width * cell):
            shades = ""
            for first in range(start, min(start + width * cell, pages), cell):
                count = min(cell, pages - first)
                present = machine.pager.bitmap.count_range(first, count)
                shades += _SHADES[-(-present * (len(_SHADES) - 1) // count)]
            lines.append(f"{format_size(start * 4096):>8} │{shades:<{width}}│")
        return lines

    def _draw(self, lines: list[str]) -> None:
        # A line that wraps would count for two on the way back up.
        lines = [line[: terminal_columns()] for line in lines]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        self._stream.write(f"{up}\x1b[J" + "".join(f"{line}\n" for line in lines))
        self._stream.flush()
        self._drawn = len(lines)
