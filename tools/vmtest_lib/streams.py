"""What comes out of the emulator: streams of the command, which end with a mark, and the kernel's log."""

import re
from collections.abc import Iterator
from typing import BinaryIO

_LOG_LINES = 40
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1bc|\r")
_WARNING = re.compile(r"\b(WARNING|BUG): .*")
_PANIC = re.compile(r"Kernel panic - .*")


class Stream:
    """The bytes of one port up to the mark `end`: into `output` as they come, or else into `content`."""

    def __init__(self, end: bytes, output: BinaryIO | None = None) -> None:
        self._end = end
        self._output = output
        self._held = b""
        self.content = b""
        self.closed = False

    def feed(self, data: bytes) -> None:
        """Take `data` from the port. What may be the beginning of the mark is held back for the next time."""
        if self.closed:
            return
        data = self._held + data
        passed, mark, _ = data.partition(self._end)
        self.closed = bool(mark)
        if not mark:
            held = next(n for n in range(len(self._end) - 1, -1, -1) if data.endswith(self._end[:n]))
            passed, self._held = data[: len(data) - held], data[len(data) - held :]
        if self._output is None:
            self.content += passed
        elif passed:
            self._output.write(passed)
            self._output.flush()


class KernelLog:
    """The emulated kernel's messages; shown on `output` as they come where that is given."""

    def __init__(self, output: BinaryIO | None = None) -> None:
        self._output = output
        self._content = b""
        self._shown_from = 0

    def feed(self, data: bytes) -> None:
        """Take `data` from the serial console."""
        self._content += data
        if self._output is not None:
            self._output.write(data)
            self._output.flush()

    def forget_boot(self) -> None:
        """Leave what has come so far out of `tail`: the boot went well and explains nothing any more."""
        self._shown_from = len(self._content)

    def tail(self) -> str:
        """The last lines, indented, each after a line feed; empty where there are none."""
        lines = self._lines(self._content[self._shown_from :])
        return "".join(f"\n    {line}" for line in lines[-_LOG_LINES:])

    def panic(self) -> str | None:
        """What the kernel said when it panicked, None where it did not."""
        return next(self._find(_PANIC), None)

    def warnings(self) -> tuple[str, ...]:
        """The kernel's warnings and bugs, one line each: they do not end a run, and must not go unseen."""
        return tuple(self._find(_WARNING))

    def _find(self, pattern: re.Pattern[str]) -> Iterator[str]:
        for line in self._lines(self._content):
            if match := pattern.search(line):
                yield match.group()

    @staticmethod
    def _lines(content: bytes) -> list[str]:
        return _ESCAPES.sub("", content.decode(errors="replace")).splitlines()
