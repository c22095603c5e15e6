"""What a run puts where others find it by name, and what becomes of that at the run's end, whatever end it is."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from kvmdp.cli.output import say
from kvmdp.interruption import Uninterrupted
from kvmdp.last_acts import last_act
from kvmdp.peers.wire.endpoint import EndpointError, Listener, remove_dead
from kvmdp.size import format_size


class Leftovers:
    """RAM's file (`--backing-file`) and the socket for devices (`--device-socket`) of a run with `options`.

    Made before the run, for it looks at what is there already.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._file = None if options.backing_file is None else Path(options.backing_file)
        self._was_there = self._file is not None and self._file.exists()
        self._socket: str | None = options.device_socket

    def announce(self) -> None:
        """Say that RAM's file is there; one that the run has made and not come to fill goes."""
        if self._file is None:
            return
        try:
            size = self._file.stat().st_size
            if not size and not self._was_there:
                self._file.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            say(
                f"--backing-file {self._file}: {error.strerror}: look whether it is there, and remove it if so"
            )
            return
        if size:
            say(f"{self._file} has the guest's RAM, {format_size(size)}: remove it if that is not wanted")

    def clear_up(self) -> None:
        """See to what a run in another process has left that was killed."""
        self.announce()
        if self._socket is not None:
            with contextlib.suppress(EndpointError):  # it is not there, or not that run's
                remove_dead(self._socket)


@contextlib.contextmanager
def listening(path: str) -> Iterator[Listener]:
    """Listen at `path` for the time of the block; its end, whatever it is, removes the file. Raises EndpointError."""
    with contextlib.ExitStack() as stack:
        with Uninterrupted():
            listener = Listener(path)
            stack.enter_context(last_act(listener.close))
        yield listener
